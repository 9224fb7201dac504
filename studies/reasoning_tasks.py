"""The reasoning study: what is asked, what each objective trains on, and how answers are measured."""

import functools
import json
import random
import statistics
from pathlib import Path
from typing import Any

from lit_llama.checkpoint import base_fingerprint
from lit_llama.generation import Sampling, instruct
from lit_llama.model import LLaMA
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from microworld.datasets import write_prompts, write_rows
from microworld.rewards import ends_right
from microworld.scorer import draw_questions, score_model
from microworld.world import FORMS, TRAIN, Question, World
from studies import paper_tasks
from studies.paper_tasks import SPLITS, Part
from studies.trials import stored_result

TASKS = {"two_hop": "two-hop questions about unseen people", "facts": "new facts, asked in another wording"}
# objective -> (label, `objective` of the trials)
OBJECTIVES = {
    "direct": ("SFT, direct answers", "sft"),
    "aloud": ("SFT, step by step", "sft"),
    "dpo": ("DPO, right over wrong", "dpo"),
    "best_of_n": ("best of n, then SFT", "sft"),
    "rl": ("RL", "rl"),
}
EVAL_ROWS, EVAL_INTERVAL = 40, 5  # validation questions of RL's curve, and steps between its points
LEAST_ROWS = 16  # an objective with fewer training rows is not trained


@functools.cache
def questions_of(task: str, part: Part) -> tuple[list[Question], dict[str, list[Question]]]:
    """Return the questions to train on, and those to ask afterwards: `asked`, and `others` about known facts.

    The two parts of `facts` train on different newcomers, those of `two_hop` on the same people.
    """
    world, split = World(), SPLITS[part]
    others = world.questions(split)
    if task == "facts":
        train, groups = paper_tasks.questions_of("facts", part)
        return train, {"asked": groups["fact"], "others": others}
    return world.two_hop(TRAIN), {"asked": world.two_hop(split), "others": others}


def data_name(task: str, part: Part) -> str:
    return f"{task}-{part}" if task == "facts" else task


# == samples of the base ==


def samples_of_base(
    model: LLaMA, tokenizer: Tokenizer, task: str, part: Part, each: int, base_dir: Path, path: Path
) -> list[list[str]]:
    """Sample `each` answers of the base at temperature 1 to every training question, or read them from a file."""
    questions, _ = questions_of(task, part)
    identity = {"base": base_fingerprint(base_dir)["tensors"], "each": each, "task": task, "part": part}

    def sample() -> dict[str, list[list[str]]]:
        texts = [question.text for question in questions for _ in range(each)]
        sampling = Sampling(60, temperature=1.0, seed=0)
        answers = instruct(model, tokenizer, texts, get_prompt_style("alpaca"), sampling, batch_size=128)
        return {"answers": [answers[i : i + each] for i in range(0, len(answers), each)]}

    return stored_result(path, identity, sample)["answers"]


# == data ==


def rows_of(objective: str, questions: list[Question], samples: list[list[str]]) -> list[tuple]:
    """Return (question, response) pairs, or (question, chosen, rejected) for DPO.

    Args:
        samples: Answers of the base to each question, for "dpo" and "best_of_n".
    """
    rng, forms = random.Random(0), list(FORMS.values())
    if objective == "direct":
        return [(q, rng.choice(forms).render(q.topic, q.answer)) for q in questions]
    if objective == "aloud":
        return [(q, q.render_steps(rng.choice(forms))) for q in questions]
    rows: list[tuple] = []
    for question, answers in zip(questions, samples, strict=True):
        right = [a for a in dict.fromkeys(answers) if ends_right(a, vars(question))]
        wrong = [a for a in dict.fromkeys(answers) if not ends_right(a, vars(question))]
        if objective == "best_of_n":
            rows += [(question, answer) for answer in right]
        elif right and wrong:
            rows.append((question, rng.choice(right), rng.choice(wrong)))
    return rows


def prepare(tokenizer: Tokenizer, task: str, objective: str, part: Part, samples: list[list[str]], folder: Path) -> int:
    """Write the dataset of an objective and return its number of training rows; below `LEAST_ROWS` none is written.

    A tenth of the rows is held out for the validation loss. RL validates on validation people, or on the held-out
    wordings.
    """
    train, groups = questions_of(task, part)
    about = {"source": f"micro-world 0, {task}, {objective}", "tokenizer": tokenizer, "max_seq_length": 256,
             "test_fraction": 0.1, "seed": 0, "num_proc": 1}  # fmt: skip
    if objective == "rl":
        test = groups["asked"] if task == "facts" else questions_of(task, "valid")[1]["asked"]
        write_prompts(train, test, None, folder, **about)
    else:
        rows = rows_of(objective, train, samples)
        if len(rows) < LEAST_ROWS:
            return len(rows)
        write_rows(rows, folder, **about)
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))["counts"]["train"]


# == measures ==


def share(records: list[dict[str, Any]]) -> float | None:
    """Return the share of correct answers; None if there are no answers."""
    return statistics.mean(record["fact"] for record in records) if records else None


def measure(
    model: LLaMA, tokenizer: Tokenizer, task: str, part: Part, count: int, seed: int, suffix: str = ""
) -> dict[str, Any]:
    """Ask `count` questions of each group greedily.

    Args:
        suffix: Text to append to the questions asked, such as " Think step by step.".

    Returns:
        right: share of correct answers; aloud: share step by step; right_aloud, right_direct: share of correct answers
        among those step by step and the others; other_facts, other_forms: of answers about known facts, the share
        with the correct fact, and in any form; answers.
    """
    groups = {name: draw_questions(pool, count, seed) for name, pool in questions_of(task, part)[1].items()}
    groups["asked"] = [Question(**{**vars(q), "text": q.text + suffix}) for q in groups["asked"]]
    results = {
        name: score_model(model, tokenizer, World(), pool, temperature=0.0, seed=seed) for name, pool in groups.items()
    }
    asked, others = results["asked"], results["others"]
    return {
        "right": asked["fact"],
        "aloud": asked["aloud"],
        "right_aloud": share([a for a in asked["answers"] if a["aloud"]]),
        "right_direct": share([a for a in asked["answers"] if not a["aloud"]]),
        "other_facts": others["fact"],
        "other_forms": 1 - others["forms"].get("none", 0.0),
        "answers": {name: result["answers"] for name, result in results.items()},
    }
