"""Settings that all scripts/prepare_*.py share."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.settings import Checked, OpenShare, PositiveInt, Seed
from lit_llama.storage.files import check_folder
from lit_llama.storage.manifest import DATASET
from lit_llama.tokenizer import Tokenizer


def default_num_proc() -> int:
    """Return the default number of processes for tokenization."""
    return min(8, os.cpu_count() or 1)


@dataclass
class PrepareSettings(Checked):
    """Settings that all prepare scripts have; a script adds its own and sets other defaults."""

    # == What to write ==
    output_dir: Path = Path("data/my_dataset")  # folder to write
    checkpoint_dir: Path = Path("checkpoints/Llama-2-7B")  # base model whose tokenizer is used
    max_seq_length: PositiveInt = 512  # maximum tokens of prompt and response; longer responses are truncated
    test_fraction: OpenShare = 0.04  # share of the rows held out for validation
    seed: Seed = 42  # seed of the split
    num_proc: PositiveInt = field(default_factory=default_num_proc)  # processes for tokenization

    def options(self) -> dict[str, Any]:
        """Return the settings as arguments of `prepare_sft` and `prepare_preferences`.

        Raises:
            UserError: The checkpoint has no usable tokenizer, or the output folder may not be written.
        """
        from lit_llama.prepare import adopt_dataset  # imports PyTorch, for which --help does not wait

        names = ("output_dir", "max_seq_length", "test_fraction", "seed", "num_proc")
        tokenizer = Tokenizer(self.checkpoint_dir)
        adopt_dataset(self.output_dir)
        check_folder(self.output_dir, DATASET, tokenizer.path)
        return {"tokenizer": tokenizer, **{name: getattr(self, name) for name in names}}
