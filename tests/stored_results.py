"""The results.csv of a study: its rows, and the trials that the current study would run with these results."""

import csv
from pathlib import Path
from typing import Any

from studies.trials import Cell, Plan

TEXT = {"task", "objective", "method", "part", "error"}
INTS = {"seed", "parameters", "steps", "answers_sampled", "answers_until"}


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results.csv with the types that the study uses; an empty number is None."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            numbers = {name: int(v) if name in INTS else float(v) for name, v in line.items() if v and name not in TEXT}
            rows.append({name: v if name in TEXT else numbers.get(name) for name, v in line.items()})
    return rows


def records_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a study states about its training runs, from the rows that have a learning rate."""
    return [{"seconds": row["seconds"], "versions": {"torch": "2.13.0+cpu"}} for row in rows if row["learning_rate"]]


def replay(plan: Plan[Cell], rows: list[dict[str, Any]]) -> int:
    """Run the plan of a cell with the stored results of its trials; return their number.

    It must try the same rates and choose the same one.
    """
    by_trial = {(row["part"], row["learning_rate"], row["seed"]): row for row in rows}
    records, tried = None, set()
    try:
        while True:
            trials = plan.send(records)
            keys = [(t.scoring["part"], t.settings["learning_rate"], t.settings["seed"]) for t in trials]
            records = [
                {"trial": trial.as_json(), "summary": {"last_val_loss": row["val_loss"]}, "scores": row}
                for trial, row in zip(trials, map(by_trial.__getitem__, keys), strict=True)
            ]
            tried.update(keys)
    except StopIteration:
        assert tried == by_trial.keys()
    return len(tried)
