"""The questions of MMLU: subjects and categories, and reading them from files, rows or the Hub."""

import csv
import difflib
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.letters import LETTERS
from lit_llama.storage.rows import download_rows, naming, read_rows, read_text, text_field
from lit_llama.storage.schema import check_readable
from lit_llama.utils import UserError, check_text

# fmt: off
CATEGORIES = {
    "STEM": (
        "abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "social sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "other": (
        "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
        "management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}
# fmt: on
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects}


@dataclass(frozen=True)
class Item:
    """A multiple-choice question: `answer` is a letter."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str

    def text(self) -> str:
        return "\n".join([self.question.strip(), *map("{}. {}".format, LETTERS, self.choices)])


def read_items(path: Path | None, repo_id: str) -> dict[str, dict[str, list[Item]]]:
    """Return the questions of the dev and test splits by subject: `items[split][subject]`.

    Args:
        path: a zip file, a folder, a CSV file or rows; None downloads `repo_id`.

    Raises:
        UserError: a file is missing or is not MMLU's, or a row is invalid (with its number).
    """
    if path is None:
        rows = {split: download_rows(repo_id, split=split, config_name="all") for split in ("dev", "test")}
        pairs = [(split, item) for split in rows for item in from_rows(rows[split], f"{repo_id} ({split})")]
    elif path.suffix.lower() in (".json", ".jsonl", ".parquet", ".gz"):
        pairs = [("test", item) for item in from_rows(read_rows(path), str(path))]
    else:
        pairs = [(split, item) for split, name, text in csv_files(path) for item in from_csv(text, name)]
    items: dict[str, dict[str, list[Item]]] = {"dev": {}, "test": {}}
    for split, item in pairs:
        items[split].setdefault(item.subject, []).append(item)
    if not items["test"]:
        raise UserError(f"{path or repo_id} has no test questions of MMLU; they are in SUBJECT_test.csv.")
    return items


def csv_files(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield split, name and text of each CSV file in a zip file or folder; for a single file, also of its dev file.

    Raises:
        UserError: the path is missing or cannot be read.
    """

    def split(name: str) -> str | None:
        match = re.fullmatch(r"[a-z_]+_(dev|test)\.csv", name.split("/")[-1])
        return match and match[1]

    try:
        if path.suffix.lower() == ".zip":
            check_readable(path, "zip file")
            with zipfile.ZipFile(path) as archive:
                for name in sorted(filter(split, archive.namelist())):
                    yield split(name), f"{path}/{name}", archive.read(name).decode("utf-8-sig")
            return
        if path.is_dir():
            files = sorted(path.rglob("*.csv"))
        else:
            check_readable(path)
            dev = path.name.replace("_test.", "_dev.")
            files = [path, *filter(Path.is_file, (path.with_name(dev), path.parent.parent / "dev" / dev))][:2]
        if not path.is_dir() and not split(path.name):
            raise UserError(
                f"{path} cannot be used: --data_file takes mmlu.zip, the folder extracted from the authors' data.tar, "
                "a file SUBJECT_test.csv in it, or rows in JSON or Parquet."
            )
        for file in files:
            if split(file.name):
                yield split(file.name), str(file), read_text(file)
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        # a RuntimeError means that the archive is encrypted or its compression is unknown
        raise UserError(f"{path} cannot be read as MMLU's files ({error}).") from None


def from_csv(text: str, name: str) -> Iterator[Item]:
    """Yield the questions of a CSV file; its rows are question, four choices and a letter.

    Raises:
        UserError: a row does not have these columns (with its number).
    """
    subject = re.split(r"_(?:dev|test)\.csv$", name.split("/")[-1])[0]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, 1):
            if not row:  # a blank line
                continue
            if len(row) != 6:
                raise UserError(
                    f"Row {number} of {name} has {len(row)} columns instead of 6: question, four choices, letter."
                )
            yield checked(Item(subject, row[0], tuple(row[1:5]), row[5].strip()), number, name)
    except csv.Error as error:
        raise UserError(f"Row {number + 1} of {name} is not CSV: {error}.") from None


def from_rows(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Item]:
    """Yield the questions of rows in the Hub's schema.

    Raises:
        UserError: a row lacks a field, or a field has the wrong type (with its number).
    """
    for number, row in enumerate(rows, 1):
        with naming(name):
            question, subject = text_field(row, number, "question"), text_field(row, number, "subject")
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) for c in choices):
            raise UserError(f"Row {number} of {name}: 'choices' is not a list of four texts.")
        check_text("\n".join(choices), f"Row {number} of {name}: 'choices'")
        letter = LETTERS[answer] if type(answer) is int and answer in range(4) else str(answer)
        yield checked(Item(subject, question, tuple(choices), letter), number, name)


def checked(item: Item, number: int, name: str) -> Item:
    if item.subject not in CATEGORY:
        raise UserError(f"Row {number} of {name}: {item.subject!r} is not one of MMLU's 57 subjects.")
    if item.answer not in tuple(LETTERS):
        raise UserError(f"Row {number} of {name}: the answer is {item.answer!r} instead of one of A, B, C, D.")
    return item


def pick_subjects(names: tuple[str, ...], available: Iterable[str]) -> list[str]:
    """Return the subjects to evaluate, in alphabetical order.

    Raises:
        UserError: MMLU or the data has no such subject.
    """
    available = sorted(available)
    for name in names:
        if name not in CATEGORY:
            near = difflib.get_close_matches(name.replace(" ", "_"), CATEGORY, n=1)
            hint = f"the nearest name is {near[0]!r}" if near else f"examples are {', '.join(available[:3])}"
            raise UserError(f"MMLU has no subject {name!r}; {hint}.")
        if name not in available:
            raise UserError(f"The data has no questions of the subject {name!r}; it has {', '.join(available)}.")
    return sorted(set(names)) or available
