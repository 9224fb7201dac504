"""Reproduce the paper's comparison in miniature, on the bundled model: Aligner, LLaMA-Adapter, LoRA, BitFit and prompt
tuning, on form, values, new facts and reasoning.

All methods get the same data, steps, batch size and candidate learning rates. The rate is chosen by the answers to
validation questions, which never appear in the table; then several seeds are trained at that rate. The study writes
all trials (CSV), the table (CSV and Markdown) and figures. A stopped study continues where it stopped.
"""

import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, PositiveFloat, PositiveInt, Seed


@dataclass
class Settings(Checked):
    # == What is compared ==
    methods: tuple[str, ...] = ()  # methods to compare (default: all)
    tasks: tuple[str, ...] = ()  # tasks, trained separately (default: all)
    learning_rates: tuple[PositiveFloat, ...] = (2e-3, 8e-3, 3.2e-2, 1.28e-1, 5.12e-1, 2.048)  # the best one is used
    seeds: tuple[Seed, ...] = (1, 2, 3)  # seeds of the adapter, the data order and the questions, at the chosen rate
    sweep_seed: Seed = 0  # seed of the trials that choose the rate
    quick: bool = False  # minutes instead of more than an hour: one token and LoRA, fewer tasks, rates and seeds

    # == Each training run ==
    steps: PositiveInt = 200  # optimizer steps, except for values
    batch_size: PositiveInt = 8  # rows per step, except for values
    pair_epochs: PositiveFloat = 2.25  # passes over the pairs of values
    questions: PositiveInt = 200  # maximum number of questions of each group
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder

    # == Running ==
    out_dir: Path = Path("out/study")  # data, trials, tables and figures
    report_dir: Path | None = None  # another folder for tables and figures
    jobs: PositiveInt = 2  # training runs in parallel, one thread each


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from tqdm import tqdm

from lit_llama.checkpoint import base_fingerprint, load_model
from lit_llama.run.report import write_above_bar
from lit_llama.storage.files import claim, write_text
from lit_llama.tables import csv_text
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError
from scripts.count_parameters import VARIANTS
from studies.paper_report import BASE, Row, means, plot_accuracy, plot_curves, report
from studies.paper_tasks import TASKS, Part, measure, prepare
from studies.protocol import DPO, dpo_settings, sft_settings
from studies.trials import (
    Cell,
    Plan,
    Record,
    Trial,
    choose,
    complete,
    origin_of,
    result_row,
    run_cells,
    stored_result,
)

QUICK = {"methods": ("aligner1", "lora"), "tasks": ("pirate", "facts"), "learning_rates": (8e-3, 3.2e-2),
         "seeds": (1, 2)}  # fmt: skip
COMPARED = {"methods": tuple(VARIANTS), "tasks": tuple(TASKS)}


def scoring_of(settings: Settings, task: str, part: Part, seed: int) -> dict[str, Any]:
    """Return the arguments of `measure`."""
    scoring = {"task": task, "part": part, "count": settings.questions, "seed": seed}
    temperature = TASKS[task].temperature
    return {**scoring, "temperature": temperature} if temperature else scoring


def make_trial(settings: Settings, task: str, method: str, rate: float, seed: int, part: Part) -> Trial:
    data_dir = settings.out_dir / "data" / f"{task}-{part}"
    rows = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))["counts"]["train"]
    common = {"data_dir": data_dir, "checkpoint_dir": settings.checkpoint_dir, "learning_rate": rate, "seed": seed,
              "eval_rows": 64, "save_interval": 10**6}  # fmt: skip
    if task == "values":
        steps = round(settings.pair_epochs * math.ceil(rows / DPO["batch_size"]))
        stated = dpo_settings(epochs=settings.pair_epochs, eval_interval=max(1, steps // 8), **common)
    else:
        interval = max(1, settings.steps // 8)
        stated = sft_settings(rows, settings.steps, settings.batch_size, eval_interval=interval, **common)
    name, scoring = f"{task}-{method}-{part}-lr{rate:g}-seed{seed}", scoring_of(settings, task, part, seed)
    return Trial(name, VARIANTS[method], stated, "dpo" if task == "values" else "sft", scoring)


def score_base(settings: Settings) -> list[Row]:
    """Return the base model's answers to the same questions as lines of results.csv."""
    rows = []
    model, tokenizer = load_model(settings.checkpoint_dir), Tokenizer(settings.checkpoint_dir)
    base = base_fingerprint(settings.checkpoint_dir)["tensors"]
    cells = [(task, seed) for task in settings.tasks for seed in settings.seeds]
    for task, seed in tqdm(cells, desc="base model", unit="score"):
        scoring = scoring_of(settings, task, "reported", seed)
        path, identity = settings.out_dir / "base" / f"{task}-seed{seed}.json", {**scoring, "base": base}
        scores = stored_result(path, identity, functools.partial(measure, model, tokenizer, **scoring))
        del scores["answers"]
        rows.append({"task": task, "method": BASE, "part": "reported", "learning_rate": None, "seed": seed,
                     "parameters": 0, "error": "", **scores})  # fmt: skip
    return rows


def run_study(settings: Settings) -> Cell:
    """Return the trials that choose learning rates, and those of the table: one for each seed at the chosen rate."""
    plans = [cell_plan(settings, task, method) for method in settings.methods for task in settings.tasks]
    expected = len(plans) * (len(settings.learning_rates) + len(settings.seeds))
    return run_cells(plans, settings.out_dir / "runs", measure, jobs=settings.jobs, expected=expected)


def cell_plan(settings: Settings, task: str, method: str) -> Plan[Cell]:
    """Choose the learning rate of a method on a task and train all seeds; return the trials of both."""
    rates, seeds = settings.learning_rates, settings.seeds
    swept = yield [make_trial(settings, task, method, rate, settings.sweep_seed, "valid") for rate in rates]
    try:
        chosen = choose(swept, key=lambda record: record["scores"]["right"])
    except UserError as error:
        write_above_bar(f"{task} {method} is left out: {error}")
        return swept, []
    rate = chosen["trial"]["settings"]["learning_rate"]
    return swept, (yield [make_trial(settings, task, method, rate, seed, "reported") for seed in seeds])


def origin(settings: Settings, records: list[Record]) -> str:
    """Return command, duration, seeds and versions in one line."""
    return origin_of("studies/reproduce_paper.py", settings, COMPARED, QUICK, records)


def main(settings: Settings) -> None:
    settings = complete(settings, COMPARED, QUICK, sys.argv)
    folder = settings.report_dir or settings.out_dir
    claim(folder, ("table.md", "table.csv", "results.csv", "accuracy.png", "curves.png"))
    for task in settings.tasks:
        for part in get_args(Part):
            prepare(Tokenizer(settings.checkpoint_dir), settings.out_dir / "data", task, part)
    base = score_base(settings)
    swept, final = run_study(settings)
    rows = base + [result_row(record, ("task", "method")) for record in swept + final]
    caption = origin(settings, swept + final)
    text = report(rows, questions=settings.questions, sweep_seed=settings.sweep_seed, origin=caption)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", csv_text(means(rows)))
    write_text(folder / "results.csv", csv_text(rows))
    plot_accuracy(rows, folder / "accuracy.png", caption)
    plot_curves(final, folder / "curves.png", caption)
    print(text, end="")


if __name__ == "__main__":
    cli.run(main, settings)
