"""Speed and memory of a training step, compared with PEFT, LitGPT and the bare base.

All take turns on the same model with random weights and the same random tokens of Alpaca's lengths. The bare base,
forward and backward through the frozen layers alone, is the limit. Each contestant has its own process, so that its
memory can be measured separately; on a CPU a peer has one for each kind of batches. The peers are installed from PyPI
into the output folder.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks.settings import PeerSettings
from lit_llama import cli
from lit_llama.settings import PositiveInt, Range


@dataclass
class Settings(PeerSettings):
    # == What to measure ==
    max_length: PositiveInt = 512  # tokens; longer rows are truncated
    micro_batch_size: Annotated[int, Range(least=2)] = 8  # rows of a forward pass; two make a pair
    micro_batches: PositiveInt = 2  # per step
    dpo: bool = True  # compare DPO with SFT on equally many tokens
    growth: bool = True  # measure how the cost grows with length, N, layers and batch size


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np
import torch

from benchmarks import harness as b
from benchmarks.material import alpaca_lengths, padding_share, training_flops, write_data
from benchmarks.measure import compare, matmul_rate, number, ratio_table, with_interval
from lit_llama.epochs import plan_epoch
from lit_llama.tables import markdown_table

BARE, N1, N10 = "bare base (limit)", "Aligner N = 1", "Aligner N = 10"
BF16 = "Aligner N = 1, bf16 base"
CHECKPOINTED = "Aligner N = 1, gradient checkpointing"
SFT_PAIRS, DPO_PAIRS = "SFT on the pairs", "DPO, cached reference"
PAIRS = {SFT_PAIRS: "sft", DPO_PAIRS: "dpo"}  # losses on pairs of responses
PEERS = {
    "PEFT LoRA r = 8": dict(kind="transformers", method="lora"),
    "PEFT adaption_prompt": dict(kind="transformers", method="adaption_prompt"),
    "LitGPT adapter": dict(kind="litgpt", method="adapter"),
}
OWN_BATCHES = ", own batches"  # suffix of a peer's name
PARTS = ("data", "forward", "backward", "optimizer")
USUAL = {"tokens of a row": 256, "layers": 8, "rows of a batch": 2}
GROWTH = {
    "tokens of a row": (64, 128, 256, 512, 1024),
    "prefix tokens N": (1, 10, 100, 200, 300),
    "layers": (4, 6, 8, 12),
    "rows of a batch": (1, 2, 4, 8),
}
Growth = dict[str, dict[str, list[tuple[float, float]]]]  # cause -> curve -> (value, seconds)


def choose(lengths: np.ndarray, size: int, count: int) -> dict[str, list[np.ndarray]]:
    """Return micro-batches that represent an epoch in this project's order ("grouped") and in random order ("random").

    The micro-batches of an epoch are sorted by their longest row and divided into `count` equal parts; the middle one
    of each part is returned. The first few of an epoch would not represent it.
    """
    ours = [rows for step in plan_epoch(lengths, size * 8, size, 0, 0) for rows in step if len(rows) == size]
    order = np.random.default_rng(0).permutation(len(lengths))
    random = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    chosen = {}
    for name, batches in (("grouped", ours), ("random", random)):
        batches = sorted(batches, key=lambda rows: lengths[rows].max())
        chosen[name] = [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]
    return chosen


def our_contestants(settings: Settings, dtype: torch.dtype, peak: dict[torch.dtype, float]) -> b.Specs:
    """Return this project's contestants.

    A bf16 base is one of them if products in bf16 are not several times as slow as in fp32, as on a CPU that emulates
    bf16.

    Args:
        peak: FLOPs per second of a large matrix product in each dtype.
    """
    ours = {BARE: {"n": 0}, N1: {"n": 1}, N10: {"n": 10}, CHECKPOINTED: {"n": 1, "checkpointing": True}}
    if dtype == torch.float32 and peak[torch.bfloat16] > peak[dtype] / 4:
        ours[BF16] = {"n": 1, "dtype": torch.bfloat16}
    return ours | ({name: {"n": 1} for name in PAIRS} if settings.dpo else {})


def measure(run: b.Run, ours: b.Specs) -> tuple[dict[str, dict[str, Any]], b.Answers]:
    """Return the first step and the measured steps of every contestant; peers also run on randomly ordered batches.

    Args:
        ours: This project's contestants, all or some of `our_contestants`.
    """
    settings = run.settings
    prompts, lengths = alpaca_lengths(1024, min(settings.max_length, run.config.block_size))
    run.shared["data"] = settings.out_dir / "data"
    write_data(run.shared["data"], prompts, lengths, run.config.vocab_size)
    batches = choose(lengths, settings.micro_batch_size, settings.micro_batches)
    half = [rows[: max(1, len(rows) // 2)] for rows in batches["grouped"]]
    own = {name + OWN_BATCHES: spec for name, spec in PEERS.items()}
    on_gpu = run.device.type == "cuda"  # where models are large, and the peak of one step does not affect the next
    with run.contestants(ours, PEERS if on_gpu else PEERS | own) as contestants:
        turns = {}
        for name, contestant in contestants.items():
            if name in PAIRS:
                turns[name] = partial(contestant, "step", batches=half, data="pairs", loss=PAIRS[name])
                continue
            turns[name] = partial(contestant, "step", batches=batches["random" if name in own else "grouped"])
            if on_gpu and name in PEERS:
                turns[name + OWN_BATCHES] = partial(contestant, "step", batches=batches["random"])
        return b.take_turns(turns, settings.rounds, run.notes)


def tokens_per_second(steps: list[dict[str, Any]]) -> list[float]:
    return [step["lengths"].sum() / sum(step["seconds"].values()) for step in steps]


def step_table(run: b.Run, answers: b.Answers, peak: dict[torch.dtype, float]) -> str:
    rows = []
    for name, steps in answers.items():
        last, rates = steps[-1], tokens_per_second(steps)
        flops = np.median(rates) / last["lengths"].sum() * training_flops(run.config, last["lengths"])
        rows.append([
            name,
            with_interval(rates),
            f"{last['padding']:.1%}",
            number(last["beyond"] / 1e6),
            f"{flops / peak[torch.bfloat16 if name == BF16 else run.dtype]:.0%}",
            *(number(1000 * np.median([step["seconds"][part] for step in steps])) for part in PARTS),
        ])  # fmt: skip
    heads = ["", "tokens/s", "padding", "MB beyond the weights", "MFU", *(f"{part}, ms" for part in PARTS)]
    size = f"{run.settings.micro_batches} × {run.settings.micro_batch_size}"
    return f"## A step of {size} rows\n\n{markdown_table(heads, rows)}"


def ratios(run: b.Run, answers: b.Answers) -> list[list[str]]:
    """Return the rows of the table of ratios."""
    rates, rows = {name: tokens_per_second(steps) for name, steps in answers.items()}, []

    def ratio(what: str, target: str, one: str, other: str) -> None:
        if one in rates and other in rates:
            rows.append([what, target, *compare(rates[one], rates[other])])

    def memory(what: str, target: str, one: str, other: str, key: str) -> None:
        rows.append([what, target, f"{answers[one][-1][key] / answers[other][-1][key]:.2f}", ""])

    ratio("time per token, N = 1 over the bare base", "≤ 1.01", BARE, N1)
    ratio("time per token, N = 10 over the bare base", "≤ 1.05", BARE, N10)
    for suffix, what in (("", "on the same batches"), (OWN_BATCHES, "on its own batches")):
        if peers := [name + suffix for name in PEERS if name + suffix in rates]:
            fastest = max(peers, key=lambda name: np.median(rates[name]))
            leanest = min(peers, key=lambda name: answers[name][-1]["beyond"])
            ratio(f"tokens/s, N = 1 over {fastest.removesuffix(suffix)} {what}", "≥ 1.3", N1, fastest)
            memory(f"memory beyond the weights, N = 1 over {leanest}", "≤ 0.5", N1, leanest, "beyond")
            if CHECKPOINTED in rates and not suffix:
                ratio(f"tokens/s, with gradient checkpointing over {fastest} without", "", CHECKPOINTED, fastest)
                label = f"memory, with gradient checkpointing over {leanest} without"
                memory(label, "≤ 0.5", CHECKPOINTED, leanest, "beyond")
    ratio("tokens/s, bf16 base over fp32 base", "≥ 1.8", BF16, N1)
    if run.settings.dpo:
        ratio("time, DPO over SFT", "≤ 1.05", SFT_PAIRS, DPO_PAIRS)
        memory("peak memory, DPO over SFT", "≤ 1.1", DPO_PAIRS, SFT_PAIRS, "peak")
    return rows


def paddings(settings: Settings) -> list[list[str]]:
    """Return the rows about the padding of an epoch."""
    _, lengths = alpaca_lengths(51760, min(2048, settings.max_length), seed=1)
    epoch = [rows for step in plan_epoch(lengths, 64, settings.micro_batch_size, 0, 0) for rows in step]
    random = np.array_split(np.random.default_rng(0).permutation(len(lengths)), len(epoch))
    grouped, shuffled = (f"{padding_share(lengths, batches):.1%}" for batches in (epoch, random))
    return [
        ["padding of an epoch of 51,760 rows, batches of 64", "≤ 5%", grouped, ""],
        ["the same in random order", "", shuffled, ""],
    ]


def measure_growth(run: b.Run) -> Growth:
    """Return the seconds of a forward and backward pass against one cause at a time, on narrower random models."""
    large = run.device.type == "cuda"
    config = dict(block_size=4096, vocab_size=4096, n_head=16 if large else 4, n_embd=2048 if large else 256)

    def seconds(n: int, cause: str, value: int) -> float:
        length, layers, rows, n = {**USUAL, "prefix tokens N": n, cause: value}.values()
        contestant("build", n=n, config={**config, "n_layer": layers})
        steps = [contestant("step", batches=[(rows, length, length // 2)], data="random") for _ in range(2)]
        return min(step["seconds"]["forward"] + step["seconds"]["backward"] for step in steps)

    growth: Growth = {}
    with closing(b.Contestant("growth", **run.shared, kind="ours", n=1)) as contestant:
        for cause, values in GROWTH.items():
            curves = {"Aligner": 1} if cause == "prefix tokens N" else {"bare base": 0, "N = 1": 1}
            growth[cause] = {name: [(x, seconds(n, cause, x)) for x in values] for name, n in curves.items()}
    return growth


def growth_table(growth: Growth) -> str:
    rows = []
    for cause, curves in growth.items():
        for curve, points in curves.items():
            values, seconds = zip(*points, strict=True)
            cells = [f"{cause}: {', '.join(map(str, values))}", curve, ", ".join(number(1000 * s) for s in seconds)]
            rows.append(cells)
    return "## Growth\n\n" + markdown_table(["cause", "", "ms"], rows)


def main(settings: Settings) -> None:
    run = b.start_run(settings)
    dtypes = {torch.float32, torch.bfloat16, run.dtype}
    peak = {dtype: matmul_rate(run.device, dtype, settings.clock) for dtype in dtypes}
    ours = our_contestants(settings, run.dtype, peak)
    if run.dtype == torch.float32 and BF16 not in ours:
        run.notes.append("Without a bf16 base: this machine emulates bf16.")
    first, answers = measure(run, ours)
    parts = [step_table(run, answers, peak), ratio_table(ratios(run, answers) + paddings(settings))]
    b.plot_bars(run.path("training", ".png"), {
        "tokens/s": {name: tokens_per_second(steps) for name, steps in answers.items()},
        "MB beyond the weights": {name: [steps[-1]["beyond"] / 1e6] for name, steps in answers.items()},
    })  # fmt: skip
    if settings.growth:
        growth = measure_growth(run)
        parts.append(growth_table(growth))
        b.plot_lines(run.path("growth", ".png"), growth, "seconds, forward and backward")
    losses = ", ".join(f"{name} {step['loss']:.4f}" for name, step in first.items() if name not in PAIRS)
    run.notes += [
        "MFU counts 4 FLOPs per weight and token and causal attention, of the rate of a large matrix product in the "
        f"same run: {peak[torch.float32] / 1e9:,.0f} GFLOP/s in fp32, {peak[torch.bfloat16] / 1e9:,.0f} in bf16.",
        f"Loss of the first step: {losses}.",
    ]
    run.publish("Training", parts)


if __name__ == "__main__":
    cli.run(main, settings)
