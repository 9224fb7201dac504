"""Prepare human preferences for DPO, or, with --stage sft, the preferred responses for the SFT before it.

--data_format selects one of three row formats:

    pku         prompt, response_0, response_1, is_response_0_safe, is_response_1_safe, better_response_id,
                safer_response_id (PKU-Alignment/PKU-SafeRLHF)
    preference  prompt or instruction, chosen, rejected: texts, or lists of messages (`role` and `content`); responses
                may be complete conversations, which differ in the last answer
    hh          chosen, rejected: complete dialogues (Anthropic/hh-rlhf); the shared turns are the prompt, the last
                answers are the responses

PKU-SafeRLHF has 73,907 training rows; --revision v0, the paper's, has about 160,000 pairs with a safe response.
Both stages hold out the same prompts for validation.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare_settings import RowSettings

Keep = Literal["any_safe", "one_safe", "all"]
Prefer = Literal["safer", "better"]


@dataclass
class Settings(RowSettings):
    # == What to read ==
    data_format: Literal["pku", "preference", "hh"] = "pku"  # row format, see above
    repo_id: str = "PKU-Alignment/PKU-SafeRLHF"  # dataset on the Hugging Face Hub
    keep: Keep | None = None  # pku: keep rows with a safe response, with exactly one, or all (default: any_safe)
    prefer: Prefer | None = None  # pku: the label that decides which response is chosen (default: safer)

    # == What to write ==
    stage: Literal["dpo", "sft"] = "dpo"  # write pairs, or only the chosen responses
    output_dir: Path | None = None  # folder to write (default: data/beaver-safe-STAGE)
    prompt_style: str = "beaver"  # template of the prompts: alpaca, orca, beaver, hh, plain or chat
    max_seq_length: int = 1024  # maximum tokens of prompt and response; longer responses are truncated
    test_fraction: float = 0.02  # share of the rows held out for validation


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from tqdm import tqdm

from lit_llama.chat_template import Message, Refusal
from lit_llama.conversations import read_messages, read_tools
from lit_llama.prepare import prepare_preferences, prepare_sft, render_prompt
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.storage.rows import naming, text_field
from lit_llama.utils import UserError, log

SAFE_RESPONSES = {"any_safe": (1, 2), "one_safe": (1,), "all": (0, 1, 2)}  # how many of the two may be safe


Pair = tuple[str, str, str]  # prompt, chosen response, rejected response


def pku_pair(row: Any, number: int, style: PromptStyle, keep: Keep, prefer: Prefer) -> Pair | str:
    """Return the pair in a row of PKU-SafeRLHF, or the reason to omit the row.

    Raises:
        UserError: A field is missing or has the wrong type; the message gives the row's number.
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
    if sum(safe) not in SAFE_RESPONSES[keep]:
        return f"excluded by --keep {keep}"
    if chosen == -1:
        return f"without a {prefer} response"
    return with_replies(style, render_prompt(style, prompt), responses[chosen], responses[1 - chosen])


def preference_pair(row: Any, number: int, style: PromptStyle) -> Pair | str:
    """Return the pair in a row with `prompt` or `instruction` (and maybe `input`), `chosen` and `rejected`."""
    if isinstance(row, dict) and any(isinstance(row.get(name), list) for name in ("prompt", "chosen", "rejected")):
        return messages_pair(row, number, style)
    name = "instruction" if isinstance(row, dict) and "instruction" in row else "prompt"
    prompt = render_prompt(style, text_field(row, number, name), text_field(row, number, "input", default=""))
    return with_replies(style, prompt, text_field(row, number, "chosen"), text_field(row, number, "rejected"))


def messages_pair(row: dict[str, Any], number: int, style: PromptStyle) -> Pair | str:
    """Return the pair in a row with lists of messages, or the reason to omit the row.

    A response may be the last answer alone, or the complete conversation.

    Raises:
        UserError: A list is not a list of messages.
    """
    prompt = None
    if isinstance(row.get("prompt"), list):
        prompt = read_messages(row["prompt"], f"Row {number}: 'prompt'")
    sides = []
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), list):
            messages = read_messages(row[name], f"Row {number}: {name!r}")
        else:
            messages = [{"role": "assistant", "content": text_field(row, number, name).strip()}]
        if messages and messages[0]["role"] == "assistant":
            if prompt is None:
                prompt = [{"role": "user", "content": text_field(row, number, "prompt")}]
            messages = prompt + messages
        sides.append(messages)
    return conversations_pair(*sides, number, style, read_tools(row, number))


