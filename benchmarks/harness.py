"""Shared code of the benchmarks: contestants that take turns, each in its own process, peers, and reports."""

import multiprocessing
import os
import platform
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import worker
from benchmarks.material import dtype_name, random_weights, shape
from benchmarks.measure import copy_bandwidth, matmul_rate, median_interval
from benchmarks.settings import Clock, PeerSettings
from lit_llama.checkpoint import versions
from lit_llama.console import end_on_interrupt
from lit_llama.device import device_name, pick_device
from lit_llama.model import LLaMAConfig
from lit_llama.run.report import make_panels, save_figure
from lit_llama.storage.files import claim, write_text
from lit_llama.utils import UserError, first_line, log

Specs = dict[str, dict[str, Any]]  # contestant -> settings of its `benchmarks.worker.Worker`
Turns = Mapping[str, Callable[[], Any]]  # contestant -> what it does in its turn
Answers = dict[str, list[Any]]  # contestant -> what its turns returned

# those that determine the speed of matrix products: flag in /proc/cpuinfo -> name
INSTRUCTION_SETS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16",
                    "asimd": "NEON", "sve": "SVE", "bf16": "BF16"}  # fmt: skip


# == contestants ==


class Unavailable(UserError):
    """A peer cannot be measured; the report omits it."""


class Contestant:
    """A `benchmarks.worker.Worker` in its own process.

    Calling it calls one of the worker's methods and waits; the other processes sleep meanwhile. A peer whose call fails
    is closed, so that its model no longer takes memory.

    Raises:
        UserError: The call failed; `Unavailable` if it is a peer's.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.name, self.settings = name, settings
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_on_interrupt)
        self.failure: Unavailable | None = None

    def __call__(self, method: str, **arguments: Any) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        try:
            return self.process.submit(worker.call, self.settings, method, arguments).result()
        except Exception as error:
            sentence = first_line(error)
            if self.settings["kind"] == "ours":
                raise UserError(f"{self.name}: {sentence}.") from error
            self.failure = Unavailable(f"{self.name}: {sentence}.")
            self.close()
            raise self.failure from error

    def close(self) -> None:
        self.process.shutdown()


def take_turns(turns: Turns, rounds: int, notes: list[str]) -> tuple[dict[str, Any], Answers]:
    """Call every contestant once per round, in an order that is drawn for each round and is the same in every run.

    So other load on the machine affects all of them alike, and none always follows the same one. A peer that becomes
    unavailable is left out with a note.

    Returns:
        What each contestant returned in a first round, which warms up, and in the `rounds` that are measured.
    """
    answers_of: Answers = {name: [] for name in turns}
    rng = random.Random(0)
    with tqdm(total=len(turns) * (rounds + 1), unit="turn") as bar:
        for _ in range(rounds + 1):
            for name in rng.sample([*turns], len(turns)):
                bar.set_postfix_str(name)
                try:
                    if name in answers_of:
                        answers_of[name].append(turns[name]())
                except Unavailable as error:
                    if (note := f"Without {error}") not in notes:
                        notes.append(note)
                    del answers_of[name]
                bar.update()
    first = {name: answers[0] for name, answers in answers_of.items()}
    return first, {name: answers[1:] for name, answers in answers_of.items()}


@dataclass
class Run:
    """A benchmark of this project and its peers.

    Args:
        config: The model's configuration.
        shared: The settings that all contestants share.
        notes: Sentences at the end of the report.
    """

    settings: PeerSettings
    config: LLaMAConfig
    device: torch.device
    dtype: torch.dtype
    shared: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def specs(self, ours: Specs, peers: Specs) -> Specs:
        """Return the complete settings of the contestants; the peers are installed and follow ours."""
        specs = {name: {**self.shared, "kind": "ours", **own} for name, own in ours.items()}
        if self.settings.peers:
            path = install_peers(self.settings.out_dir / "peers", self.notes)
            specs |= {name: {**self.shared, "path": path, **own} for name, own in peers.items()}
        return specs

    @contextmanager
    def contestants(self, ours: Specs, peers: Specs) -> Iterator[dict[str, Contestant]]:
        """Yield contestants that have loaded their models; a peer that is unavailable is left out with a note."""
        contestants = {name: Contestant(name, **spec) for name, spec in self.specs(ours, peers).items()}
        try:
            loads = {name: partial(contestant, "load") for name, contestant in contestants.items()}
            ready, _ = take_turns(loads, 0, self.notes)
            for name in contestants.keys() - ready.keys():
                contestants.pop(name).close()
            if packed := [name for name, loaded in ready.items() if loaded.get("packed")]:
                plain = [name for name, loaded in ready.items() if loaded.get("packed") is False]
                self.notes.append(
                    f"Packed weights (lit_llama/onednn.py): {', '.join(packed)}; not packed: "
                    f"{', '.join(plain) or 'none'}. Each process measures which is faster."
                )
            yield contestants
        finally:
            for contestant in contestants.values():
                contestant.close()

    def path(self, name: str, suffix: str) -> Path:
        return self.settings.out_dir / f"{name}-{self.settings.size}-{dtype_name(self.dtype)}{suffix}"

    def publish(self, title: str, parts: list[str]) -> None:
        heading = f"{title}, {self.settings.size}, {dtype_name(self.dtype)}"
        print(write_report(self.path(title.lower(), ".md"), heading, [*parts, *self.notes], self.device), end="")


def start_run(settings: PeerSettings) -> Run:
    """Set the number of threads, pick the device, and write the random weights."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device, dtype = pick_device(settings.accelerator, settings.precision)
    check_clock(settings.clock, device)
    weights = random_weights(settings.out_dir, settings.size, dtype)
    shared = {"weights": weights, "device": device, "dtype": dtype, "clock": settings.clock}
    return Run(settings, shape(settings.size), device, dtype, {**shared, "threads": torch.get_num_threads()})


