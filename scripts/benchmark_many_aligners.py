raise SystemExit("error: scripts/benchmark_many_aligners.py is now benchmarks/many_aligners.py.")