def conversations_pair(
    chosen: list[Message], rejected: list[Message], number: int, style: PromptStyle, tools: list[Any] | None = None
) -> Pair | str:
    """Return the pair in two conversations that differ only in their last answer, or the reason to omit them.

    Raises:
        UserError: The style cannot render them; the message gives the row's number.
    """
    if any(not side or side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        return "that do not end with an answer"
    if chosen[:-1] != rejected[:-1]:
        return "with dialogues that differ before the last answer"
    turns = [message for message in chosen[:-1] if message["role"] != "system"]
    if not turns or turns[-1]["role"] == "assistant":
        return "whose last answer follows no question"
    if not all(message["content"].strip() for message in turns if message["role"] == "user"):
        return "with an empty question"
    try:
        prompt = style.render_messages(chosen[:-1], tools)
        return with_replies(style, prompt, chosen[-1]["content"], rejected[-1]["content"])
    except Refusal:
        return "that the chat template refuses"
    except UserError as error:
        raise UserError(f"Row {number}: {error}") from None


def with_replies(style: PromptStyle, prompt: str, chosen: str, rejected: str) -> Pair:
    """Return a prompt and both responses, rendered as they follow it in the style."""
    return prompt, style.reply(prompt, chosen), style.reply(prompt, rejected)


def hh_pair(row: Any, number: int, style: PromptStyle) -> Pair | str:
    """Return the pair in two dialogues that differ only in their last answer, or the reason to omit the row.

    The turns before the last answer become the prompt, each question rendered in the style.

    Raises:
        UserError: A field is missing, or is not a dialogue.
    """
    chosen, rejected = (split_dialogue(row, number, name) for name in ("chosen", "rejected"))
    return conversations_pair(chosen, rejected, number, style)


def split_dialogue(row: Any, number: int, name: str) -> list[Message]:
    """Return the turns of a dialogue."""
    # "", "Human", text, "Assistant", text, ...
    before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text_field(row, number, name).lstrip("\n"))
    if before or not parts:
        raise UserError(f"Row {number}: {name!r} is not a dialogue of 'Human:' and 'Assistant:' turns.")
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]


def read_pairs(settings: Settings, rows: Iterable[Any], style: PromptStyle) -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs in all rows, and the number of omitted rows by reason."""
    pairs, omitted = [], Counter()
    for number, row in enumerate(tqdm(rows, desc="Rendering", unit=" rows", delay=1), 1):
        if settings.data_format == "pku":
            pair = pku_pair(row, number, style, settings.keep, settings.prefer)
        else:
            pair = {"preference": preference_pair, "hh": hh_pair}[settings.data_format](row, number, style)
        if isinstance(pair, str):
            omitted[pair] += 1
        else:
            pairs.append(pair)
    log("".join(f"Omitted {count} rows {reason}. " for reason, count in omitted.items()) + f"Kept {len(pairs)} rows.")
    return pairs, dict(omitted)


def with_defaults(settings: Settings) -> Settings:
    """Return the settings, with defaults for those that are None.

    Raises:
        UserError: A setting would have no effect.
    """
    if settings.data_format != "pku" and (settings.keep or settings.prefer):
        raise UserError("--keep and --prefer need --data_format pku.")
    return replace(
        settings,
        keep=settings.keep or "any_safe",
        prefer=settings.prefer or "safer",
        output_dir=settings.output_dir or Path(f"data/beaver-safe-{settings.stage}"),
    )


def main(settings: Settings) -> None:
    settings = with_defaults(settings)
    options = settings.options()
    style = get_prompt_style(settings.prompt_style, options["tokenizer"])
    rows, source = settings.rows()
    about = {**source, **style.about}
    with naming(about["source"]):
        pairs, omitted = read_pairs(settings, rows, style)
    about |= {"data_format": settings.data_format, "left_out": omitted}
    if settings.data_format == "pku":
        about |= {"keep": settings.keep, "prefer": settings.prefer}
    options |= {"about": about, "split_by": "hash"}
    if settings.stage == "dpo":
        prepare_preferences(pairs, lambda pair, number: pair, **options)
    else:
        prepare_sft(pairs, lambda pair, number: pair[:2], mask_prompt=True, eos_when_cut=False, **options)
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
