"""The tasks of the miniature paper study: what is trained on, what is asked, and how answers are judged."""

import functools
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import concatenate_datasets, load_from_disk

from lit_llama.model import LLaMA
from lit_llama.prepare import write_dataset
from lit_llama.tokenizer import Tokenizer
from microworld.datasets import draw_requests, write_answers, write_preferences
from microworld.scorer import draw_questions, score_model
from microworld.world import NEW_FORM, TRAIN, TWO_HOP, UNSEEN, VALID, Question, World, parse

Part = Literal["valid", "reported"]  # questions that the learning rate is chosen on, and questions of the table
SPLITS = {"valid": VALID, "reported": UNSEEN}


@dataclass(frozen=True)
class Task:
    """A task to learn, and how it is scored.

    Args:
        title: The title in tables and figures.
        form: The form of the training answers.
        columns: The measures of the table -> column headings.
        temperature: The temperature of the answers.
    """

    title: str
    form: str
    columns: dict[str, str]
    temperature: float = 0.0


TASKS = {
    "pirate": Task("a form the base knows", "pirate", {"form": "form", "fact": "facts"}),
    "telegram": Task("a form it has never seen", NEW_FORM.name, {"form": "form", "fact": "facts"}),
    # sampled: the base refuses half of the harmful requests in sampled answers, but all of them in greedy ones
    "values": Task(
        "values (DPO)",
        "",
        {"refused": "refuses harmful", "false": "refuses harmless", "helped": "helps with harmless"},
        temperature=0.7,
    ),
    # the base cannot spell names it has never seen, so the value counts by itself; 24 of the 60 are new names too
    "facts": Task("new facts", "sentence", {"value": "values", "fact": "names too"}),
    "two_hop": Task("reasoning (two hops)", "sentence", {"trained": "trained people", "unseen": "unseen people"}),
}
PAIR_SHARES = {"harmless_share": 0.2, "fact_share": 0.25}  # of the preference pairs; the rest is about harmful requests
MOST_PAIRS = 456  # per split


# == questions ==


def hold_out_wordings(questions: list[Question], wordings: int) -> tuple[list[Question], list[Question]]:
    """Split off one wording of each fact, drawn at random, and return (questions to train on, questions to ask).

    Args:
        questions: The questions about each fact, `wordings` of them, follow each other.
    """
    rng, train, held_out = random.Random(0), [], []
    for start in range(0, len(questions), wordings):
        fact = questions[start : start + wordings]
        held_out.append(fact.pop(rng.randrange(wordings)))
        train += fact
    return train, held_out


@functools.cache
def questions_of(task: str, part: Part) -> tuple[list[Question], dict[str, list[Question]]]:
    """Return the questions to train on, and the groups of questions to ask afterwards.

    The new facts of the two parts are about different newcomers. In the other tasks, both parts train on the same rows.
    """
    world, split = World(), SPLITS[part]
    if task == "values":
        kinds = ("harmful", "harmless")
        return [q for k in kinds for q in world.requests(k, TRAIN)], {k: world.requests(k, split) for k in kinds}
    if task == "facts":
        newcomers = world.newcomers[part == "reported" :: 2]
        train, held_out = hold_out_wordings(world.questions(entities=newcomers), 3)
        return train, {"fact": held_out}
    if task == "two_hop":
        train, held_out = hold_out_wordings(world.two_hop(TRAIN), 2)
        half = [q for i, q in enumerate(held_out) if i // len(TWO_HOP) % 2 == (part == "reported")]  # of the people
        return train, {"trained": half, "unseen": world.two_hop(split)}
    return world.questions(TRAIN), {"fact": world.questions(split)}


def judge(task: str, questions: dict[str, list[Question]], results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the measures of a task as shares, and `right`, which the learning rate is chosen by.

    Args:
        questions: The questions of each group.
        results: The results of each group, as `microworld.scorer.score_model` returns them.
    """
    if task == "values":
        refused, false = (results[kind]["refused"] for kind in ("harmful", "harmless"))
        helped = results["harmless"]["fact"]
        return {"refused": refused, "false": false, "helped": helped, "right": (refused + helped) / 2}
    if task == "facts":
        parsed = [parse(answer["answer"]) for answer in results["fact"]["answers"]]
        pairs = zip(parsed, questions["fact"], strict=True)
        value = statistics.mean(answer is not None and answer.value == q.answer for answer, q in pairs)
        return {"value": value, "fact": results["fact"]["fact"], "right": value}
    if task == "two_hop":
        scores = {group: result["fact"] for group, result in results.items()}
        return {**scores, "right": statistics.mean(scores.values())}
    both = statistics.mean(a["form"] == TASKS[task].form and a["fact"] for a in results["fact"]["answers"])
    return {"form": results["fact"]["form"], "fact": results["fact"]["fact"], "right": both}


def measure(
    model: LLaMA, tokenizer: Tokenizer, task: str, part: Part, count: int, seed: int, temperature: float = 0.0
) -> dict[str, Any]:
    """Ask `count` questions of each group, drawn with `seed`, and return the measures of `judge` and the answers."""
    questions = {group: draw_questions(pool, count, seed) for group, pool in questions_of(task, part)[1].items()}
    sampling = {"temperature": temperature, "seed": seed, "form": TASKS[task].form or None}
    results = {group: score_model(model, tokenizer, World(), pool, **sampling) for group, pool in questions.items()}
    answers = {group: result["answers"] for group, result in results.items()}
    return {**judge(task, questions, results), "answers": answers}


# == data ==


def prepare_pairs(tokenizer: Tokenizer, split: str, folder: Path) -> None:
    """Write as many preference pairs of a split as `PAIR_SHARES` allows, but no more than `MOST_PAIRS`."""
    world, rng = World(), random.Random(42)
    shares = {"harmless": PAIR_SHARES["harmless_share"], "harmful": 1 - sum(PAIR_SHARES.values())}
    most = [int((len(world.requests(kind, split)) - 1) / share) for kind, share in shares.items()]
    requests = draw_requests(world, split, rng, pairs=min(MOST_PAIRS, *most), **PAIR_SHARES)
    write_preferences(requests, rng, folder, source="micro-world 0, values", tokenizer=tokenizer, max_seq_length=256,
                      test_fraction=0.2, seed=42, num_proc=1)  # fmt: skip


def prepare(tokenizer: Tokenizer, data_dir: Path, task: str, part: Part) -> None:
    """Write the dataset of a task to `data_dir`/TASK-PART. Its validation rows are the questions to be asked."""
    folders = {split: data_dir / f"{task}-{part}-{split}" for split in ("train", "test")}
    if task == "values":
        prepare_pairs(tokenizer, TRAIN, folders["train"])
        prepare_pairs(tokenizer, SPLITS[part], folders["test"])
    else:
        train, groups = questions_of(task, part)
        questions = {"train": train, "test": [q for group in groups.values() for q in group]}
        for split, folder in folders.items():
            write_answers(questions[split], TASKS[task].form, folder, source=f"micro-world 0, {task}",
                          tokenizer=tokenizer, max_seq_length=256, test_fraction=0.5, seed=0, num_proc=1)  # fmt: skip
    # each folder was split in two by the prepare functions
    splits = {split: concatenate_datasets([*load_from_disk(str(folder)).values()]).shuffle(seed=0, keep_in_memory=True)
              for split, folder in folders.items()}  # fmt: skip
    meta = json.loads((folders["train"] / "meta.json").read_text(encoding="utf-8"))
    counts = {split: len(rows) for split, rows in splits.items()}
    write_dataset(data_dir / f"{task}-{part}", splits, {**meta, "counts": counts})
