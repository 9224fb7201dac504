"""Supervised finetuning with prompt tuning: learned vectors in front of the tokens (lit_llama/prompt_tuning.py).

The data, the loop and all other settings are those of finetune/aligner.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from finetune.aligner import SFTSettings, main
from lit_llama import cli
from lit_llama.settings import PositiveFloat, PositiveInt


@dataclass
class Settings(SFTSettings):
    method = "prompt_tuning"

    # == What to train on ==
    out_dir: Path = Path("out/prompt_tuning/microworld-pirate")  # folder for all files of the run

    # == Prompt tuning ==
    prompt_length: PositiveInt = 10  # number of learned vectors, each in the place of a token

    # == Optimization ==
    learning_rate: PositiveFloat = 1e-1  # peak learning rate of AdamW


if __name__ == "__main__":
    cli.run(main, cli.parse(Settings))
