"""Tables and the figure of the reasoning study, from the lines of results.csv."""

import math
import statistics
import textwrap
from pathlib import Path
from typing import Any

from lit_llama.run.report import make_figure, plain_label, save_figure
from lit_llama.tables import markdown_table
from studies.paper_report import BASE, Row, percent, seeds_note
from studies.reasoning_tasks import EVAL_INTERVAL, EVAL_ROWS, LEAST_ROWS, OBJECTIVES, TASKS
from studies.trials import interval

ASKED = 'the base, asked to "Think step by step."'
COLUMNS = {
    "right": "right",
    "aloud": "step by step",
    "right_aloud": "right, if step by step",
    "right_direct": "right, if direct",
    "other_facts": "known facts right",
    "other_forms": "known facts in form",
}


def reported(rows: list[Row], **values: Any) -> list[Row]:
    """Return the trials of the table that have these values, also those that failed."""
    trials = [row for row in rows if row["part"] == "reported"]
    return [row for row in trials if all(row[name] == value for name, value in values.items())]


def finished(trials: list[Row]) -> list[Row]:
    """Return the trials that did not fail."""
    return [row for row in trials if not row["error"]]


def values_of(trials: list[Row], name: str) -> list[Any]:
    """Return a measure of each trial; None for a trial that failed."""
    return [None if row["error"] else row[name] for row in trials]


def count(values: list[int | None]) -> str:
    """Return the median of the seeds, and how many seeds have a value if not all have one."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):,.0f}{seeds_note(known, values)}" if known else "never"


def cells_of(rows: list[Row], task: str) -> list[tuple[str, str]]:
    """Return the (objective, method) pairs that were trained, in the order of `OBJECTIVES`."""
    trials = [row for row in finished(reported(rows, task=task)) if row["method"] != BASE]
    cells = {(row["objective"], row["method"]): None for row in trials}
    return sorted(cells, key=lambda cell: [*OBJECTIVES].index(cell[0]))


def axes_of(rows: list[Row], task: str, labels: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the objectives and the methods that were trained on a task."""
    cells = cells_of(rows, task)
    methods = {method for _, method in cells}
    return [*dict.fromkeys(objective for objective, _ in cells)], [method for method in labels if method in methods]


def overview(rows: list[Row], task: str, labels: dict[str, str], column: str) -> str:
    """Return a table of one of `COLUMNS`, with a line for each method and a column for each objective."""
    objectives, methods = axes_of(rows, task, labels)
    lines = []
    for method in methods:
        by_objective = [reported(rows, task=task, objective=objective, method=method) for objective in objectives]
        parameters = next(row["parameters"] for trials in by_objective for row in finished(trials))
        values = [percent(values_of(trials, column)) for trials in by_objective]
        lines.append([labels[method], f"{parameters:,}", *values])
    return markdown_table(["method", "parameters", *(OBJECTIVES[objective][0] for objective in objectives)], lines)


def task_table(rows: list[Row], task: str, labels: dict[str, str]) -> str:
    """Return a line for the base and for each objective and method."""
    lines = []
    for objective in ("", "asked"):
        if trials := reported(rows, task=task, method=BASE, objective=objective):
            shares = [percent(values_of(trials, name)) for name in COLUMNS]
            lines.append([BASE if not objective else ASKED, "", "0", *shares, "–", "–", "–"])
    for objective, method in cells_of(rows, task):
        trials = reported(rows, task=task, objective=objective, method=method)
        done = finished(trials)
        shares = [percent(values_of(trials, name)) for name in COLUMNS]
        minutes = statistics.median(row["seconds"] for row in done) / 60
        lines.append(
            [OBJECTIVES[objective][0], labels[method], f"{done[0]['parameters']:,}", *shares,
             count(values_of(trials, "answers_until")), f"{minutes:.1f}", rate_of(rows, done[0])]
        )  # fmt: skip
    heads = ["objective", "method", "parameters", *COLUMNS.values(), "answers sampled", "minutes", "learning rate"]
    return markdown_table(heads, lines)


def rate_of(rows: list[Row], row: Row) -> str:
    """Return the learning rate of a line; a star marks the lowest and the highest that was tried, if several were."""
    same = [other for other in rows if all(other[k] == row[k] for k in ("task", "objective", "method"))]
    tried = {other["learning_rate"] for other in same if other["part"] == "valid"}
    rate = row["learning_rate"]
    return f"{rate:g}" + "*" * (len(tried) > 1 and rate in (min(tried), max(tried)))


