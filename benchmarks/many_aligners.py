"""Many Aligners at once: the speed of a batch with 1, 64 and all-different adapters, and the size and pace of a bank.

Generation is measured on random weights: ordinary models with one adapter against one model whose rows choose from a
bank (lit_llama/bank.py), in turns. Then a bank of random adapters is filled at the bundled model's width and at 7B's,
and adapters are added, looked up and swapped. A Markdown table and two plots come out.
"""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import numpy as np
import torch

from benchmarks import harness as b
from lit_llama import cli
from lit_llama.bank import Bank
from lit_llama.checkpoint import AdapterFile, load_model
from lit_llama.compose import load_with_bank
from lit_llama.device import pick_device
from lit_llama.generation import Sampling, generate
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.onednn import pack_
from lit_llama.report import markdown_table
from lit_llama.utils import UserError, log


@dataclass
class Settings:
    # == Speed ==
    sizes: tuple[str, ...] = ("microworld", "110M")  # 110M, or names of lit_llama.model.llama_configs
    batch_size: int = 128  # prompts of a batch
    prompt_tokens: int = 32  # of each prompt
    new_tokens: int = 16  # of each answer
    lengths: tuple[int, ...] = (1, 10)  # prefix tokens N
    rounds: int = 5  # every contestant has so many turns

    # == Banks ==
    widths: tuple[str, ...] = ("microworld", "7B")  # whose adapters, of one token, a bank is filled with
    adapters: int = 1_000_000  # so many of each, or as many as fit
    memory_gb: float = 8.0  # into this
    samples: int = 2000  # of looking up, swapping and removing one

    # == Where ==
    out_dir: Path = Path("out/benchmark")  # table, plots, random weights
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda; banks are held in the main memory
    precision: str = "auto"  # of the base: 32, bf16; auto is bf16 on GPUs that have it, else 32
    threads: int = 0  # on a CPU; 0 is PyTorch's own choice


START = 2  # first aligned layer
NAME_BYTES = 400  # of the main memory, at most, for a name and its place
SAVED_BYTES = 1e9  # banks up to this size are also written to a file and opened


def random_adapter(config: LLaMAConfig, length: int) -> AdapterFile:
    """One with open gates."""
    state = {"global_value_embedding.weight": torch.randn(length, config.n_embd)}
    for layer in range(START, config.n_layer):
        state[f"transformer.h.{layer}.attn.gating_factor"] = 0.1 * torch.randn(1, config.n_head, 1, 1)
    about = {"adapter_prompt_length": length, "adapter_start_layer": START}
    return AdapterFile(state, {"method": "aligner", "config": about}, Path("random"))


# == Speed ==


def contestants(
    args: Settings, base: Path, config: LLaMAConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[LLaMA, list[str | None] | None]]:
    """A model each, and the adapters of the batch's rows if it has a bank."""
    size = args.batch_size
    bank = Bank(config, start_layer=START, dtype=torch.bfloat16)
    many = pack_(load_with_bank(base, bank, device=device, dtype=dtype))
    found: dict[str, tuple[LLaMA, list[str | None] | None]] = {
        "base": (pack_(load_model(base, device=device, dtype=dtype)), None),
        "base, through the bank's model": (many, [None] * size),
    }
    for n in args.lengths:
        for i in range(size):
            bank.add(f"{n}-{i}", random_adapter(config, n))
        model = load_model(base, bank.adapter(f"{n}-0"), device=device, dtype=dtype)
        found[ordinary(n)] = (pack_(model), None)
        for different in sorted({1, min(64, size), size}):
            names = [f"{n}-{i % different}" for i in range(size)]
            found[f"N = {n}, bank, {different} in the batch"] = (many, names)
    cycle = [*args.lengths, None]
    mixed = [n and f"{n}-{i}" for i, n in enumerate(cycle * size)][:size]
    found[f"bank, N = {', '.join(map(str, args.lengths))} and the base mixed"] = (many, mixed)
    return found


def ordinary(n: int) -> str:
    return f"N = {n}, one adapter, no bank"


def measure_speed(args: Settings, size: str, device: torch.device, dtype: torch.dtype) -> dict[str, list[float]]:
    """Tokens/s of each turn of each contestant: finding and projecting the adapters, prefill, decoding."""
    config = b.shape(size)
    base = args.out_dir / f"weights-{size}-{'bf16' if dtype == torch.bfloat16 else '32'}"
    b.write_weights(base, config, dtype)
    prompts = torch.randint(3, config.vocab_size, (args.batch_size, args.prompt_tokens)).tolist()
    models = contestants(args, base, config, device, dtype)

    def answer(model: LLaMA, names: list[str | None] | None, new: int) -> None:
        with nullcontext() if names is None else model.using(names):
            generate(model, prompts, Sampling(new))

    rates: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-1, args.rounds):
        log(f"{size}: round {turn + 1} of {args.rounds}")
        order = list(models)
        for name in order[max(turn, 0) :] + order[: max(turn, 0)]:  # so that none always follows the same one
            model, names = models[name]
            if turn < 0:
                answer(model, names, 2)  # warms up
                continue
            seconds = b.timed(lambda model=model, names=names: answer(model, names, args.new_tokens), device)
            rates[name].append(args.batch_size * args.new_tokens / seconds)
    return rates


def speed_table(args: Settings, rates: dict[str, list[float]]) -> str:
    rows = []
    for name, values in rates.items():
        against = next((ordinary(n) for n in args.lengths if name.startswith(f"N = {n},")), "base")
        middle, spread = b.ratio(values, rates[against])
        rows.append([name, b.with_spread(values), "1" if name == against else f"{middle:.3f} ± {spread:.3f}"])
    return markdown_table(["rows of the batch", "tokens/s", "of the same without a bank"], rows)