def check_clock(clock: Clock, device: torch.device) -> None:
    """Check that a clock can measure the work.

    Raises:
        UserError: CPU time would not measure it.
    """
    if clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UserError("--clock cpu counts CPU time: it needs --accelerator cpu and --threads 1.")


def install_peers(folder: Path, notes: list[str]) -> Path:
    """Install transformers, PEFT and LitGPT from PyPI into a folder, and return the path to import them from.

    The packages of this environment are not changed, and the peers use them too, so that all contestants run the same
    build of torch. A peer that cannot be installed is noted, and missing from the tables.
    """
    folder = folder / f"with-torch-{torch.__version__}"
    stamp, constraints = folder / "complete", folder / "constraints.txt"
    if not stamp.is_file():
        log(f"installing the peers into {folder}")
        write_text(constraints, "".join(f"{d.name}=={d.version}\n" for d in distributions()))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--prefix", folder, "-c", constraints]
        complete = True
        for packages in (["transformers", "peft"], ["--no-deps", "litgpt"]):  # LitGPT pins an older transformers
            if subprocess.run([*pip, *packages], stdout=sys.stderr, stderr=subprocess.DEVNULL).returncode:
                notes.append(f"Without {packages[-1]}: pip cannot install it.")
                complete = False
        if complete:  # else the next run tries again
            stamp.touch()
    path = next(folder.glob("**/*-packages"), folder)
    installed = {d.name.lower(): d.version for d in distributions(path=[*sys.path, str(path)])}
    names = ("torch", "transformers", "peft", "litgpt")
    notes.append("The peers: " + ", ".join(f"{name} {installed[name]}" for name in names if name in installed) + ".")
    return path


# == reports ==


def describe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name and its `INSTRUCTION_SETS`; without the file, the set that PyTorch reports."""
    fields = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    sets = [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} with {', '.join(sets) or torch.backends.cpu.get_cpu_capability()}"


def describe_run(device: torch.device) -> str:
    """Return a list in Markdown: the machine, how fast it is in this run, the versions, the date, and the command."""
    gpu = f", {device_name(device)}" if device.type == "cuda" else ""
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    fp32, bf16 = (matmul_rate(device, dtype, "wall") / 1e9 for dtype in (torch.float32, torch.bfloat16))
    copied = copy_bandwidth(device, "wall") / 1e9
    lines = {
        "machine": f"{describe_cpu()}, {os.cpu_count()} cores{gpu}{load}",
        "threads": str(torch.get_num_threads()),
        "in this run": f"a copy reads and writes {copied:,.1f} GB/s; a large matrix product does "
        f"{fp32:,.0f} GFLOP/s in fp32, {bf16:,.0f} in bf16 ({bf16 / fp32:.1f} ×)",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def write_report(path: Path, title: str, parts: list[str], device: torch.device) -> str:
    """Write a report in Markdown, a description of the run followed by the parts, and return its text."""
    text = "\n\n".join([f"# {title}", describe_run(device), *parts]) + "\n"
    claim(path.parent, [path.name])
    write_text(path, text)
    return text


def plot_bars(path: Path, panels: dict[str, dict[str, list[float]]]) -> None:
    """Draw a panel for each quantity: a bar for each contestant, the median with its interval."""
    figure, grid = make_panels(len(panels), 7, 3.6)
    for axes, (label, bars) in zip(grid, panels.items(), strict=True):
        middles, lows, highs = np.transpose([median_interval(values) for values in bars.values()])
        axes.barh(list(bars), middles, xerr=[middles - lows, highs - middles], color="C0", ecolor="0.3", capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel=label)
        axes.grid(alpha=0.3, axis="x")
    claim(path.parent, [path.name])
    save_figure(figure, path)


def plot_lines(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]], ylabel: str) -> None:
    """Draw a panel for each cause: named curves of (cause, cost), with axes that start at 0."""
    figure, grid = make_panels(len(panels), 7, 3.6)
    for axes, (label, curves) in zip(grid, panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
        axes.set(xlabel=label, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    claim(path.parent, [path.name])
    save_figure(figure, path)
