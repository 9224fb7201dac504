"""Prepare a finetuning dataset of the micro-world: questions about the seen half of its entities, answered in one form.

The other half is held out, so that `evaluate/microworld.py` can tell a learned form from memorized answers. With
--stage rl the dataset has the questions without answers, and its validation split is about held-out entities. By
default these are two-hop questions for checkpoints/microworld-aloud; the training split also has as many questions
about single facts, so that the model does not forget them.
"""

import random
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare_settings import PrepareSettings
from lit_llama.settings import OpenShare, PositiveInt, Seed
from lit_llama.utils import UserError
from microworld.world import FormName


@dataclass
class Settings(PrepareSettings):
    # == What to write ==
    stage: Literal["sft", "rl"] = "sft"  # write questions with answers, or prompts for reinforcement learning
    questions: Literal["facts", "two_hop", "mixed"] | None = (
        None  # two_hop takes two facts to answer, mixed is half of each (default: facts, and mixed for rl)
    )
    manner: Literal["direct", "aloud"] = "direct"  # sft: answer two-hop questions at once, or step by step
    form: FormName = "pirate"  # form of every answer; the base model knows all but telegram
    split: Literal["seen", "train"] = "seen"  # "train" leaves out the entities reserved for choosing hyperparameters
    world_seed: Seed = 0  # seed of the world; the bundled base model knows world 0
    output_dir: Path | None = None  # folder to write (default: data/microworld-FORM, -two_hop-MANNER, or -rl)
    checkpoint_dir: Path | None = (
        None  # base model whose tokenizer is used (default: checkpoints/microworld, and -aloud for two_hop)
    )
    max_seq_length: PositiveInt = 256  # maximum number of tokens of prompt and response
    test_fraction: OpenShare = 0.1  # sft: share of the rows held out for validation (rl: unseen entities are)


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from microworld.datasets import write_answers, write_prompts
from microworld.world import SEEN, UNSEEN, VALID, Question, World


def with_defaults(settings: Settings) -> Settings:
    """Return the settings with the defaults that depend on others.

    Raises:
        UserError: The questions or the manner do not fit the stage.
    """
    questions = settings.questions or ("mixed" if settings.stage == "rl" else "facts")
    two_hop = questions != "facts"
    if questions == "mixed" and settings.stage == "sft":
        raise UserError("--questions mixed needs --stage rl.")
    if settings.manner == "aloud" and not (two_hop and settings.stage == "sft"):
        raise UserError("--manner aloud needs --questions two_hop and --stage sft.")
    name = "rl" if settings.stage == "rl" else f"two_hop-{settings.manner}" if two_hop else settings.form
    return replace(
        settings,
        questions=questions,
        output_dir=settings.output_dir or Path(f"data/microworld-{name}"),
        checkpoint_dir=settings.checkpoint_dir or Path("checkpoints/microworld" + "-aloud" * two_hop),
    )


def draw_evenly(questions: list[Question], count: int, rng: random.Random) -> list[Question]:
    """Draw `count` questions, equally many about each relation (job, capital, …).

    If a relation has too few questions, they are repeated.
    """
    by_relation = defaultdict(list)
    for question in rng.sample(questions, len(questions)):
        by_relation[relation(question.topic)].append(question)
    in_turn = cycle(cycle(group) for group in by_relation.values())
    return [next(group) for group in islice(in_turn, count)]


def relation(topic: str) -> str:
    """Return the relation that a topic names: "the capital of" for "the capital of Plikovia"."""
    return topic.rpartition(" ")[0]


def facts_to_keep(facts: list[Question], two_hop: list[Question], rng: random.Random) -> list[Question]:
    """Return one fact question per two-hop question, so that the model does not forget single facts.

    Half of them ask for the same relations as the two-hop questions: a model that learns to begin with a person's home
    country would otherwise also do so when asked for the capital of a country. The other half ask for all other
    relations.
    """
    asked_for = {relation(question.steps[-1][0]) for question in two_hop}
    similar = [question for question in facts if relation(question.topic) in asked_for]
    others = [question for question in facts if relation(question.topic) not in asked_for]
    half = len(two_hop) // 2
    return draw_evenly(similar, half, rng) + draw_evenly(others, len(two_hop) - half, rng)


def main(settings: Settings) -> None:
    settings = with_defaults(settings)
    world, two_hop = World(settings.world_seed), settings.questions != "facts"
    ask = world.two_hop if two_hop else world.questions
    train, test = ask(settings.split), ask(UNSEEN if settings.split == SEEN else VALID)
    if settings.questions == "mixed":
        train = train + facts_to_keep(world.questions(settings.split), train, random.Random(settings.seed))
    source = f"micro-world {settings.world_seed}, " + ("two-hop, " if two_hop else "") + f"form {settings.form}"
    if settings.stage == "rl":
        write_prompts(train, test, settings.form, source=source, **settings.options())
    else:
        aloud = settings.manner == "aloud"
        write_answers(train, settings.form, source=source, aloud=aloud, **settings.options())
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
