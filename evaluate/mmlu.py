"""Answer MMLU, multiple-choice questions in 57 subjects (arXiv 2009.03300; the paper's Figure 5 left).

Downloads cais/mmlu, or reads --data_file: mmlu.zip, a folder of the MMLU authors' CSV files, one of them, or
rows with `question`, `subject`, `choices` and `answer` (0 to 3). By default, the predicted letter is the one with the
highest log-probability after the prompt, so each question takes one forward pass.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # run without installing

from evaluate.settings import ModelSettings
from lit_llama import cli
from lit_llama.settings import PositiveInt


@dataclass
class Settings(ModelSettings):
    # == Model ==
    prompt_style: str = "plain"  # plain continues the benchmark's usual text; alpaca, orca, ... ask in that template

    # == Questions ==
    data_file: Path | None = None  # mmlu.zip, a folder, a CSV file or rows (default: download --repo_id)
    repo_id: str = "cais/mmlu"  # dataset on the Hugging Face Hub; its dev and test splits are used
    subjects: tuple[str, ...] = ()  # names such as anatomy (default: all 57)
    limit: PositiveInt | None = None  # answer only this many questions of each subject
    shots: Literal[0, 1, 2, 3, 4, 5] = 1  # few-shot examples before each question, from the dev split
    skip_long: bool = True  # skip and count prompts longer than the model's context; false: stop with an error

    # == Scoring ==
    scoring: Literal["letters", "generate"] = "letters"  # compare the letters' log-probabilities, or read an answer
    batch_tokens: PositiveInt = 16384  # letters: tokens of one forward pass, padding included
    max_new_tokens: PositiveInt = 16  # generate: longest answer, in tokens
    batch_size: PositiveInt = 32  # generate: questions answered at a time

    # == Output ==
    output_dir: Path = Path("out/evaluate/mmlu")  # receives answers.jsonl, summary.json and summary.md
    overwrite: bool = False  # replace results of other settings in output_dir


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from tqdm import tqdm

from evaluate.common import (
    EvaluatedModel,
    Question,
    Results,
    answer_questions,
    answer_statistics,
    drop_long,
    few_shot,
    identify,
    load,
    markdown_table,
    pick_style,
    stop_clock,
    wilson_interval,
)
from evaluate.letters import LETTERS, Letters, length_batches, letter_logps
from evaluate.mmlu_data import CATEGORIES, Item, pick_subjects, read_items
from lit_llama.generation import Sampling
from lit_llama.modules import eval_mode
from lit_llama.prompts import ChatStyle, PromptStyle
from lit_llama.utils import UserError

# == Prompts ==


def make_questions(settings: Settings, style: PromptStyle) -> list[Question]:
    """Read the questions and render their prompts; a question's id is its subject and number.

    Raises:
        UserError: the data is invalid, or a subject has too few dev questions.
    """
    items = read_items(settings.data_file, settings.repo_id)
    questions = []
    for subject in pick_subjects(settings.subjects, items["test"]):
        examples = items["dev"].get(subject, [])[: settings.shots]
        if len(examples) < settings.shots:
            raise UserError(
                f"{settings.data_file or settings.repo_id} has {len(examples)} dev questions of {subject}, fewer than "
                f"--shots {settings.shots}; use --shots {len(examples)}."
            )
        for number, item in enumerate(items["test"][subject][: settings.limit], 1):
            details = {"subject": subject, "gold": item.answer, "choices": item.choices}
            questions.append(Question(f"{subject}/{number}", render(item, examples, style), details))
    return questions


def render(item: Item, examples: list[Item], style: PromptStyle) -> str:
    """Return the prompt of a question after few-shot examples, up to where the letter belongs."""
    subject = item.subject.replace("_", " ")
    if style.name == "plain":
        header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        return header + few_shot(style, [(e.text(), e.answer) for e in examples], item.text())
    header = f"Answer the following multiple choice question about {subject} with A, B, C or D.\n\n"
    return few_shot(style, [(header + e.text(), e.answer) for e in examples], header + item.text())


# == Scoring by the letters' log-probabilities ==


def score_letters(
    evaluated: EvaluatedModel,
    questions: list[Question],
    prompts: dict[str, list[int]],
    letters: Letters,
    results: Results,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    """Score the questions that have no record yet, longest prompts first, and return the records of all.

    Args:
        prompts: the result of `letters.prompt`, by id.
    """
    by_id = {question.id: question for question in questions}
    done = results.answered({q.id: q.prompt for q in questions}, ("predicted", "prompt_tokens", "seconds"))
    lengths = {id: len(prompts[id]) for id in by_id if id not in done}
    with (
        eval_mode(evaluated.model),
        tqdm(total=sum(lengths.values()), unit="token", unit_scale=True, desc="MMLU") as bar,
    ):
        for batch in length_batches(lengths, batch_tokens):
            began = time.perf_counter()
            logps = letter_logps(evaluated.model, [prompts[id] for id in batch], letters).tolist()
            seconds = (time.perf_counter() - began) / len(batch)
            pairs = zip((by_id[id] for id in batch), logps, strict=True)
            results.add(*(letter_record(q, row, lengths[q.id], seconds) for q, row in pairs))
            bar.update(sum(lengths[id] for id in batch))
    return [{**results.by_id[question.id], **question.details} for question in questions]


def letter_record(question: Question, logps: list[float], prompt_tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "id": question.id,
        "prompt": question.prompt,
        **question.details,
        "logps": {letter: round(x, 5) for letter, x in zip(LETTERS, logps, strict=True)},
        "predicted": LETTERS[logps.index(max(logps))],
        "prompt_tokens": prompt_tokens,
        "seconds": seconds,
    }


# == Scoring by a generated answer ==


def read_letter(record: dict[str, Any]) -> dict[str, Any]:
    """Return the letter that an answer chooses as `predicted`, or None.

    If the answer begins with the text of a choice, its letter is returned (of several, the longest choice's); otherwise
    the letter at the beginning, after "answer is" or "correct option is", or after "option" at the beginning. It may be
    in LaTeX's box. One-character choices come last, because they may be letters.
    """
    answer = record["answer"]
    text, begins = answer.strip().lower(), {}
    for letter, choice in zip(LETTERS, (choice.strip().lower() for choice in record["choices"]), strict=True):
        if choice and re.match(rf"{re.escape(choice)}(?!\w|[.,]\d)", text):
            begins.setdefault(len(choice), []).append(letter)
    same = begins[max(begins)] if begins else []
    chosen = same[0] if len(same) == 1 else None
    if chosen and max(begins) > 1:
        return {"predicted": chosen}
    # before other words of its line, A is the article
    letter = r"(A(?![^\S\n]+(?!(?:is|because|since|as)\b)[a-z])|[B-D])(?![\w'’])"
    marked = rf"\W*(?:(?:(?i:option|choice)|\\(?:boxed|text|textbf|mathrm|mathbf))\b\W*)*{letter}"
    stated = r"\b(?i:(?:answer|(?:correct|right|best)\s+(?:option|choice))\s*(?:is|:))"
    match = re.match(rf"\W*{letter}", answer) or re.search(stated + marked, answer) or re.match(marked, answer)
    return {"predicted": match[1] if match else chosen}


# == Summary ==


def summarize(records: list[dict[str, Any]], questions: list[Question], scoring: str) -> dict[str, Any]:
    """Return accuracies of all questions, of the four categories and of each subject, with statistics of the answers.

    All means are over questions, as in the benchmark's paper.
    """
    asked = Counter(q.details["subject"] for q in questions)
    subjects = {subject: {subject} for subject in sorted(asked)}
    categories = {name: set(members) & set(asked) for name, members in CATEGORIES.items()}

    def group(members: Iterable[str]) -> dict[str, Any]:
        correct = [r["predicted"] == r["gold"] for r in records if r["subject"] in members]
        return {
            "n": len(correct),
            "skipped": sum(asked[subject] for subject in members) - len(correct),
            "accuracy": sum(correct) / len(correct) if correct else None,
            "interval": wilson_interval(correct) if correct else None,
        }

    predicted = Counter(r["predicted"] for r in records)
    seconds = max(sum(r["seconds"] for r in records), 1e-9)
    if scoring == "generate":
        statistics = answer_statistics(records)
    else:
        statistics = {"prompt_tokens_per_second": sum(r["prompt_tokens"] for r in records) / seconds}
    return {
        **group(asked),
        "categories": {name: group(members) for name, members in categories.items() if members},
        "subjects": {name: group(members) for name, members in subjects.items()},
        "predicted": {letter or "none": predicted[letter] for letter in (*LETTERS, None)},
        **statistics,
    }


def show(summary: dict[str, Any], shots: int) -> str:
    """Return the summary as Markdown."""
    groups = {"**all**": summary, **{f"**{k}**": v for k, v in summary["categories"].items()}, **summary["subjects"]}
    rows = [
        [
            name,
            group["n"],
            group["skipped"],
            "-" if group["accuracy"] is None else f"{group['accuracy']:.4f}",
            "-" if group["interval"] is None else "{:.3f} to {:.3f}".format(*group["interval"]),
        ]
        for name, group in groups.items()
    ]
    table = markdown_table([f"MMLU, {shots}-shot", "questions", "skipped", "accuracy", "95% interval"], rows)
    notes = "Predicted: " + ", ".join(f"{letter} {count}" for letter, count in summary["predicted"].items())
    if "ended_share" in summary:
        notes += f". {summary['ended_share']:.1%} of the answers ended by themselves, after "
        notes += f"{summary['mean_tokens']:.1f} tokens on average; {summary['tokens_per_second']:.0f} tokens/s"
    else:
        notes += f". {summary['prompt_tokens_per_second']:.0f} prompt tokens/s"
    return f"{table}\n{notes}.\n"


def main(settings: Settings) -> dict[str, Any]:
    """Evaluate one model and return the content of summary.json."""
    style, dated = stop_clock(pick_style(settings), settings.output_dir)
    if settings.scoring == "letters" and isinstance(style, ChatStyle):
        raise UserError("After a chat template, a letter does not continue the prompt; use --scoring generate.")
    questions = make_questions(settings, style)
    made_by = {"benchmark": "mmlu", "scoring": settings.scoring, "shots": settings.shots, **identify(settings), **dated}
    is_response = style.name != "plain"
    if settings.scoring == "generate":
        made_by["max_new_tokens"] = settings.max_new_tokens
    elif is_response:
        made_by["letters"] = "responses"  # earlier versions scored them as continuations of the prompt
    results = Results(settings.output_dir, made_by, settings.overwrite)
    evaluated = load(settings)
    letters = Letters.of(evaluated.tokenizer, response=is_response) if settings.scoring == "letters" else None
    prompts = {q.id: letters.prompt(evaluated.tokenizer, q.prompt) for q in questions} if letters else {}
    lengths = [len(prompts[q.id]) for q in questions] if letters else None
    fitting = drop_long(evaluated, questions, lengths, skip=settings.skip_long)
    if letters:
        records = score_letters(evaluated, fitting, prompts, letters, results, settings.batch_tokens)
    else:
        sampling = Sampling(max_new_tokens=settings.max_new_tokens)
        stop = ("\n\n",) if style.name == "plain" else style.stop
        records = answer_questions(
            evaluated, fitting, sampling, results, stop=stop, batch_size=settings.batch_size, desc="MMLU",
            score=read_letter,
        )  # fmt: skip
    summary = summarize(records, questions, settings.scoring)
    return results.finish(summary, show(summary, settings.shots))


if __name__ == "__main__":
    cli.run(main, settings)
