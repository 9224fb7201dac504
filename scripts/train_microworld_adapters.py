raise SystemExit("error: scripts/train_microworld_adapters.py is now studies/train_microworld_adapters.py.")
