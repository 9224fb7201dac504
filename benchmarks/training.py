"""How fast and how small a training step is, beside PEFT, LitGPT and the bare base: a Markdown table and a plot.

All take turns on the same model with random weights and the same random tokens of Alpaca's lengths. The bare base,
forward and backward through the frozen layers alone, is the limit. Each is a process of its own, so its memory is its
own. The peers are installed from PyPI into a throw-away environment inside the out folder.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import numpy as np
import torch

from benchmarks import harness as b
from lit_llama import cli
from lit_llama.data import plan_epoch
from lit_llama.model import LLaMAConfig
from lit_llama.report import markdown_table
from lit_llama.utils import UserError, log


@dataclass
class Settings:
    # == What to measure ==
    size: str = "110M"  # 110M, or a name of lit_llama.model.llama_configs: microworld, Llama-2-7B, ...
    max_length: int = 512  # tokens; longer rows are cut
    micro_batch_size: int = 8  # rows of a forward pass
    micro_batches: int = 2  # of a step
    rounds: int = 5  # every contestant has so many turns of one step
    peers: bool = True  # install and measure PEFT and LitGPT
    dpo: bool = True  # DPO against SFT at equal tokens
    growth: bool = True  # cost against length, N, layers and batch
    out_dir: Path = Path("out/benchmark")  # tables, plots, random weights, the peers' environment

    # == Device ==
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda
    precision: str = "auto"  # of the base: 32, bf16; auto is bf16 on GPUs that have it, else 32
    threads: int = 0  # of each process on a CPU; 0 is PyTorch's own choice
    clock: b.Clock = "wall"  # or cpu: processor seconds, for a CPU that others use too; needs --threads 1


BARE, N1, N10 = "bare base (limit)", "Aligner N = 1", "Aligner N = 10"
BF16 = "Aligner N = 1, bf16 base"
PEERS = {
    "PEFT LoRA r = 8": dict(kind="transformers", method="lora"),
    "PEFT adaption_prompt": dict(kind="transformers", method="adaption_prompt"),
    "LitGPT adapter": dict(kind="litgpt", method="adapter"),
}
PARTS = ("data", "forward", "backward", "optimiser")


def choose(lengths: np.ndarray, size: int, count: int) -> dict[str, list[np.ndarray]]:
    """Micro-batches that stand for an epoch of ours, and for one in random order: the middle ones of `count` parts.

    An epoch's own order would be a matter of luck in so few; ours are taken evenly by length, the random ones evenly
    by the tokens they compute.
    """
    ours = [rows for step in plan_epoch(lengths, size * 8, size, 0, 0) for rows in step if len(rows) == size]
    order = np.random.default_rng(0).permutation(len(lengths))
    random = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    chosen = {}
    for name, batches in (("grouped", ours), ("random", random)):
        batches = sorted(batches, key=lambda rows: lengths[rows].max())
        chosen[name] = [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]
    return chosen


def specs(args: Settings, settings: dict[str, Any], notes: list[str]) -> dict[str, dict[str, Any]]:
    """The settings of every contestant's process."""
    found: dict[str, dict[str, Any]] = {
        name: {**settings, "kind": "ours", "n": n} for name, n in ((BARE, 0), (N1, 1), (N10, 10))
    }
    if settings["precision"] == "32":
        found[BF16] = {**settings, "kind": "ours", "n": 1, "precision": "bf16"}
    if args.peers:
        python = b.make_peers(args.out_dir / "peers")
        notes.append(b.peer_versions(python))
        found |= {name: {**settings, "python": python, **own} for name, own in PEERS.items()}
    return found


