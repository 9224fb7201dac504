"""Tables and figures of the miniature paper study, from the lines of results.csv."""

import math
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_llama.run.report import make_figure, plain_label, save_figure
from lit_llama.tables import markdown_table
from scripts.count_parameters import VARIANTS
from studies.paper_tasks import TASKS
from studies.trials import Record, interval

Row = dict[str, Any]  # a line of results.csv
BASE = "the base alone"
KNOWLEDGE = ("facts", "two_hop")  # tasks that have a separate table
# panel of the figure -> (task, measure, label of the line)
PANELS = {
    "form": [("pirate", "form", "a form the base knows"), ("telegram", "form", "one it has never seen")],
    "new facts": [("facts", "value", "asked in another wording")],
    "reasoning (two hops)": [("two_hop", "trained", "trained people"), ("two_hop", "unseen", "unseen people")],
}
MARKERS = {"aligner": "o", "adapter": "s", "lora": "^", "bitfit": "D", "prompt_tuning": "v"}


def methods_of(rows: list[Row]) -> dict[str, int]:
    """Return {method: trainable parameters}, the base first."""
    known = {row["method"]: row["parameters"] for row in rows if row["parameters"] is not None}
    return dict(sorted(known.items(), key=lambda pair: pair[0] != BASE))


def tasks_of(rows: list[Row]) -> list[str]:
    return [task for task in TASKS if any(row["task"] == task for row in rows)]


def values_of(rows: list[Row], task: str, method: str, name: str) -> dict[int, float | None]:
    """Return {seed: share} of a measure, from the reported trials; None for a trial that failed."""
    trials = [row for row in rows if (row["task"], row["method"], row["part"]) == (task, method, "reported")]
    return {row["seed"]: None if row["error"] else row[name] for row in trials}


def label(method: str) -> str:
    return VARIANTS[method].label if method in VARIANTS else method


def percent(values: Iterable[float | None], sign: str = "") -> str:
    """Return the mean and half of the 95% interval, such as "97.5 ± 1.3", or a dash if no seed has a value.

    If only some have one, their number follows, as in "97.5 ± 1.3 (2 of 3 seeds)".
    """
    values = list(values)
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, half = interval(known)
    return f"{100 * mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}") + seeds_note(known, values)


def seeds_note(known: list, values: list) -> str:
    """Return how many seeds have a value if not all have one."""
    return "" if len(known) == len(values) else f" ({len(known)} of {len(values)} seeds)"


# == tables ==


def results_table(rows: list[Row], tasks: list[str]) -> str:
    """Return a table with a line for each method and a column for each measure of each task."""
    columns = [(task, name) for task in tasks for name in TASKS[task].columns]
    heads = [f"{TASKS[task].title}: {TASKS[task].columns[name]}" for task, name in columns]
    lines = [
        [label(method), f"{n:,}", *(percent(values_of(rows, task, method, name).values()) for task, name in columns)]
        for method, n in methods_of(rows).items()
    ]
    return markdown_table(["method", "parameters", *heads], lines)


def differences_table(rows: list[Row]) -> str:
    """Return a table of differences, one token minus LoRA, in percentage points; runs are paired by seed."""
    lines = []
    for task in tasks_of(rows):
        for name, head in TASKS[task].columns.items():
            one, lora = (values_of(rows, task, method, name) for method in ("aligner1", "lora"))
            pairs = [(one[seed], lora[seed]) for seed in one if seed in lora]
            points = percent((None if None in pair else pair[0] - pair[1] for pair in pairs), "+")
            lines.append([f"{TASKS[task].title}: {head}", points])
    return markdown_table(["one token minus LoRA", "points"], lines)


def rates_table(rows: list[Row]) -> str:
    """Return the chosen learning rates; a star marks the lowest and the highest tried."""

    def chosen(task: str, method: str) -> str:
        trials = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        tried = [row["learning_rate"] for row in trials if row["part"] == "valid"]
        rate = next((row["learning_rate"] for row in trials if row["part"] == "reported"), None)
        return "–" if rate is None else f"{rate:g}" + "*" * (rate in (min(tried), max(tried)))

    tasks = tasks_of(rows)
    lines = [[label(m), *(chosen(task, m) for task in tasks)] for m in methods_of(rows) if m != BASE]
    return markdown_table(["learning rate", *(TASKS[task].title for task in tasks)], lines)


