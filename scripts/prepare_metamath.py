"""Prepare MetaMathQA (`query`, `response`) for supervised finetuning.

Downloads meta-math/MetaMathQA, or reads --data_file: a JSON list, JSON Lines or Parquet. Expect of the full dataset:
395,000 rows. The solutions end with "The answer is: ...", which evaluate/gsm8k.py reads.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare import PrepareSettings, prepare_sft, render_prompt
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.rows import download_rows, read_rows, text_field


@dataclass
class Settings(PrepareSettings):
    # == What to read ==
    data_file: Path | None = None  # rows to prepare (default: download --repo_id)
    repo_id: str = "meta-math/MetaMathQA"  # dataset on the Hugging Face hub

    # == What to write ==
    output_dir: Path = Path("data/metamath")  # folder to write
    prompt_style: str = "orca"  # template of the prompts: alpaca, orca, beaver, hh or plain
    mask_prompt: bool = True  # train on the solutions only; the paper's authors train on the questions too
    test_fraction: float = 0.01  # share of the rows held out for validation


def prepare_sample(row: Any, number: int, style: PromptStyle) -> tuple[str, str]:
    """Return (prompt, response) of a row."""
    return render_prompt(style, text_field(row, number, "query")), text_field(row, number, "response")


def main(settings: Settings) -> None:
    style = get_prompt_style(settings.prompt_style)
    prepare_sft(
        read_rows(settings.data_file) if settings.data_file else download_rows(settings.repo_id),
        lambda row, number: prepare_sample(row, number, style),
        mask_prompt=settings.mask_prompt,
        about={"source": str(settings.data_file or settings.repo_id), "prompt_style": style.name},
        **settings.options(),
    )
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, Settings)
