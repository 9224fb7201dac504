"""Time and memory that a model takes until its first token, compared with transformers and LitGPT.

Each start runs in a new process; the contestants take turns, and the weights are in the page cache for all. Imports are
not measured.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks.settings import PeerSettings
from lit_llama import cli
from lit_llama.settings import PositiveInt


@dataclass
class Settings(PeerSettings):
    # == What to measure ==
    prompt_length: PositiveInt = 32  # tokens of the prompt


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from benchmarks import harness as b
from benchmarks.generation import PEERS
from benchmarks.measure import with_interval
from lit_llama.checkpoint import weights_path
from lit_llama.tables import markdown_table


def first_token(name: str, spec: dict[str, Any], prompt: list[int]) -> tuple[float, float]:
    """Return the seconds and the peak megabytes that a new process takes to load the model and generate a token."""
    with closing(b.Contestant(name, **spec)) as contestant:
        loaded = contestant("load")
        answer = contestant("generate", prompts=[prompt], n_new=1)
    return loaded["seconds"] + answer["prefill"], answer["peak"] / 1e6


def main(settings: Settings) -> None:
    run, prompt = b.start_run(settings), list(range(3, 3 + settings.prompt_length))
    specs = run.specs({"Aligner N = 1": {"n": 1, "generates": True}}, PEERS)
    turns = {name: partial(first_token, name, spec, prompt) for name, spec in specs.items()}
    _, answers = b.take_turns(turns, settings.rounds, run.notes)
    size = weights_path(run.shared["weights"]).stat().st_size / 1e6
    seconds, megabytes = ({name: [pair[i] for pair in pairs] for name, pairs in answers.items()} for i in (0, 1))
    rows = []
    for name, sizes in megabytes.items():
        cells = [seconds[name], sizes, [value / size for value in sizes]]
        rows.append([name, *map(with_interval, cells)])
    b.plot_bars(run.path("loading", ".png"), {"seconds to the first token": seconds, "MB at most": megabytes})
    heads = ["", "seconds to the first token", "MB at most", "of the weights"]
    run.publish("Loading", [markdown_table(heads, rows)])


if __name__ == "__main__":
    cli.run(main, settings)
