raise SystemExit("error: scripts/train_microworld_values.py is now studies/train_microworld_values.py.")
