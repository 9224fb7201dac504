"""Threads of OpenMP beside other programs: how they wait, and whether there are cores for them. Imports no PyTorch."""

import os

from lit_llama.utils import log

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables that say how threads wait


def wait_passively() -> None:
    """Let threads sleep while they wait for work, unless the environment says how they wait.

    By default they spin, and beside another busy program each then waits for a core that a spinning one holds. OpenMP
    reads the variable when PyTorch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def note_if_busy(n_threads: int) -> None:
    """Log a note if other programs leave fewer cores free than there are threads."""
    if n_threads == 1 or not hasattr(os, "getloadavg"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0]
    if n_threads > max(1, round(cores - busy)):
        log(
            f"note: {n_threads} threads for {cores} cores, of which other programs use {min(busy, cores):.1f}; fewer "
            "may be faster (OMP_NUM_THREADS=1)."
        )
