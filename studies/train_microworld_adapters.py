"""Train an Aligner for each form of the micro-world, with several seeds, and score all of them on held-out entities.

Writes a table (CSV and Markdown). With --weights_dir it also writes the first seed's adapters, each with a card.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, PositiveInt, Seed
from microworld.world import FORMS, FormName


@dataclass
class Settings(Checked):
    forms: tuple[FormName, ...] = tuple(FORMS)  # forms to train
    adapter_prompt_length: PositiveInt = 1  # prefix tokens
    seeds: tuple[Seed, ...] = (1, 2, 3)  # seeds of the adapter and of the data order
    questions: PositiveInt = 300  # questions to ask about unseen entities, per temperature
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    out_dir: Path = Path("out/microworld-adapters")  # data, runs and tables
    weights_dir: Path | None = None  # where the first seed's adapters go, such as aligner_weights
    overwrite: bool = False  # replace files in weights_dir
    jobs: PositiveInt = 2  # training runs in parallel, one thread each


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.checkpoint import load_model, read_adapter
from lit_llama.storage.files import check_file, claim, copy_file, write_text
from lit_llama.tables import csv_text, markdown_table
from lit_llama.tokenizer import Tokenizer
from microworld.datasets import write_answers
from microworld.scorer import draw_questions, score_model
from microworld.world import SEEN, UNSEEN, World
from scripts.count_parameters import Variant
from studies.protocol import COMMON
from studies.trials import Record, Trial, all_finished, run_trials

TEMPERATURES = (0.0, 0.7, 1.0)
TRAINING = {
    **COMMON,
    "epochs": 4.0,
    "batch_size": 32,
    "micro_batch_size": 32,
    "learning_rate": 3e-2,
    "warmup_epochs": 0.4,
    "eval_interval": 50,
    "eval_rows": 512,
    "save_interval": 100,
    "sample_prompts": 2,
}


def make_trial(settings: Settings, form: str, seed: int) -> Trial:
    n = settings.adapter_prompt_length
    stated = {**TRAINING, "checkpoint_dir": settings.checkpoint_dir, "data_dir": settings.out_dir / f"data-{form}",
              "seed": seed}  # fmt: skip
    variant = Variant(f"Aligner, N = {n}", "aligner", {"adapter_prompt_length": n})
    return Trial(f"{form}-n{n}-seed{seed}", variant, stated, scoring={"form": form, "questions": settings.questions})


def score(trial: Trial, run: Path) -> dict[str, float]:
    """Return {form@T, fact@T} for each temperature."""
    base, form, scores = trial.settings["checkpoint_dir"], trial.scoring["form"], {}
    world, model, tokenizer = World(), load_model(base, read_adapter(run)), Tokenizer(base)
    questions = draw_questions(world.questions(UNSEEN), trial.scoring["questions"], seed=0)
    for temperature in TEMPERATURES:
        result = score_model(model, tokenizer, world, questions, temperature=temperature, seed=0, form=form)
        scores |= {f"{what}@{temperature}": result[what] for what in ("form", "fact")}
    return scores


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and lowest over the seeds of each form, and the median of the seconds."""
    heads = [f"{what}, {'greedy' if t == 0 else f'T = {t}'}" for t in TEMPERATURES for what in ("form", "facts")]
    lines = []
    for form in dict.fromkeys(row["form"] for row in rows):
        trials, cells = [row for row in rows if row["form"] == form], []
        for name in (f"{what}@{t}" for t in TEMPERATURES for what in ("form", "fact")):
            values = [row[name] for row in trials]
            cells.append(f"{statistics.mean(values):.1%} ({min(values):.1%})")
        seconds = statistics.median(row["seconds"] for row in trials)
        lines.append([form, trials[0]["parameters"], f"{seconds:.0f}", *cells])
    return markdown_table(["form", "parameters", "seconds", *heads], lines)


def card(settings: Settings, row: dict[str, Any], torch: str) -> str:
    """Return the README of a shipped adapter.

    Args:
        torch: The version of PyTorch that trained it.
    """
    n, form = settings.adapter_prompt_length, row["form"]
    lines = [["greedy" if t == 0 else t, f"{row[f'form@{t}']:.1%}", f"{row[f'fact@{t}']:.1%}"] for t in TEMPERATURES]
    return f"""# Micro-world, form "{form}", N = {n}

An Aligner with {row["parameters"]} parameters for the bundled base model. It was trained to answer in the form
"{form}".

{markdown_table(["temperature", "form", "facts"], lines)}

{settings.questions} questions about entities that finetuning never saw. A form counts only if the entire answer matches
it; a fact counts only if topic and value are both right. Seed {row["seed"]}, torch {torch}.

    python generate/aligner.py --adapter {settings.weights_dir}/{folder_name(settings, form)}

Made with:

    python scripts/prepare_microworld.py --form {form}
    python finetune/aligner.py --data_dir data/microworld-{form} --out_dir out/{form} --adapter_prompt_length {n} \\
        --seed {row["seed"]}
"""


