"""Write prepared datasets of prompts, for reinforcement learning (finetune/alignerRL.py)."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from lit_llama.data import PROMPT_FORMAT
from lit_llama.prepare import prepare_dataset
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import check_text


def prepare_prompts(
    rows: Iterable[Any],
    prepare_sample: Callable[[Any, int], tuple[str, Any]],
    *,
    tokenizer: Tokenizer,
    max_seq_length: int,
    **options: Any,
) -> dict[str, Any]:
    """Write a dataset of prompts. For `rows`, `options` and the result see `prepare_dataset`.

    Args:
        prepare_sample: Function of a row and its number, counted from 1, that returns the prompt and what the reward
            needs to know; values that JSON cannot represent, such as dates, become text. It raises `UserError` for an
            invalid row.
        max_seq_length: Maximum length of prompt and answer, in tokens; a row whose prompt leaves no room for an answer
            is dropped.
    """

    def prepare(row: Any, number: int) -> tuple[str, str]:
        prompt, source = prepare_sample(row, number)
        return prompt, check_text(json.dumps(source, ensure_ascii=False, default=str), f"Row {number}")

    def encode(prompt: str, source: str) -> dict[str, Any]:
        prompt_ids = tokenizer.encode(prompt, bos=True)
        fits = len(prompt_ids) <= max_seq_length - 2  # one token of the answer, and EOS
        return {"prompt": prompt_ids, "row": source, "dropped": "" if fits else "too_long", "cut": 0}

    return prepare_dataset(
        rows,
        prepare,
        encode,
        drops=("too_long",),
        key=[PROMPT_FORMAT, max_seq_length],
        tokenizer=tokenizer,
        settings={"format": PROMPT_FORMAT, "max_seq_length": max_seq_length},
        **options,
    )
