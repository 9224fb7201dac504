"""Time and memory that a model takes to its first token, beside transformers and LitGPT.

Each start is a process of its own, in turns; the weights are in the page cache for all. Imports do not count.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks import harness as b
from benchmarks.generation import PEERS
from benchmarks.measure import with_interval
from benchmarks.report import plot_bars, publish
from lit_llama import cli
from lit_llama.checkpoint import weights_path
from lit_llama.settings import PositiveInt
from lit_llama.tables import markdown_table


@dataclass
class Settings(b.PeerSettings):
    # == What to measure ==
    prompt_length: PositiveInt = 32  # tokens


def first_token(name: str, spec: dict[str, Any], prompt: list[int]) -> dict[str, float]:
    """Return the seconds and the most bytes that a new process takes to load the model and generate a token."""
    contestant = b.Contestant(name, **spec)
    try:
        loaded = contestant("load")
        answer = contestant("generate", prompts=[prompt], n_new=1)
    finally:
        contestant.close()
    return {"seconds": loaded["seconds"] + answer["prefill"], "bytes": answer["peak"]}


def main(settings: Settings) -> None:
    run, notes = b.start_run(settings), []
    specs = {"Aligner N = 1": {**run.shared, "kind": "ours", "n": 1, "generates": True}}
    if settings.peers:
        path = b.install_peers(settings.out_dir / "peers", notes)
        specs |= {name: {**run.shared, **peer, "path": path} for name, peer in PEERS.items()}
    prompt = list(range(3, 3 + settings.prompt_length))
    turns = {name: partial(first_token, name, spec, prompt) for name, spec in specs.items()}
    _, found = b.take_turns(turns, settings.rounds, notes)
    weights = weights_path(run.shared["weights"]).stat().st_size
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in found.items()}
    megabytes = {name: [answer["bytes"] / 1e6 for answer in answers] for name, answers in found.items()}
    rows = [
        [name, with_interval(seconds[name]), with_interval(megabytes[name]),
         with_interval([1e6 * m / weights for m in megabytes[name]])]
        for name in found
    ]  # fmt: skip
    table = markdown_table(["", "seconds to the first token", "MB at most", "of the weights"], rows)
    path = settings.out_dir / f"loading-{settings.size}.md"
    plot_bars(path.with_suffix(".png"), {"seconds to the first token": seconds, "MB at most": megabytes})
    publish(path, f"Loading, {settings.size}, {run.shared['precision']}", [table, *notes], run.device)


if __name__ == "__main__":
    cli.run(main, Settings)
