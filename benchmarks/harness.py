"""Contestants in processes of their own that take turns, and the settings that the benchmarks share."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import worker
from benchmarks.material import shape, write_weights
from benchmarks.measure import Clock
from lit_llama.device import pick_device
from lit_llama.files import write_text
from lit_llama.model import LLaMAConfig
from lit_llama.settings import Checked, NonNegativeInt, PositiveInt
from lit_llama.utils import UserError, log


@dataclass
class DeviceSettings(Checked):
    # == Device ==
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda
    precision: str = "auto"  # of the base: 32, bf16; auto is bf16 on GPUs that have it, else 32


@dataclass
class BenchmarkSettings(DeviceSettings):
    # == What to measure ==
    rounds: PositiveInt = 7  # turns of every contestant
    out_dir: Path = Path("out/benchmark")  # tables, plots, random weights, the peers' packages

    # == Device ==
    threads: NonNegativeInt = 0  # of each process on a CPU; 0 is PyTorch's own choice


@dataclass
class PeerSettings(BenchmarkSettings):
    # == What to measure ==
    size: str = "110M"  # 110M, or a name of lit_llama.model.llama_configs: microworld, Llama-2-7B, ...
    peers: bool = True  # install and measure transformers, PEFT and LitGPT too

    # == Device ==
    clock: Clock = "wall"  # or cpu: processor seconds, for a CPU that others use too; needs --threads 1


class Run(NamedTuple):
    """The shape of the model, where and in what it computes, and the settings that all contestants share."""

    config: LLaMAConfig
    device: torch.device
    dtype: torch.dtype
    shared: dict[str, Any]


def start_run(settings: PeerSettings) -> Run:
    """Set the number of threads, pick the device, and write the random weights."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device, dtype = pick_device(settings.accelerator, settings.precision)
    if settings.clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UserError("--clock cpu counts the processor's seconds: it needs --accelerator cpu and --threads 1.")
    config, precision = shape(settings.size), precision_name(dtype)
    weights = settings.out_dir / f"weights-{settings.size}-{precision}"
    write_weights(weights, config, dtype)
    shared = {"weights": weights, "device": device, "precision": precision, "clock": settings.clock}
    return Run(config, device, dtype, {**shared, "threads": torch.get_num_threads()})


def precision_name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "32"


class Unavailable(UserError):
    """A peer cannot be measured; the report goes on without it."""


class Contestant:
    """A `benchmarks.worker.Worker` in its own process.

    Calling it calls one of the worker's methods and waits; the other processes sleep meanwhile.

    Raises:
        UserError: The call failed; `Unavailable` if it is a peer's.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.name, self.settings = name, settings
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(self, method: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self.process.submit(worker.call, self.settings, method, arguments).result()
        except Exception as error:
            kind = UserError if self.settings["kind"] == "ours" else Unavailable
            sentence = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise kind(f"{self.name}: {sentence}.") from error

    def close(self) -> None:
        self.process.shutdown()


def start_all(specs: dict[str, dict[str, Any]], notes: list[str]) -> dict[str, Contestant]:
    """Start the contestants and load their models; a peer that is unavailable is left out with a note."""
    contestants = {}
    for name, settings in specs.items():
        contestant = Contestant(name, **settings)
        try:
            contestant("load")
            contestants[name] = contestant
        except Unavailable as error:
            contestant.close()
            notes.append(f"Without {error}")
    return contestants


def take_turns(
    turns: Mapping[str, Callable[[], Any]], rounds: int, notes: list[str]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Call every contestant once per round: A B C, B C A, C A B, …

    So whatever else the machine does affects all of them, and none always follows the same one. A peer that becomes
    unavailable is left out with a note.

    Returns:
        What each contestant returned in a first round that warms up, and in the `rounds` that count.
    """
    found: dict[str, list[Any]] = {name: [] for name in turns}
    with tqdm(total=len(turns) * (rounds + 1), unit="turn") as bar:
        for number in range(rounds + 1):
            first = number % len(turns)
            for name in [*turns][first:] + [*turns][:first]:
                bar.set_postfix_str(name)
                try:
                    if name in found:
                        found[name].append(turns[name]())
                except Unavailable as error:
                    notes.append(f"Without {error}")
                    del found[name]
                bar.update()
    return {name: answers[0] for name, answers in found.items()}, {name: found[name][1:] for name in found}


def install_peers(folder: Path, notes: list[str]) -> Path:
    """Install transformers, PEFT and LitGPT from PyPI into a folder, and return the path to import them from.

    All packages of this environment stay as they are and are used by the peers too, so that torch is the same build
    for everybody. What cannot be installed is noted, and missing in the tables.
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
    found = {d.name.lower(): d.version for d in distributions(path=[*sys.path, str(path)])}
    names = ("torch", "transformers", "peft", "litgpt")
    notes.append("The peers: " + ", ".join(f"{name} {found[name]}" for name in names if name in found) + ".")
    return path