def overview(settings: Settings, rows: list[dict[str, Any]]) -> str:
    """Return the README of the folder of shipped adapters."""
    flags = (
        f"--seeds {' '.join(map(str, settings.seeds))} --questions {settings.questions} "
        f"--weights_dir {settings.weights_dir} --overwrite"
    )
    return f"""# Adapters for the bundled base model

Each adapter has a folder with a model card. An adapter is one safetensors file of about 3 KB, whose header records the
method, the training data, the settings and the versions. `python generate/aligner.py --adapter FOLDER` uses it.

The table has the mean over seeds {", ".join(map(str, settings.seeds))}, with the lowest in parentheses. With each
seed, {settings.questions} questions are asked about entities that finetuning never saw. A form counts only if the
entire answer matches it; a fact counts only if topic and value are both right. Seconds are the median training time on
one CPU core, with {settings.jobs} runs at a time, beside other programs. The files are those of seed
{settings.seeds[0]}, whose scores are on the cards; `scores.csv` has those of all seeds.

The adapter that refuses harmful requests, `microworld-safe-n1`, comes from `studies/train_microworld_values.py`; its
results are on its card.

{table(rows)}

Made by
`python studies/train_microworld_adapters.py {flags}`.
"""


def folder_name(settings: Settings, form: str) -> str:
    return f"microworld-{form}-n{settings.adapter_prompt_length}"


def is_complete(settings: Settings) -> bool:
    """Return whether the adapters are those of the folder's overview: one token for each form."""
    return set(settings.forms) == set(FORMS) and settings.adapter_prompt_length == 1


def ship(settings: Settings, rows: list[dict[str, Any]], records: list[Record]) -> None:
    """Put the first seed's adapters into `weights_dir` and, if all forms were trained, the scores of all."""
    overwrite = settings.overwrite
    if is_complete(settings):
        write_text(settings.weights_dir / "README.md", overview(settings, rows), overwrite=overwrite)
        copy_file(settings.out_dir / "scores.csv", settings.weights_dir / "scores.csv", overwrite=overwrite)
    for row, record in zip(rows, records, strict=True):
        if row["seed"] == settings.seeds[0]:
            folder = settings.weights_dir / folder_name(settings, row["form"])
            write_text(folder / "README.md", card(settings, row, record["versions"]["torch"]), overwrite=overwrite)
            run = settings.out_dir / make_trial(settings, row["form"], row["seed"]).name
            copy_file(run / "best.safetensors", folder / "adapter.safetensors", overwrite=overwrite)


def main(settings: Settings) -> None:
    claim(settings.out_dir, ("scores.csv", "scores.md"))
    if settings.weights_dir:
        folders = [settings.weights_dir / folder_name(settings, form) for form in settings.forms]
        shipped = [settings.weights_dir / name for name in ("README.md", "scores.csv") if is_complete(settings)]
        for path in shipped + [folder / name for folder in folders for name in ("README.md", "adapter.safetensors")]:
            check_file(path, overwrite=settings.overwrite)
    for form in settings.forms:
        write_answers(World().questions(SEEN), form, settings.out_dir / f"data-{form}",
                      source=f"micro-world 0, form {form}", tokenizer=Tokenizer(settings.checkpoint_dir),
                      max_seq_length=256, test_fraction=0.1, seed=42, num_proc=1)  # fmt: skip
    cells = [(form, seed) for form in settings.forms for seed in settings.seeds]
    trials = [make_trial(settings, *cell) for cell in cells]
    records = all_finished(run_trials(trials, settings.out_dir, score, jobs=settings.jobs, desc="training"))
    rows = [
        {"form": form, "seed": seed, "parameters": record["summary"]["trainable_parameters"],
         "seconds": record["summary"]["seconds"], **record["scores"]}
        for (form, seed), record in zip(cells, records, strict=True)
    ]  # fmt: skip
    write_text(settings.out_dir / "scores.csv", csv_text(rows))
    write_text(settings.out_dir / "scores.md", table(rows) + "\n")
    print(table(rows))
    if settings.weights_dir:
        ship(settings, rows, records)


if __name__ == "__main__":
    cli.run(main, settings)
