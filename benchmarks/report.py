"""Reports of the benchmarks: Markdown and plots."""

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import median_interval
from lit_llama.checkpoint import versions
from lit_llama.files import claim, write_text
from lit_llama.report import make_figure, save_figure


def describe_machine(device: torch.device) -> dict[str, str]:
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores{gpu}{load}",
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def publish(path: Path, title: str, parts: list[str], device: torch.device) -> None:
    """Write a report in Markdown and print it: what ran where, then its parts."""
    machine = "\n".join(f"- {name}: {value}" for name, value in describe_machine(device).items())
    text = "\n\n".join([f"# {title}", machine, *parts]) + "\n"
    claim(path.parent, [path.name])
    write_text(path, text)
    print(text, end="")


def plot_bars(path: Path, panels: dict[str, dict[str, list[float]]]) -> None:
    """Draw a panel for each quantity: a bar for each contestant, the median with its interval."""
    figure, grid = _panels(len(panels))
    for axes, (label, bars) in zip(grid, panels.items(), strict=True):
        middles, lows, highs = np.transpose([median_interval(values) for values in bars.values()])
        axes.barh(list(bars), middles, xerr=[middles - lows, highs - middles], color="C0", ecolor="0.3", capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel=label)
        axes.grid(alpha=0.3, axis="x")
    claim(path.parent, [path.name])
    save_figure(figure, path)


def plot_lines(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]], ylabel: str) -> None:
    """Draw a panel for each cause: named curves of (cause, cost) from the origin."""
    figure, grid = _panels(len(panels))
    for axes, (label, curves) in zip(grid, panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
        axes.set(xlabel=label, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    claim(path.parent, [path.name])
    save_figure(figure, path)


def _panels(count: int) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, two in a line."""
    columns = min(count, 2)
    lines = -(-count // columns)
    figure = make_figure(7 * columns, 3.6 * lines)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]
