raise SystemExit("error: scripts/benchmark_training.py is now benchmarks/training.py.")
