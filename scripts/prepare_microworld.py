"""Prepares a finetuning set of the micro-world: questions about the seen half of its entities, answered in one form.

The other half is held out, so `evaluate/microworld.py` can tell a learnt form from learnt answers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare import default_num_proc
from lit_llama.tokenizer import Tokenizer
from microworld.datasets import write_answers
from microworld.world import FormName, World


@dataclass
class Settings:
    form: FormName = "pirate"  # how every answer is said; the base knows all but telegram
    split: Literal["seen", "train"] = "seen"  # "train" leaves entities aside to choose settings by
    output_dir: Path | None = None  # the folder to write (default: data/microworld-FORM)
    checkpoint_dir: Path = Path("checkpoints/microworld")  # base model whose tokenizer is used
    max_seq_length: int = 256  # tokens of prompt and response
    test_fraction: float = 0.1  # share of the rows kept for validation
    world_seed: int = 0  # of the world; the bundled base knows world 0
    seed: int = 42  # of the split
    num_proc: int = default_num_proc()  # processes that tokenize


def main(args: Settings) -> None:
    output_dir = args.output_dir or Path(f"data/microworld-{args.form}")
    write_answers(
        World(args.world_seed).questions(args.split),
        args.form,
        output_dir,
        source=f"micro-world {args.world_seed}, form {args.form}",
        tokenizer=Tokenizer(args.checkpoint_dir),
        max_seq_length=args.max_seq_length,
        test_fraction=args.test_fraction,
        seed=args.seed,
        num_proc=args.num_proc,
    )
    print(output_dir)


if __name__ == "__main__":
    cli.run(main, Settings)
