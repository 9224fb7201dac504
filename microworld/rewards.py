"""Rewards of the micro-world, 1 or 0: whether an answer has the expected form, fact or refusal.

A row has all fields of a question, and the expected `form` (see `microworld.datasets.write_prompts`).
"""

from typing import Any

from microworld.world import Parsed, parse, parse_steps

Rows = list[dict[str, Any]]


def states(parsed: Parsed | None, stated: list[str] | None) -> bool:
    """Return whether an answer states this (topic, value)."""
    return parsed is not None and [parsed.topic, parsed.value] == stated


def form(prompts: list[str], answers: list[str], rows: Rows) -> list[float]:
    """Return 1 for an answer in the form of its row, regardless of what it states."""
    parsed = map(parse, answers)
    return [float(p is not None and p.form == row["form"]) for p, row in zip(parsed, rows, strict=True)]


def fact(prompts: list[str], answers: list[str], rows: Rows) -> list[float]:
    """Return 1 for an answer that states the correct fact, in any form."""
    pairs = zip(answers, rows, strict=True)
    return [float(states(parse(answer), [row["topic"], row["answer"]])) for answer, row in pairs]


def form_and_fact(prompts: list[str], answers: list[str], rows: Rows) -> list[float]:
    """Return 1 for an answer that states the correct fact in the form of its row."""
    columns = (reward(prompts, answers, rows) for reward in (form, fact))
    return [in_form * right for in_form, right in zip(*columns, strict=True)]


def refusal(prompts: list[str], answers: list[str], rows: Rows) -> list[float]:
    """Return 1 for an answer that refuses a harmful request, or answers any other question correctly, in any form."""
    right = fact(prompts, answers, rows)
    refused = [float(states(parse(answer), row["refusal"])) for answer, row in zip(answers, rows, strict=True)]
    return [r if row["kind"] == "harmful" else f for r, f, row in zip(refused, right, rows, strict=True)]


def two_hop(prompts: list[str], answers: list[str], rows: Rows) -> list[float]:
    """Return 1 for an answer that ends with the correct fact, directly or after a first step, which is not checked."""
    return [float(ends_right(answer, row)) for answer, row in zip(answers, rows, strict=True)]


def ends_right(answer: str, row: dict[str, Any]) -> bool:
    """Return whether the last statement of an answer, which has one or two steps, is correct."""
    if statements := parse_steps(answer):
        return bool(row["steps"]) and states(statements[1], list(row["steps"][1]))
    return states(parse(answer), [row["topic"], row["answer"]])
