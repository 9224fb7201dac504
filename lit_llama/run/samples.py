"""Answers to validation prompts during training."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_llama.generation import Sampling, generate
from lit_llama.model import LLaMA
from lit_llama.prompts import instruction_of
from lit_llama.storage.schema import field, parse_json, read_bytes
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

Record = dict[str, str]  # "prompt", "answer", "reference"


def answer_samples(
    pairs: list[tuple[list[int], list[int]]], tokenizer: Tokenizer, max_new_tokens: int
) -> Callable[[LLaMA], list[Record]]:
    """Return a function that answers prompts with a model, greedily.

    Args:
        pairs: (prompt, response) token ids; the response is recorded as the reference.
        max_new_tokens: Maximum length of an answer.
    """
    prompts, references = [prompt for prompt, _ in pairs], [response for _, response in pairs]

    def answer(model: LLaMA) -> list[Record]:
        answers = generate(model, prompts, Sampling(max_new_tokens), tokenizer.stop_ids) if prompts else []
        texts = ([tokenizer.decode(ids) for ids in column] for column in (prompts, answers, references))
        return [dict(zip(("prompt", "answer", "reference"), row, strict=True)) for row in zip(*texts, strict=True)]

    return answer


def summarize(record: Record) -> str:
    """Return one line: the end of the instruction and the beginning of the answer."""
    prompt, answer = _on_one_line(instruction_of(record["prompt"])), _on_one_line(record["answer"])
    prompt = prompt if len(prompt) <= 50 else "…" + prompt[-50:]
    answer = answer if len(answer) <= 90 else answer[:90] + "…"
    return f"  {prompt} -> {answer}"


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def read_samples(path: Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """Return the records of a samples.jsonl up to a step, none if there is no such file.

    Raises:
        UserError: It cannot be read, or is damaged.
    """
    records = []
    try:
        if not os.path.lexists(path):
            return []
        # JSON strings may contain U+2028, at which `str.splitlines` splits
        # when it was killed, an earlier version could leave an incomplete last line
        for line in read_bytes(path, limit=2**33).split(b"\n")[:-1]:
            record = parse_json(line, path)
            if field(record, "step", int, path, least=0) <= last_step:
                for name in ("prompt", "answer"):
                    field(record, name, str, path)
                records.append(record)
    except UserError as error:
        raise UserError(f"{error} Move it away to continue without it.") from None
    return records


def compare_samples(samples: Path) -> str:
    """Return the first and the last answer to each prompt of the last validation in a samples.jsonl, as text."""
    records = read_samples(samples)
    first = {record["prompt"]: record for record in reversed(records)}
    last_step = max((record["step"] for record in records), default=0)
    return "".join(
        f"\n> {instruction_of(r['prompt'])}\nbefore: {first[r['prompt']]['answer']}\nafter:  {r['answer']}\n"
        for r in records
        if r["step"] == last_step
    )
