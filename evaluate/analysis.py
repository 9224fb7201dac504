raise SystemExit("error: evaluate/analysis.py is now studies/analysis.py.")
