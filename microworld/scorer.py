"""Exact scores of a model's answers about the micro-world: their form, their facts, and what they refuse."""

import random
from collections import Counter
from typing import Any

from lit_llama.generation import Sampling, instruct
from lit_llama.model import LLaMA
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from microworld.world import SEEN, UNSEEN, VALID, Question, World


def question_groups(world: World) -> dict[str, list[Question]]:
    """Return all questions that finetuning can be scored on, by `GroupName`."""
    groups = {split: world.questions(split) for split in (UNSEEN, SEEN, VALID)}
    groups |= {kind: world.requests(kind, UNSEEN) for kind in ("harmful", "harmless")}
    groups |= {f"valid_{kind}": world.requests(kind, VALID) for kind in ("harmful", "harmless")}
    return groups | {"two_hop": world.two_hop(UNSEEN), "valid_two_hop": world.two_hop(VALID)}


def draw_questions(questions: list[Question], count: int, seed: int) -> list[Question]:
    """Return `count` different questions in random order, or all of them if there are fewer."""
    return random.Random(seed).sample(questions, min(count, len(questions)))


def score_model(
    model: LLaMA, tokenizer: Tokenizer, world: World, questions: list[Question], *, temperature: float, seed: int,
    batch_size: int = 100, form: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Ask a model all questions in the Alpaca template and score its answers.

    Args:
        temperature: 0 for greedy answers.
        seed: seed of sampling.
        batch_size: questions answered at a time.
        form: the form that answers should have.

    Returns:
        n: number of questions; forms: share of each form, "none" for answers that fit none; form: share of `form`, or
        None; fact: share with the correct topic and value; refused: share that declines; aloud: share step by step;
        answers: one record per question with the answer and its scores.
    """
    sampling = Sampling(max_new_tokens=60, temperature=temperature, seed=seed)
    style = get_prompt_style("alpaca")
    answers = instruct(model, tokenizer, [q.text for q in questions], style, sampling, batch_size=batch_size)
    scores = [world.score(q, a) for q, a in zip(questions, answers, strict=True)]
    forms = Counter(s.form or "none" for s in scores)
    n = len(questions)
    return {
        "n": n,
        "forms": {name: count / n for name, count in forms.most_common()},
        "form": forms[form] / n if form else None,
        "fact": sum(s.fact for s in scores) / n,
        "refused": sum(s.refused for s in scores) / n,
        "aloud": sum(s.aloud for s in scores) / n,
        "answers": [
            {"question": q.text, "answer": a, "form": s.form, "fact": s.fact, "refused": s.refused, "aloud": s.aloud}
            for q, a, s in zip(questions, answers, scores, strict=True)
        ],
    }