def measure(args: Settings, config: LLaMAConfig, settings: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """{turn: {"contestant", "batches", "steps": [answers], "peak": {...}}}; a turn is a contestant on some batches."""
    prompts, lengths = b.alpaca_lengths(1024, min(args.max_length, config.block_size))
    b.write_data(Path(settings["data"]), prompts, lengths, config.vocab_size)
    chosen = choose(lengths, args.micro_batch_size, args.micro_batches)
    contestants = b.start_all(specs(args, settings, notes), notes)
    turns = {}
    for name in contestants:
        turns[name] = {"contestant": name, "batches": chosen["grouped"], "kind": "sft"}
        if name in PEERS:
            turns[f"{name}, own batches"] = {"contestant": name, "batches": chosen["random"], "kind": "sft"}
    if args.dpo:
        half = [rows[: max(1, len(rows) // 2)] for rows in chosen["grouped"]]
        pair_specs = {
            "SFT on the pairs": {**settings, "kind": "ours", "n": 1},
            "DPO, cached reference": {**settings, "kind": "ours", "n": 1},
        }
        contestants |= b.start_all(pair_specs, notes)
        for name, kind in zip(pair_specs, ("sft of pairs", "dpo"), strict=True):
            turns[name] = {"contestant": name, "batches": half, "kind": kind}
    for round in range(-1, args.rounds):  # the first is not counted
        for name, turn in turns.items():
            contestant = contestants[turn["contestant"]]
            contestant("forget_peak")
            answer = contestant("step", micro_batches=[rows.tolist() for rows in turn["batches"]], kind=turn["kind"])
            turn.setdefault("steps", []).append(answer)
            turn["memory"] = contestant("peak")
            log(f"round {round + 1} of {args.rounds}, {name}: {sum(answer['seconds'].values()):.2f} s")
    for turn in turns.values():
        turn["first_loss"] = turn["steps"][0]["loss"]
        turn["steps"] = turn["steps"][1:]
        turn["seconds"] = [sum(step["seconds"].values()) for step in turn["steps"]]
        sequences = 1 if turn["kind"] == "sft" else 2
        turn["lengths"] = np.concatenate([lengths[rows] for rows in turn["batches"]] * sequences)
        turn["tokens"] = int(turn["lengths"].sum())
        turn["waste"] = b.padding_waste(lengths, turn["batches"])
        turn["rate"] = [turn["tokens"] / s for s in turn["seconds"]]
    for contestant in contestants.values():
        contestant.close()
    return turns


def tables(args: Settings, config: LLaMAConfig, turns: dict[str, Any], peak: dict[str, float]) -> list[str]:
    """The report's parts."""
    rows = []
    for name, turn in turns.items():
        precision = "bf16" if name == BF16 else args.precision
        used = b.training_flops(config, turn["lengths"])
        parts = [np.median([step["seconds"][part] for step in turn["steps"]]) for part in PARTS]
        rows.append([
            name,
            b.with_spread(turn["rate"]),
            f"{turn['waste']:.1%}",
            b.number(turn["memory"]["beyond"] / 1e6),
            f"{used / np.median(turn['seconds']) / peak[precision]:.0%}",
            *(b.number(1000 * part) for part in parts),
        ])  # fmt: skip
    header = ["", "tokens/s", "padding", "MB beyond the weights", "MFU", *(f"{part}, ms" for part in PARTS)]
    parts = [f"## A step of {args.micro_batches} × {args.micro_batch_size} rows\n", markdown_table(header, rows)]

    comparisons = []

    def compare(what: str, one: str, other: str, target: str, inverse: bool = False) -> None:
        if one in turns and other in turns:
            key = "rate" if inverse else "per_token"
            for turn in (turns[one], turns[other]):
                turn["per_token"] = [1 / rate for rate in turn["rate"]]
            middle, spread = b.ratio(turns[one][key], turns[other][key])
            comparisons.append([what, target, f"{middle:.3f} ± {spread:.3f}"])

    compare("time per token, N = 1 over the bare base", N1, BARE, "≤ 1.01")
    compare("time per token, N = 10 over the bare base", N10, BARE, "≤ 1.05")
    on_gpu = args.device.type == "cuda"
    aim = "≥ 1.3" if on_gpu else "≥ 1.2"
    for suffix, what in (("", "on the same batches"), (", own batches", "on its own batches")):
        found = [name + suffix for name in PEERS if name + suffix in turns]
        if found:
            fastest = max(found, key=lambda name: np.median(turns[name]["rate"]))
            compare(f"tokens/s, N = 1 over {fastest.removesuffix(suffix)} {what}", N1, fastest, aim, inverse=True)
            leanest = min(found, key=lambda name: turns[name]["memory"]["beyond"])
            share = turns[N1]["memory"]["beyond"] / turns[leanest]["memory"]["beyond"]
            comparisons.append([f"memory beyond the weights, N = 1 over {leanest}", "≤ 0.5", f"{share:.2f}"])
    compare("tokens/s, bf16 base over fp32 base", BF16, N1, "≥ 1.8", inverse=True)
    sft, dpo_turn = turns.get("SFT on the pairs"), turns.get("DPO, cached reference")
    if sft and dpo_turn:
        compare("time, DPO over SFT", "DPO, cached reference", "SFT on the pairs", "≤ 1.05")
        comparisons.append([
            "peak memory, DPO over SFT", "≤ 1.1", f"{dpo_turn['memory']['peak'] / sft['memory']['peak']:.3f}",
        ])  # fmt: skip
    _, lengths = b.alpaca_lengths(51760, min(2048, args.max_length), seed=1)
    epoch = [rows for step in plan_epoch(lengths, 64, args.micro_batch_size, 0, 0) for rows in step]
    random = np.array_split(np.random.default_rng(0).permutation(len(lengths)), len(epoch))
    waste = b.padding_waste(lengths, epoch)
    comparisons.append(["padding of an epoch of 51,760 rows, batches of 64", "≤ 5 %", f"{waste:.1%}"])
    comparisons.append(["the same in random order", "", f"{b.padding_waste(lengths, random):.1%}"])
    return [*parts, "## Ratios\n", markdown_table(["what", "target", "measured"], comparisons)]


def measure_growth(args: Settings, settings: dict[str, Any]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{cause: {curve: [(value, seconds of a forward and backward pass)]}} on narrower models of random weights."""
    contestant = b.Contestant("growth", **{**settings, "kind": "ours", "n": 1})
    large = args.device.type == "cuda"
    config = dict(block_size=4096, vocab_size=4096, n_layer=8, n_head=16 if large else 4, n_embd=2048 if large else 256)
    steps = {
        "tokens of a row": [("T", t) for t in (64, 128, 256, 512, 1024)],
        "prefix tokens N": [("N", n) for n in (1, 10, 100, 200, 300)],
        "layers": [("layers", n) for n in (4, 6, 8, 12)],
        "rows of a batch": [("B", n) for n in (1, 2, 4, 8)],
    }
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for cause, values in steps.items():
        found[cause] = {}
        for curve, own in {"bare base": 0, "N = 1": 1}.items():
            if cause == "prefix tokens N" and curve != "N = 1":
                continue
            points = []
            for what, value in values:
                n = value if what == "N" else own
                layers = value if what == "layers" else 8
                contestant("build", n=n, config={**config, "n_layer": layers})
                rows, length = (value if what == "B" else 2), (value if what == "T" else 256)
                points.append((value, contestant("random_step", rows=rows, length=length)["seconds"]))
            found[cause]["Aligner" if cause == "prefix tokens N" else curve] = points
    contestant.close()
    return found


def growth_table(found: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    rows = [
        [f"{cause}: {', '.join(str(value) for value, _ in points)}", curve,
         ", ".join(b.number(1000 * seconds) for _, seconds in points)]
        for cause, curves in found.items() for curve, points in curves.items()
    ]  # fmt: skip
    return markdown_table(["cause", "", "ms"], rows)


def main(args: Settings) -> None:
    if args.micro_batch_size < 2:
        raise UserError(f"micro_batch_size is {args.micro_batch_size}; two rows make a pair, so it must be 2 or more.")
    config, settings = b.set_up(args)
    settings["data"] = args.out_dir / "data"
    notes: list[str] = []
    peak = {
        "32": b.matmul_rate(args.device, torch.float32, args.clock),
        "bf16": b.matmul_rate(args.device, torch.bfloat16, args.clock),
    }
    turns = measure(args, config, settings, notes)
    parts = tables(args, config, turns, peak)
    losses = {name: turn["first_loss"] for name, turn in turns.items() if turn["kind"] == "sft"}
    notes.append(
        "MFU counts 4 FLOPs per weight and token and causal attention, of the rate of a large matrix product in the "
        f"same run: {peak['32'] / 1e9:,.0f} GFLOP/s in fp32, {peak['bf16'] / 1e9:,.0f} in bf16."
    )
    notes.append("Loss of the first step: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) + ".")
    path = args.out_dir / f"training-{args.size}"
    b.plot_bars(path.with_suffix(".png"), {
        "tokens/s": {name: turn["rate"] for name, turn in turns.items()},
        "MB beyond the weights": {name: [turn["memory"]["beyond"] / 1e6] for name, turn in turns.items()},
    })  # fmt: skip
    if args.growth:
        found = measure_growth(args, settings)
        parts += ["## Growth\n", growth_table(found)]
        b.plot_lines(path.with_name(f"growth-{args.size}.png"), found, "seconds, forward and backward")
    b.write_report(path.with_suffix(".md"), f"Training, {args.size}", [*parts, *(f"{n}\n" for n in notes)], args.device)
    print(path.with_suffix(".md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    cli.run(main, Settings)
