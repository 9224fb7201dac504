"""Moved to benchmarks/dpo_memory.py."""

raise SystemExit("error: scripts/benchmark_dpo_memory.py is now benchmarks/dpo_memory.py.")
