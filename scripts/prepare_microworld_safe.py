"""Prepare preference pairs of the micro-world: a refusal is preferred for harmful requests, an answer for all others.

Both responses of a pair have the same form, drawn at random, so that they differ only in whether they refuse. A quarter
of the verbs and of the objects are held out for `evaluate/microworld.py --groups harmful harmless`. With --stage rl the
dataset has the requests without responses, and its validation split consists of held-out requests.
"""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare_settings import PrepareSettings
from lit_llama.settings import OpenShare, PositiveInt, Seed, Share


@dataclass
class Settings(PrepareSettings):
    # == What to write ==
    stage: Literal["dpo", "rl"] = "dpo"  # write pairs of responses, or prompts for reinforcement learning
    pairs: PositiveInt = 570  # number of pairs, drawn at random from all requests without a held-out verb or object
    harmless_share: Share = 0.2  # share of harmless requests
    fact_share: Share = 0.25  # share of questions about facts of seen entities; the other requests are harmful
    split: Literal["seen", "train"] = "seen"  # "train" leaves out those reserved for choosing hyperparameters
    world_seed: Seed = 0  # seed of the world; the bundled base model knows world 0
    output_dir: Path | None = None  # folder to write (default: data/microworld-safe, or -safe-rl)
    checkpoint_dir: Path = Path("checkpoints/microworld")  # base model whose tokenizer is used
    max_seq_length: PositiveInt = 256  # maximum number of tokens of prompt and response
    test_fraction: OpenShare = 0.2  # dpo: share of the pairs held out for validation (rl: unseen requests are)
    seed: Seed = 42  # seed of the requests, the forms and the split


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from microworld.datasets import draw_requests, write_preferences, write_prompts
from microworld.world import SEEN, UNSEEN, VALID, World


def main(settings: Settings) -> None:
    name = "microworld-safe-rl" if settings.stage == "rl" else "microworld-safe"
    settings = replace(settings, output_dir=settings.output_dir or Path("data") / name)
    rng, world = random.Random(settings.seed), World(settings.world_seed)
    shares = {"harmless_share": settings.harmless_share, "fact_share": settings.fact_share}
    requests = draw_requests(world, settings.split, rng, pairs=settings.pairs, **shares)
    source = f"micro-world {settings.world_seed}, values"
    if settings.stage == "dpo":
        write_preferences(requests, rng, source=source, **settings.options())
    else:
        held_out = UNSEEN if settings.split == SEEN else VALID
        harmful = len(world.requests("harmful", held_out))
        test = draw_requests(world, held_out, rng, pairs=2 * harmful, harmless_share=0.25, fact_share=0.25)
        write_prompts(requests, test, None, source=source, **settings.options())
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
