raise SystemExit("error: scripts/benchmark_dpo_memory.py is now benchmarks/dpo_memory.py.")
