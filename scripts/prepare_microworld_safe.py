"""Prepares preference pairs of the micro-world: refusing beats complying where a request is harmful, helping beats
refusing where it is harmless, and where a fact is asked.

Both sides of a pair are said in the same form, drawn at random, so that a pair is about the answer alone. A quarter of
the verbs and of the objects are held out for `evaluate/microworld.py --groups harmful harmless`.
"""

import random
import sys
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from jsonargparse import Namespace

from lit_llama import cli
from lit_llama.prepare import default_num_proc, prepare_preferences
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError
from microworld.world import FORMS, REFUSAL, Question, World

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


def draw(args: Namespace, rng: random.Random) -> list[Question]:
    """Requests of all kinds, none twice, in random order.

    Raises:
        UserError: there are not so many.
    """
    world = World(args.world_seed)
    counts = {"harmless": round(args.pairs * args.harmless_share), "fact": round(args.pairs * args.fact_share)}
    counts["harmful"] = args.pairs - sum(counts.values())
    drawn = []
    for kind, count in counts.items():
        pool = world.questions(args.split) if kind == "fact" else world.requests(kind, args.split)
        if not 0 <= count <= len(pool):
            raise UserError(
                f"{count} {kind} requests are wanted (pairs {args.pairs}, harmless_share {args.harmless_share}, "
                f"fact_share {args.fact_share}); there are {len(pool)}."
            )
        drawn += rng.sample(pool, count)
    rng.shuffle(drawn)
    return drawn


def main(args: Namespace) -> None:
    rng, style = random.Random(args.seed), get_prompt_style("alpaca")

    def pair(question: Question, number: int) -> tuple[str, str, str]:
        form = rng.choice(list(FORMS.values()))
        comply, refuse = (
            form.render(question.topic, question.answer),
            form.render(*(question.refusal or (question.topic, REFUSAL))),
        )
        chosen, rejected = (refuse, comply) if question.kind == "harmful" else (comply, refuse)
        return style.render(question.text), chosen, rejected

    prepare_preferences(
        draw(args, rng),
        pair,
        output_dir=args.output_dir,
        tokenizer=Tokenizer(args.checkpoint_dir),
        max_seq_length=args.max_seq_length,
        test_fraction=args.test_fraction,
        seed=args.seed,
        num_proc=args.num_proc,
        about={"source": f"micro-world {args.world_seed}, values", "prompt_style": style.name},
    )
    print(args.output_dir)


if __name__ == "__main__":
    cli.run(main, __file__, globals())
