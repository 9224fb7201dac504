"""Compare answers to the 80 questions of the Vicuna benchmark, with a language model as the judge (paper, Tables 2, 3).

The answers of a model with any adapter are compared with those of the base, of another adapter, or with a file of
answers. The judge is any OpenAI-compatible endpoint. It scores each pair in both orders, and a disagreement counts as a
tie; it also scores each answer alone. All replies are kept, so that a stopped run continues, and a finished one can
be scored again without the judge. With --review_file, reviews in FastChat's format are counted instead.
"""

import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # run without installing

from evaluate.settings import CompareSettings
from lit_llama import cli
from lit_llama.settings import PositiveInt


@dataclass
class Settings(CompareSettings):
    replaces: ClassVar = {
        **CompareSettings.replaces,
        "review_file": ("adapter", "strength", "judge_url", "judge_cache", "reference_file", "judging"),
    }

    # == Benchmark ==
    data_file: Path | None = None  # the questions, in FastChat's format (default: downloaded into --data_dir)
    data_dir: Path = Path("data/vicuna_bench")  # where the questions are downloaded to
    reference_file: Path | None = None  # correct answers to show the judge, in FastChat's format
    judging: Literal["both", "pair", "single"] = "both"  # compare pairs, grade each answer alone, or both
    review_file: Path | None = None  # count these reviews instead of asking a judge
    limit: PositiveInt | None = None  # only the first questions, up to this many
    output_dir: Path = Path("out/evaluate/vicuna")  # answers, judgements, summary and figure
    overwrite: bool = False  # replace results of other settings in output_dir


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np

from evaluate.answers import Answers, Item, answered_by_both, answers_of_both, describe, fetch, id_field, read_answers
from evaluate.common import REPORT, bootstrap_interval, check_report, markdown_table
from evaluate.judge import Judge, Request, open_judge
from evaluate.pairs import (
    Comparison,
    comparison_summary,
    fixed,
    judge_each,
    judge_pairs,
    plot_bars,
    plot_pairs,
    rating_summary,
    reference_block,
    render_pairs,
    render_unparsed,
    write_report,
)
from evaluate.replies import parse_score, parse_scores
from lit_llama.checkpoint import versions
from lit_llama.run.report import make_figure, save_figure
from lit_llama.storage.files import claim
from lit_llama.storage.rows import naming, read_rows, text_field
from lit_llama.storage.schema import check
from lit_llama.utils import UserError, check_text

QUESTIONS = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/vicuna_bench/question.jsonl"
RESULTS = {"both": ("pairs", "single"), "pair": ("pairs",), "single": ("single",)}  # by `judging`, in the summary

PAIR_PROMPT = """\
Below are a question and two answers to it, by two different assistants. Compare how good the answers are.

A good answer does what the question asks, is correct, and is as detailed as the question needs. Repetition, missing \
parts, an end in the middle of a sentence and text that has nothing to do with the question make an answer worse. The \
order in which the answers stand, their length as such and the assistants' numbers must not matter.

[Question]
{question}
[End of the question]
{reference}
[Answer of assistant 1]
{answer_1}
[End of the answer of assistant 1]

[Answer of assistant 2]
{answer_2}
[End of the answer of assistant 2]

Begin your reply with a line of two numbers and nothing else: the scores of assistant 1 and assistant 2, from 1 \
(worst) to 10 (best), with a space between them. Give equal scores if neither answer is better. Then explain the \
scores in a few sentences."""

SINGLE_PROMPT = """\
Below are a question and an answer to it. Grade the answer.

A good answer does what the question asks, is correct, and is as detailed as the question needs. Repetition, missing \
parts, an end in the middle of a sentence and text that has nothing to do with the question make an answer worse. \
Length as such must not matter.

[Question]
{question}
[End of the question]
{reference}
[Answer]
{answer}
[End of the answer]

Begin your reply with a line of one number and nothing else: the grade from 1 (worst) to 10 (best). Then explain it in \
a few sentences."""


def read_items(path: Path, reference_file: Path | None = None) -> list[Item]:
    """Read questions in FastChat's format: `question_id`, `category`, and `turns` or `text`.

    Raises:
        UserError: a row lacks one of these or has several turns, an id is used twice, or no reference is to a question.
    """
    references = read_references(reference_file) if reference_file else {}
    items: dict[Any, Item] = {}
    for number, row in enumerate(read_rows(path), 1):
        with naming(path):
            turns = row.get("turns") if isinstance(row, dict) else None
            row = {**row, "text": turns[0]} if isinstance(turns, list) and turns else row
            text = text_field(row, number, "text")
            category = text_field(row, number, "category")
            id = id_field(row, number)
            if isinstance(turns, list) and len(turns) > 1:
                raise UserError(f"Row {number}: question {id!r} has {len(turns)} turns; only one can be asked.")
        if id in items:
            raise UserError(f"{path}, row {number}: question {id!r} appears twice.")
        items[id] = Item(id, text, category, references.get(id, ""))
    if not items:
        raise UserError(f"{path} has no questions.")
    if reference_file and not items.keys() & references.keys():
        raise UserError(
            f"{reference_file} has no reference answer to a question in {path}; both must have the same question_id, "
            f"such as {next(iter(items))!r}."
        )
    return list(items.values())


