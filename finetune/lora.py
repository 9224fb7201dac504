"""Supervised finetuning with LoRA: low-rank updates of the query and value projections (lit_llama/lora.py).

The data, the loop and all other settings are those of finetune/aligner.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from finetune.aligner import SFTSettings, main
from lit_llama import cli
from lit_llama.settings import PositiveFloat, PositiveInt, Range


@dataclass
class Settings(SFTSettings):
    method = "lora"

    # == What to train on ==
    out_dir: Path = Path("out/lora/microworld-pirate")  # folder for all files of the run

    # == LoRA ==
    lora_r: PositiveInt = 8  # rank of each update
    lora_alpha: PositiveInt = 16  # α: an update is multiplied by α / r
    lora_dropout: Annotated[float, Range(least=0, below=1)] = 0.05  # dropout probability of the inputs of an update

    # == Optimization ==
    learning_rate: PositiveFloat = 3e-3  # peak learning rate of AdamW


if __name__ == "__main__":
    cli.run(main, cli.parse(Settings))
