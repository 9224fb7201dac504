"""Two sets of answers to the same questions: generated here, or read from files."""

import http.client
import urllib.request
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.common import (
    ANSWER_FIELDS,
    TEMPLATE_DATE,
    Question,
    Results,
    answer_questions,
    answer_statistics,
    check_report,
    drop_long,
    identify,
    load,
    pick_style,
    stop_clock,
    versions_of,
)
from evaluate.settings import CompareSettings
from lit_llama.generation import Sampling
from lit_llama.prompts import PROMPT_STYLES, check_style_name, is_chat
from lit_llama.storage.files import atomic_write
from lit_llama.storage.rows import naming, read_rows, text_field
from lit_llama.storage.schema import check, read_json
from lit_llama.utils import UserError, check_text, log

HARMLESS = "harmless"  # the category of the requests in --harmless_file


@dataclass(frozen=True)
class Item:
    """A question of a benchmark.

    Args:
        id: unique in the benchmark.
        text: the question.
        category: the question's category.
        reference: a correct answer for the judge, if there is one.
    """

    id: int | str
    text: str
    category: str
    reference: str = ""


@dataclass
class Answers:
    """One answer to each question.

    Args:
        name: of the model or file, for reports.
        texts: id of a question -> answer.
        answer_ids: id of a question -> the answer's own id, in FastChat's files.
        statistics: of answers generated here: share that ended by themselves, mean tokens, tokens per second.
        made_by: what made them, as JSON.
        versions: the versions that made them, several if they were made in several runs.
    """

    name: str
    texts: dict[int | str, str]
    answer_ids: dict[int | str, str] = field(default_factory=dict)
    statistics: dict[str, float] | None = None
    made_by: dict[str, Any] = field(default_factory=dict)
    versions: list[dict[str, str]] = field(default_factory=list)


def fetch(url: str, path: Path) -> Path:
    """Download a file once.

    Raises:
        UserError: it cannot be downloaded.
    """
    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"Cannot download {url} ({reason}); give the questions with --data_file.") from None
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
        log(f"downloaded {path}")
    return path


def answers_of_both(
    settings: CompareSettings, items: list[Item], asked: list[Item], report: dict[str, Any]
) -> tuple[Answers, Answers]:
    """Read or generate both sets of answers.

    Args:
        settings: `answer_file` or the model is the first side, `against` the second.
        items: all questions of the benchmark, which a file of answers may have.
        asked: those to compare.
        report: what the summary states besides the sides, for `check_report`.

    Raises:
        UserError: a file has answers to other questions, a model cannot be loaded, both sides are the base, or the
            output folder has the summary of another comparison.
    """
    if settings.against == "base" and not settings.adapter and not settings.answer_file:
        raise UserError("This compares the base model with itself; give --adapter, --answer_file or --against.")
    # files and settings are read first, since generating takes long
    against_file = Path(settings.against).suffix.lower() in (".json", ".jsonl", ".gz")
    first = read_answers(settings.answer_file, items, asked) if settings.answer_file else None
    second = read_answers(Path(settings.against), items, asked) if against_file else None
    other = None if second else other_side(settings, first)
    stated = next(
        (side.made_by[TEMPLATE_DATE] for side in (first, second) if side and TEMPLATE_DATE in side.made_by), None
    )
    if first is None:
        if settings.adapter is None:  # a base is asked in the style of the other side
            style = pick_style(other).name if other else settings.prompt_style or second.made_by.get("prompt_style")
            settings = replace(settings, prompt_style=style)
        results = open_results(settings, "answers", stated)
    if other is not None:
        other_results = open_results(other, "answers_against", stated)
    sides = {"first": first or results, "second": second or other_results}
    report = {**report, **{name: {"made_by": side.made_by} for name, side in sides.items()}}
    check_report(settings.output_dir, report, settings.overwrite)
    places = {item.id: place for place, item in enumerate(items)}
    return (
        first or generate_answers(settings, asked, places, results),
        second or generate_answers(other, asked, places, other_results),
    )


