raise SystemExit("error: scripts/benchmark_loading.py is now benchmarks/loading.py.")
