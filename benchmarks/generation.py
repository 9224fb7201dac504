"""Speed of prefill and decoding, beside transformers, LitGPT and the bare base.

All take turns on the same model with random weights and the same random prompts, greedy, without a stop token. Decoding
is limited by memory: the bytes of weights and cache that a token needs, over the bandwidth of a copy in the same run.
The peers are installed from PyPI into the output folder.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import numpy as np

from benchmarks import harness as b
from benchmarks.material import alpaca_lengths, decode_bytes
from benchmarks.measure import compare, copy_bandwidth, with_interval
from benchmarks.report import plot_bars, publish
from lit_llama import cli
from lit_llama.settings import NonNegativeInt, PositiveInt, Range
from lit_llama.tables import markdown_table


@dataclass
class Settings(b.PeerSettings):
    # == What to measure ==
    prompt_length: PositiveInt = 64  # tokens of each prompt
    new_tokens: Annotated[int, Range(least=3)] = 32  # to generate; the first belongs to the prompt
    batch_sizes: tuple[PositiveInt, ...] = (1, 8, 64)  # prompts at a time
    one_by_one: NonNegativeInt = 64  # prompts of Alpaca's lengths, as one batch against one by one; 0 for none


BARE, N1 = "bare base", "Aligner N = 1"
OURS = {BARE: 0, N1: 1, "Aligner N = 10": 10, "Aligner N = 100": 100}
TARGETS = {N1: "≤ 1.01", "Aligner N = 10": "≤ 1.05"}  # of a decoding step over the bare base
HF = "transformers generate, static cache"
PEERS = {HF: dict(kind="transformers", method=""), "LitGPT generate": dict(kind="litgpt", method="")}
Times = dict[str, dict[str, list[float]]]  # contestant -> "prefill", "decode" -> seconds


def start(settings: Settings, run: b.Run, notes: list[str]) -> dict[str, b.Contestant]:
    specs = {name: {**run.shared, "kind": "ours", "n": n, "generates": True} for name, n in OURS.items()}
    if settings.peers:
        path = b.install_peers(settings.out_dir / "peers", notes)
        specs |= {name: {**run.shared, **peer, "path": path} for name, peer in PEERS.items()}
    return b.start_all(specs, notes)


def measure(settings: Settings, run: b.Run, contestants: dict[str, b.Contestant], notes: list[str]) -> dict[int, Times]:
    """Return the times of each batch size."""
    rng, found = np.random.default_rng(0), {}
    for size in settings.batch_sizes:
        prompts = rng.integers(3, run.config.vocab_size, (size, settings.prompt_length)).tolist()
        turns = {name: partial(contestant, "generate", prompts=prompts, n_new=settings.new_tokens)
                 for name, contestant in contestants.items()}  # fmt: skip
        _, answers = b.take_turns(turns, settings.rounds, notes)
        found[size] = {name: {what: [a[what] for a in own] for what in ("prefill", "decode")}
                       for name, own in answers.items()}  # fmt: skip
    return found


def measure_batching(settings: Settings, run: b.Run, contestant: b.Contestant, notes: list[str]) -> list[list[float]]:
    """Return the seconds for prompts of Alpaca's lengths one by one, and for all of them as one batch."""
    rng = np.random.default_rng(1)
    lengths, _ = alpaca_lengths(settings.one_by_one, run.config.block_size - settings.new_tokens)
    prompts = [rng.integers(3, run.config.vocab_size, n).tolist() for n in lengths]
    turns = {str(size): partial(contestant, "answer_all", prompts=prompts, n_new=settings.new_tokens, batch_size=size)
             for size in (1, len(prompts))}  # fmt: skip
    _, answers = b.take_turns(turns, max(1, settings.rounds // 2), notes)
    return [[answer["seconds"] for answer in own] for own in answers.values()]


def tables(settings: Settings, run: b.Run, found: dict[int, Times], batching: list[list[float]]) -> list[str]:
    new = settings.new_tokens - 1  # the first belongs to the prefill
    bandwidth = copy_bandwidth(run.device, settings.clock)
    context = settings.prompt_length + settings.new_tokens / 2
    rows, ratios = [], []
    for size, times in found.items():
        limit = size * bandwidth / decode_bytes(run.config, run.dtype, size, context)
        for name, own in times.items():
            decode = [size * new / seconds for seconds in own["decode"]]
            prefill = [size * settings.prompt_length / seconds for seconds in own["prefill"]]
            share = f"{np.median(decode) / limit:.0%}"
            rows.append([f"{size}, {name}", with_interval(prefill), with_interval(decode), share])
            if name in OURS and name != BARE:
                what = f"decode step, batch {size}, {name} over the bare base"
                ratios.append([what, TARGETS.get(name, ""), *compare(own["decode"], times[BARE]["decode"])])
            elif name in PEERS:
                target = "≥ 2" if name == HF and size == 1 and run.device.type == "cpu" else ""
                what = f"decode tokens/s, batch {size}, N = 1 over {name}"
                ratios.append([what, target, *compare(own["decode"], times[N1]["decode"], 2)])
            if name == N1 and run.device.type == "cuda":
                ratios.append([f"decode, batch {size}, share of the bandwidth limit", "≥ 85 %", share, ""])
    if batching:
        target = "≥ 20" if run.device.type == "cuda" else "≥ 4"
        what = f"tokens/s, {settings.one_by_one} prompts as one batch over one by one"
        ratios.append([what, target, *compare(*batching, 1)])
    heads = ["batch", "prefill, tokens/s", "decode, tokens/s", "of the bandwidth limit"]
    return [
        f"## {settings.prompt_length} tokens, then {settings.new_tokens} more\n\n{markdown_table(heads, rows)}",
        "## Ratios\n\n" + markdown_table(["what", "target", "measured (interval)", "verdict"], ratios),
        f"The bandwidth limit is that of a copy in the same run: {bandwidth / 1e9:,.1f} GB/s, read and written.",
    ]


def main(settings: Settings) -> None:
    run, notes = b.start_run(settings), []
    contestants = start(settings, run, notes)
    found = measure(settings, run, contestants, notes)
    batching = measure_batching(settings, run, contestants[N1], notes) if settings.one_by_one else []
    for contestant in contestants.values():
        contestant.close()
    path = settings.out_dir / f"generation-{settings.size}.md"
    plot_bars(path.with_suffix(".png"), {
        f"decode, tokens/s, batch {size}": {
            name: [size * (settings.new_tokens - 1) / seconds for seconds in own["decode"]]
            for name, own in times.items()
        }
        for size, times in found.items()
    })  # fmt: skip
    parts = tables(settings, run, found, batching)
    publish(path, f"Generation, {settings.size}, {run.shared['precision']}", [*parts, *notes], run.device)


if __name__ == "__main__":
    cli.run(main, Settings)
