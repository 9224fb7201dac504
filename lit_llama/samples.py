"""Answers to validation prompts during training."""

import json
from collections.abc import Callable
from pathlib import Path

from lit_llama.generation import Sampling, generate
from lit_llama.model import LLaMA
from lit_llama.tokenizer import Tokenizer

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
    """Return one line: the end of the prompt and the beginning of the answer."""
    prompt, answer = _on_one_line(record["prompt"]), _on_one_line(record["answer"])
    prompt = prompt if len(prompt) <= 50 else "…" + prompt[-50:]
    answer = answer if len(answer) <= 90 else answer[:90] + "…"
    return f"  {prompt} -> {answer}"


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def compare_samples(samples: Path) -> str:
    """Return the first and the last answer to each prompt of the last validation in a samples.jsonl, as text."""
    records = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    first = {record["prompt"]: record for record in reversed(records)}
    last_step = max((record["step"] for record in records), default=0)
    return "".join(
        f"\n> {r['prompt']}\nbefore: {first[r['prompt']]['answer']}\nafter:  {r['answer']}\n"
        for r in records
        if r["step"] == last_step
    )
