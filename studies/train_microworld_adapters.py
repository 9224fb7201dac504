"""Trains an Aligner for every form of the micro-world, with several seeds, and scores all of them on held-out entities.

Writes a table (CSV and Markdown) and puts the first seed's adapters, each with a card, into aligner_weights/.
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from tqdm import tqdm

from lit_llama import cli
from lit_llama.checkpoint import versions, write_text
from lit_llama.utils import UserError
from microworld.world import FORMS


@dataclass
class Settings:
    forms: tuple[str, ...] = tuple(FORMS)  # forms to train
    adapter_prompt_length: int = 1  # prefix tokens
    seeds: tuple[int, ...] = (1, 2, 3)  # of the adapter and the data's order
    questions: int = 300  # asked of the held-out half, per temperature
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    out_dir: Path = Path("out/microworld-adapters")  # runs, answers and tables
    weights_dir: Path | None = Path("aligner_weights")  # where the first seed's adapters go; null for nowhere
    jobs: int = 2  # trainings side by side, one thread each


ROOT = Path(__file__).parent.parent
TEMPERATURES = (0.0, 0.7, 1.0)


def call(script: str, **flags: Any) -> None:
    """Runs a script with one thread. Raises: UserError: it failed; its last lines say why."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{script} {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")


def train_and_score(args: Settings, form: str, seed: int) -> dict[str, Any]:
    """One adapter: {form, seed, parameters, seconds, form@T and fact@T for each temperature}."""
    run = args.out_dir / f"{form}-n{args.adapter_prompt_length}-seed{seed}"
    base = {"checkpoint_dir": args.checkpoint_dir}
    call("finetune/aligner.py", **base, data_dir=args.out_dir / f"data-{form}", out_dir=run, seed=seed, overwrite=True,
         adapter_prompt_length=args.adapter_prompt_length)  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    row = {"form": form, "seed": seed, "parameters": summary["trainable_parameters"], "seconds": summary["seconds"]}
    for temperature in TEMPERATURES:
        scores = run / f"scores-{temperature}.json"
        call("evaluate/microworld.py", **base, adapter=run, form=form, questions=args.questions, groups="unseen",
             temperature=temperature, output_file=scores, overwrite=True)  # fmt: skip
        result = json.loads(scores.read_text())["results"]["unseen"]
        row |= {f"form@{temperature}": result["form"], f"fact@{temperature}": result["fact"]}
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """Mean and lowest over seeds, per form; the median of the seconds."""
    heads = [f"{what}, {'greedy' if t == 0 else f'T = {t}'}" for t in TEMPERATURES for what in ("form", "facts")]
    lines = ["| form | parameters | seconds | " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) + 2)]
    for form in dict.fromkeys(r["form"] for r in rows):
        own = [r for r in rows if r["form"] == form]
        cells = []
        for t in TEMPERATURES:
            for what in ("form", "fact"):
                values = [r[f"{what}@{t}"] for r in own]
                cells.append(f"{statistics.mean(values):.1%} ({min(values):.1%})")
        seconds = statistics.median(r["seconds"] for r in own)
        lines.append(f"| {form} | {own[0]['parameters']} | {seconds:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def card(args: Settings, row: dict[str, Any], run: Path) -> str:
    """The README of one shipped adapter."""
    settings = json.loads((run / "environment.json").read_text())
    scores = "\n".join(
        f"| {'greedy' if t == 0 else t} | {row[f'form@{t}']:.1%} | {row[f'fact@{t}']:.1%} |" for t in TEMPERATURES
    )
    n, form = args.adapter_prompt_length, row["form"]
    return f"""# Micro-world, form "{form}", N = {n}

An Aligner of {row["parameters"]} numbers for the bundled base model: it answers every question in the form "{form}".

| temperature | form | facts |
|---|---:|---:|
{scores}

{args.questions} questions about entities that finetuning never saw; a form counts only if the whole answer fits it, a
fact only if topic and value are both right. Seed {row["seed"]}, torch {settings["torch"]}.

    python generate/aligner.py --adapter {args.weights_dir}/{weights_name(form, n)}

Made with:

    python scripts/prepare_microworld.py --form {form}
    python finetune/aligner.py --data_dir data/microworld-{form} --out_dir out/{form} --adapter_prompt_length {n} \\
        --seed {row["seed"]}
"""


def overview(args: Settings, rows: list[dict[str, Any]]) -> str:
    """The README of the folder of shipped adapters."""
    flags = f"--seeds {' '.join(map(str, args.seeds))} --questions {args.questions}"
    return f"""# Adapters for the bundled base model

One folder each, with a card. An adapter is one safetensors file of about 3 KB, whose header says what it is, what it
was trained on and by what. `python generate/aligner.py --adapter FOLDER` uses it.

Mean over seeds {", ".join(map(str, args.seeds))} (lowest in brackets); {args.questions} questions each about entities
that finetuning never saw; a form counts only if the whole answer fits it, a fact only if topic and value are both
right; median seconds of training on one CPU core, {args.jobs} runs and other work side by side. The files are those of
seed {args.seeds[0]}.

{markdown(rows)}
Made by `python studies/train_microworld_adapters.py {flags}`.
"""


def weights_name(form: str, n: int) -> str:
    return f"microworld-{form}-n{n}"


def main(args: Settings) -> None:
    for form in args.forms:
        call("scripts/prepare_microworld.py", form=form, checkpoint_dir=args.checkpoint_dir,
             output_dir=args.out_dir / f"data-{form}")  # fmt: skip
    todo = [(form, seed) for seed in args.seeds for form in args.forms]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda pair: train_and_score(args, *pair), todo)
        rows = sorted(
            tqdm(done, total=len(todo), desc="training", unit="adapter"), key=lambda r: args.forms.index(r["form"])
        )

    with (args.out_dir / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_text(args.out_dir / "scores.md", markdown(rows))
    write_text(args.out_dir / "environment.json", json.dumps(versions(), indent=2) + "\n")
    print(markdown(rows))
    if args.weights_dir:
        write_text(args.weights_dir / "README.md", overview(args, rows))
        shutil.copy(args.out_dir / "scores.csv", args.weights_dir / "scores.csv")
    for row in rows if args.weights_dir else []:
        if row["seed"] == args.seeds[0]:
            n = args.adapter_prompt_length
            run = args.out_dir / f"{row['form']}-n{n}-seed{row['seed']}"
            folder = args.weights_dir / weights_name(row["form"], n)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / "best.safetensors", folder / "adapter.safetensors")
            write_text(folder / "README.md", card(args, row, run))


if __name__ == "__main__":
    cli.run(main, Settings)
