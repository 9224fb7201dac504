"""Compare training objectives on two-hop reasoning: what supervised finetuning, DPO, best-of-n and reinforcement
learning achieve with one token, and with more parameters, on checkpoints/microworld-aloud.

This base model answers two-hop questions either directly, by guessing, or step by step, correctly; it prefers direct
answers. The study separates the manner of answering, the accuracy within each manner, and new facts, for which the
manner does not matter. The learning rate is chosen by the accuracy on validation questions plus half of that on known
facts; then several seeds are trained at that rate. The study writes all trials (CSV), the tables (Markdown) and a
figure. A stopped study continues where it stopped.
"""

import functools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from lit_llama.storage.files import claim, write_text


@dataclass
class Settings(Checked):
    # == What is compared ==
    methods: tuple[str, ...] = ()  # methods to train (default: all)
    objectives: tuple[str, ...] = ()  # objectives to train for (default: all)
    tasks: tuple[str, ...] = ()  # two-hop questions, and new facts (default: both)
    learning_rates: tuple[PositiveFloat, ...] = (8e-3, 3.2e-2, 1.28e-1, 5.12e-1)  # the best one is used
    extra_rates: NonNegativeInt = 2  # most rates to add, one at a time, while the best one is the lowest or highest
    seeds: tuple[Seed, ...] = (1, 2, 3)  # seeds of the adapter, the data order and the questions, at the chosen rate
    sweep_seeds: tuple[Seed, ...] = (0, 4, 5)  # seeds that choose the rate; only the best two rates get all of them
    quick: bool = False  # minutes instead of hours: one token, two objectives, one rate and one seed

    # == Each training run ==
    sft_steps: PositiveInt = 60  # optimizer steps of SFT and DPO
    sft_batch_size: PositiveInt = 8  # rows per step of SFT
    rl_steps: PositiveInt = 30  # steps of RL, of 8 prompts with 8 sampled answers each
    samples: PositiveInt = 8  # answers of the base to each training question, for DPO and best of n
    questions: PositiveInt = 100  # questions to ask of each group
    reached: PositiveFloat = 0.9  # count the answers that RL samples until accuracy on validation people reaches this
    checkpoint_dir: Path = Path("checkpoints/microworld-aloud")  # the base model's folder

    # == Running ==
    out_dir: Path = Path("out/reasoning")  # data, trials, tables and figure
    report_dir: Path | None = None  # another folder for tables and figure
    jobs: PositiveInt = 2  # training runs in parallel, one thread each


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.checkpoint import base_fingerprint, load_model
from lit_llama.run.report import write_above_bar
from lit_llama.tables import csv_text
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import log
from microworld.world import STEPS_REQUEST
from scripts.count_parameters import ADAPTER_V2, VARIANTS, Variant
from studies.paper_report import BASE, Row
from studies.paper_tasks import Part
from studies.protocol import dpo_settings, rl_settings, sft_settings
from studies.reasoning_report import plot, report
from studies.reasoning_tasks import (
    EVAL_INTERVAL,
    EVAL_ROWS,
    LEAST_ROWS,
    OBJECTIVES,
    TASKS,
    data_name,
    measure,
    prepare,
    samples_of_base,
)
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

METHODS: dict[str, Variant] = {
    **{name: variant for name, variant in VARIANTS.items() if name != "prompt_tuning"},
    "adapter_v2": ADAPTER_V2,
}
QUICK = {"methods": ("aligner1",), "objectives": ("direct", "rl"), "tasks": ("two_hop",), "learning_rates": (0.128,),
         "seeds": (1,), "sft_steps": 40, "rl_steps": 25, "questions": 60}  # fmt: skip
COMPARED = {"methods": tuple(METHODS), "objectives": tuple(OBJECTIVES), "tasks": tuple(TASKS)}
PARTS: tuple[Part, ...] = ("valid", "reported")


def data_dir(settings: Settings, task: str, objective: str, part: Part) -> Path:
    return settings.out_dir / "data" / f"{data_name(task, part)}-{objective}"


