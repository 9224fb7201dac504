raise SystemExit("error: scripts/benchmark_generation.py is now benchmarks/generation.py.")
