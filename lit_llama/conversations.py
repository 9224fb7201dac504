"""Conversations as lists of messages: read them from rows, and prepare them for supervised finetuning.

A row has `messages` in OpenAI's format (`role`, `content`) or `conversations` in ShareGPT's (`from`, `value`).
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_llama.chat_template import ChatText, Message
from lit_llama.data import SFT_FORMAT
from lit_llama.prepare import prepare_dataset
from lit_llama.storage.schema import parse_json, shown
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, check_text

ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "model", "chatgpt", "bing", "bard"), "assistant"),
}
KEPT = ("name", "reasoning_content", "tool_calls", "tool_call_id")  # other fields that templates read


# == reading ==


def read_conversation(row: Any, number: int) -> tuple[list[Message], list[Any] | None]:
    """Return the messages of a row, and the descriptions of tools in its field `tools`.

    A text in the field `system` becomes a system message if there is none.

    Args:
        row: The row.
        number: Its number, counted from 1, for error messages.

    Raises:
        UserError: The row has no conversation, or a message is invalid.
    """
    if not isinstance(row, dict):
        raise UserError(f"Row {number} is not an object with named fields but {type(row).__name__}.")
    name = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    if name is None:
        has = ", ".join(map(repr, row)) or "none"
        raise UserError(f"Row {number} has no field 'messages' or 'conversations'; it has {has}.")
    messages = read_messages(row[name], f"Row {number}: {name!r}")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": check_text(system, f"Row {number}: 'system'")})
    return messages, read_tools(row, number)


def read_tools(row: dict[str, Any], number: int) -> list[Any] | None:
    """Return the descriptions of tools in a row: a list, see `without_null`, or a list as JSON.

    Raises:
        UserError: They are neither, are nested too deeply, or hold text that cannot be encoded.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools or "null", f"Row {number}: 'tools'", object, halves=True)
    else:
        tools = without_null(tools)
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"Row {number}: 'tools' is not a list of tools.")
    check_text(json.dumps(tools, ensure_ascii=False, default=str), f"Row {number}: 'tools'")
    return tools or None


def without_null(value: Any) -> Any:
    """Return plain data without the null entries of objects: Arrow gives all objects of a column the same fields."""
    if isinstance(value, dict):
        return {name: without_null(item) for name, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def read_messages(value: Any, label: str) -> list[Message]:
    """Return messages with the fields `role`, `content` (text) and those in `KEPT`, see `without_null`.

    White space around answers is removed, as templates and generation do too. System messages without text are omitted.

    Args:
        value: A list, which may be empty, of objects with `role` and `content`, or `from` and `value`.
        label: Description of the value, for error messages.

    Raises:
        UserError: It is not a list of messages, or one has an unknown role or no text.
    """
    if not isinstance(value, list):
        raise UserError(f"{label} is not a list of messages.")
    messages = [_read_message(entry, f"{label}, message {i}") for i, entry in enumerate(value, 1)]
    return [message for message in messages if message["role"] != "system" or message["content"].strip()]


def _read_message(entry: Any, label: str) -> Message:
    if not isinstance(entry, dict):
        raise UserError(f"{label} is not an object but {type(entry).__name__}.")
    name = "from" if entry.get("role") is None and "from" in entry else "role"
    role = entry.get(name)
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{label}: {name!r} is {shown(role)}; it must be one of {', '.join(ROLES)}.")
    content = next((entry[n] for n in ("content", "value") if entry.get(n) is not None), None)
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
                 for part in content]  # fmt: skip
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{label} has parts that are not text; only text can be used.")
        content = "".join(texts)
    kept = without_null({name: entry[name] for name in KEPT if entry.get(name)})
    if content is None and ("tool_calls" in kept or ROLES[role] == "system"):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{label} has no text.")
    content = check_text(content, label)
    check_text(json.dumps(kept, ensure_ascii=False, default=str), label)
    return {"role": ROLES[role], "content": content.strip() if ROLES[role] == "assistant" else content, **kept}


def up_to_last_answer(messages: Sequence[Message]) -> list[Message]:
    """Return the messages from the first question, with system messages before it, to the last answer.

    Some rows begin with an answer, or end with a question. The list is empty if nothing is answered.
    """
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        return []
    first, last = roles.index("user"), len(roles) - roles[::-1].index("assistant")
    return [message for i, message in enumerate(messages[:last]) if i >= first or message["role"] == "system"]


# == preparing ==


def prepare_conversations(
    samples: Sequence[tuple[ChatText, Sequence[tuple[int, int]]]],
    *,
    tokenizer: Tokenizer,
    max_seq_length: int,
    **options: Any,
) -> dict[str, Any]:
    """Write a dataset of conversations for supervised finetuning; only answers are labels.

    A conversation longer than the maximum ends after the last answer that fits. If the first answer does not fit, it is
    truncated, and its last token is replaced with the one that ends the turn. For `options` and the result see
    `prepare_dataset`.

    Args:
        samples: Conversations and the spans of their answers, from `ChatTemplate.answer_spans`.
        tokenizer: The tokenizer of the checkpoint that the template comes from.
        max_seq_length: Maximum length in tokens. A row whose first prompt leaves no room for an answer is dropped.

    Raises:
        UserError: As `prepare_dataset`, or the tokens of a conversation's beginning change as it continues.
    """

    def encode(text: ChatText, spans: str) -> dict[str, Any]:
        ids, edges = tokenizer.encode(text), []
        for position in json.loads(spans):
            before = tokenizer.encode(text.part(0, position))
            tokenizer.check_boundary(before, ids)
            edges.append(len(before))
        ids = ids[: edges[-1]]
        if ids[-1] not in tokenizer.stop_ids:  # the template does not end its answers
            ids.append(tokenizer.eos_id)
            edges[-1] += 1
        starts, ends = edges[::2], edges[1::2]
        n_fitting = sum(end <= max_seq_length for end in ends)
        cut = int(n_fitting < len(ends))
        if n_fitting == 0:
            ids = ids[: max_seq_length - 1] + ids[ends[0] - 1 : ends[0]]
            n_fitting, ends[0] = 1, len(ids)
        gaps = [i for end, start in zip(ends[: n_fitting - 1], starts[1:], strict=False) for i in (end, start)]
        return {
            "input_ids": ids[: ends[n_fitting - 1]],
            "prompt_length": starts[0],
            "gaps": np.array(gaps, np.int64),
            "dropped": "" if starts[0] <= max_seq_length - 2 else "too_long",
            "cut": cut,
        }

    return prepare_dataset(
        samples,
        lambda sample, number: (sample[0], json.dumps([edge for span in sample[1] for edge in span])),
        encode,
        drops=("too_long",),
        key=[SFT_FORMAT, "conversations", max_seq_length],
        tokenizer=tokenizer,
        settings={
            "format": SFT_FORMAT,
            "max_seq_length": max_seq_length,
            "mask_prompt": True,
            "multi_turn": True,
        },
        **options,
    )