def make_trial(settings: Settings, task: str, objective: str, method: str, rate: float, seed: int, part: Part) -> Trial:
    folder = data_dir(settings, task, objective, part)
    rows = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["counts"]["train"]
    common = {"data_dir": folder, "checkpoint_dir": settings.checkpoint_dir, "learning_rate": rate, "seed": seed,
              "save_interval": 10**6, "eval_rows": EVAL_ROWS}  # fmt: skip
    _, kind = OBJECTIVES[objective]
    if kind == "rl":
        interval = EVAL_INTERVAL if part == "reported" else settings.rl_steps  # choosing the rate needs no curve
        stated = rl_settings(rows, settings.rl_steps, reward="microworld_two_hop", eval_interval=interval, **common)
    elif kind == "dpo":
        steps = settings.sft_steps
        stated = dpo_settings(epochs=steps, max_steps=steps, eval_interval=steps, **common)
    else:
        stated = sft_settings(rows, settings.sft_steps, settings.sft_batch_size, eval_interval=settings.sft_steps,
                              **common)  # fmt: skip
    name = f"{task}-{objective}-{method}-{part}-lr{rate:g}-seed{seed}"
    scoring = {"task": task, "part": part, "count": settings.questions, "seed": seed}
    return Trial(name, METHODS[method], stated, kind, scoring)


def prepare_all(settings: Settings) -> dict[tuple[str, str], tuple[int, int]]:
    """Write all datasets; return (training rows, answers sampled from the base) of each (task, objective).

    A task with two parts has two datasets; the smaller one counts.
    """
    tokenizer, counts = Tokenizer(settings.checkpoint_dir), {}
    model = load_model(settings.checkpoint_dir)
    for task in settings.tasks:
        for part in PARTS if task == "facts" else ("reported",):
            samples: list[list[str]] = []
            if {"dpo", "best_of_n"} & set(settings.objectives):
                log(f"Sampling answers of the base to the training questions of {task}.")
                path = settings.out_dir / "samples" / f"{data_name(task, part)}.json"
                samples = samples_of_base(model, tokenizer, task, part, settings.samples, settings.checkpoint_dir, path)
            for objective in settings.objectives:
                if (task, objective) == ("facts", "aloud"):
                    continue  # a single fact has no steps
                folder = data_dir(settings, task, objective, part)
                rows = prepare(tokenizer, task, objective, part, samples, folder)
                sampled = settings.samples * len(samples) if objective in ("dpo", "best_of_n") else 0
                counts[task, objective] = min(rows, counts.get((task, objective), (rows, 0))[0]), sampled
    return counts


def score_base(settings: Settings) -> list[Row]:
    """Return the measures of the base model, as it is and asked to think step by step, as lines of results.csv."""
    rows, model, tokenizer = [], load_model(settings.checkpoint_dir), Tokenizer(settings.checkpoint_dir)
    base = base_fingerprint(settings.checkpoint_dir)["tensors"]
    for task in settings.tasks:
        for objective, suffix in (("", ""), ("asked", f" {STEPS_REQUEST}")):
            if task == "facts" and suffix:
                continue
            for seed in settings.seeds:
                scoring = {"task": task, "part": "reported", "count": settings.questions, "seed": seed,
                           "suffix": suffix}  # fmt: skip
                path = settings.out_dir / "base" / f"{task}{objective and '-'}{objective}-seed{seed}.json"
                identity = {**scoring, "base": base}
                scores = stored_result(path, identity, functools.partial(measure, model, tokenizer, **scoring))
                del scores["answers"]
                rows.append({"task": task, "objective": objective, "method": BASE, "part": "reported",
                             "learning_rate": None, "seed": seed, "parameters": 0, "error": "", **scores})  # fmt: skip
    return rows


def answers_until(record: Record, reached: float, per_step: int) -> int | None:
    """Return how many answers RL had sampled when validation first reached this accuracy; None if it never did."""
    steps = [step for step, loss in record["curve"] if 1 - loss >= reached]
    return steps[0] * per_step if steps else None


def as_row(settings: Settings, record: Record, sampled: dict[tuple[str, str], tuple[int, int]]) -> Row:
    """Return a trial as a line of results.csv."""
    trial, summary = record["trial"], record.get("summary", {})
    task, objective, _ = trial["name"].split("-", 2)
    of_base = until = sampled[task, objective][1]
    if objective == "rl" and summary:
        per_step = trial["settings"]["batch_size"] * trial["settings"]["group_size"]
        until = answers_until(record, settings.reached, per_step)
    columns = {"answers_sampled": summary.get("answers_sampled", of_base), "answers_until": until}
    return result_row(record, ("task", "objective", "method"), columns)


def run_study(settings: Settings, cells: list[tuple[str, str, str]]) -> Cell:
    """Return the trials that choose learning rates, and those of the table: one for each seed at the chosen rate.

    Args:
        cells: (task, objective, method) to run.
    """
    sweeps = len(settings.learning_rates) + 2 * len(settings.sweep_seeds[1:]) if settings.learning_rates[1:] else 0
    expected, plans = len(cells) * (sweeps + len(settings.seeds)), [cell_plan(settings, cell) for cell in cells]
    return run_cells(plans, settings.out_dir / "runs", measure, jobs=settings.jobs, expected=expected)


