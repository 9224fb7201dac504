"""Prepare MetaMathQA (`query`, `response`) for supervised finetuning.

Downloads meta-math/MetaMathQA, or reads --data_file: a JSON list, JSON Lines or Parquet. The full dataset has
395,000 rows. The solutions end with "The answer is: ...", which evaluate/gsm8k.py reads. With --stage rl it writes
prompts for reinforcement learning with `--reward gsm8k`, from MetaMathQA or GSM8K (`question`, `answer`).
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare_settings import PrepareSettings


@dataclass
class Settings(PrepareSettings):
    # == What to read ==
    data_file: Path | None = None  # rows to prepare (default: download --repo_id)
    repo_id: str = "meta-math/MetaMathQA"  # dataset on the Hugging Face hub

    # == What to write ==
    stage: Literal["sft", "rl"] = "sft"  # write problems with solutions, or prompts for reinforcement learning
    output_dir: Path | None = None  # folder to write (default: data/metamath, or -rl)
    prompt_style: str = "orca"  # template of the prompts: alpaca, orca, beaver, hh, plain or chat
    mask_prompt: bool = True  # train on the solutions only; the paper's authors train on the questions too
    test_fraction: float = 0.01  # share of the rows held out for validation


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.prepare import prepare_sft, render_prompt
from lit_llama.prepare_prompts import prepare_prompts
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.storage.rows import download_rows, read_rows, text_field


def prepare_sample(row: Any, number: int, style: PromptStyle) -> tuple[str, str]:
    """Return (prompt, response) of a row."""
    prompt = render_prompt(style, text_field(row, number, "query"))
    return prompt, style.reply(prompt, text_field(row, number, "response"))


def prepare_prompt(row: Any, number: int, style: PromptStyle) -> tuple[str, Any]:
    """Return the prompt of a row of MetaMathQA or GSM8K, and the row, which has the solution."""
    problem, solution = ("question", "answer") if isinstance(row, dict) and "question" in row else ("query", "response")
    text_field(row, number, solution)
    return render_prompt(style, text_field(row, number, problem)), row


def main(settings: Settings) -> None:
    name = "metamath-rl" if settings.stage == "rl" else "metamath"
    settings = replace(settings, output_dir=settings.output_dir or Path("data") / name)
    options = settings.options()
    style = get_prompt_style(settings.prompt_style, options["tokenizer"])
    rows = read_rows(settings.data_file) if settings.data_file else download_rows(settings.repo_id)
    options["about"] = {"source": str(settings.data_file or settings.repo_id), **style.about}
    if settings.stage == "sft":
        prepare_sft(rows, partial(prepare_sample, style=style), mask_prompt=settings.mask_prompt, **options)
    else:
        prepare_prompts(rows, partial(prepare_prompt, style=style), **options)
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
