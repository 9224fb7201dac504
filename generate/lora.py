raise SystemExit("error: generate/lora.py is now generate/aligner.py, which answers for any method.")
