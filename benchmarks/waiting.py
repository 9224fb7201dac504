"""Time of a training step by how OpenMP threads wait for work, spinning or asleep, with and without other programs.

A step consists of many short parallel parts, between which threads wait for each other. A thread that spins starts the
next part sooner, but holds a core that another program, or the thread it waits for, may need.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks.settings import BenchmarkSettings
from lit_llama import cli
from lit_llama.settings import NonNegativeInt, PositiveInt


@dataclass
class Settings(BenchmarkSettings):
    # == What to measure ==
    size: str = "microworld"  # 110M, or a name of lit_llama.model.llama_configs
    rows: PositiveInt = 8  # rows of a training step
    length: PositiveInt = 100  # tokens of a row
    busy: tuple[NonNegativeInt, ...] = (0, 1)  # numbers of other programs to run, each of which fills a core


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from benchmarks import harness as b
from benchmarks.material import shape
from benchmarks.measure import CPU, compare, ratio_table, with_interval
from lit_llama.tables import markdown_table
from lit_llama.threads import BRIEFLY, WAITING

ASLEEP = "asleep"
POLICIES = {
    ASLEEP: {"OMP_WAIT_POLICY": "PASSIVE"},
    "spinning briefly": BRIEFLY,  # as in all scripts of this project
    # what GNU's OpenMP does by default. With OMP_WAIT_POLICY=ACTIVE a process would also spin during the others' turns
    "spinning first": {"GOMP_SPINCOUNT": "300000"},
}


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set how threads wait in processes started in this context."""
    with patch.dict(os.environ):
        for name in WAITING:
            os.environ.pop(name, None)
        os.environ.update(variables)
        yield


def keep_busy() -> None:
    while True:
        pass


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Run programs that each fill a core."""
    programs = [multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True) for _ in range(count)]
    for program in programs:
        program.start()
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.join()


def measure(settings: Settings) -> dict[int, dict[str, list[float]]]:
    """Return the seconds of training steps: busy programs -> policy -> one value per round."""
    spec = {"kind": "ours", "n": 1, "weights": None, "device": CPU, "dtype": torch.float32}
    batch = [(settings.rows, settings.length, settings.length // 2)]
    seconds = {}
    with ExitStack() as stack:
        contestants = {}
        for name, variables in POLICIES.items():
            contestant = stack.enter_context(closing(b.Contestant(name, **spec, threads=torch.get_num_threads())))
            with environment(variables):  # the first call starts the process
                contestant("build", n=1, config=asdict(shape(settings.size)))
            contestants[name] = partial(contestant, "step", batches=batch, data="random")
        for count in settings.busy:
            with busy_programs(count):
                _, steps = b.take_turns(contestants, settings.rounds, [])
            seconds[count] = {name: [sum(step["seconds"].values()) for step in taken] for name, taken in steps.items()}
    return seconds


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    seconds = measure(settings)
    names = {n: f"with {n} busy program{'s' * (n > 1)}" if n else "idle" for n in seconds}
    rows = [
        [name, *(with_interval([1000 * s for s in times[name]]) for times in seconds.values())] for name in POLICIES
    ]
    ratios = [
        [f"time, {name} over {ASLEEP}, {names[count]}", "", *compare(times[name], times[ASLEEP])]
        for name in POLICIES
        if name != ASLEEP
        for count, times in seconds.items()
    ]
    title = f"A training step of {settings.rows} × {settings.length} tokens, {settings.size}, N = 1, fp32"
    table = markdown_table(["threads that wait are", *(f"ms per step, {name}" for name in names.values())], rows)
    parts = [f"## {title}\n\n{table}", ratio_table(ratios)]
    path = settings.out_dir / f"waiting-{settings.size}.md"
    print(b.write_report(path, "How threads wait", parts, CPU), end="")


if __name__ == "__main__":
    cli.run(main, settings)
