"""Reward functions, which score sampled answers, and their names.

A reward function takes a batch of prompts and answers (texts) and of rows (further data of each prompt in the dataset),
and keyword options, if it has any:

    def reward(prompts: list[str], answers: list[str], rows: list[Any], **options) -> list[float]

It is selected as `module:function`, or by a short name in `REWARDS`. Its module is imported only then, so it may be
part of any package or a file in the current folder.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from lit_llama.utils import UserError

REWARDS = {
    "length": "lit_llama.rewards:length",
    "gsm8k": "evaluate.rewards:gsm8k",
    "microworld_form": "microworld.rewards:form",
    "microworld_fact": "microworld.rewards:fact",
    "microworld_answer": "microworld.rewards:form_and_fact",
    "microworld_refusal": "microworld.rewards:refusal",
    "microworld_two_hop": "microworld.rewards:two_hop",
}


class Reward:
    """A reward function with its options, which checks what the function returns.

    Args:
        name: A name in `REWARDS`, or `module:function`.
        options: Keyword arguments of the function.

    Raises:
        UserError: There is no such function.
    """

    def __init__(self, name: str, options: dict[str, Any] | None = None) -> None:
        self.name, self.function, self.options = name, load_function(name), options or {}

    def __call__(self, prompts: list[str], answers: list[str], rows: list[Any], numbers: list[int]) -> list[float]:
        """Return the reward of each answer.

        Args:
            numbers: The number of each row in the dataset, for error messages.

        Raises:
            UserError: The function fails, or a reward is not a finite number. The message names the row.
        """
        try:
            return self.checked(self.function(prompts, answers, rows, **self.options), numbers, rows)
        except UserError:
            raise
        except Exception as error:
            raise UserError(self.explain(error, prompts, answers, rows, numbers)) from error

    def checked(self, values: Any, numbers: list[int], rows: list[Any]) -> list[float]:
        values = list(values)
        if len(values) != len(rows):
            raise UserError(f"The reward {self.name} returned {len(values)} values for {len(rows)} answers.")
        for value, number, row in zip(values, numbers, rows, strict=True):
            if isinstance(value, str) or not math.isfinite(value):
                raise UserError(f"The reward {self.name} is {value!r} for row {number} ({shortened(row)}).")
        return [float(value) for value in values]

    def explain(self, error: Exception, *columns: list[Any]) -> str:
        """Return an error message that names the first row for which the function fails by itself."""
        for prompt, answer, row, number in zip(*columns, strict=True):
            try:
                float(next(iter(self.function([prompt], [answer], [row], **self.options))))
            except Exception as row_error:
                problem = " ".join(f"{type(row_error).__name__}: {row_error}".split())
                return f"The reward {self.name} fails for row {number} ({shortened(row)}): {problem}."
        return f"The reward {self.name} fails for {len(columns[0])} answers: {type(error).__name__}: {error}."


def load_function(name: str) -> Callable[..., list[float]]:
    """Return the function of a reward; modules are also looked for in the current folder.

    Raises:
        UserError: There is no such function.
    """
    module, colon, function = REWARDS.get(name, name).partition(":")
    if not colon:
        raise UserError(f"There is no reward {name!r}; choose from {', '.join(REWARDS)}, or give module:function.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # a module can raise anything
        raise UserError(f"The reward {name!r} cannot be loaded: {type(error).__name__}: {error}.") from error


def shortened(row: Any) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if len(text) <= 120 else text[:120] + "…"


def length(prompts: list[str], answers: list[str], rows: list[Any], words: int = 20) -> list[float]:
    """Return 1 for an answer of `words` words, falling linearly to 0 for an empty answer and for one twice as long."""
    return [max(0.0, 1 - abs(len(answer.split()) - words) / words) for answer in answers]
