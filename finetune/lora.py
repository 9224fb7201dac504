"""Supervised finetuning with LoRA: low-rank updates of the query and value projections (lit_llama/lora.py).

The loop and all other settings are those of finetune/aligner.py.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from finetune import aligner
from lit_llama import cli


@dataclass
class Settings(aligner.SFTSettings):
    # == What to train on ==
    init_adapter: Path | None = None  # start from this adapter, with its settings
    out_dir: Path = Path("out/lora/microworld-pirate")  # everything the run writes

    # == LoRA ==
    lora_r: int = 8  # rank of each update
    lora_alpha: int = 16  # α: an update is multiplied by α / r
    lora_dropout: float = 0.05  # share of the inputs of an update that training leaves out

    # == Optimisation (a step is always an optimiser step) ==
    learning_rate: float = 3e-3  # peak of AdamW's learning rate


main = partial(aligner.main, method="lora")

if __name__ == "__main__":
    cli.run(main, Settings)
