"""How fast tokens come, beside transformers, LitGPT and the bare base: a Markdown table and a plot.

All take turns on the same model with random weights and the same random prompts, greedy, without an end. The limit of
decoding is memory: the bytes of weights and cache that a token needs, over the bandwidth of a copy in the same run.
The peers are installed from PyPI into a throw-away environment inside the out folder.
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
from lit_llama.model import LLaMAConfig
from lit_llama.report import markdown_table
from lit_llama.utils import UserError, log


@dataclass
class Settings:
    # == What to measure ==
    size: str = "110M"  # 110M, or a name of lit_llama.model.llama_configs: microworld, Llama-2-7B, ...
    prompt_length: int = 64  # tokens of each prompt
    new_tokens: int = 32  # to generate
    batch_sizes: tuple[int, ...] = (1, 8, 64)  # prompts at a time
    rounds: int = 5  # every contestant has so many turns of each batch size
    peers: bool = True  # install and measure transformers and LitGPT
    one_by_one: int = 64  # prompts of Alpaca's lengths, as one batch against one by one; 0 for none
    out_dir: Path = Path("out/benchmark")  # tables, plots, random weights, the peers' environment

    # == Device ==
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda
    precision: str = "auto"  # of the base: 32, bf16; auto is bf16 on GPUs that have it, else 32
    threads: int = 0  # of each process on a CPU; 0 is PyTorch's own choice
    clock: b.Clock = "wall"  # or cpu: processor seconds, for a CPU that others use too; needs --threads 1


BARE, N1 = "bare base", "Aligner N = 1"
OURS = {BARE: 0, N1: 1, "Aligner N = 10": 10, "Aligner N = 100": 100}
HF = "transformers generate, static cache"
PEERS = {HF: dict(kind="transformers", method=""), "LitGPT generate": dict(kind="litgpt", method="")}


def measure(args: Settings, config: LLaMAConfig, settings: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """{contestant: {batch size: {"prefill": [seconds], "decode": [seconds]}}}, and the 64 prompts both ways."""
    specs: dict[str, dict[str, Any]] = {
        name: {**settings, "kind": "ours", "n": n, "generates": True} for name, n in OURS.items()
    }
    if args.peers:
        python = b.make_peers(args.out_dir / "peers")
        notes.append(b.peer_versions(python))
        specs |= {name: {**settings, "python": python, **own} for name, own in PEERS.items()}
    contestants = b.start_all(specs, notes)
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {name: {} for name in contestants}
    for batch_size in args.batch_sizes:
        prompts = rng.integers(3, config.vocab_size, (batch_size, args.prompt_length)).tolist()
        for round in range(-1, args.rounds):  # the first is not counted
            for name, contestant in contestants.items():
                n_new = args.new_tokens if round >= 0 else 2
                answer = contestant("generate", prompts=prompts, n_new=n_new)
                if round >= 0:
                    times = found[name].setdefault(batch_size, {"prefill": [], "decode": []})
                    for what in times:
                        times[what].append(answer[what])
        log(f"batch {batch_size}: done")
    if args.one_by_one:
        lengths, _ = b.alpaca_lengths(args.one_by_one, config.block_size - args.new_tokens)
        prompts = [rng.integers(3, config.vocab_size, n).tolist() for n in lengths]
        found["one by one"] = []
        for _ in range(max(1, args.rounds // 2)):
            whole, each = (contestants[N1]("answer_all", prompts=prompts, n_new=args.new_tokens, batch_size=size)
                           for size in (len(prompts), 1))  # fmt: skip
            found["one by one"].append((whole["seconds"], each["seconds"]))
    for contestant in contestants.values():
        contestant.close()
    return found


def tables(args: Settings, config: LLaMAConfig, found: dict[str, Any], bandwidth: float) -> list[str]:
    """The report's parts."""
    new = args.new_tokens - 1  # of which the first belongs to the prefill
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    context = args.prompt_length + args.new_tokens / 2
    names = [name for name in found if name != "one by one"]
    rows, limits = [], []
    for size in args.batch_sizes:
        limit = size * bandwidth / b.decode_bytes(config, dtype, size, context)
        limits.append(limit)
        for name in names:
            times = found[name][size]
            decode = [size * new / s for s in times["decode"]]
            prefill = [size * args.prompt_length / s for s in times["prefill"]]
            rows.append([f"{size}, {name}", b.with_spread(prefill), b.with_spread(decode),
                         f"{np.median(decode) / limit:.0%}"])  # fmt: skip
    header = ["batch", "prefill, tokens/s", "decode, tokens/s", "of the bandwidth limit"]
    parts = [f"## {args.prompt_length} tokens, then {args.new_tokens} more\n", markdown_table(header, rows)]

    comparisons = []
    smallest = args.batch_sizes[0]
    for size in args.batch_sizes:
        for name in names:
            if name in OURS and name != BARE:
                target = {"Aligner N = 1": "≤ 1.01", "Aligner N = 10": "≤ 1.05"}.get(name, "")
                middle, spread = b.ratio(found[name][size]["decode"], found[BARE][size]["decode"])
                comparisons.append([f"decode step, batch {size}, {name} over the bare base", target,
                                    f"{middle:.3f} ± {spread:.3f}"])  # fmt: skip
        for name in PEERS:
            if name in found:
                middle, spread = b.ratio(found[name][size]["decode"], found[N1][size]["decode"])
                target = "≥ 2" if name == HF and size == 1 and args.device.type == "cpu" else ""
                comparisons.append([f"decode tokens/s, batch {size}, N = 1 over {name}", target,
                                    f"{middle:.2f} ± {spread:.2f}"])  # fmt: skip
    if args.device.type == "cuda":
        rate = np.median([smallest * new / s for s in found[N1][smallest]["decode"]])
        comparisons.append([f"decode, batch {smallest}, share of the bandwidth limit", "≥ 85 %",
                            f"{rate / limits[0]:.0%}"])  # fmt: skip
    if args.one_by_one:
        target = "≥ 20" if args.device.type == "cuda" else "≥ 4"
        middle, spread = b.median_and_spread([each / whole for whole, each in found["one by one"]])
        comparisons.append([f"tokens/s, {args.one_by_one} prompts as one batch over one by one", target,
                            f"{middle:.1f} ± {spread:.1f}"])  # fmt: skip
    return [*parts, "## Ratios\n", markdown_table(["what", "target", "measured"], comparisons)]


def main(args: Settings) -> None:
    if args.new_tokens < 3:
        raise UserError(f"new_tokens is {args.new_tokens}; the first belongs to the prompt, so it must be 3 or more.")
    config, settings = b.set_up(args)
    bandwidth = b.copy_bandwidth(args.device, args.clock)
    notes = [f"The bandwidth limit is that of a copy in the same run: {bandwidth / 1e9:,.1f} GB/s, read and written."]
    found = measure(args, config, settings, notes)
    parts = tables(args, config, found, bandwidth)
    path = args.out_dir / f"generation-{args.size}"
    new = args.new_tokens - 1
    b.plot_bars(path.with_suffix(".png"), {
        f"decode, tokens/s, batch {size}": {
            name: [size * new / s for s in found[name][size]["decode"]] for name in found if name != "one by one"
        }
        for size in args.batch_sizes
    })  # fmt: skip
    report = path.with_suffix(".md")
    b.write_report(
        report, f"Generation, {args.size}, {args.precision}", [*parts, *(f"{n}\n" for n in notes)], args.device
    )
    print(report.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    cli.run(main, Settings)
