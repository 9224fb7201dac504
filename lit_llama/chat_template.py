"""Chat templates: how a checkpoint renders a conversation.

A template is a Jinja program that comes with the checkpoint, as `chat_template.jinja` or in `tokenizer_config.json`. It
may come from a stranger, so it runs in Jinja's sandbox, on plain data. The names that a template may use are those of
transformers (its `apply_chat_template`).

Special tokens written by the template become special tokens of the model; those spelled out in a message stay text. To
tell them apart, an invisible noncharacter, `GUARD`, is inserted into the special tokens in messages while a template
runs; `Tokenizer.encode` removes it.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llama.console import did_you_mean
from lit_llama.storage.schema import field, read_bytes, read_json
from lit_llama.utils import UserError

TEMPLATE_NAME = "chat_template.jinja"
GUARD = "\ufdd0"  # reserved by Unicode for use within a program
MOST_TEXT = 10_000_000  # characters that a template may write
Message = dict[str, Any]  # role, content, and other fields that the template reads
PING: Message = {"role": "user", "content": "Ping"}  # rendered to find out what a template writes


class Rendered(str):
    """A conversation as text.

    Args:
        first: Its first question. Conversations with the same first question are kept in the same split.
    """

    first: str

    def __new__(cls, text: str, first: str = "") -> "Rendered":
        rendered = super().__new__(cls, text)
        rendered.first = first
        return rendered


class ChatText(Rendered):
    """A conversation rendered by a chat template, or a part of it. Special tokens in it are special.

    Args:
        messages, tools: The messages and tools that were rendered.
    """

    messages: Sequence[Message]
    tools: list[Any] | None

    def __new__(
        cls, text: str, first: str = "", messages: Sequence[Message] = (), tools: list[Any] | None = None
    ) -> "ChatText":
        rendered = super().__new__(cls, text, first)
        rendered.messages, rendered.tools = messages, tools
        return rendered

    def __add__(self, text: str) -> "ChatText":
        """Append another part, or a text whose special tokens stay text."""
        more = text if isinstance(text, ChatText) else "".join(GUARD + c for c in text.replace(GUARD, ""))
        return self.with_text(super().__add__(more))

    def part(self, start: int, end: int | None = None) -> "ChatText":
        """Return the characters from `start` to before `end`."""
        return self.with_text(self[start:end])

    def with_text(self, text: str) -> "ChatText":
        return ChatText(text, self.first, self.messages, self.tools)


class Refusal(UserError):
    """A template refuses a conversation, such as one whose roles do not alternate."""


class Unstable(UserError):
    """A template renders an earlier answer differently from the last one."""


class Interrupter:
    """Inserts `GUARD` into special tokens that a text spells out, and next to parts of them at the text's ends.

    Args:
        tokens: The special tokens.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = sorted(filter(None, tokens), key=len, reverse=True)
        self.longest = len(tokens[0]) if tokens else 0
        self.begins = {token[:n] for token in tokens for n in range(1, len(token))}
        self.ends = {token[n:] for token in tokens for n in range(1, len(token))}
        self.starts = re.compile(f"(?=(?:{'|'.join(map(re.escape, tokens)) or '(?!)'})).", re.DOTALL)

    def __call__(self, value: Any) -> Any:
        """Return plain data whose texts contain no special token, and form none with the text around them."""
        if isinstance(value, dict):
            # keys are only searched for complete tokens, so that templates find them under their names
            return {self.interrupt(n) if isinstance(n, str) else n: self(item) for n, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        if not isinstance(value, str):
            return value
        text = self.interrupt(value)
        core = text.strip()
        lengths = range(1, min(self.longest, len(core)) + 1)
        begin, end = text.find(core), text.find(core) + len(core)
        if any(core[-n:] in self.begins for n in lengths):
            text = text[:end] + GUARD + text[end:]
        if any(core[:n] in self.ends for n in lengths):
            text = text[:begin] + GUARD + text[begin:]
        return text

    def interrupt(self, text: str) -> str:
        """Return a text without complete special tokens."""
        return self.starts.sub(lambda match: match[0] + GUARD, text.replace(GUARD, ""))


class ChatTemplate:
    """A checkpoint's chat template.

    Args:
        sources: Jinja programs: "default", and "tool_use" if another one renders conversations with tools.
        path: The file that they come from.
        names: Special tokens by their names in templates, such as `bos_token`.
        control: The special tokens, as texts.
        added: Other tokens that the tokenizer never splits, such as `<think>`, which a model may write itself. If the
            template writes them, only answers may contain them.
        variables: Further variables of the template, such as Qwen3's `enable_thinking`.
    """

    def __init__(
        self,
        sources: dict[str, str],
        path: Path,
        names: dict[str, str],
        control: Iterable[str],
        added: Iterable[str] = (),
        variables: dict[str, Any] | None = None,
    ) -> None:
        self.sources, self.path, self.names, self.variables = sources, path, names, variables or {}
        self.source, complete = sources["default"], "".join(sources.values())
        self.limits_memory = True
        self.control = sorted(filter(None, control), key=len, reverse=True)
        self.added = [token for token in added if token.strip() and token in complete]
        self.sha256 = hashlib.sha256(complete.encode()).hexdigest()
        self._interrupt_answer = Interrupter(self.control)
        self._interrupt = Interrupter([*self.control, *self.added]) if self.added else self._interrupt_answer

    def with_variables(self, variables: dict[str, Any]) -> "ChatTemplate":
        """Return the template with further variables, such as `enable_thinking`.

        Raises:
            UserError: The template does not read one of them, or it is invalid.
        """
        from lit_llama.sandbox import variables_of

        with explained(self.path):
            known = set().union(*map(variables_of, self.sources.values())) - self._values((), False, None).keys()
        if unknown := sorted(variables.keys() - known):
            near = did_you_mean(unknown[0], sorted(known))
            raise UserError(f"The chat template in {self.path} has no variable {unknown[0]!r}{near}")
        template = ChatTemplate(self.sources, self.path, self.names, self.control, self.added, variables)
        template.limits_memory = self.limits_memory
        return template

    def at(self, day: date) -> "ChatTemplate":
        """Return the template with the clock that it reads, `strftime_now`, stopped at the beginning of a day."""
        variables = {**self.variables, "strftime_now": day.strftime}
        return ChatTemplate(self.sources, self.path, self.names, self.control, self.added, variables)

    def allow_threads(self) -> None:
        """Render a question once, then stop limiting memory: such a limit would apply to all threads of the process.

        Raises:
            UserError: The template is invalid or fails.
        """
        with suppress(Refusal):
            self._run([PING], True)
        self.limits_memory = False

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool = True, tools: list[Any] | None = None
    ) -> ChatText:
        """Return a conversation as text.

        Args:
            messages: Turns, oldest first. If the template does not support system messages, their texts are put before
                the first question, separated by empty lines.
            generation_prompt: Append the beginning of the model's answer.
            tools: Descriptions of functions that the model may call.

        Raises:
            UserError: The template is invalid, fails or refuses the conversation.
        """
        first = next((message["content"] for message in messages if message["role"] == "user"), "")
        placed = messages if self.takes_system else without_system(messages)
        return ChatText(self._run(placed, generation_prompt, tools), first, messages, tools)

    def _values(self, messages: Sequence[Message], generation_prompt: bool, tools: list[Any] | None) -> dict[str, Any]:
        return {
            **self.names,
            "messages": [self._guarded(message) for message in messages],
            "tools": self._interrupt(tools),
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }

    def _run(self, messages: Sequence[Message], generation_prompt: bool, tools: list[Any] | None = None) -> str:
        values = {**self._interrupt(self.variables), **self._values(messages, generation_prompt, tools)}
        source = self.source if tools is None else self.sources.get("tool_use", self.source)
        parts, n_characters = [], 0
        from lit_llama.sandbox import limited, program

        with explained(self.path), limited(self.limits_memory):
            for part in program(source).generate(**values):
                n_characters += len(part)
                if n_characters > MOST_TEXT:
                    raise UserError(f"it writes more than {MOST_TEXT:,} characters")
                parts.append(part)
        return "".join(parts)

    def _guarded(self, message: Message) -> Message:
        interrupt = self._interrupt_answer if message["role"] == "assistant" else self._interrupt
        return {**interrupt(message), "role": message["role"]}

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template supports a system message."""
        try:
            return "Pang" in self._run([{"role": "system", "content": "Pang"}, PING], True)
        except Refusal:
            return False
        except UserError:  # rendering the conversation itself will report what is wrong
            return True

    @cached_property
    def end_of_turn(self) -> str | None:
        """The token that ends an answer, None if the template writes none there or fails."""
        try:
            text = self._run([PING, {"role": "assistant", "content": "Pong"}], False)
        except UserError:
            return None
        after = text.rpartition("Pong")[2].lstrip()
        return next((token for token in (*self.control, *self.added) if after.startswith(token)), None)

    def answer_spans(
        self, messages: Sequence[Message], *, only_last: bool = False, tools: list[Any] | None = None
    ) -> tuple[ChatText, list[tuple[int, int]]]:
        """Return a conversation that ends with an answer, and the positions of its answers.

        A span begins where generation would begin, after the generation prompt, and ends after the token that ends the
        turn. So it contains exactly what the model would generate from the text before it.

        Args:
            messages: The conversation.
            only_last: Return only the span of the last answer.
            tools: See `render`.

        Returns:
            The text, and (start, end) character positions in it.

        Raises:
            Unstable: The text of an earlier part changes as the conversation continues.
            UserError: As `render`, or the template begins a finished answer differently from its generation prompt.
        """
        full, spans = self.render(messages, generation_prompt=False, tools=tools), []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers[-1:] if only_last else answers:
            before = self.render(messages[:i], tools=tools)
            is_last = i + 1 == len(messages)
            through = full if is_last else self.render(messages[: i + 1], generation_prompt=False, tools=tools)
            if not through.startswith(before):
                raise UserError(
                    f"The chat template in {self.path} begins a finished answer differently from its generation "
                    "prompt, so generation would not begin where training did; edit the template."
                )
            if not full.startswith(through):
                raise Unstable(
                    f"The chat template in {self.path} renders an earlier answer differently from the last one."
                )
            end = len(through)
            if self.end_of_turn and (position := full.find(self.end_of_turn, len(before), end)) >= 0:
                end = position + len(self.end_of_turn)
            spans.append((len(before), end))
        return full, spans


def without_system(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation with its system messages, except blank ones, moved into the first question, if any."""
    texts = [message["content"] for message in messages if message["role"] == "system" and message["content"].strip()]
    turns = [message for message in messages if message["role"] != "system"]
    first = next((i for i, message in enumerate(turns) if message["role"] == "user"), None)
    if first is None:
        return list(messages)
    content = "\n\n".join([*texts, turns[first]["content"]])
    return [*turns[:first], {**turns[first], "content": content}, *turns[first + 1 :]]


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn any exception of a template into one sentence.

    Raises:
        UserError: The template failed, or refused the conversation.
    """
    try:
        yield
    except Exception as error:
        from jinja2 import TemplateSyntaxError

        reason = " ".join(str(error).split()).rstrip(".")
        reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
        if isinstance(error, Refusal):
            raise Refusal(f"The chat template refuses the conversation: {reason}.") from None
        if isinstance(error, TemplateSyntaxError):
            reason = f"line {error.lineno}: {reason}"
        elif type(error).__name__ == "TooLong":
            reason = "it runs too long"
        elif not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise UserError(f"The chat template in {path} cannot be used ({reason}).") from None


def read_chat_template(folder: Path) -> tuple[dict[str, str], Path] | None:
    """Return the `sources` of a folder's chat template and the file that they come from, None if there is no template.

    `chat_template.jinja` takes precedence over `tokenizer_config.json`, where the template is a text, or a list from
    which those named "default" and "tool_use" are used, as in transformers.

    Raises:
        UserError: A file is damaged.
    """
    path = folder / TEMPLATE_NAME
    if path.exists():
        try:
            return {"default": read_bytes(path).decode("utf-8-sig")}, path
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not text in UTF-8 (byte {error.start + 1}).") from None
    path = folder / "tokenizer_config.json"
    source = field(read_json(path), "chat_template", str | list, path, None) if path.exists() else None
    if not isinstance(source, list):
        return None if source is None else ({"default": source}, path)
    named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") in ("default", "tool_use")]
    sources = {entry["name"]: field(entry, "template", str, f"{path}: chat_template") for entry in named}
    return (sources, path) if "default" in sources else None
