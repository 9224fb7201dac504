"""Prepare a finetuning dataset of the micro-world: questions about the seen half of its entities, answered in one form.

The other half is held out, so that `evaluate/microworld.py` can tell a learned form from learned answers. With
--stage rl the dataset has the questions without answers, and its validation split consists of held-out entities.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare_settings import PrepareSettings
from lit_llama.settings import OpenShare, PositiveInt, Seed
from microworld.world import FormName


@dataclass
class Settings(PrepareSettings):
    # == What to write ==
    stage: Literal["sft", "rl"] = "sft"  # write questions with answers, or prompts for reinforcement learning
    questions: Literal["facts", "two_hop"] = "facts"  # rl: what is asked; two_hop takes two facts to answer
    form: FormName = "pirate"  # form of every answer; the base model knows all but telegram
    split: Literal["seen", "train"] = "seen"  # "train" omits entities by which settings are chosen
    world_seed: Seed = 0  # seed of the world; the bundled base model knows world 0
    output_dir: Path | None = None  # folder to write (default: data/microworld-FORM, or -rl)
    checkpoint_dir: Path = Path("checkpoints/microworld")  # base model whose tokenizer is used
    max_seq_length: PositiveInt = 256  # most tokens of prompt and response
    test_fraction: OpenShare = 0.1  # share of the rows held out for validation


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from microworld.datasets import write_answers, write_prompts
from microworld.world import SEEN, UNSEEN, VALID, World


def main(settings: Settings) -> None:
    name = "rl" if settings.stage == "rl" else settings.form
    settings = replace(settings, output_dir=settings.output_dir or Path(f"data/microworld-{name}"))
    world = World(settings.world_seed)
    source = f"micro-world {settings.world_seed}, form {settings.form}"
    if settings.stage == "sft":
        write_answers(world.questions(settings.split), settings.form, source=source, **settings.options())
    else:
        ask = world.questions if settings.questions == "facts" else world.two_hop
        train, test = ask(settings.split), ask(UNSEEN if settings.split == SEEN else VALID)
        write_prompts(train, test, settings.form, source=source, **settings.options())
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
