raise SystemExit("error: generate/prompt_tuning.py is now generate/aligner.py, which answers for any method.")