def other_side(settings: CompareSettings, first: Answers | None) -> CompareSettings:
    """Return the settings of the model `against`; a base model gets the prompt style of the first side."""
    if settings.against != "base":
        return replace(settings, answer_file=None, adapter=Path(settings.against), strength=1.0)
    style = pick_style(settings).name if first is None else settings.prompt_style or first.made_by.get("prompt_style")
    return replace(settings, adapter=None, strength=1.0, prompt_style=style)


def open_results(settings: CompareSettings, name: str, stated: str | None) -> Results:
    """Return the folder of a model's answers. Both sides get their prompts on the same date.

    Args:
        name: of the folder, "answers" or "answers_against".
        stated: the date that a file of the other side's answers states, see `stop_clock`.

    Raises:
        UserError: it holds answers of other settings, or the model's files are missing or do not fit.
    """
    sampling = Sampling(settings.max_new_tokens, settings.temperature, seed=settings.seed)
    folders = [settings.output_dir / side for side in ("answers", "answers_against")]
    _, dated = stop_clock(pick_style(settings), *folders, stated=stated)
    made_by = {**identify(settings), **dated, "sampling": asdict(sampling)}
    return Results(settings.output_dir / name, made_by, settings.overwrite)


def generate_answers(
    settings: CompareSettings, items: list[Item], places: dict[int | str, int], results: Results
) -> Answers:
    """Answer the questions that have no answer yet; the model is loaded only if there are any.

    Args:
        places: the place of each question in the benchmark, by id.
    """
    style, _ = stop_clock(pick_style(settings), stated=results.made_by.get(TEMPLATE_DATE))
    name = str(settings.adapter or settings.checkpoint_dir)
    questions = [
        Question(i.id, style.render(i.text), {"question": i.text, "category": i.category}, places[i.id]) for i in items
    ]
    prompts = {question.id: question.prompt for question in questions}
    if len(results.answered(prompts, ANSWER_FIELDS)) < len(questions):
        evaluated = load(settings)
        questions = drop_long(evaluated, questions, skip=settings.skip_long)
        answer_questions(evaluated, questions, Sampling(**results.made_by["sampling"]), results, stop=style.stop,
                         batch_size=settings.batch_size, desc=f"Answering with {name}")  # fmt: skip
    records = [results.by_id[question.id] for question in questions]
    texts = {record["id"]: record["answer"] for record in records}
    return Answers(name, texts, {}, answer_statistics(records), results.made_by, versions_of(records))


def read_answers(path: Path, items: list[Item], asked: list[Item]) -> Answers:
    """Read a file of answers: FastChat's (`question_id`, and `text` or `choices`), or an evaluation's `answers.jsonl`.

    Answers to harmless requests are left out if the benchmark has none.

    Raises:
        UserError: a row lacks a field, or the answers are to other questions.
    """
    known, by_text = {item.id: item for item in items}, {item.text: item.id for item in items}
    answers, made_by = Answers(Path(path).stem, {}, made_by={"file": str(path)}), {}
    rows, n_harmless = read_rows(path), 0
    has_harmless = any(item.category == HARMLESS for item in items)
    for number, row in enumerate(rows, 1):
        if not has_harmless and isinstance(row, dict) and row.get("category") == HARMLESS:
            n_harmless += 1
            continue
        with naming(path):
            id, text = answer_of_row(row, number, by_text)
        if id not in known:
            raise UserError(f"{path} has answers to other questions: the benchmark has no question {id!r}.")
        if "prompt" in row and known[id].text.strip() not in str(row["prompt"]):  # chat templates strip it
            raise UserError(f"{path} has answers to other questions: its question {id!r} has a different text.")
        if id in answers.texts:
            raise UserError(f"{path} has several answers to question {id!r}; it must have one to each.")
        answers.texts[id] = text
        answers.answer_ids[id] = str(row.get("answer_id", ""))
        made_by = row["made_by"] if isinstance(row.get("made_by"), dict) else {}
        name = str(row.get("model_id") or made_by.get("adapter") or made_by.get("base") or answers.name)
        answers.name = check_text(name, f"{path}: the name of the model in row {number}")
        answers.made_by |= {**style_of_row(row, made_by, path), **made_by}
    answers.versions = versions_of(rows)
    if n_harmless:
        log(f"note: without --harmless_file, answers to harmless requests in {path} are left out ({n_harmless}).")
    missing = [item.id for item in asked if item.id not in answers.texts]
    if missing and answers.texts and made_by and len(missing) <= count_skipped(path):
        # `answered_by_both` leaves them out
        log(f"note: {path} has no answers to {len(missing)} of {len(asked)} questions, which are left out.")
    elif missing:
        raise UserError(f"{path} lacks answers to {len(missing)} of {len(asked)} questions, such as {missing[0]!r}.")
    return answers


