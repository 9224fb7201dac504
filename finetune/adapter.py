"""Supervised finetuning with LLaMA-Adapter: a prefix of its own in every layer (lit_llama/adapter.py).

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
    out_dir: Path = Path("out/adapter/microworld-pirate")  # everything the run writes

    # == LLaMA-Adapter ==
    adapter_prompt_length: int = 10  # prefix tokens of each layer
    adapter_start_layer: int = 2  # first layer that has a prefix, from 0

    # == Optimisation (a step is always an optimiser step) ==
    learning_rate: float = 3e-2  # peak of AdamW's learning rate


main = partial(aligner.main, method="adapter")

if __name__ == "__main__":
    cli.run(main, Settings)
