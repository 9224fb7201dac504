raise SystemExit("error: evaluate/probe.py is now studies/probe.py.")
