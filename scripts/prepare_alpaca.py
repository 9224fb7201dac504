"""Prepare an instruction dataset with Alpaca's fields (`instruction`, `input`, `output`) for supervised finetuning.

Downloads tatsu-lab/alpaca, or reads --data_file: a JSON list, JSON Lines or Parquet. The full dataset has
52,002 rows, 28 of them with an empty output. With --stage rl it writes prompts for reinforcement learning: rows need no
`output`, and the reward function receives each row with all its fields.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare_settings import RowSettings


@dataclass
class Settings(RowSettings):
    # == What to read ==
    repo_id: str = "tatsu-lab/alpaca"  # dataset on the Hugging Face Hub

    # == What to write ==
    stage: Literal["sft", "rl"] = "sft"  # write prompts with responses, or prompts for reinforcement learning
    output_dir: Path | None = None  # folder to write (default: data/alpaca, or -rl)
    prompt_style: str = "alpaca"  # template of the prompts: alpaca, orca, beaver, hh, plain or chat
    mask_prompt: bool = True  # train on the responses only


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.prepare import prepare_sft, render_prompt
from lit_llama.prepare_prompts import prepare_prompts
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.storage.rows import text_field


def prepare_prompt(row: Any, number: int, style: PromptStyle) -> str:
    """Return the prompt of a row."""
    return render_prompt(style, text_field(row, number, "instruction"), text_field(row, number, "input", default=""))


def prepare_sample(row: Any, number: int, style: PromptStyle) -> tuple[str, str]:
    """Return (prompt, response) of a row."""
    prompt, response = prepare_prompt(row, number, style), text_field(row, number, "output")
    return prompt, style.reply(prompt, response)


def main(settings: Settings) -> None:
    name = "alpaca-rl" if settings.stage == "rl" else "alpaca"
    settings = replace(settings, output_dir=settings.output_dir or Path("data") / name)
    options = settings.options()
    style = get_prompt_style(settings.prompt_style, options["tokenizer"])
    rows, source = settings.rows()
    options |= {"about": {**source, **style.about}, "split_by": "hash"}
    if settings.stage == "sft":
        sample = partial(prepare_sample, style=style)
        prepare_sft(rows, sample, mask_prompt=settings.mask_prompt, **options)
    else:
        prepare_prompts(rows, lambda row, number: (prepare_prompt(row, number, style), row), **options)
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