# == Banks ==


def resident() -> int:
    """Bytes of main memory that the process holds now; where that cannot be read, the most it has held."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def microseconds(work: Callable[[int], Any], count: int) -> np.ndarray:
    """Of work(0), work(1), ..., each."""
    found = np.zeros(count)
    for i in range(count):
        began = time.perf_counter()
        work(i)
        found[i] = time.perf_counter() - began
    return found * 1e6


def measure_bank(args: Settings, width: str) -> tuple[dict[str, str], list[tuple[float, float]]]:
    """What a filled bank of bf16 adapters takes, in words, and its growth: (adapters, GB) pairs."""
    config = LLaMAConfig.from_name(width)
    numbers = config.n_embd + (config.n_layer - START) * config.n_head
    count = min(args.adapters, int(args.memory_gb * 1e9 / (2 * numbers + NAME_BYTES)))
    pool = [random_adapter(config, 1) for _ in range(100)]
    rng = np.random.default_rng(0)
    bank, before = Bank(config, start_layer=START, dtype=torch.bfloat16), resident()
    points, added = [(0.0, 0.0)], []
    steps = np.diff(np.linspace(0, count, 11).astype(int))
    for step in steps:
        log(f"{width}: {len(bank):,} of {count:,} adapters")
        start = len(bank)
        added.append(microseconds(lambda i, start=start: bank.add(f"user-{start + i}", pool[i % 100]), step))
        points.append((len(bank), (resident() - before) / 1e9))

    def some(n: int) -> list[list[str]]:
        return [[f"user-{i}" for i in rng.integers(count, size=n)] for _ in range(args.samples)]

    one, batch, swapped = some(1), some(64), some(1)
    fetched = microseconds(lambda i: bank.gather(one[i]), args.samples)
    fetched_64 = microseconds(lambda i: bank.gather(batch[i]), args.samples)
    swaps = microseconds(lambda i: bank.swap(swapped[i][0], pool[i % 100]), args.samples)
    gone = [f"user-{i}" for i in rng.permutation(count)[: args.samples]]
    removals = microseconds(lambda i: bank.remove(gone[i]), len(gone))
    for name in gone:
        bank.add(name, pool[0])

    def pace(times: np.ndarray) -> str:
        return f"{b.number(np.median(times))} ({b.number(np.quantile(times, 0.99))})"

    held = points[-1][1]
    rows = {
        "adapters in the bank": f"{count:,}",
        "numbers of one": f"{numbers:,}",
        "bytes of one, in bf16": f"{2 * numbers:,}",
        "GB of prefixes and gates": b.number(bank.nbytes / 1e9),
        "GB that the process grew by": b.number(held),
        "bytes for the name and place of one": f"{(held * 1e9 - bank.nbytes) / count:,.0f}",
        "µs to add one": pace(np.concatenate(added)),
        "µs to look up and gather one": pace(fetched),
        "µs to look up and gather 64": pace(fetched_64),
        "µs to swap one": pace(swaps),
        "µs to remove one": pace(removals),
        "s to write the bank to a file": "not done",
        "s to open the file": "not done",
    }
    if bank.nbytes <= SAVED_BYTES:
        file = args.out_dir / f"bank-{width}.safetensors"
        began = time.perf_counter()
        bank.save(file)
        rows["s to write the bank to a file"] = b.number(time.perf_counter() - began)
        began = time.perf_counter()
        Bank.load(file).gather([gone[0]])
        rows["s to open the file"] = b.number(time.perf_counter() - began)
        file.unlink()
    return rows, points


def bank_table(found: dict[str, dict[str, str]]) -> str:
    names = next(iter(found.values()))
    return markdown_table(
        ["at the width of", *found], [[name, *(rows[name] for rows in found.values())] for name in names]
    )


def main(args: Settings) -> None:
    for name in ("batch_size", "prompt_tokens", "new_tokens", "rounds", "adapters", "samples"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it must be 1 or more.")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = pick_device(args.accelerator, args.precision)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rates = {size: measure_speed(args, size, device, dtype) for size in args.sizes}
    banks = {}
    for width in args.widths:  # each in a process of its own, whose memory is its own
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            banks[width] = process.submit(measure_bank, args, width).result()

    parts = [
        f"- what else the machine did: load {load:.1f} on {os.cpu_count()} cores before the run\n",
        "## Speed\n",
        f"{args.batch_size} prompts of {args.prompt_tokens} tokens as one batch, {args.new_tokens} new tokens each, "
        f"greedy, random weights in {str(dtype).removeprefix('torch.')}; median of {args.rounds} turns ± half the "
        "distance between the quartiles. Finding the adapters and projecting them is part of the time.\n",
    ]
    for size, found in rates.items():
        parts += [f"### {size}\n", speed_table(args, found)]
    parts += [
        "## Size and pace of a bank\n",
        f"Adapters of one token, at most {args.memory_gb:g} GB; times are medians, and 99 of 100 took no longer than "
        "what stands in brackets.\n",
        bank_table({width: rows for width, (rows, _) in banks.items()}),
    ]
    path = args.out_dir / "many-aligners"
    b.plot_bars(path.with_suffix(".png"), {f"tokens/s, {size}": found for size, found in rates.items()})
    curves = {f"adapters of one token at {width}'s width": {"measured": points} for width, (_, points) in banks.items()}
    b.plot_lines(args.out_dir / "many-aligners-memory.png", curves, "GB of main memory")
    b.write_report(path.with_suffix(".md"), "Many Aligners at once", parts, device)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    cli.run(main, Settings)
