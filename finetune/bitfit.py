"""Supervised finetuning with BitFit: a bias on the attention output of every layer (lit_llama/bitfit.py).

The data, the loop and all other settings are those of finetune/aligner.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from finetune.aligner import SFTSettings, main
from lit_llama import cli


@dataclass
class Settings(SFTSettings):
    method = "bitfit"

    # == What to train on ==
    out_dir: Path = Path("out/bitfit/microworld-pirate")  # folder for all files of the run

    # == Optimization ==
    learning_rate: float = 1e-1  # peak learning rate of AdamW


if __name__ == "__main__":
    cli.run(main, cli.parse(Settings))
