"""Supervised finetuning with LLaMA-Adapter v2: prefixes, biases and scales in all layers (lit_llama/adapter_v2.py).

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
    method = "adapter_v2"

    # == What to train on ==
    out_dir: Path = Path("out/adapter_v2/microworld-pirate")  # folder for all files of the run

    # == LLaMA-Adapter v2 ==
    adapter_prompt_length: PositiveInt = 10  # number of prefix tokens of each layer
    adapter_start_layer: NonNegativeInt = 2  # first layer with a prefix, counted from 0

    # == Optimization ==
    learning_rate: PositiveFloat = 1e-2  # peak learning rate of AdamW


if __name__ == "__main__":
    cli.run(main, cli.parse(Settings))