def read_references(path: Path) -> dict[Any, str]:
    """Read reference answers in FastChat's format: id of a question -> answer."""
    references = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            references[row["question_id"]] = row["choices"][0]["turns"][0]
        except (LookupError, TypeError):
            raise UserError(f"{path}, row {number} is not a reference answer in FastChat's format.") from None
    return references


def main(settings: Settings) -> dict[str, Any]:
    """Compare both sides, and return the content of summary.json."""
    claim(settings.output_dir, REPORT)
    summary: dict[str, Any] = {"benchmark": "vicuna", "date": date.today().isoformat(), "versions": versions()}
    if settings.review_file:
        return report(settings, {**summary, **count_reviews(settings)})
    judge = open_judge(settings, settings.output_dir)
    path = settings.data_file or fetch(QUESTIONS, settings.data_dir / "question.jsonl")
    items = read_items(path, settings.reference_file)
    references = {"reference_file": str(settings.reference_file)} if settings.reference_file else {}
    about = {"benchmark": "vicuna", "judge": judge and {**judge.describe([]), **references}}
    about |= dict.fromkeys(RESULTS[settings.judging])
    first, second = answers_of_both(settings, items, items[: settings.limit], about)
    asked = answered_by_both(items[: settings.limit], first, second)
    skipped = len(items[: settings.limit]) - len(asked)
    summary |= {"skipped": skipped, "first": describe(first, asked), "second": describe(second, asked)}
    if judge:
        summary |= judge_all(judge, settings.judging, asked, first, second)
        if references:
            n_references = sum(item.reference != "" for item in asked)
            summary["judge"] |= {**references, "questions_with_reference": n_references}
    return report(settings, summary)


def judge_all(judge: Judge, judging: str, asked: list[Item], first: Answers, second: Answers) -> dict[str, Any]:
    """Compare the pairs and grade each answer alone, or one of the two; return what the summary states about it."""
    summary, records = {}, []
    if "pairs" in RESULTS[judging]:
        comparisons, pair_records = judge_pairs(judge, PAIR_PROMPT, asked, first, second)
        records += pair_records
        summary["pairs"] = comparison_summary(comparisons, first, second)
    if "single" in RESULTS[judging]:
        grades, single_records = judge_each(judge, asked, first, second, single_request, parse_score)
        records += single_records
        summary["single"] = rating_summary(grades, mean_grades, ("grade", "grade_against"))
    prompts = {"pairs": PAIR_PROMPT, "single": SINGLE_PROMPT}
    prompts = {name: prompt for name, prompt in prompts.items() if name in summary}
    return {**summary, "judge": {**judge.describe(records), "prompts": prompts}}


def count_reviews(settings: Settings) -> dict[str, Any]:
    """Count reviews in FastChat's format. Without the questions, all are of one category.

    Raises:
        UserError: a row lacks a field, a question has no review, the reviews are of other answers, there is only one
            file of answers, or the output folder has the summary of another comparison.
    """
    if (settings.answer_file is None) != (settings.against == "base"):
        raise UserError("--review_file takes the answers of both sides, --answer_file and --against, or neither.")
    reviews = read_reviews(settings.review_file)
    items = [Item(id, "", "unknown") for id in reviews]
    path = settings.data_file or settings.data_dir / "question.jsonl"
    if settings.data_file or path.is_file():
        items = read_items(path)
    asked = items[: settings.limit]
    known = {item.id for item in items}
    if other := [id for id in reviews if id not in known]:
        raise UserError(f"{settings.review_file} reviews another benchmark's answers, to question {other[0]!r}.")
    if missing := [item.id for item in asked if item.id not in reviews]:
        raise UserError(f"{settings.review_file} lacks {len(missing)} of {len(asked)} reviews, such as {missing[0]!r}.")
    first = second = None
    if settings.answer_file:
        first = read_answers(settings.answer_file, items, asked)
        second = read_answers(Path(settings.against), items, asked)
        check_reviewed(settings.review_file, reviews, {"answer1_id": first, "answer2_id": second})
    about = {"benchmark": "vicuna", "reviews": {"file": str(settings.review_file)}}
    sides = {name: {"made_by": side.made_by} for name, side in (("first", first), ("second", second)) if side}
    check_report(settings.output_dir, {**about, **sides}, settings.overwrite)
    comparisons = [Comparison(item, parse_scores(reviews[item.id]["text"]), None, one_order=True) for item in asked]
    stored = [(c, reviews[c.item.id]["score"]) for c in comparisons if "score" in reviews[c.item.id]]
    return {
        "first": describe(first, asked) if first else {"name": "answer 1"},
        "second": describe(second, asked) if second else {"name": "answer 2"},
        "reviews": {
            "file": str(settings.review_file),
            "reviewers": sorted({str(reviews[item.id].get("reviewer_id")) for item in asked}),
            "other_scores_stored": [c.item.id for c, score in stored if list(c.direct or (-1, -1)) != score],
        },
        "pairs": comparison_summary(comparisons, first, second),
    }


