"""Prepare conversations for supervised finetuning, in the chat template of an instruct model or in a prompt style.

Rows have `messages` (`role` and `content`, as in OpenAI's files) or `conversations` (`from` and `value`, as in
ShareGPT's), with one or more turns, and optionally `system` and `tools`. Downloads HuggingFaceH4/no_robots (9,500
training rows), or reads --data_file: a JSON list, JSON Lines or Parquet.

With --prompt_style chat, the checkpoint's template, a conversation becomes one row, and the model is trained on all of
its answers. In other styles, and with templates that change earlier turns, each answer becomes a separate row, with the
turns before it as the prompt.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.prepare_settings import RowSettings


@dataclass
class Settings(RowSettings):
    # == What to read ==
    repo_id: str = "HuggingFaceH4/no_robots"  # dataset on the Hugging Face Hub

    # == What to write ==
    output_dir: Path = Path("data/chat")  # folder to write
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct")  # model whose tokenizer and template are used
    prompt_style: str = "chat"  # the checkpoint's template, also chat:NAME=VALUE; or alpaca, orca, beaver, hh, plain
    train_on: Literal["all", "last"] = "all"  # train on all answers of a conversation, or on the last one
    max_seq_length: int = 2048  # maximum number of tokens of a conversation; longer ones end after an earlier answer


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from tqdm import tqdm

from lit_llama.chat_template import Message, Refusal, Unstable
from lit_llama.conversations import prepare_conversations, read_conversation, up_to_last_answer
from lit_llama.prepare import prepare_sft
from lit_llama.prompts import ChatStyle, PromptStyle, get_prompt_style
from lit_llama.storage.rows import naming
from lit_llama.utils import UserError, log

Conversation = tuple[int, list[Message], list[Any] | None]  # row number, messages, tools


class Omitted:
    """The number of omitted rows and answers by reason, with the first example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def report(self) -> None:
        for reason, count in self.counts.items():
            log(f"Omitted {count} {reason} (the first: {self.examples[reason].rstrip('.')}).")


def conversations(rows: Iterable[Any], omitted: Omitted) -> Iterator[Conversation]:
    """Yield the rows that have an answer to a question and no empty message.

    Raises:
        UserError: A row is not a conversation.
    """
    for number, row in enumerate(rows, 1):
        messages, tools = read_conversation(row, number)
        messages = up_to_last_answer(messages)
        if not messages:
            omitted.add("rows without an answer to a question", f"row {number}")
        elif not all(message["content"].strip() or "tool_calls" in message for message in messages):
            omitted.add("rows with an empty message", f"row {number}")
        else:
            yield number, messages, tools


def answers(messages: list[Message], train_on: str) -> list[int]:
    """Return the indices of the answers to train on."""
    indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return indices[-1:] if train_on == "last" else indices


def chat_samples(rows: Iterable[Conversation], style: ChatStyle, train_on: str, omitted: Omitted) -> list[Any]:
    """Return the conversations in a chat template, each with the spans of its answers.

    Raises:
        UserError: The template is broken, or cannot be trained on.
    """
    samples, n_divided, n_parts = [], 0, 0
    for number, messages, tools in rows:
        try:
            try:
                samples.append(style.chat.answer_spans(messages, only_last=train_on == "last", tools=tools))
            except Unstable:
                parts = [messages[: i + 1] for i in answers(messages, train_on)]
                samples += [style.chat.answer_spans(part, only_last=True, tools=tools) for part in parts]
                n_divided, n_parts = n_divided + 1, n_parts + len(parts)
        except Refusal as error:
            omitted.add("rows that the chat template refuses", f"row {number}: {error}")
        except UserError as error:
            raise UserError(f"Row {number}: {error}") from None
    if n_divided:
        log(
            f"note: the chat template renders earlier answers differently from the last one; {n_divided} "
            f"conversations became {n_parts} rows, one for each answer."
        )
    return samples


def style_samples(
    rows: Iterable[Conversation], style: PromptStyle, train_on: str, omitted: Omitted
) -> list[tuple[str, str]]:
    """Return (prompt, answer) for the answers to train on; a prompt consists of the turns before the answer.

    Raises:
        UserError: A conversation has a message that the style cannot render.
    """
    samples = []
    for number, messages, tools in rows:
        try:
            for i in answers(messages, train_on):
                if next(m["role"] for m in reversed(messages[:i]) if m["role"] != "system") == "assistant":
                    omitted.add("answers that follow no question", f"row {number}")
                else:
                    samples.append((style.render_messages(messages[:i], tools), messages[i]["content"]))
        except UserError as error:
            raise UserError(f"Row {number}: {error}") from None
    return samples


def main(settings: Settings) -> None:
    options = settings.options()
    style = get_prompt_style(settings.prompt_style, options["tokenizer"])
    rows, source = settings.rows()
    about = {**source, **style.about, "train_on": settings.train_on}
    omitted = Omitted()
    with naming(about["source"]):
        kept = conversations(tqdm(rows, desc="Rendering", unit=" rows"), omitted)
        if isinstance(style, ChatStyle):
            samples = chat_samples(kept, style, settings.train_on, omitted)
        else:
            samples = style_samples(kept, style, settings.train_on, omitted)
    omitted.report()
    options |= {"about": {**about, "left_out": dict(omitted.counts)}, "split_by": "hash"}
    if isinstance(style, ChatStyle):
        prepare_conversations(samples, **options)
    else:
        prepare_sft(samples, lambda sample, number: sample, mask_prompt=True, **options)
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
