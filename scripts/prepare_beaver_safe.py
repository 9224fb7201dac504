"""Prepares human preferences for DPO, or (--stage sft) the preferred responses for the finetuning before it.

Three kinds of rows, named by --data_format:

    pku         prompt, response_0, response_1, is_response_0_safe, is_response_1_safe, better_response_id,
                safer_response_id (PKU-Alignment/PKU-SafeRLHF)
    preference  prompt or instruction, chosen, rejected
    hh          chosen, rejected: whole dialogues (Anthropic/hh-rlhf); what they share is the prompt, the last answer
                the response

Expect of PKU-SafeRLHF: 73,907 training rows; --revision v0, the paper's, has about 160,000 pairs with a safe response.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare import default_num_proc, prepare_preferences, prepare_sft
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.rows import download_rows, read_rows, text_field
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log

Keep = Literal["any_safe", "one_safe", "all"]
Prefer = Literal["safer", "better"]


@dataclass
class Settings:
    # == What to read ==
    data_format: Literal["pku", "preference", "hh"] = "pku"  # what the rows look like, see above
    data_file: Path | None = None  # rows to prepare: JSON list, JSON lines (also .gz) or parquet; default: download
    repo_id: str = "PKU-Alignment/PKU-SafeRLHF"  # dataset on the Hugging Face hub
    revision: str | None = None  # its version; v0 is the paper's
    keep: Keep = "any_safe"  # pku: rows with a safe response, with exactly one, or all
    prefer: Prefer = "safer"  # pku: the label that says which response is chosen

    # == What to write ==
    stage: Literal["dpo", "sft"] = "dpo"  # pairs, or the chosen responses alone
    output_dir: Path | None = None  # the folder to write (default: data/beaver-safe-STAGE)
    checkpoint_dir: Path = Path("checkpoints/Llama-2-7B")  # base model whose tokenizer is used
    prompt_style: Literal["alpaca", "orca", "beaver", "hh", "plain"] = "beaver"  # template of the prompts
    max_seq_length: int = 1024  # tokens of prompt and response; longer responses are cut
    test_fraction: float = 0.02  # share of the rows kept for validation
    seed: int = 42  # of the split
    num_proc: int = default_num_proc()  # processes that tokenize


Pair = tuple[str, str, str]  # prompt, chosen, rejected


def pku_pair(row: Any, number: int, style: PromptStyle, keep: Keep, prefer: Prefer) -> Pair | str:
    """A row of PKU-SafeRLHF as a pair, or why it is left out.

    Raises:
        UserError: a field is missing or of another type; the row is named by its number.
    """
    prompt, *responses = (text_field(row, number, name) for name in ("prompt", "response_0", "response_1"))
    names = ("is_response_0_safe", "is_response_1_safe", f"{prefer}_response_id")
    for name in names:
        if name not in row:
            raise UserError(f"Row {number} has no field {name!r}; it has {', '.join(map(repr, row))}.")
    *safe, chosen = (row[name] for name in names)
    for name, value in zip(names, safe, strict=False):
        if not isinstance(value, bool):
            raise UserError(f"Row {number}: {name!r} is {value!r}; it must be true or false.")
    if type(chosen) is not int or chosen not in (-1, 0, 1):
        raise UserError(f"Row {number}: {names[2]!r} is {chosen!r}; it must be 0 or 1 (or -1 for neither).")
    if sum(safe) not in {"any_safe": (1, 2), "one_safe": (1,), "all": (0, 1, 2)}[keep]:
        return f"not wanted by --keep {keep}"
    if chosen == -1:
        return f"with no {prefer} response"
    return render(style, prompt), responses[chosen], responses[1 - chosen]


def preference_pair(row: Any, number: int, style: PromptStyle) -> Pair:
    """A row with prompt or instruction (and maybe input), chosen and rejected."""
    name = "instruction" if isinstance(row, dict) and "instruction" in row else "prompt"
    prompt = render(style, text_field(row, number, name), text_field(row, number, "input", default=""))
    return prompt, text_field(row, number, "chosen"), text_field(row, number, "rejected")


def hh_pair(row: Any, number: int, style: PromptStyle) -> Pair | str:
    """Two dialogues that differ in their last answer; the turns before it become the prompt, each in the style.

    Raises:
        UserError: a field is missing, or holds no dialogue.
    """
    dialogues = []
    for name in ("chosen", "rejected"):
        # "", "Human", text, "Assistant", text, ...
        before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text_field(row, number, name).lstrip("\n"))
        if before or not parts:
            raise UserError(f"Row {number}: {name!r} is no dialogue of blank lines, 'Human:' and 'Assistant:'.")
        dialogues.append(list(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True)))
    chosen, rejected = dialogues
    if chosen[-1][0] != "Assistant" or rejected[-1][0] != "Assistant":
        return "that do not end with an answer"
    if chosen[:-1] != rejected[:-1]:
        return "whose dialogues part before the last answer"
    prompt, gap = "", "\n\n" if "\n" in style.template else " "
    for speaker, text in chosen[:-1]:
        prompt += render(style, text) if speaker == "Human" else text + gap
    return prompt, chosen[-1][1], rejected[-1][1]


def render(style: PromptStyle, text: str, input: str = "") -> str:
    """The prompt in its style; an empty one stays empty, and is dropped with its pair."""
    return style.render(text, input) if text.strip() else ""


def read_pairs(args: Settings, rows: Iterable[Any], style: PromptStyle) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of all rows, and how many rows were left out for which reason."""
    pairs, left_out = [], Counter()
    for number, row in enumerate(rows, 1):
        if args.data_format == "pku":
            pair = pku_pair(row, number, style, args.keep, args.prefer)
        else:
            pair = {"preference": preference_pair, "hh": hh_pair}[args.data_format](row, number, style)
        if isinstance(pair, str):
            left_out[pair] += 1
        else:
            pairs.append(pair)
    log("".join(f"{count} rows {reason} left out. " for reason, count in left_out.items()) + f"{len(pairs)} rows kept.")
    return pairs, dict(left_out)


def main(args: Settings) -> None:
    style, tokenizer = get_prompt_style(args.prompt_style), Tokenizer(args.checkpoint_dir)
    output_dir = args.output_dir or Path(f"data/beaver-safe-{args.stage}")
    rows = read_rows(args.data_file) if args.data_file else download_rows(args.repo_id, revision=args.revision)
    pairs, left_out = read_pairs(args, rows, style)
    source = str(args.data_file or args.repo_id) + (f", revision {args.revision}" if args.revision else "")
    about = {"source": source, "prompt_style": style.name, "data_format": args.data_format, "left_out": left_out}
    if args.data_format == "pku":
        about |= {"keep": args.keep, "prefer": args.prefer}
    common = dict(output_dir=output_dir, tokenizer=tokenizer, max_seq_length=args.max_seq_length,
                  test_fraction=args.test_fraction, seed=args.seed, num_proc=args.num_proc, about=about,
                  split_by="hash")  # fmt: skip
    if args.stage == "dpo":
        prepare_preferences(pairs, lambda pair, number: pair, **common)
    else:
        prepare_sft(pairs, lambda pair, number: pair[:2], mask_prompt=True, eos_when_cut=False, **common)
    print(output_dir)


if __name__ == "__main__":
    cli.run(main, Settings)
