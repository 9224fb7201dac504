"""Many Aligners at once: the speed of a batch with 1, 64 and all-different adapters, and the size and speed of a bank.

Generation is measured on random weights: models with one adapter against one model whose rows choose from a bank
(lit_llama/bank.py), in turns. Then a bank of random adapters is filled at the width of the bundled model and of a 7B,
and adapters are added, gathered, swapped and removed.
"""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks.settings import BenchmarkSettings
from lit_llama import cli
from lit_llama.settings import PositiveFloat, PositiveInt


@dataclass
class Settings(BenchmarkSettings):
    # == Speed ==
    sizes: tuple[str, ...] = ("microworld", "110M")  # 110M, or names of lit_llama.model.llama_configs
    batch_size: PositiveInt = 128  # prompts of a batch
    prompt_tokens: PositiveInt = 32  # tokens of each prompt
    new_tokens: PositiveInt = 16  # tokens of each answer
    lengths: tuple[PositiveInt, ...] = (1, 10)  # prefix tokens N

    # == Banks ==
    widths: tuple[str, ...] = ("microworld", "7B")  # models whose one-token adapters fill a bank
    adapters: PositiveInt = 1_000_000  # adapters in each bank, or as many as fit into memory_gb
    memory_gb: PositiveFloat = 8.0  # memory for a bank
    samples: PositiveInt = 2000  # repetitions of gathering, swapping and removing an adapter


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np
import torch

from benchmarks import harness as b
from benchmarks.material import START, dtype_name, random_adapter, random_weights, shape
from benchmarks.measure import Memory, compare, now, number, timed, with_interval
from lit_llama.bank import Bank
from lit_llama.checkpoint import load_model
from lit_llama.compose import LastUsed, load_adapted, load_with_bank
from lit_llama.device import pick_device
from lit_llama.generation import Sampling, generate
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.onednn import pack_
from lit_llama.tables import markdown_table
from lit_llama.utils import log

NAME_BYTES = 400  # upper bound of the main memory for a name and its entry
ASSIGNMENTS = 10  # repetitions of gathering and projecting the adapters of a batch
SAVED_BYTES = 1e9  # banks up to this size are also written to a file and opened
Rates = dict[str, list[float]]  # tokens/s of each kind of batch, in each round


class Batch(NamedTuple):
    """How a batch is answered.

    Args:
        names: the adapters of the rows, None for a model without a bank.
        anew: project all prefixes again, also those that the model keeps from the last batch.
    """

    model: LLaMA
    names: list[str | None] | None = None
    anew: bool = False

    def assign(self) -> AbstractContextManager:
        if self.anew:
            self.model.projected = LastUsed()
        return nullcontext() if self.names is None else self.model.using(self.names)


# == speed ==


def make_batches(settings: Settings, size: str, device: torch.device, dtype: torch.dtype) -> dict[str, Batch]:
    """Return all kinds of batches on random weights."""
    rows, config = settings.batch_size, shape(size)
    base = random_weights(settings.out_dir, size, dtype)
    bank, options = Bank(config, start_layer=START, dtype=torch.bfloat16), {"device": device, "dtype": dtype}
    many = pack_(load_with_bank(base, bank, **options))
    batches: dict[str, Batch] = {
        "base": Batch(pack_(load_model(base, **options))),
        "base, through the bank's model": Batch(many, [None] * rows),
    }
    for n in settings.lengths:
        for i in range(rows):
            bank.add(f"{n}-{i}", random_adapter(config, n))
        batches[without_bank(n)] = Batch(pack_(load_adapted(base, [bank.adapter(f"{n}-0")], **options)))
        for different in sorted({1, min(64, rows), rows}):
            names = [f"{n}-{i % different}" for i in range(rows)]
            batches[f"N = {n}, bank, {different} in the batch"] = Batch(many, names)
        batches[f"N = {n}, bank, {rows} in the batch, projected for each batch"] = Batch(many, names, anew=True)
    cycle = [*settings.lengths, None]
    mixed = [n and f"{n}-{i}" for i, n in enumerate(cycle * rows)][:rows]
    batches[f"bank, N = {', '.join(map(str, settings.lengths))} and the base mixed"] = Batch(many, mixed)
    return batches


