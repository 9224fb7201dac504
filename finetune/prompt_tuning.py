"""Supervised finetuning with prompt tuning: learnt vectors in front of the tokens (lit_llama/prompt_tuning.py).

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
    out_dir: Path = Path("out/prompt_tuning/microworld-pirate")  # everything the run writes

    # == Prompt tuning ==
    prompt_length: int = 10  # learnt vectors, each in the place of a token

    # == Optimisation (a step is always an optimiser step) ==
    learning_rate: float = 1e-1  # peak of AdamW's learning rate


main = partial(aligner.main, method="prompt_tuning")

if __name__ == "__main__":
    cli.run(main, Settings)