def report(rows: list[Row], *, questions: int, sweep_seed: int, origin: str) -> str:
    """Return the content of table.md.

    Args:
        questions: The maximum number of questions of each group.
        sweep_seed: The seed of the trials that chose the learning rates.
        origin: How the results were made.
    """
    tasks, rates = tasks_of(rows), sorted({row["learning_rate"] for row in rows if row["part"] == "valid"})
    groups = [[task for task in tasks if (task in KNOWLEDGE) == knowledge] for knowledge in (False, True)]
    failed = [f"Failed: {row['task']}, {row['method']}, {row['learning_rate']:g}, seed {row['seed']}: {row['error']}"
              for row in rows if row["error"]]  # fmt: skip
    parts = [
        *(results_table(rows, group) for group in groups if group),
        f"""Shares of answers in percent: mean ± half-width of the 95% confidence interval (Student's t) over the seeds.
Answers are greedy, except those about values, which are sampled at temperature {TASKS["values"].temperature:g}. A seed
determines the training run, the sampled answers and, in groups of more than {questions} questions, which {questions}
are asked. All questions of a smaller group are asked, so there the interval does not cover the choice of questions. It
is 0 where all seeds gave the same.""",
        *([differences_table(rows)] if {"aligner1", "lora"} <= methods_of(rows).keys() else []),
        rates_table(rows),
        f"""The rate with the best answers to validation questions, which are none of those above. Rates tried:
{", ".join(f"{rate:g}" for rate in rates)}, with seed {sweep_seed}. A star marks the lowest and the highest of them,
beyond which a better one may lie.""",
        *failed,
        f"Made by {origin}.",
    ]
    return "\n\n".join(parts) + "\n"


def means(rows: list[Row]) -> list[Row]:
    """Return the table as lines of a CSV file: mean and half of the interval, as shares."""
    lines = []
    for method, parameters in methods_of(rows).items():
        for task in tasks_of(rows):
            for name in TASKS[task].columns:
                if values := [v for v in values_of(rows, task, method, name).values() if v is not None]:
                    mean, half = interval(values)
                    lines.append({"method": method, "parameters": parameters, "task": task, "measure": name,
                                  "mean": mean, "half": half, "seeds": len(values)})  # fmt: skip
    return lines


# == figures ==


def plot_accuracy(rows: list[Row], path: Path, caption: str) -> None:
    """Plot accuracy against trainable parameters (the paper's figure 5); dotted lines are the base.

    Only the tasks in `PANELS` are plotted; without any of them, no file is written, and an old one is deleted.
    """
    by_cell = {(line["task"], line["measure"], line["method"]): line for line in means(rows)}
    panels = {title: [line for line in lines if line[0] in tasks_of(rows)] for title, lines in PANELS.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        path.unlink(missing_ok=True)
        return
    figure, markers = make_figure(5 * len(panels), 5), {}
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (task, name, what) in enumerate(lines):
            by_method = {method: line for (*of, method), line in by_cell.items() if of == [task, name]}
            if BASE in by_method:
                base = 100 * by_method.pop(BASE)["mean"]
                axes.axhline(base, color=f"C{i}", ls=":", lw=1, label=None if i else "the base alone")
            aligners = [line for method, line in by_method.items() if VARIANTS[method].method == "aligner"]
            x, y = [line["parameters"] for line in aligners], [100 * line["mean"] for line in aligners]
            axes.plot(x, y, color=f"C{i}", label=what)
            for method, line in by_method.items():
                marker = MARKERS[VARIANTS[method].method]
                axes.errorbar(line["parameters"], 100 * line["mean"], 100 * line["half"], fmt=marker, color=f"C{i}",
                              capsize=3)  # fmt: skip
                legend = axes.plot([], [], marker=marker, color="black", ls="")[0]
                markers.setdefault(label(method).partition(",")[0], legend)
        measure = "in the form (%)" if lines[0][1] == "form" else "right (%)"
        axes.set(title=title, xscale="log", xlabel="trainable parameters", ylabel=measure, ylim=(-3, 103))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.legend(markers.values(), markers, loc="outside upper center", ncols=len(markers), fontsize=8)
    figure.supxlabel(textwrap.fill(plain_label(caption), 60 * len(panels)), fontsize=6)
    save_figure(figure, path)


def plot_curves(records: list[Record], path: Path, caption: str) -> None:
    """Plot the loss on the questions asked over steps, at the chosen rates: the mean over seeds of each method."""
    curves: dict[str, dict[str, list[list]]] = {}
    for record in records:
        if "error" not in record:
            task, method, _ = record["trial"]["name"].split("-", 2)
            curves.setdefault(task, {}).setdefault(method, []).append(record["curve"])
    columns = max(1, len(curves))
    figure = make_figure(4.2 * columns, 4)
    tasks = [task for task in TASKS if task in curves]
    for axes, task in zip(figure.subplots(1, columns, squeeze=False)[0], tasks, strict=False):
        for method, runs in curves[task].items():
            steps, losses = [step for step, _ in runs[0]], [[loss for _, loss in curve] for curve in runs]
            mean = [statistics.mean(at_step) for at_step in zip(*losses, strict=True)]
            axes.plot(steps, mean, marker=".", label=label(method))
        axes.set(title=TASKS[task].title, xlabel="optimizer step", ylabel="loss on the questions asked", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.supxlabel(textwrap.fill(plain_label(caption), 50 * columns), fontsize=6)
    save_figure(figure, path)