def without_bank(n: int) -> str:
    return f"N = {n}, one adapter, no bank"


def measure_speed(settings: Settings, batches: dict[str, Batch], size: str, device: torch.device) -> Rates:
    """Return the tokens/s of each kind of batch: gathering and projecting the adapters, prefill, decoding."""
    prompts = torch.randint(3, shape(size).vocab_size, (settings.batch_size, settings.prompt_tokens)).tolist()

    def answer(batch: Batch) -> None:
        with batch.assign():
            generate(batch.model, prompts, Sampling(settings.new_tokens))

    turns = {name: partial(timed, partial(answer, batch), device) for name, batch in batches.items()}
    tokens = settings.batch_size * settings.new_tokens
    _, seconds = b.take_turns(turns, settings.rounds, notes=[])
    return {name: [tokens / s for s in times] for name, times in seconds.items()}


def assigning_table(settings: Settings, batches: dict[str, Batch], device: torch.device) -> str:
    """Return a table of the milliseconds to gather and project the adapters of a batch, by their number."""
    rows = []
    for n in settings.lengths:
        model, names, _ = batches[f"N = {n}, bank, {settings.batch_size} in the batch"]
        for different in sorted({1, min(8, len(names)), min(64, len(names)), len(names)}):
            cells = []
            for anew in (True, False):
                batch = Batch(model, [names[i % different] for i in range(len(names))], anew)
                enter(batch)
                cells.append([1000 * timed(partial(enter, batch), device) for _ in range(ASSIGNMENTS)])
            rows.append([f"N = {n}, {different}", *map(with_interval, cells)])
    return markdown_table(
        ["adapters in the batch", "ms, projected for this batch", "ms, cached from the last batch"], rows
    )


def enter(batch: Batch) -> None:
    with batch.assign():
        pass


def speed_table(settings: Settings, rates: Rates) -> str:
    rows = []
    for name, values in rates.items():
        other = next((without_bank(n) for n in settings.lengths if name.startswith(f"N = {n},")), "base")
        rows.append([name, with_interval(values), *(["1", ""] if name == other else compare(values, rates[other]))])
    return markdown_table(
        ["rows of the batch", "tokens/s", "ratio to the same batch without a bank", "compared with 1"], rows
    )


# == banks ==


def seconds_each(work: Callable[[int], object], count: int) -> np.ndarray:
    """Return the seconds of work(0), work(1), …, each."""
    times = [now()]
    for i in range(count):
        work(i)
        times.append(now())
    return np.diff(times)


