"""Threads of OpenMP beside other programs: how they wait, and whether there are cores for them. Imports no PyTorch."""

import os
import time
from pathlib import Path

from lit_llama.utils import log

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables that say how threads wait


def wait_passively() -> None:
    """Let threads sleep while they wait for work, unless the environment says how they wait.

    By default they spin, and beside another busy program each then waits for a core that a spinning one holds. OpenMP
    reads the variable when PyTorch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def busy_cores() -> float | None:
    """Return how many cores other programs use at this moment, None where that is not known.

    The load average would not do: it still counts what this process, or the one before it, did a minute ago.
    """
    samples = []
    try:
        for _ in range(5):
            running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0]
            samples.append(int(running) - 1)  # without this thread
            time.sleep(0.01)
    except (OSError, ValueError, IndexError):  # not Linux
        return None
    return sum(samples) / len(samples)


def note_if_busy(n_threads: int) -> None:
    """Log a note if other programs leave fewer cores free than there are threads."""
    if n_threads == 1 or (busy := busy_cores()) is None:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n_threads > max(1, round(cores - busy)):
        log(
            f"note: {n_threads} threads for {cores} cores, of which other programs use {min(busy, cores):.1f}; fewer "
            "may be faster (OMP_NUM_THREADS=1)."
        )
