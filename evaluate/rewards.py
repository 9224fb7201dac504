"""Rewards that score answers as a benchmark does; see lit_llama/rewards.py."""

from typing import Any

from evaluate.gsm8k import extract_answer, states_one_number
from lit_llama.utils import UserError

SOLUTIONS = ("answer", "response")  # the solution's field in rows of GSM8K and of MetaMathQA


def gsm8k(prompts: list[str], answers: list[str], rows: list[dict[str, Any]], only_number: bool = False) -> list[float]:
    """Return 1 for an answer whose final number equals that of the row's solution (see evaluate/gsm8k.py), else 0.

    With `only_number`, an answer that is more than a number with a unit gets 0.
    """
    expected = [extract_answer(next((row[name] for name in SOLUTIONS if name in row), "")) for row in rows]
    if None in expected:
        row = rows[expected.index(None)]
        raise UserError(f"A row has no number in its {' or '.join(map(repr, SOLUTIONS))}: {str(row)[:120]}.")
    return [
        float(extract_answer(answer) == number and (states_one_number(answer) or not only_number))
        for answer, number in zip(answers, expected, strict=True)
    ]