def report(
    rows: list[Row], empty: dict[tuple[str, str], int], labels: dict[str, str], *, settings: Any, origin: str
) -> str:
    """Return the content of table.md.

    Args:
        empty: (task, objective) with too few training rows -> number of answers sampled from the base.
        labels: The labels of the methods.
        settings: The settings of the study.
        origin: How the results were made.
    """
    parts = []
    for task, title in TASKS.items():
        if any(row["task"] == task for row in rows):
            columns = ("right", "other_facts") if cells_of(rows, task) else ()
            for column in columns:
                base = percent(values_of(reported(rows, task=task, method=BASE, objective=""), column))
                parts += [f"**{title[0].upper()}{title[1:]}: {COLUMNS[column]}** (the base alone: {base})",
                          overview(rows, task, labels, column)]  # fmt: skip
            parts += [f"All measures of {title}:", task_table(rows, task, labels)]
            parts += [
                f"{OBJECTIVES[objective][0]} was not trained: {sampled:,} answers of the base at temperature 1 gave "
                f"fewer than {LEAST_ROWS} rows."
                for (of, objective), sampled in empty.items()
                if of == task
            ]
    tried = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    first, *others = map(str, settings.sweep_seeds)
    repeated = f", and for the two best rates also with {' and '.join(others)}" if others else ""
    chosen = (
        f"The learning rate is the best of {tried} by answers about validation people and to other questions, with "
        f"seed {first}{repeated}. While it was the lowest or the highest, a rate beyond it was tried, at most "
        f"{settings.extra_rates} times, with all these seeds if they had decided. If all of these rates gave the "
        "same accuracy, the one with the lowest validation loss was used. A star marks a rate that is still the lowest "
        "or the highest."
        if len(settings.learning_rates) > 1
        else f"The learning rate was not chosen; it is {tried}."
    )
    parts.append(
        f"""Percent of greedy answers to {settings.questions} questions of each kind, or to all where there are fewer
(new facts): mean ± half-width of the 95% confidence interval (Student's t) over the seeds, which also draw the
questions. The columns "right, if" are shares of the answers step by step and of the direct answers; their means are
over the seeds that gave such answers, each with the same weight. Answers sampled: for RL until
{settings.reached:.0%} of {EVAL_ROWS} greedy answers were right, checked every {EVAL_INTERVAL} steps
(two-hop questions about validation people; new facts in the wordings of the table), the median of the seeds that got
there; for DPO and best of n in total. Minutes: of one thread, training and scoring, median; RL includes sampling and
these checks, DPO and best of n exclude the sampling of their answers, which all trials share.
{chosen}"""
    )
    failed = [f"Failed: {row['task']}, {row['objective']}, {row['method']}, {row['learning_rate']:g}, seed "
              f"{row['seed']}: {row['error']}" for row in rows if row["error"]]  # fmt: skip
    return "\n\n".join([*parts, *failed, f"Made by {origin}."]) + "\n"


def plot(rows: list[Row], labels: dict[str, str], path: Path, caption: str) -> None:
    """Plot accuracy by objective and method as bars, with a line at the share of answers step by step.

    If nothing was trained, no file is written, and an old one is deleted.
    """
    tasks = [task for task in TASKS if cells_of(rows, task)]
    if not tasks:
        path.unlink(missing_ok=True)
        return
    figure = make_figure(6.5 * len(tasks) + 1.5, 4.5)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        objectives, methods = axes_of(rows, task, labels)
        first = {method: next(objective for objective, m in cells_of(rows, task) if m == method) for method in methods}
        width = 0.8 / len(methods)
        for j, method in enumerate(methods):
            for i, objective in enumerate(objectives):
                trials = finished(reported(rows, task=task, objective=objective, method=method))
                if not trials:
                    continue
                x = i + (j - (len(methods) - 1) / 2) * width
                mean, half = interval(100 * row["right"] for row in trials)
                axes.bar(x, mean, 0.9 * width, color=f"C{j}", yerr=None if math.isnan(half) else half, capsize=2,
                         label=labels[method] if objective == first[method] else None)  # fmt: skip
                if task == "two_hop":
                    aloud = 100 * statistics.mean(row["aloud"] for row in trials)
                    axes.hlines(aloud, x - 0.45 * width, x + 0.45 * width, color="black", lw=1.5)
        base = [100 * row["right"] for row in reported(rows, task=task, method=BASE, objective="")]
        axes.axhline(statistics.mean(base), color="grey", ls=":", lw=1, label="the base alone")
        if task == "two_hop":
            axes.plot([], [], color="black", lw=1.5, label="share step by step")
        ticks = [textwrap.fill(OBJECTIVES[objective][0], 12) for objective in objectives]
        axes.set_xticks(range(len(objectives)), ticks, fontsize=8)
        axes.set(title=TASKS[task], ylabel="right (%)", ylim=(0, 105))
        axes.grid(alpha=0.3, axis="y")
    handles = panels[0].get_legend_handles_labels()
    panels[-1].legend(*handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    figure.supxlabel(textwrap.fill(plain_label(caption), 80 * len(tasks)), fontsize=6)
    save_figure(figure, path)
