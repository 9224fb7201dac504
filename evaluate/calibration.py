"""Measure how well a judge or a rule detects harmful answers, on answers labeled by people: 1 harmful, 0 safe."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from lit_llama.storage.rows import naming, read_rows, read_text, text_field
from lit_llama.utils import UserError

QUESTION = ("question", "prompt", "instruction", "query", "goal", "input")
ANSWER = ("answer", "response", "completion", "output")
HARMFUL = ("label", "harmful", "is_harmful", "unsafe", "is_unsafe")  # columns whose 1 is a harmful answer
SAFE = ("safe", "is_safe", "harmless", "is_harmless")  # columns whose 1 is a safe one
YES = {"1", "1.0", "true", "yes"}
NO = {"0", "0.0", "false", "no"}
NAMED = {"unsafe": True, "harmful": True, "safe": False, "harmless": False}  # whether the answer is harmful


@dataclass(frozen=True)
class Labelled:
    """An answer labeled by people."""

    question: str
    answer: str
    harmful: bool


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV or TSV file with a header, or of a file that `read_rows` reads.

    Raises:
        UserError: there is no such file, or it is not a table.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        return read_rows(path)
    csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.DictReader(StringIO(read_text(path)), delimiter="\t" if suffix == ".tsv" else ","))
    except csv.Error as error:
        raise UserError(f"{path} is not a table ({error}).") from None
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {number} and the header have different numbers of columns.")
    return rows


def read_labelled(path: Path) -> list[Labelled]:
    """Read labeled answers: rows of a question, an answer and a label, with the usual column names and label formats.

    A label is 0 or 1, true or false, safe or unsafe. In a column named `is_safe` or `safe`, 1 is safe. Rows with two
    answers, as PKU-SafeRLHF has them (`response_0`, `is_response_0_safe`, ...), count as two.

    Raises:
        UserError: a row lacks one of the three, or has a label in another format.
    """
    labelled = []
    for number, row in enumerate(read_table(path), 1):
        with naming(path):
            labelled += labelled_of_row(row, number)
    return labelled


def labelled_of_row(row: Any, number: int) -> list[Labelled]:
    question = text_field(row, number, first_name(row, QUESTION))
    if "response_0" in row:
        answers = [(f"response_{i}", f"is_response_{i}_safe") for i in (0, 1)]
        return [
            Labelled(question, text_field(row, number, answer), is_harmful(row, number, label, inverted=True))
            for answer, label in answers
        ]
    answer = text_field(row, number, first_name(row, ANSWER))
    inverted = next((name for name in SAFE if name in row), None)
    if inverted and not set(HARMFUL) & row.keys():
        return [Labelled(question, answer, is_harmful(row, number, inverted, inverted=True))]
    return [Labelled(question, answer, is_harmful(row, number, first_name(row, HARMFUL)))]


def first_name(row: Any, names: Sequence[str]) -> str:
    """Return the first of the names that a row has; if it has none, the first name, for the error message."""
    return next((name for name in names if isinstance(row, dict) and name in row), names[0])


def is_harmful(row: dict[str, Any], number: int, name: str, inverted: bool = False) -> bool:
    """Return whether a label calls the answer harmful.

    Args:
        inverted: 1, true and yes mean safe in this column. Words such as "harmless" have the same meaning in all.

    Raises:
        UserError: the label is missing or in another format.
    """
    if name not in row:
        raise UserError(f"Row {number} has no field {name!r}; it has {', '.join(map(repr, row)) or 'none'}.")
    text = str(row[name]).strip().lower()
    if text in NAMED:
        return NAMED[text]
    if text not in YES | NO:
        raise UserError(f"Row {number}: the label {name!r} is {row[name]!r}; use 0/1, true/false or safe/unsafe.")
    return (text in YES) != inverted


def agreement(labels: Sequence[bool], predictions: Sequence[bool | None]) -> dict[str, Any]:
    """Return how predictions agree with labels; harmful is the positive class.

    Predictions that are None, for replies that were not understood, are only counted as `unparsed`.
    """
    pairs = [(label, p) for label, p in zip(labels, predictions, strict=True) if p is not None]
    tp, fn = pairs.count((True, True)), pairs.count((True, False))
    fp, tn = pairs.count((False, True)), pairs.count((False, False))
    return {
        "n": len(labels),
        "unparsed": len(labels) - len(pairs),
        "positive_class": "harmful",
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": ratio(tp + tn, len(pairs)),
        "TPR": ratio(tp, tp + fn),
        "TNR": ratio(tn, tn + fp),
        "F1": ratio(2 * tp, 2 * tp + fp + fn),
    }


def ratio(part: int, total: int) -> float | None:
    return part / total if total else None


def area_under_curve(labels: Sequence[bool], scores: Sequence[float | None]) -> float | None:
    """Return the probability that a harmful answer has a lower score than a safe one; equal scores count half."""
    known = [(label, score) for label, score in zip(labels, scores, strict=True) if score is not None]
    harmful = np.array([score for label, score in known if label])
    safe = np.array([score for label, score in known if not label])
    if not len(harmful) or not len(safe):
        return None
    lower, equal = harmful[:, None] < safe[None], harmful[:, None] == safe[None]
    return float((lower + 0.5 * equal).mean())
