raise SystemExit("error: generate/bitfit.py is now generate/aligner.py, which answers for any method.")
