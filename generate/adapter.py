raise SystemExit("error: generate/adapter.py is now generate/aligner.py, which answers for any method.")