def count_skipped(path: Path) -> int:
    """Return how many questions an evaluation skipped as too long, by the summary beside its answers; 0 without one.

    Raises:
        UserError: The summary is damaged.
    """
    for folder in (path.parent, path.parent.parent):  # of an evaluation's answers, or of those of one side
        summary = folder / "summary.json"
        if summary.is_file():
            return check(read_json(summary).get("skipped", 0), int, f"{summary}: skipped")
    return 0


def style_of_row(row: dict[str, Any], made_by: dict[str, Any], path: Path) -> dict[str, str]:
    """Return the prompt style that a row states, as an entry of `made_by`; empty if it states none.

    Raises:
        UserError: An evaluation's row states a style that does not exist.
    """
    if "prompt_style" in made_by:
        with naming(path):
            return {"prompt_style": check_style_name(str(made_by["prompt_style"]))}
    style = str(row.get("style"))  # written by generate/aligner.py; in other files it may be anything
    return {"prompt_style": style} if style in PROMPT_STYLES or is_chat(style) else {}


def answer_of_row(row: Any, number: int, by_text: dict[str, int | str]) -> tuple[int | str, str]:
    """Return the question's id and the answer of one row; a row without an id may have the question as `prompt`.

    Raises:
        UserError: the row lacks them.
    """
    if isinstance(row, dict) and not {"question_id", "id"} & row.keys() and str(row.get("prompt")) in by_text:
        row = {**row, "id": by_text[row["prompt"]]}
    is_ours = isinstance(row, dict) and "id" in row and "question_id" not in row
    id = id_field(row, number, "id" if is_ours else "question_id")
    if "choices" in row:
        try:
            turns = row["choices"][0]["turns"]
            row = {**row, "text": turns[0]}
        except (LookupError, TypeError):
            raise UserError(f"Row {number}: 'choices' has no answer.") from None
        if len(turns) > 1:
            raise UserError(f"Row {number}: 'choices' has answers of {len(turns)} turns; the questions have one turn.")
    name = next((name for name in ("text", "answer", "response") if name in row), "text")
    return id, text_field(row, number, name)


def id_field(row: Any, number: int, name: str = "question_id") -> int | str:
    """Return a question's id; see `lit_llama.storage.rows.text_field`.

    Raises:
        UserError: The row has no id, or one that is neither a number nor a text.
    """
    if isinstance(row, dict) and name in row and not isinstance(row[name], str):
        return check(row[name], int | str, f"Row {number}: {name!r}")
    return text_field(row, number, name)


def answered_by_both(items: list[Item], first: Answers, second: Answers) -> list[Item]:
    """Return the questions that neither side skipped.

    Raises:
        UserError: there are none.
    """
    answered = [item for item in items if item.id in first.texts and item.id in second.texts]
    if not answered:
        raise UserError(f"{first.name} and {second.name} have no answered question in common.")
    return answered


def describe(answers: Answers, asked: list[Item]) -> dict[str, Any]:
    """Return what a report states about a set of answers, as JSON."""
    texts = [answers.texts[item.id] for item in asked]
    return {
        "name": answers.name,
        "n": len(texts),
        "mean_words": float(np.mean([len(text.split()) for text in texts])),
        "mean_characters": float(np.mean([len(text) for text in texts])),
        "statistics": answers.statistics,
        "made_by": answers.made_by,
        "versions": answers.versions,
    }


def render_answers(side: dict[str, Any]) -> str:
    """Return a sentence about a set of answers, from `describe`."""
    text = f"{side['name']}: {side['n']} answers, {side['mean_words']:.1f} words on average"
    if statistics := side["statistics"]:
        text += (
            f" or {statistics['mean_tokens']:.1f} tokens; {statistics['ended_share']:.1%} ended by themselves, at "
            f"{statistics['tokens_per_second']:.0f} tokens/s"
        )
    return text + ".\n"
