"""Supervised finetuning with BitFit: a bias on every layer's attention output (lit_llama/bitfit.py).

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
    out_dir: Path = Path("out/bitfit/microworld-pirate")  # everything the run writes

    # == Optimisation (a step is always an optimiser step) ==
    learning_rate: float = 1e-1  # peak of AdamW's learning rate


main = partial(aligner.main, method="bitfit")

if __name__ == "__main__":
    cli.run(main, Settings)
