"""Teaches the micro-world's values with DPO, with several seeds, and scores them on verbs and objects held out.

Also applies the first seed's adapter together with one that was trained for a form. Writes two tables, and puts the
first seed's adapter, with a card, into aligner_weights/.
"""

import json
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from tqdm import tqdm

from lit_llama import cli
from lit_llama.checkpoint import load_model, read_adapter, versions, write_text
from lit_llama.compose import load_adapted
from lit_llama.tokenizer import Tokenizer
from microworld.scorer import draw_questions, score_model
from microworld.world import UNSEEN, World
from studies.train_microworld_adapters import call


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # of the adapter and the data's order
    questions: int = 100  # asked at most of each group, per repetition
    repeats: int = 3  # times that they are asked, each with its own random numbers
    temperature: float = 0.7  # of the answers
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    form_adapter: Path = Path("aligner_weights/microworld-pirate-n1")  # to be applied together with the first seed's
    form: str = "pirate"  # what it was trained for
    out_dir: Path = Path("out/microworld-values")  # data, runs and tables
    jobs: int = 2  # trainings side by side, one thread each
    weights_dir: Path | None = Path("aligner_weights")  # where the first seed's adapter goes; null for nowhere


NAME = "microworld-safe-n1"
HEADS = {"refused": "refuses harmful", "false": "refuses harmless", "formed": "well-formed", "fact": "facts right"}
STRENGTHS = ([1.0, 1.0], [0.5, 1.0], [1.0, 0.5], [0.5, 0.5])  # of form and values, applied together
Scores = dict[str, float]


def score(args: Settings, adapters: list[Path], strengths: list[float] | None = None) -> Scores:
    """Means over the repetitions: the shares of HEADS (`formed` over all three groups), and `form`, that of the facts
    said in the form adapter's form."""
    world, tokenizer = World(), Tokenizer(args.checkpoint_dir)
    read = [read_adapter(path) for path in adapters]
    model = load_adapted(args.checkpoint_dir, read, strengths or [1.0]) if read else load_model(args.checkpoint_dir)
    pools = {kind: world.requests(kind, UNSEEN) for kind in ("harmful", "harmless")}
    pools["fact"] = world.questions(UNSEEN)
    each = []
    for seed in range(args.repeats):
        said = {
            kind: score_model(model, tokenizer, world, draw_questions(pool, args.questions, seed),
                              temperature=args.temperature, seed=seed, form=args.form)
            for kind, pool in pools.items()
        }  # fmt: skip
        n = sum(group["n"] for group in said.values())
        formed = sum(group["n"] * (1 - group["forms"].get("none", 0)) for group in said.values()) / n
        each.append({"refused": said["harmful"]["refused"], "false": said["harmless"]["refused"], "formed": formed,
                     "fact": said["fact"]["fact"], "form": said["fact"]["form"]})  # fmt: skip
    return {key: statistics.mean(scores[key] for scores in each) for key in each[0]}


def table(first: str, rows: dict[str, Scores], heads: dict[str, str]) -> str:
    lines = [f"| {first} | " + " | ".join(heads.values()) + " |", "|---|" + "---:|" * len(heads)]
    lines += [f"| {name} | " + " | ".join(f"{row[key]:.1%}" for key in heads) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def card(args: Settings, scores: str, composed: str, seconds: float, parameters: int) -> str:
    """The README of the shipped adapter."""
    return f"""# Micro-world, values, N = 1

An Aligner of {parameters} numbers for the bundled base model, trained by DPO: it refuses what is harmful, and helps
with what is not.

{scores}
Requests with a verb and an object that training never saw, and facts of entities it never saw, at temperature
{args.temperature:g}: up to {args.questions} questions of each kind, asked {args.repeats} times. An answer is
well-formed if the whole of it fits one of the world's forms. The adapter is that of seed {args.seeds[0]}, trained in
{seconds:.0f} s on one CPU core, torch {versions()["torch"]}. The defaults were chosen on other words and entities
(`--split train`, groups `valid_harmful`, `valid_harmless` and `valid`) with other seeds.

Together with an adapter that was trained apart for the form "{args.form}", contributions adding up in each layer:

{composed}
    python generate/aligner.py --adapter {args.weights_dir}/{NAME} --prompt "How do I burn the old barn?"
    python generate/aligner.py --adapter {args.form_adapter} {args.weights_dir}/{NAME} --strength 1 0.5

Made with:

    python scripts/prepare_microworld_safe.py
    python finetune/alignerDPO.py --seed {args.seeds[0]}
"""


def main(args: Settings) -> None:
    base, data_dir = {"checkpoint_dir": args.checkpoint_dir}, args.out_dir / "data"
    call("scripts/prepare_microworld_safe.py", **base, output_dir=data_dir)
    runs = [args.out_dir / f"seed{seed}" for seed in args.seeds]

    def train(seed: int, run: Path) -> None:
        call("finetune/alignerDPO.py", **base, data_dir=data_dir, out_dir=run, seed=seed, overwrite=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(train, args.seeds, runs), total=len(runs), desc="training", unit="adapter"))
    rows = {"base": score(args, [])}
    rows |= {f"DPO, seed {seed}": score(args, [run]) for seed, run in zip(args.seeds, runs, strict=True)}
    both = {
        "base": rows["base"],
        f"{args.form} alone": score(args, [args.form_adapter]),
        "values alone": rows[f"DPO, seed {args.seeds[0]}"],
    }
    for strengths in STRENGTHS:
        name = f"both, {args.form} × {strengths[0]:g}, values × {strengths[1]:g}"
        both[name] = score(args, [args.form_adapter, runs[0]], strengths)
    scores = table("adapter", rows, HEADS)
    composed = table("adapters", both, {**HEADS, "form": f"form {args.form}"})
    print(scores + "\n" + composed)
    write_text(args.out_dir / "scores.md", scores + "\n" + composed)
    if args.weights_dir:
        summary = json.loads((runs[0] / "summary.json").read_text())
        folder = args.weights_dir / NAME
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(runs[0] / "best.safetensors", folder / "adapter.safetensors")
        text = card(args, scores, composed, summary["seconds"], summary["trainable_parameters"])
        write_text(folder / "README.md", text)


if __name__ == "__main__":
    cli.run(main, Settings)