def read_reviews(path: Path) -> dict[Any, dict[str, Any]]:
    """Read reviews: `question_id` and `text`, perhaps `score`, `answer1_id` and `answer2_id`.

    Raises:
        UserError: a row lacks one of the first two, its `score` is not a list or its `reviewer_id` cannot be encoded; a
            question has two reviews; or there is no review.
    """
    reviews: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(read_rows(path), 1):
        with naming(path):
            text_field(row, number, "text")
            id = id_field(row, number)
            check_text(str(row.get("reviewer_id")), f"Row {number}: 'reviewer_id'")
            if "score" in row:
                check(row["score"], list, f"Row {number}: 'score'")
        if id in reviews:
            raise UserError(f"{path}, row {number} is a second review of question {id!r}.")
        reviews[id] = row
    if not reviews:
        raise UserError(f"{path} has no reviews.")
    return reviews


def check_reviewed(path: Path, reviews: dict[Any, dict[str, Any]], sides: dict[str, Answers]) -> None:
    """Check that the reviews are of the given answers, if they name answers.

    Raises:
        UserError: a review names another answer.
    """
    for id, review in reviews.items():
        for field, answers in sides.items():
            answer_id = answers.answer_ids.get(id)
            if answer_id and review.get(field, answer_id) != answer_id:
                raise UserError(
                    f"{path} reviews other answers: its {field} for question {id!r} is {review[field]}, that of "
                    f"{answers.name} is {answer_id}."
                )


def single_request(item: Item, answer: str, side: str) -> Request:
    prompt = SINGLE_PROMPT.format(question=item.text, reference=reference_block(item), answer=answer)
    return Request((("user", prompt),), {"id": item.id, "kind": "single", "side": side})


def mean_grades(understood: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the mean grade of each side, and their difference with its 95% bootstrap interval."""
    if not understood:
        return {"n": 0, "grade": None, "grade_against": None, "difference": None, "interval": None}
    differences = [a - b for a, b in understood]
    return {
        "n": len(understood),
        "grade": float(np.mean([a for a, _ in understood])),
        "grade_against": float(np.mean([b for _, b in understood])),
        "difference": float(np.mean(differences)),
        "interval": bootstrap_interval(differences),
    }


def report(settings: Settings, summary: dict[str, Any]) -> dict[str, Any]:
    """Print the summary, write it with a figure into the output folder, and return it."""
    sections = {}
    if "reviews" in summary:
        other = ", ".join(map(str, summary["reviews"]["other_scores_stored"]))
        sections["Reviews"] = (
            f"{summary['reviews']['file']}, by {', '.join(summary['reviews']['reviewers'])}, one order only. "
            + (f"The stored scores differ from those in the review's text for questions {other}.\n" if other else "\n")
        )
    if "pairs" in summary:
        first, second = summary["first"]["name"], summary["second"]["name"]
        sections["Pairs"] = render_pairs(summary["pairs"], first, second)
    if "single" in summary:
        sections["Each answer alone"] = render_grades(summary["single"])
    drawn = "pairs" in summary or "single" in summary
    return write_report("Vicuna benchmark", summary, sections, settings.output_dir, plot if drawn else None)


def render_grades(single: dict[str, Any]) -> str:
    rows = []
    for name, part in {"all": single["all"], **single["by_category"]}.items():
        interval = "–" if part["interval"] is None else "{:.2f} to {:.2f}".format(*part["interval"])
        numbers = [fixed(part[field], 2) for field in ("grade", "grade_against", "difference")]
        rows.append([name, part["n"], *numbers, interval])
    table = markdown_table(["category", "n", "grade", "against", "difference", "95%"], rows)
    return table + render_unparsed(single["unparsed"])


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw wins, ties and losses, and mean grades, by category."""
    kinds = [kind for kind in ("pairs", "single") if kind in summary]
    figure = make_figure(7 * len(kinds), 4.5)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        first, second = summary["first"]["name"], summary["second"]["name"]
        if kind == "pairs":
            plot_pairs(axes, summary["pairs"], f"{first}\nagainst {second}")
            continue
        plot_bars(axes, summary["single"], ("grade", "grade_against"), (first, second), "mean grade", 10)
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main, settings)
