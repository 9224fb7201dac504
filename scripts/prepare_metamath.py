"""Prepare MetaMathQA (`query`, `response`) for supervised finetuning.

Downloads meta-math/MetaMathQA, or reads --data_file: a JSON list, JSON lines or parquet. Expect 395,000 rows of the
full dataset. The solutions end with "The answer is: ...", which evaluate/gsm8k.py reads.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare import default_num_proc, prepare_sft
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.rows import download_rows, read_rows, text_field
from lit_llama.tokenizer import Tokenizer


@dataclass
class Settings:
    data_file: Path | None = None  # rows to prepare; default: download --repo_id
    repo_id: str = "meta-math/MetaMathQA"  # dataset on the Hugging Face hub
    output_dir: Path = Path("data/metamath")  # the folder to write
    checkpoint_dir: Path = Path("checkpoints/Llama-2-7B")  # base model whose tokenizer is used
    prompt_style: Literal["alpaca", "orca", "beaver", "hh", "plain"] = "orca"  # template of the prompts
    max_seq_length: int = 512  # tokens of question and solution; longer solutions are cut
    mask_prompt: bool = True  # learn the solutions only; the paper's authors train on the questions too
    test_fraction: float = 0.01  # share of the rows kept for validation
    seed: int = 42  # of the split
    num_proc: int = default_num_proc()  # processes that tokenize


def prepare_sample(row: dict[str, str], number: int, style: PromptStyle) -> tuple[str, str]:
    """Return a row as (prompt, response); an empty question makes an empty prompt, which is dropped."""
    query, response = text_field(row, number, "query"), text_field(row, number, "response")
    return style.render(query) if query.strip() else "", response


def main(args: Settings) -> None:
    style, tokenizer = get_prompt_style(args.prompt_style), Tokenizer(args.checkpoint_dir)
    prepare_sft(
        read_rows(args.data_file) if args.data_file else download_rows(args.repo_id),
        lambda row, number: prepare_sample(row, number, style),
        output_dir=args.output_dir,
        tokenizer=tokenizer,
        max_seq_length=args.max_seq_length,
        mask_prompt=args.mask_prompt,
        test_fraction=args.test_fraction,
        seed=args.seed,
        num_proc=args.num_proc,
        about={"source": str(args.data_file or args.repo_id), "prompt_style": style.name},
    )
    print(args.output_dir)


if __name__ == "__main__":
    cli.run(main, Settings)
