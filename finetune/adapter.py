"""Supervised finetuning with LLaMA-Adapter: a separate prefix in every layer (lit_llama/adapter.py).

The data, the loop and all other settings are those of finetune/aligner.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from finetune.aligner import SFTSettings, main
from lit_llama import cli
from lit_llama.settings import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class Settings(SFTSettings):
    method = "adapter"

    # == What to train on ==
    out_dir: Path = Path("out/adapter/microworld-pirate")  # folder for all files of the run

    # == LLaMA-Adapter ==
    adapter_prompt_length: PositiveInt = 10  # number of prefix tokens of each layer
    adapter_start_layer: NonNegativeInt = 2  # first layer with a prefix, counted from 0

    # == Optimization ==
    learning_rate: PositiveFloat = 3e-2  # peak learning rate of AdamW


if __name__ == "__main__":
    cli.run(main, cli.parse(Settings))
