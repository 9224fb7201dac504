"""Time, memory and statistics of the benchmarks."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import binom

from benchmarks.settings import Clock
from lit_llama.tables import markdown_table

CPU = torch.device("cpu")
MATMUL_SECONDS = 3  # a product that takes longer, as in bf16 on a CPU without instructions for it, is not repeated


def now(device: torch.device = CPU, clock: Clock = "wall") -> float:
    """Wait for the device and return the seconds of a clock; "cpu" counts CPU time of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() if clock == "wall" else time.process_time()


def timed(work: Callable[[], Any], device: torch.device = CPU, clock: Clock = "wall") -> float:
    """Return the seconds of one call."""
    began = now(device, clock)
    work()
    return now(device, clock) - began


@cache
def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Return the bytes per second, read and written, of a large copy; measured once in a run for each clock."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device, clock) for _ in range(7))


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Return the FLOPs per second of a large matrix product; measured once in a run for each clock."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < MATMUL_SECONDS:
        seconds.append(timed(lambda: a @ b, device, clock))
    return 2 * n**3 / min(seconds)


class Memory:
    """Bytes of memory that this process uses in addition to those it used when this object was created.

    On a GPU this is the memory that PyTorch allocated, on a CPU the resident memory, or its maximum if only that is
    known.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.gpu, self.start = device.type == "cuda", 0
        self.reset_peak()
        self.start = self.now()

    def now(self) -> int:
        return (torch.cuda.memory_allocated() if self.gpu else _resident("VmRSS")) - self.start

    def peak(self) -> int:
        """Return the maximum since `reset_peak`."""
        return (torch.cuda.max_memory_allocated() if self.gpu else _resident("VmHWM")) - self.start

    def reset_peak(self) -> None:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")


def _resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if field in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the ends of its 95% interval.

    The ends are the k-th lowest and the k-th highest value. They enclose the median of the distribution with a
    probability of 1 - 2 P(B < k), where B is binomial with n draws and p = 1/2; k is the largest that gives 95%. With
    fewer than six values it is 1, and the probability is lower: 94% with five.
    """
    values, n = sorted(values), len(values)
    k = max(1, int(binom.ppf(0.025, n, 0.5)))
    return statistics.median(values), values[k - 1], values[n - k]


def number(value: float) -> str:
    """Return a number with three significant digits and separated thousands, without an exponent."""
    if value == 0 or not np.isfinite(value):
        return f"{value:.0f}"
    decimals = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{decimals}f}"


def with_interval(values: list[float]) -> str:
    middle, low, high = map(number, median_interval(values))
    return f"{middle} ({low} to {high})"


def compare(values: list[float], others: list[float], digits: int = 3) -> list[str]:
    """Return the ratio values[i] / others[i] with its interval, and whether it differs from 1, as cells of a table."""
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    middle, low, high = (f"{x:.{digits}f}" for x in median_interval(ratios))
    if float(low) <= 1 <= float(high):
        verdict = "no difference"
    elif len(ratios) < 6:
        verdict = "too few rounds"
    else:
        verdict = "more" if float(low) > 1 else "less"
    return [f"{middle} ({low} to {high})", verdict]


def ratio_table(rows: list[list[str]]) -> str:
    return "## Ratios\n\n" + markdown_table(["what", "target", "measured (interval)", "compared with 1"], rows)
