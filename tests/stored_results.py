"""The results.csv of a study, as the study's rows."""

import csv
from pathlib import Path
from typing import Any

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
