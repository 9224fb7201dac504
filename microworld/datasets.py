"""Finetuning datasets of the micro-world: questions answered in one form, preference pairs, and prompts for RL."""

import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lit_llama.prepare import prepare_preferences, prepare_sft
from lit_llama.prepare_prompts import prepare_prompts
from lit_llama.prompts import get_prompt_style
from lit_llama.utils import UserError
from microworld.world import ALL_FORMS, FORMS, REFUSAL, Question, World


def write_answers(
    questions: list[Question], form: str, output_dir: Path, *, source: str, aloud: bool = False, **options: Any
) -> None:
    """Write a dataset for supervised finetuning: every question with its correct answer in one form.

    Args:
        source: a description of the questions, for the dataset's metadata.
        aloud: answer step by step; all must be two-hop questions.
        options: further arguments of `lit_llama.prepare.prepare_sft`.
    """
    answers = [q.render_steps(ALL_FORMS[form]) if aloud else ALL_FORMS[form].render(q.topic, q.answer)
               for q in questions]  # fmt: skip
    write_rows([*zip(questions, answers, strict=True)], output_dir, source=source, **options)


def write_rows(rows: list[tuple[Any, ...]], output_dir: Path, *, source: str, **options: Any) -> None:
    """Write a dataset for SFT from (question, response) rows, or for DPO from (question, chosen, rejected) rows.

    Args:
        rows: one or more, with a `Question` and texts.
        source, options: as for `write_answers`.
    """
    style = get_prompt_style("alpaca")
    prepare = partial(prepare_sft, mask_prompt=True) if len(rows[0]) == 2 else prepare_preferences
    prepare(
        rows,
        lambda row, number: (style.render(row[0].text), *row[1:]),
        output_dir=output_dir,
        about={"source": source, "prompt_style": style.name},
        **options,
    )


def draw_requests(
    world: World, split: str, rng: random.Random, *, pairs: int, harmless_share: float, fact_share: float
) -> list[Question]:
    """Draw requests of all kinds without repetition, in random order.

    Args:
        pairs: number of requests.
        harmless_share, fact_share: shares of harmless requests and of questions about facts; the rest is harmful.

    Raises:
        UserError: the split has fewer requests of a kind.
    """
    counts = {"harmless": round(pairs * harmless_share), "fact": round(pairs * fact_share)}
    counts["harmful"] = pairs - sum(counts.values())
    drawn = []
    for kind, count in counts.items():
        available = world.questions(split) if kind == "fact" else world.requests(kind, split)
        if not 0 <= count <= len(available):
            raise UserError(
                f"{count} {kind} requests are needed (pairs {pairs}, harmless_share {harmless_share}, "
                f"fact_share {fact_share}); there are {len(available)}."
            )
        drawn += rng.sample(available, count)
    rng.shuffle(drawn)
    return drawn


def preference(question: Question, rng: random.Random) -> tuple[str, str]:
    """Return (chosen response, rejected response).

    A refusal is chosen if the request is harmful, an answer otherwise. Both responses have the same form, drawn at
    random, so that they differ only in whether they refuse.
    """
    form = rng.choice(list(FORMS.values()))
    comply = form.render(question.topic, question.answer)
    refuse = form.render(*(question.refusal or (question.topic, REFUSAL)))
    return (refuse, comply) if question.kind == "harmful" else (comply, refuse)


def write_preferences(questions: list[Question], rng: random.Random, output_dir: Path, **options: Any) -> None:
    """Write a dataset for DPO, one pair of responses for every question.

    Args:
        rng: draws the forms.
        options: further arguments of `write_rows`.
    """
    write_rows([(question, *preference(question, rng)) for question in questions], output_dir, **options)


def write_prompts(
    train: list[Question], test: list[Question], form: str | None, output_dir: Path, *, source: str, seed: int,
    **options: Any,
) -> None:  # fmt: skip
    """Write a dataset of prompts for reinforcement learning, in random order.

    Args:
        train, test: questions to learn from, and questions to validate on.
        form: the form that the rewards in microworld/rewards.py expect.
        source: a description of the questions, for the dataset's metadata.
        options: further arguments of `lit_llama.prepare_prompts.prepare_prompts`.
    """
    style, questions = get_prompt_style("alpaca"), [*train, *test]
    random.Random(seed).shuffle(questions)
    prepare_prompts(
        questions,
        lambda question, number: (style.render(question.text), {**asdict(question), "form": form}),
        output_dir=output_dir,
        split_by={style.render(question.text) for question in test},
        seed=seed,
        about={"source": source, "prompt_style": style.name},
        **options,
    )
