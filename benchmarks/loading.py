"""How long and how much memory a model takes to its first token, beside transformers and LitGPT.

Each start is a process of its own, in turns; the weights are in the page cache for all. Imports are not counted.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks import harness as b
from benchmarks.generation import PEERS
from lit_llama import cli
from lit_llama.report import markdown_table
from lit_llama.utils import UserError, log


@dataclass
class Settings:
    # == What to measure ==
    size: str = "110M"  # 110M, or a name of lit_llama.model.llama_configs: microworld, Llama-2-7B, ...
    prompt_length: int = 32  # tokens
    rounds: int = 5  # starts of each
    peers: bool = True  # install and measure transformers and LitGPT
    out_dir: Path = Path("out/benchmark")  # tables, plots, random weights, the peers' environment

    # == Device ==
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda
    precision: str = "auto"  # of the base: 32, bf16; auto is bf16 on GPUs that have it, else 32
    threads: int = 0  # of each process on a CPU; 0 is PyTorch's own choice
    clock: b.Clock = "wall"  # or cpu: processor seconds, for a CPU that others use too; needs --threads 1


def main(args: Settings) -> None:
    _, settings = b.set_up(args)
    notes = []
    specs: dict[str, dict[str, Any]] = {"Aligner N = 1": {**settings, "kind": "ours", "n": 1, "generates": True}}
    if args.peers:
        python = b.make_peers(args.out_dir / "peers")
        notes.append(f"{b.peer_versions(python)}\n")
        names = {"transformers generate, static cache": "transformers", "LitGPT generate": "LitGPT"}
        specs |= {names[name]: {**settings, "python": python, **own} for name, own in PEERS.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in specs}
    for round in range(-1, args.rounds):  # the first is not counted
        for name in list(found):
            contestant = b.Contestant(name, **specs[name])
            try:
                answer = contestant("first_token", prompt=list(range(3, 3 + args.prompt_length)))
                if round >= 0:
                    found[name].append(answer)
            except UserError as error:
                log(f"note: without {error}")
                notes.append(f"Without {error}\n")
                del found[name]
            contestant.close()
    rows = [
        [name, b.with_spread([a["seconds"] for a in answers]), b.with_spread([a["peak"] / 1e6 for a in answers]),
         b.with_spread([a["peak"] / a["bytes"] for a in answers])]
        for name, answers in found.items()
    ]  # fmt: skip
    table = markdown_table(["", "seconds to the first token", "MB at most", "of the weights"], rows)
    path = args.out_dir / f"loading-{args.size}"
    b.plot_bars(path.with_suffix(".png"), {
        "seconds to the first token": {name: [a["seconds"] for a in answers] for name, answers in found.items()},
        "MB at most": {name: [a["peak"] / 1e6 for a in answers] for name, answers in found.items()},
    })  # fmt: skip
    b.write_report(path.with_suffix(".md"), f"Loading, {args.size}, {args.precision}", [table, *notes], args.device)
    print(path.with_suffix(".md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    cli.run(main, Settings)
