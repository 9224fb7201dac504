"""Settings that all scripts/prepare_*.py share."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.settings import Checked, OpenShare, PositiveInt, Seed
from lit_llama.storage.files import check_folder
from lit_llama.storage.manifest import DATASET
from lit_llama.storage.rows import download_rows, origin, read_rows
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError


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


@dataclass
class RowSettings(PrepareSettings):
    """Settings of the prepare scripts that read rows from a file or from a dataset on the Hugging Face Hub.

    Raises:
        UserError: As `Checked`, or a setting of the dataset is combined with `data_file`.
    """

    # == What to read ==
    data_file: Path | None = None  # rows to prepare: JSON list, JSON Lines (also .gz) or Parquet (default: download)
    repo_id: str = "OWNER/NAME"  # dataset on the Hugging Face Hub
    config_name: str | None = None  # configuration of the dataset, if it has several
    split: str | None = None  # split of the dataset (default: train)
    revision: str | None = None  # version of the dataset: a branch, tag or commit

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("config_name", "split", "revision"):
            if self.data_file is not None and getattr(self, name) is not None:
                raise UserError(f"--{name} and --data_file cannot be combined.")

    def rows(self) -> tuple[Iterable[Any], dict[str, str]]:
        """Return the rows, and the entries of `meta.json` that say where they come from.

        Raises:
            UserError: The file cannot be read, or the dataset cannot be downloaded.
        """
        if self.data_file is not None:
            return read_rows(self.data_file), origin(self.data_file, self.repo_id)
        chosen = {"config_name": self.config_name, "split": self.split, "revision": self.revision}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return download_rows(self.repo_id, **chosen), origin(None, self.repo_id, **chosen)
