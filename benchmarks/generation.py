"""Speed of prefill and decoding, compared with transformers, LitGPT and the bare base.

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

from benchmarks.settings import PeerSettings
from lit_llama import cli
from lit_llama.settings import NonNegativeInt, PositiveInt, Range


@dataclass
class Settings(PeerSettings):
    # == What to measure ==
    prompt_length: PositiveInt = 64  # tokens of each prompt
    new_tokens: Annotated[int, Range(least=3)] = 32  # tokens to generate; the first is part of prefill
    batch_sizes: tuple[PositiveInt, ...] = (1, 8, 64)  # prompts at a time
    one_by_one: NonNegativeInt = 64  # prompts of Alpaca's lengths, as one batch against one by one; 0 skips this


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np

from benchmarks import harness as b
from benchmarks.material import alpaca_lengths, decode_bytes
from benchmarks.measure import compare, copy_bandwidth, ratio_table, with_interval
from lit_llama.tables import markdown_table

BARE, N1 = "bare base", "Aligner N = 1"
LENGTHS = {BARE: 0, N1: 1, "Aligner N = 10": 10, "Aligner N = 100": 100}
OURS = {name: dict(n=n, generates=True) for name, n in LENGTHS.items()}
TARGETS = {N1: "≤ 1.01", "Aligner N = 10": "≤ 1.05"}  # of a decoding step over the bare base
HF = "transformers generate, static cache"
PEERS = {HF: dict(kind="transformers", method=""), "LitGPT generate": dict(kind="litgpt", method="")}
Times = dict[str, dict[str, list[float]]]  # contestant -> "prefill", "decode" -> seconds


def measure(run: b.Run, contestants: dict[str, b.Contestant], size: int) -> Times:
    """Return the times of a batch size."""
    settings = run.settings
    prompts = np.random.default_rng(0).integers(3, run.config.vocab_size, (size, settings.prompt_length)).tolist()
    turns = {
        name: partial(contestant, "generate", prompts=prompts, n_new=settings.new_tokens)
        for name, contestant in contestants.items()
    }
    _, results = b.take_turns(turns, settings.rounds, run.notes)
    return {
        name: {what: [answer[what] for answer in answers] for what in ("prefill", "decode")}
        for name, answers in results.items()
    }


def measure_batching(run: b.Run, contestant: b.Contestant) -> list[list[float]]:
    """Return the seconds for prompts of Alpaca's lengths one by one, and for all of them as one batch."""
    settings, rng = run.settings, np.random.default_rng(1)
    lengths, _ = alpaca_lengths(settings.one_by_one, run.config.block_size - settings.new_tokens)
    prompts = [rng.integers(3, run.config.vocab_size, n).tolist() for n in lengths]
    answer = partial(contestant, "answer_all", prompts=prompts, n_new=settings.new_tokens)
    turns = {str(size): partial(answer, batch_size=size) for size in (1, len(prompts))}
    _, results = b.take_turns(turns, max(1, settings.rounds // 2), run.notes)
    return [[answer["seconds"] for answer in answers] for answers in results.values()]


def tables(run: b.Run, results: dict[int, Times], bandwidth: float) -> tuple[str, list[list[str]]]:
    """Return the table of speeds, and the rows of the table of ratios."""
    prompt, new, on_gpu = run.settings.prompt_length, run.settings.new_tokens, run.device.type == "cuda"
    rows, ratios = [], []
    for size, times in results.items():
        limit = size * bandwidth / decode_bytes(run.config, run.dtype, size, prompt + new / 2)  # tokens/s
        for name, seconds_of in times.items():
            prefill = [size * prompt / seconds for seconds in seconds_of["prefill"]]
            decode = decode_rates(run, size, seconds_of)
            share = f"{np.median(decode) / limit:.0%}"
            rows.append([f"{size}, {name}", with_interval(prefill), with_interval(decode), share])
            if name in PEERS:
                target = "≥ 2" if name == HF and size == 1 and not on_gpu else ""
                what = f"decode tokens/s, batch {size}, N = 1 over {name}"
                ratios.append([what, target, *compare(seconds_of["decode"], times[N1]["decode"], 2)])
            elif name != BARE:
                what = f"decode step, batch {size}, {name} over the bare base"
                ratios.append([what, TARGETS.get(name, ""), *compare(seconds_of["decode"], times[BARE]["decode"])])
            if name == N1 and on_gpu:
                ratios.append([f"decode, batch {size}, share of the bandwidth limit", "≥ 85%", share, ""])
    heads = ["batch", "prefill, tokens/s", "decode, tokens/s", "of the bandwidth limit"]
    return f"## {prompt} tokens, then {new} more\n\n{markdown_table(heads, rows)}", ratios


def decode_rates(run: b.Run, size: int, times: dict[str, list[float]]) -> list[float]:
    """Return the tokens/s of decoding, which excludes the first new token."""
    return [size * (run.settings.new_tokens - 1) / seconds for seconds in times["decode"]]


def main(settings: Settings) -> None:
    run = b.start_run(settings)
    with run.contestants(OURS, PEERS) as contestants:
        results = {size: measure(run, contestants, size) for size in settings.batch_sizes}
        batching = measure_batching(run, contestants[N1]) if settings.one_by_one else None
    bandwidth = copy_bandwidth(run.device, settings.clock)
    speeds, ratios = tables(run, results, bandwidth)
    if batching:
        target = "≥ 20" if run.device.type == "cuda" else "≥ 4"
        what = f"tokens/s, {settings.one_by_one} prompts as one batch over one by one"
        ratios.append([what, target, compare(*batching, 1)[0], ""])  # too few rounds for a verdict
    b.plot_bars(run.path("generation", ".png"), {
        f"decode, tokens/s, batch {size}": {name: decode_rates(run, size, parts) for name, parts in times.items()}
        for size, times in results.items()
    })  # fmt: skip
    limit = f"The bandwidth limit is that of a copy in the same run: {bandwidth / 1e9:,.1f} GB/s, read and written."
    run.publish("Generation", [speeds, ratio_table(ratios), limit])


if __name__ == "__main__":
    cli.run(main, settings)
