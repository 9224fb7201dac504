raise SystemExit("error: pretrain/train.py is now microworld/pretrain.py.")
