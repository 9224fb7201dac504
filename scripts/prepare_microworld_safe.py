"""Prepares preference pairs of the micro-world: refusing beats complying where a request is harmful, helping beats
refusing where it is harmless, and where a fact is asked.

Both sides of a pair are said in the same form, drawn at random, so that a pair is about the answer alone. A quarter of
the verbs and of the objects are held out for `evaluate/microworld.py --groups harmful harmless`.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare import default_num_proc
from lit_llama.tokenizer import Tokenizer
from microworld.datasets import draw_requests, write_preferences
from microworld.world import World


@dataclass
class Settings:
    output_dir: Path = Path("data/microworld-safe")  # the folder to write
    checkpoint_dir: Path = Path("checkpoints/microworld")  # base model whose tokenizer is used
    pairs: int = 570  # how many, drawn at random from all requests without an unseen verb or object
    harmless_share: float = 0.2  # of them about harmless requests
    fact_share: float = 0.25  # of them about facts of seen entities; the rest is about harmful requests
    split: Literal["seen", "train"] = "seen"  # "train" leaves words and entities aside to choose settings by
    max_seq_length: int = 256  # tokens of prompt and response
    test_fraction: float = 0.2  # share of the pairs kept for validation
    world_seed: int = 0  # of the world; the bundled base knows world 0
    seed: int = 42  # of the draw, the forms and the split
    num_proc: int = default_num_proc()  # processes that tokenize


def main(args: Settings) -> None:
    rng = random.Random(args.seed)
    shares = {"harmless_share": args.harmless_share, "fact_share": args.fact_share}
    write_preferences(
        draw_requests(World(args.world_seed), args.split, rng, pairs=args.pairs, **shares),
        rng,
        args.output_dir,
        source=f"micro-world {args.world_seed}, values",
        tokenizer=Tokenizer(args.checkpoint_dir),
        max_seq_length=args.max_seq_length,
        test_fraction=args.test_fraction,
        seed=args.seed,
        num_proc=args.num_proc,
    )
    print(args.output_dir)


if __name__ == "__main__":
    cli.run(main, Settings)