def fill(bank: Bank, count: int, add: Callable[[int], None]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Add `count` adapters, and return the seconds of each and the growth of memory as (adapters, GB) pairs."""
    memory, growth, seconds = Memory(), [(0.0, 0.0)], []
    for stop in np.linspace(0, count, 11).astype(int)[1:]:
        start = len(bank)
        log(f"{start:,} of {count:,} adapters")
        seconds.append(seconds_each(lambda i, start=start: add(start + i), stop - start))
        growth.append((len(bank), memory.now() / 1e9))
    return np.concatenate(seconds), growth


def file_seconds(bank: Bank, name: str, file: Path) -> dict[str, str]:
    """Return the seconds to write a bank to a file and to open it, as text."""
    seconds = ["not done", "not done"]
    if bank.nbytes <= SAVED_BYTES:
        seconds = [number(timed(work)) for work in (lambda: bank.save(file), lambda: Bank.load(file).gather([name]))]
        file.unlink()
    return dict(zip(("s to write the bank to a file", "s to open the file"), seconds, strict=True))


def measure_bank(settings: Settings, width: str) -> tuple[dict[str, str], list[tuple[float, float]]]:
    """Return the time and memory of a filled bank of bf16 adapters, as text, and its growth: (adapters, GB) pairs."""
    config, samples, rng = LLaMAConfig.from_name(width), settings.samples, np.random.default_rng(0)
    numbers = config.n_embd + (config.n_layer - START) * config.n_head
    count = min(settings.adapters, int(settings.memory_gb * 1e9 / (2 * numbers + NAME_BYTES)))
    pool = [random_adapter(config, 1) for _ in range(100)]
    bank = Bank(config, start_layer=START, dtype=torch.bfloat16)
    adding, growth = fill(bank, count, lambda i: bank.add(f"user-{i}", pool[i % 100]))
    grown = growth[-1][1] * 1e9
    one, many = ([[f"user-{i}" for i in rng.integers(count, size=size)] for _ in range(samples)] for size in (1, 64))
    gone = [f"user-{i}" for i in rng.permutation(count)[:samples]]
    times = {
        "µs to add one": adding,
        "µs to look up and gather one": seconds_each(lambda i: bank.gather(one[i]), samples),
        "µs to look up and gather 64": seconds_each(lambda i: bank.gather(many[i]), samples),
        "µs to swap one": seconds_each(lambda i: bank.swap(one[-i][0], pool[i % 100]), samples),
        "µs to remove one": seconds_each(lambda i: bank.remove(gone[i]), len(gone)),
    }
    for name in gone:
        bank.add(name, pool[0])
    rows = {
        "adapters in the bank": f"{count:,}",
        "parameters per adapter": f"{numbers:,}",
        "bytes per adapter, in bf16": f"{2 * numbers:,}",
        "GB of prefixes and gates": number(bank.nbytes / 1e9),
        "GB that the process grew by": number(grown / 1e9),
        "bytes per adapter for its name and entry": f"{(grown - bank.nbytes) / count:,.0f}",
        **{what: f"{number(1e6 * np.median(t))} ({number(1e6 * np.quantile(t, 0.99))})" for what, t in times.items()},
        **file_seconds(bank, gone[0], settings.out_dir / f"bank-{width}.safetensors"),
    }
    return rows, growth


# == the report ==


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    device, dtype = pick_device(settings.accelerator, settings.precision)
    rates, assigning = {}, {}
    for size in settings.sizes:
        batches = make_batches(settings, size, device, dtype)
        rates[size] = measure_speed(settings, batches, size, device)
        assigning[size] = assigning_table(settings, batches, device)
    banks = {}
    for width in settings.widths:  # each in its own process, so that its memory can be measured separately
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            banks[width] = process.submit(measure_bank, settings, width).result()

    names = next(iter(banks.values()))[0]
    lines = [[name, *(rows[name] for rows, _ in banks.values())] for name in names]
    parts = [
        f"## Speed\n\n{settings.batch_size} prompts of {settings.prompt_tokens} tokens as one batch, "
        f"{settings.new_tokens} new tokens each, greedy, random weights in {dtype_name(dtype)}. Gathering and "
        "projecting the adapters is part of the time.",
        *(f"### {size}\n\n{speed_table(settings, values)}\n\n{assigning[size]}" for size, values in rates.items()),
        f"## Size and speed of a bank\n\nAdapters of one token, at most {settings.memory_gb:g} GB. Times are medians, "
        "with the 99% quantile in brackets.\n\n" + markdown_table(["at the width of", *banks], lines),
    ]
    path = settings.out_dir / "many-aligners.md"
    b.plot_bars(path.with_suffix(".png"), {f"tokens/s, {size}": values for size, values in rates.items()})
    curves = {f"adapters of one token at {width}'s width": {"measured": points} for width, (_, points) in banks.items()}
    b.plot_lines(path.with_name("many-aligners-memory.png"), curves, "GB of main memory")
    print(b.write_report(path, "Many Aligners at once", parts, device), end="")


if __name__ == "__main__":
    cli.run(main, settings)
