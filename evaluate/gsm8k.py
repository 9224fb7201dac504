"""Solve GSM8K, grade-school math problems with a number as the answer (paper, Figure 5 right).

Downloads openai/gsm8k, or reads --data_file: rows with `question` and `answer`, whose last number is the solution. The
model's answer is right if its final number equals that of the reference.
"""

import itertools
import re
import sys
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # run without installing

from evaluate.settings import ModelSettings
from lit_llama import cli
from lit_llama.settings import PositiveInt


@dataclass
class Settings(ModelSettings):
    # == Questions ==
    data_file: Path | None = None  # rows with question and answer (default: download --repo_id)
    repo_id: str = "openai/gsm8k"  # dataset on the Hugging Face Hub; its test split is used
    limit: PositiveInt | None = None  # answer only this many questions
    shots: Literal[0, 1] = 0  # few-shot examples before each question
    skip_long: bool = True  # skip and count prompts longer than the model's context; false: stop with an error

    # == Generation ==
    max_new_tokens: PositiveInt = 512  # longest answer, in tokens
    batch_size: PositiveInt = 32  # questions answered at a time

    # == Output ==
    output_dir: Path = Path("out/evaluate/gsm8k")  # receives answers.jsonl, summary.json and summary.md
    overwrite: bool = False  # replace results of other settings in output_dir


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from evaluate.common import (
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
from lit_llama.generation import Sampling
from lit_llama.prompts import PromptStyle
from lit_llama.storage.rows import download_rows, naming, read_rows, text_field
from lit_llama.storage.schema import field
from lit_llama.utils import UserError

EXAMPLE = (
    "A baker fills 6 trays with 24 rolls each and sells three quarters of the rolls for $2 each. How many dollars does "
    "the baker earn?",
    "There are 6 * 24 = 144 rolls.\nThe baker sells 144 * 3 / 4 = 108 rolls.\nThe baker earns 108 * 2 = $216.\n"
    "#### 216\nThe answer is: 216",
)

# == Extracting the final number ==

DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])-)?(?:(?<!\d)(?P<whole>\d{{1,9}})\s+)?(?P<above>\d{{1,30}})/(?P<below>\d{{1,30}})(?![\d/])"
    rf"|(?P<minus>(?<![\w)])-)?(?P<decimal>{DIGITS})(?P<exponent>[eE][+-]?\d{{1,2}}(?!\w))?"
)
UNIT_EXPONENT = re.compile(r"(?<=[^\W\d_])\^(?:\d+|\{\d+\})")  # "cm^2"
OPERATION = re.compile(r"\d\s*(?:[-+*/x×÷]|\\(?:times|cdot|div)\b)\s*\d")
EXACT = Context(prec=200, traps=[Inexact])  # more digits than a fraction that NUMBER matches can have
MARKER = re.compile(
    r"(?P<boxed>\\boxed\s*\{)"
    r"|(?P<sentence>\b(?i:answer)\s+is\b(?:\s+(?:therefore|thus|approximately|about))?)"
    r"|(?P<line>\#\#\#\#|^[ \t]*(?:A|(?i:(?:the\s+)?(?:final\s+)?answer))\s*:)",
    re.MULTILINE,
)


def extract_answer(text: str) -> str | None:
    r"""Return the final number of a solution, or None if there is none.

    The last of these decides: `The answer is: 18` (MetaMath), `#### 18` and `A: 18` (GSM8K), `\boxed{18}`. Without any
    of them it is the last number of the text, except in a solution with GSM8K's calculator annotations (`<<9*2=18>>`):
    such a solution ends with `A:` or `####` unless it was cut short.

    Returns:
        The number without commas, trailing zeros, currency or unit: "1234.5". Fractions become decimals where these
        are finite ("0.5"), and are reduced otherwise ("1/3").
    """
    annotated = "<<" in text
    text = plain_text(text)
    for marker in reversed(list(MARKER.finditer(text))):
        stated = stated_after(text, marker)
        number = NUMBER.search(stated)
        if number:
            return normalized(stated, number)
    text = UNIT_EXPONENT.sub("", text)
    numbers = [] if annotated else list(NUMBER.finditer(text))
    return normalized(text, numbers[-1]) if numbers else None


