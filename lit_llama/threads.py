"""OpenMP threads on a machine with other programs: how they wait, and whether cores are free. Does not import torch."""

import os
import time
from pathlib import Path

from lit_llama.utils import log

LOAD_AVERAGES = Path("/proc/loadavg")  # its fourth field is "running threads/all threads"; Linux only
BRIEFLY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}  # 1,000 iterations in GNU's OpenMP, none in others
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # environment variables that set how threads wait


def wait_briefly() -> None:
    """Let threads that wait for work spin briefly and then sleep, unless the environment sets how they wait.

    By default they spin 300,000 times. If another program is busy, threads with work then wait for cores that spinning
    threads occupy. OpenMP reads the variables when PyTorch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(BRIEFLY)


def busy_cores() -> float | None:
    """Return how many cores other programs use at this moment, None if that is not known. Takes 40 ms.

    The load average is not used because it still counts work that ended a minute ago.
    """
    samples = []
    try:
        for i in range(5):
            time.sleep(0.01 if i else 0)
            running = LOAD_AVERAGES.read_text(encoding="ascii").split()[3].split("/")[0]
            samples.append(int(running) - 1)  # without this thread
    except (OSError, ValueError, IndexError):  # not Linux
        return None
    return sum(samples) / len(samples)


def note_if_busy(n_threads: int) -> None:
    """Log a note if other programs leave fewer cores free than there are threads.

    If this process may use only some of the cores, as in a SLURM job, none is logged: other programs may use the rest.
    """
    cores = os.cpu_count() or 1
    restricted = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < cores
    if n_threads == 1 or restricted or (busy := busy_cores()) is None:
        return
    if n_threads > max(1, round(cores - busy)):
        log(
            f"note: {n_threads} threads for {cores} cores, of which other programs use {min(busy, cores):.1f}; fewer "
            "may be faster (OMP_NUM_THREADS=1)."
        )
