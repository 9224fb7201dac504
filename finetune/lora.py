"""Supervised finetuning with LoRA: low-rank updates of the query and value projections (lit_llama/lora.py).

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
    method = "lora"

    # == What to train on ==
    out_dir: Path = Path("out/lora/microworld-pirate")  # folder for all files of the run

    # == LoRA ==
    lora_r: int = 8  # rank of each update
    lora_alpha: int = 16  # α: an update is multiplied by α / r
    lora_dropout: float = 0.05  # dropout probability of the inputs of an update

    # == Optimization (a step is always an optimizer step) ==
    learning_rate: float = 3e-3  # peak learning rate of AdamW


if __name__ == "__main__":
    cli.run(main, Settings)
