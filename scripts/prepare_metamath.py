"""Prepare MetaMathQA (`query`, `response`) for supervised finetuning.

Downloads meta-math/MetaMathQA, or reads --data_file: a JSON list, JSON Lines or Parquet. The full dataset has
395,000 rows. The solutions end with "The answer is: ...", which evaluate/gsm8k.py reads. With --stage rl it writes
prompts for reinforcement learning with `--reward gsm8k`, from MetaMathQA or GSM8K (`question`, `answer`). Rows whose
answer is not a number are omitted then.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare_settings import RowSettings


@dataclass
class Settings(RowSettings):
    # == What to read ==
    repo_id: str = "meta-math/MetaMathQA"  # dataset on the Hugging Face Hub

    # == What to write ==
    stage: Literal["sft", "rl"] = "sft"  # write problems with solutions, or prompts for reinforcement learning
    output_dir: Path | None = None  # folder to write (default: data/metamath, or -rl)
    prompt_style: str = "orca"  # template of the prompts: alpaca, orca, beaver, hh, plain or chat
    mask_prompt: bool = True  # train on the solutions only; the paper's authors train on the questions too
    test_fraction: float = 0.01  # share of the rows held out for validation


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from tqdm import tqdm

from lit_llama.prepare import prepare_sft, render_prompt
from lit_llama.prepare_prompts import prepare_prompts
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.rewards import load_function
from lit_llama.storage.rows import naming, text_field
from lit_llama.utils import UserError, check_text, log

NO_NUMBER = "whose answer is not a number"


def prepare_sample(row: Any, number: int, style: PromptStyle) -> tuple[str, str]:
    """Return (prompt, response) of a row."""
    prompt = render_prompt(style, text_field(row, number, "query"))
    return prompt, style.reply(prompt, text_field(row, number, "response"))


def read_prompts(rows: Iterable[Any], style: PromptStyle) -> tuple[list[tuple[str, Any]], int]:
    """Return the prompts of rows of MetaMathQA or GSM8K, each with its row, and the number of omitted rows."""
    reward, samples, omitted = load_function("gsm8k"), [], 0
    for number, row in enumerate(tqdm(rows, desc="Reading", unit=" rows"), 1):
        check_text(json.dumps(row, ensure_ascii=False, default=str), f"Row {number}")
        names = ("question", "answer") if isinstance(row, dict) and "question" in row else ("query", "response")
        problem, solution = (text_field(row, number, name) for name in names)
        if states_number(solution, reward):
            samples.append((render_prompt(style, problem), row))
        else:
            omitted += 1
    log(f"Omitted {omitted} rows {NO_NUMBER}. Kept {len(samples)} rows.")
    return samples, omitted


def states_number(solution: str, reward: Callable[..., list[float]]) -> bool:
    """Return whether the answer that a solution states is a number, and earns the reward.

    Words, roots and expressions such as "2x" are not. A solution may also end without stating its answer.
    """
    *solving, stated = re.split(r"####|The answer is:?", solution)
    try:
        return reward([""], [stated], [{"response": solution}], only_number=bool(solving)) == [1.0]
    except UserError:  # the solution has no number
        return False


def main(settings: Settings) -> None:
    name = "metamath-rl" if settings.stage == "rl" else "metamath"
    settings = replace(settings, output_dir=settings.output_dir or Path("data") / name)
    options = settings.options()
    style = get_prompt_style(settings.prompt_style, options["tokenizer"])
    rows, source = settings.rows()
    options["about"] = {**source, **style.about}
    if settings.stage == "sft":
        prepare_sft(rows, partial(prepare_sample, style=style), mask_prompt=settings.mask_prompt, **options)
    else:
        with naming(options["about"]["source"]):
            samples, omitted = read_prompts(rows, style)
        options["about"]["left_out"] = {NO_NUMBER: omitted}
        prepare_prompts(samples, lambda sample, number: sample, **options)
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
