raise SystemExit("error: scripts/reproduce_paper.py is now studies/reproduce_paper.py.")