def plain_text(text: str) -> str:
    """Remove annotations, currency, degrees and bold face; rewrite LaTeX's fractions, spaces and powers of ten."""
    text = re.sub(r"<<[^<>]*(?:>>|$)", "", text)
    text = text.replace("−", "-").replace("**", "").replace("`", "")
    text = re.sub(r"\{,\}|\\[,!]", "", text)
    text = re.sub(r"\\?[$€£¥₹]", "", text)
    text = re.sub(r"°|\^\s*(?:\\circ|\{\s*\\circ\s*\})", " ", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(?<=\d)\s*\\[dt]?frac\s*(?=[\d{])", r" \\frac", text)
    operand = r"(?:\{\s*(-?)\s*(\d+)\s*\}|(\d))"
    text = re.sub(rf"\\[dt]?frac\s*{operand}\s*{operand}", plain_fraction, text)
    return re.sub(r"(?<=\d)\s*(?:\\times|×|\*|x)\s*10\s*\^\s*\{?\s*(-?\d{1,2})\b\}?", r"e\1", text)


def plain_fraction(match: re.Match) -> str:
    """Return one of LaTeX's fractions as text, with the minus sign of an operand before it."""
    sign_above, above, digit_above, sign_below, below, digit_below = match.groups("")
    sign = "-" if sign_above != sign_below else ""
    return f"{sign}{above or digit_above}/{below or digit_below}"


def stated_after(text: str, marker: re.Match) -> str:
    """Return the words of the answer that a marker announces, beginning with the number; empty if it announces none."""
    rest = text[marker.end() :].lstrip(" \t:=")
    if marker["boxed"]:
        return balanced(rest)
    line = rest.lstrip().split("\n", 1)[0]
    if marker["sentence"]:
        line = re.split(r"[.!?](?=\s|$)|\s\(|\b(?:since|because)\b", line)[0]
        numbers = list(NUMBER.finditer(line))
        if "=" not in line and numbers and re.search(r"\w", line[: numbers[0].start()]):
            return line[line.rfind(" ", 0, numbers[-1].start()) + 1 :]  # "The answer is that ... 18"
    elif re.search(r"[.!?]\s+\D*\d", line) or not re.match(r"[^\w]*(?:[a-z]\s*=|\d)", line):
        return ""  # reasoning behind `Answer:`, or a heading
    parts = [part for part in line.split("=") if re.search(r"\d", part)]
    if len(parts) > 1 and is_calculation(parts[-1]) and is_number(parts[0]):
        return parts[0]  # "42 = 6 * 7"
    return parts[-1] if parts else ""


def is_calculation(text: str) -> bool:
    """Return whether a text has an operation on two numbers, such as "6 * 7"."""
    return OPERATION.search(text) is not None and len(NUMBER.findall(text)) > 1


def is_number(text: str) -> bool:
    """Return whether a text has one number, perhaps with a unit; "2x" is none."""
    return len(NUMBER.findall(text)) == 1 and not re.search(r"\d[^\W\d]", text)


def states_one_number(text: str) -> bool:
    """Return whether a text is only a number, perhaps with "x =", a currency, a percent sign or the words of a unit."""
    text = re.sub(r"^[^\W\d_]\s*=\s*", "", plain_text(text).strip())
    number = NUMBER.match(text)
    return number is not None and re.fullmatch(r"\s*\\?%?(?:\s+[^\W\d_]{2,})*\s*\.?", text[number.end() :]) is not None


def balanced(text: str) -> str:
    """Return the text before the brace that closes one opened earlier."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return text


def normalized(text: str, number: re.Match) -> str | None:
    """Return a match of NUMBER in its shortest form.

    None if it is an operand of a root, a power or π, or part of "(3, 4)" or "3,4", whose comma separates no thousands.
    """
    before, after = text[: number.start()], text[number.end() :]
    if re.search(r"(?:\\sqrt(?:\[\d+\])?\{?|√|\^\{?)\s*$|\d,$", before):
        return None
    if re.match(r"\s*(?:\^|\\sqrt|√|\\pi\b|π)|,-?\d", after):
        return None
    if re.search(r"[(\[]\s*$", before) and re.match(r"\s*,", after):
        return None
    if number["decimal"] is None:
        below = int(number["below"])
        if below == 0:
            return None
        value = Fraction(int(number["above"]), below) + int(number["whole"] or 0)
        return with_sign(number["sign"], finite_decimal(value) or f"{value.numerator}/{value.denominator}")
    digits = number["decimal"].replace(",", "")
    if number["exponent"]:
        digits = format(Decimal(digits + number["exponent"]), "f")
    return with_sign(number["minus"], digits)


def finite_decimal(value: Fraction) -> str | None:
    """Return a fraction as a decimal; None if its digits never end."""
    try:
        return format(EXACT.divide(value.numerator, value.denominator), "f")
    except Inexact:
        return None


def with_sign(sign: str | None, digits: str) -> str:
    """Strip insignificant zeros and add the minus sign, unless the number is zero."""
    before, _, after = digits.partition(".")
    before, after = before.lstrip("0") or "0", after.rstrip("0")
    number = f"{before}.{after}" if after else before
    return f"-{number}" if sign and number != "0" else number


# == Evaluation ==


def read_questions(settings: Settings, style: PromptStyle) -> list[Question]:
    """Read the problems and render their prompts.

    Raises:
        UserError: a row lacks a field, or its answer has no number.
    """
    source = settings.data_file or settings.repo_id
    rows = read_rows(source) if settings.data_file else download_rows(source, split="test", config_name="main")
    questions = []
    for number, row in enumerate(itertools.islice(rows, settings.limit), 1):
        with naming(source):
            text, gold = text_field(row, number, "question"), extract_answer(text_field(row, number, "answer"))
        if gold is None or not text.strip():
            lacking = "number in its answer" if text.strip() else "question"
            raise UserError(f"Row {number} of {source} has no {lacking}.")
        questions.append(Question(number, render(text, style, settings.shots), {"gold": gold}))
    if not questions:
        raise UserError(f"{source} has no rows.")
    return questions


def render(question: str, style: PromptStyle, shots: int) -> str:
    """Return the prompt of a question, after a few-shot example for `shots` = 1."""
    mark = "Question: " if style.name == "plain" else ""
    examples = [(f"{mark}{text}", solution) for text, solution in (EXAMPLE,)[:shots]]
    return few_shot(style, examples, f"{mark}{question}")


def score(record: dict[str, Any]) -> dict[str, Any]:
    extracted = extract_answer(record["answer"])
    return {"extracted": extracted, "correct": extracted == field(record, "gold", str, "A record in answers.jsonl")}


def main(settings: Settings) -> dict[str, Any]:
    """Evaluate one model and return the content of summary.json."""
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    style, dated = stop_clock(pick_style(settings), settings.output_dir)
    questions = read_questions(settings, style)
    made_by = {**identify(settings), **dated, "shots": settings.shots, "max_new_tokens": settings.max_new_tokens}
    results = Results(settings.output_dir, {"benchmark": "gsm8k", **made_by}, settings.overwrite)
    evaluated = load(settings)
    fitting = drop_long(evaluated, questions, skip=settings.skip_long)
    stop = ("\nQuestion:",) if style.name == "plain" else style.stop
    records = answer_questions(
        evaluated, fitting, sampling, results, stop=stop, batch_size=settings.batch_size, desc="GSM8K", score=score
    )
    summary = summarize(records, skipped=len(questions) - len(records))
    return results.finish(summary, show(summary, settings.shots))


def summarize(records: list[dict[str, Any]], skipped: int) -> dict[str, Any]:
    correct = [record["correct"] for record in records]
    return {
        "n": len(records),
        "skipped": skipped,
        "accuracy": sum(correct) / len(correct),
        "interval": wilson_interval(correct),
        "extracted_share": sum(r["extracted"] is not None for r in records) / len(records),
        **answer_statistics(records),
    }


def show(summary: dict[str, Any], shots: int) -> str:
    """Return the summary as a Markdown table."""
    columns = {
        "GSM8K": f"{shots}-shot",
        "questions": summary["n"],
        "skipped": summary["skipped"],
        "accuracy": f"{summary['accuracy']:.3f}",
        "95% interval": "{:.3f} to {:.3f}".format(*summary["interval"]),
        "with a number": f"{summary['extracted_share']:.1%}",
        "ended": f"{summary['ended_share']:.1%}",
        "mean tokens": f"{summary['mean_tokens']:.1f}",
        "tokens/s": f"{summary['tokens_per_second']:.0f}",
    }
    return markdown_table(list(columns), [list(columns.values())])


if __name__ == "__main__":
    cli.run(main, settings)