def cell_plan(settings: Settings, cell: tuple[str, str, str]) -> Plan[Cell]:
    """Choose the learning rate of a cell and train all seeds; return the trials of both."""
    swept, rate = yield from sweep(settings, cell)
    if rate is None:
        write_above_bar(f"{' '.join(cell)} is left out: all trials failed, the first with: {swept[0]['error']}")
        return swept, []
    final = yield [make_trial(settings, *cell, rate, seed, "reported") for seed in settings.seeds]
    return swept, final


def sweep(settings: Settings, cell: tuple[str, str, str]) -> Plan[tuple[list[Record], float | None]]:
    """Return the trials that choose a learning rate, and the rate, or None if all trials failed.

    While the best rate is the lowest or the highest, one beyond it is tried, at most `extra_rates` in all. One seed can
    be lucky, so the two best rates are tried with the other seeds as well, and the better mean decides; if that rate is
    now the lowest or the highest, one beyond it is tried with all seeds. If all rates score the same, the one with the
    lowest validation loss is returned without further trials. A single rate is returned without a trial.
    """
    rates, seeds = sorted(settings.learning_rates), settings.sweep_seeds
    if len(rates) == 1:
        return [], rates[0]
    most, tried = len(rates) + settings.extra_rates, []

    def trials(rates: list[float], seeds: tuple[int, ...]) -> list[Trial]:
        return [make_trial(settings, *cell, rate, seed, "valid") for rate in rates for seed in seeds]

    def beyond(rate: float) -> list[float]:
        """Return the next rate beyond this one, or nothing, if it is not an outermost one or enough were tried."""
        inner = {rates[0]: rates[1], rates[-1]: rates[-2]}.get(rate)
        return [] if inner is None or len(rates) == most else [float(f"{rate**2 / inner:.3g}")]

    further = rates
    while further:
        tried += yield trials(further, seeds[:1])
        if all("error" in record for record in tried):
            return tried, None
        rate = choose(tried, rank)["trial"]["settings"]["learning_rate"]
        if all("error" not in record and rank(record) == rank(tried[0]) for record in tried):
            return tried, rate
        further = beyond(rate)
        rates = sorted(rates + further)
    if not seeds[1:]:
        return tried, rate
    finalists = [rate]
    if rest := [r for r in tried if "error" not in r and r["trial"]["settings"]["learning_rate"] != rate]:
        finalists.append(choose(rest, rank)["trial"]["settings"]["learning_rate"])
    tried += yield trials(finalists, seeds[1:])
    while further := beyond(rate := max(finalists, key=lambda rate: mean_rank(tried, rate))):
        tried += yield trials(further, seeds)
        rates, finalists = sorted(rates + further), finalists + further
    return tried, rate


def mean_rank(records: list[Record], rate: float) -> float:
    """Return the mean `rank` of the trials at a learning rate; a failed trial counts 0."""
    same = [record for record in records if record["trial"]["settings"]["learning_rate"] == rate]
    return statistics.mean(0 if "error" in record else rank(record) for record in same)


def rank(record: Record) -> float:
    """Return the score that chooses the rate: validation accuracy plus half the accuracy on known facts."""
    return record["scores"]["right"] + record["scores"]["other_facts"] / 2


def origin(settings: Settings, records: list[Record]) -> str:
    """Return command, duration, seeds and versions in one line."""
    return origin_of("studies/reasoning.py", settings, COMPARED, QUICK, records)


def main(settings: Settings) -> None:
    settings = complete(settings, COMPARED, QUICK, sys.argv)
    folder = settings.report_dir or settings.out_dir
    claim(folder, ("table.md", "results.csv", "reasoning.png"))
    counts = prepare_all(settings)
    base = score_base(settings)
    empty = {pair: sampled for pair, (rows, sampled) in counts.items() if rows < LEAST_ROWS}
    cells = [(task, objective, method) for task in settings.tasks for objective in settings.objectives
             for method in settings.methods if (task, objective) in counts.keys() - empty.keys()]  # fmt: skip
    swept, final = run_study(settings, cells)
    rows = base + [as_row(settings, record, counts) for record in swept + final]
    labels, caption = {name: variant.label for name, variant in METHODS.items()}, origin(settings, swept + final)
    text = report(rows, empty, labels, settings=settings, origin=caption)
    write_text(folder / "table.md", text)
    write_text(folder / "results.csv", csv_text(rows))
    plot(rows, labels, folder / "reasoning.png", caption)
    print(text, end="")


if __name__ == "__main__":
    cli.run(main, settings)
