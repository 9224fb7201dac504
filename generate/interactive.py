"""Chat in a terminal: a conversation with history, line editing and commands.

generate/aligner.py and generate/base.py start it for --interactive. If standard input is not a terminal, they answer
its lines one by one instead.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lit_llama.answering import Session
from lit_llama.bank import BASE, Bank, adapter_name
from lit_llama.chat_template import Message
from lit_llama.checkpoint import read_adapter
from lit_llama.compose import Sum, parse_sum
from lit_llama.generation import check_prompts, remaining_context, stream
from lit_llama.huggingface.hub import is_on_hub
from lit_llama.model import LLaMA
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, check_text, log

HELP = """\
Enter sends a message, Alt+Enter begins a new line, the arrow keys move the cursor and recall earlier messages. Ctrl-C
stops an answer, Ctrl-D ends the program.

    /adapter NAME     answer with this adapter; for Aligners also a sum, such as a:0.5+b, the path of a file, or
                      hf:OWNER/NAME
    /adapter          list the adapters
    /strength NUMBER  set the strength of the adapters in use: 0 is the base model, 1 as trained
    /base             answer with the base model alone
    /reset            begin a new conversation
    /help             show this text

A line that begins with a space is a message, even if a slash follows."""
LISTED = 20  # adapters that /adapter lists


# == which model answers ==


class Adapters:
    """The adapters that a chat can switch between. This base class has none.

    Attributes:
        names: Their names.
        label: A description of what answers now.
        style: The prompt style in use.
    """

    names: Sequence[str] = ()
    label = "the base model"

    def __init__(self, style: PromptStyle) -> None:
        self.style = style

    def use(self, text: str) -> None:
        """Answer with an adapter or a sum of adapters.

        Raises:
            UserError: There is no such adapter.
        """
        if text != BASE:
            raise UserError(f"There are no adapters to choose from ({text!r}).")

    def set_strength(self, strength: float) -> None:
        """Set the strength of the adapters in use.

        Raises:
            UserError: There are none, or their method does not support the strength.
        """
        raise UserError("The base model answers alone; there is no adapter whose strength could change.")


class OneAdapter(Adapters):
    """A single adapter of any method, which is part of the model.

    Args:
        model: From `load_adapted`, with the adapter as trained.
        name: The adapter's name.
        style: The prompt style.
        strength: The strength to start with.

    Raises:
        UserError: The method does not support the strength.
    """

    def __init__(self, model: LLaMA, name: str, style: PromptStyle, strength: float = 1.0) -> None:
        super().__init__(style)
        self.model, self.names = model, (name,)
        self.trained = {key: p.data for key, p in model.adapter_parameters().items()}
        self.set_strength(strength)

    def use(self, text: str) -> None:
        if text not in (BASE, *self.names):
            raise UserError(f"There is no adapter {text!r}; this model has {self.names[0]}.")
        self.set_strength(float(text != BASE))

    def set_strength(self, strength: float) -> None:
        for key, p in self.model.adapter_parameters().items():
            p.data = self.model.scaled_parameter(key, self.trained[key], strength)
        self.label = f"{self.names[0]}, strength {strength:g}" if strength else "the base model"


class BankAdapters(Adapters):
    """The Aligners of a bank.

    Args:
        model: From `load_with_bank`, not merged.
        tokenizer: The tokenizer of the base.
        terms: The weighted sum to start with.
        style: Name of the prompt style for all; None uses each adapter's own.
        files: The files of the bank's adapters, by their names, as far as they are known.
    """

    def __init__(
        self, model: LLaMA, tokenizer: Tokenizer, terms: Sum, style: str | None, files: dict[str, Path] | None = None
    ) -> None:
        self.model, self.bank, self.tokenizer, self.forced = model, model.bank, tokenizer, style
        self.files = files or {}
        self.set(terms)

    @property
    def names(self) -> Sequence[str]:
        return list(self.bank)

    def use(self, text: str) -> None:
        name = text
        on_hub = is_on_hub(text) and text.count(":") == 1 and "+" not in text  # not a sum of such names
        if text != BASE and (on_hub or os.path.exists(text)):
            path, file = Path(text), Path(text).resolve()
            if text not in self.bank:
                name = adapter_name(path)
                if name == BASE or (name in self.bank and self.files.get(name) != file):  # the name is taken
                    name = text
            if name not in self.bank or self.files.get(name) == file:
                change = self.bank.swap if name in self.bank else self.bank.add
                change(name, read_adapter(path))  # again, because the file may have changed
                self.files[name] = file
        self.set(parse_sum(name, self.bank))

    def set_strength(self, strength: float) -> None:
        if not self.terms:
            super().set_strength(strength)
        self.set(tuple((name, strength) for name, _ in self.terms))

    def set(self, terms: Sum) -> None:
        """Answer with a weighted sum."""
        style = get_prompt_style(self.forced or style_name(terms, self.bank, self.tokenizer), self.tokenizer)
        self.model.use([terms])  # Ctrl-C may interrupt it
        self.style, self.terms = style, terms
        parts = [f"{name}, strength {strength:g}" for name, strength in terms]
        self.label = " + ".join(parts) or "the base model"


def style_name(terms: Sum, bank: Bank, tokenizer: Tokenizer) -> str:
    """Return the prompt style of a sum's first adapter; for the base alone "chat", or else that of the bank's first."""
    if terms:
        return bank[terms[0][0]].style
    return "chat" if tokenizer.template is not None else next((slot.style for slot in bank.values()), "alpaca")


# == the conversation ==


class Chat:
    """A conversation with a model.

    Args:
        session: The model with its settings.
        adapters: The adapters to switch between.
    """

    def __init__(self, session: Session, adapters: Adapters) -> None:
        self.session, self.adapters = session, adapters
        self.turns: list[Message] = []  # questions and answers
        self.stopping = False

    def run(self) -> None:
        """Read messages and commands from the terminal until Ctrl-D."""
        read = line_reader()
        log(f"Answering with {self.adapters.label}, in the prompt style {self.adapters.style.name}. /help lists the "
            "commands, Ctrl-D ends.")  # fmt: skip
        while True:
            try:
                line = read()
            except KeyboardInterrupt:  # at the prompt, it discards the line
                continue
            except EOFError:
                return
            try:
                self.handle(line)
            except KeyboardInterrupt:  # pressed twice, or while no answer was being generated
                log("Stopped.")
            except UserError as error:
                log(f"error: {error}")
            except torch.OutOfMemoryError:
                log("error: The GPU's memory is full. The conversation is kept; /reset begins a new, shorter one.")

    def handle(self, line: str) -> None:
        """Execute a command, or answer a message.

        Raises:
            UserError: The command or message is invalid.
        """
        if line.startswith("/"):
            self.command(*line[1:].split(maxsplit=1))
        elif line.strip():
            self.answer(check_text(line.strip(), "The message"))

    def command(self, name: str = "", argument: str = "") -> None:
        """Execute a command.

        Raises:
            UserError: There is no such command, or its argument is wrong.
        """
        argument = argument.strip()
        if name == "help":
            return log(HELP)
        if name == "reset":
            self.turns = []
            return log("A new conversation begins.")
        if name == "base":
            self.adapters.use(BASE)
        elif name == "adapter" and argument:
            self.adapters.use(argument)
        elif name == "strength" and argument:
            self.adapters.set_strength(parse_strength(argument))
        elif name not in ("adapter", "strength"):
            raise UserError(f"There is no command /{name}; /help lists them. Begin a message with a space to send it.")
        if name == "adapter" and not argument:
            names = self.adapters.names
            more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
            log(f"Adapters: {', '.join(names[:LISTED]) or 'none'}{more}.")
        log(f"Answering with {self.adapters.label}.")

    def answer(self, text: str) -> None:
        """Print the answer to a message, and keep both for the next one.

        Raises:
            UserError: The message is too long.
        """
        session, style = self.session, self.adapters.style
        turns = [*self.turns, {"role": "user", "content": text}]
        system = session.settings.system
        turns, prompt = ([], style.render(text, system=system)) if style.continues else self.fit(turns)
        pieces: list[str] = []
        began = time.perf_counter()
        sampling = session.settings.sampling
        with stopped_by_ctrl_c() as is_stopped:
            model, tokenizer = session.model, session.tokenizer
            answer = stream(model, tokenizer, prompt, sampling, style.stop, style.continues, is_stopped)
            try:
                with closing(answer):
                    for piece in answer:
                        pieces.append(piece)
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:  # a second Ctrl-C
                print(flush=True)
                raise
        print(flush=True)
        answered = "".join(pieces)
        n_tokens = max(0, session.count(answered) - (session.count(prompt) if style.continues else 0))
        seconds = time.perf_counter() - began
        stopped = ", stopped" if is_stopped() else ", reached --max_new_tokens" * (n_tokens >= sampling.max_new_tokens)
        log(f"({n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.0f} tokens/s{stopped})")
        if turns and answered:
            self.turns = [*turns, {"role": "assistant", "content": answered}]

    def fit(self, turns: list[Message]) -> tuple[list[Message], str]:
        """Return the latest turns that fit into the context with an answer, and their prompt.

        Room is kept for an answer of `max_new_tokens`, at most half the context. The oldest turns are left out, each
        question together with its answers. The last question may leave less room.

        Raises:
            UserError: The last question alone is too long.
        """
        session, style = self.session, self.adapters.style
        context = session.model.max_tokens
        room = min(session.settings.max_new_tokens, context // 2)
        system = session.settings.system
        before: list[Message] = [{"role": "system", "content": system}] if system else []
        questions = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
        for first in questions:
            prompt = style.render_messages([*before, *turns[first:]])
            ids = session.tokenizer.encode(prompt, bos=True)
            if remaining_context(session.model, ids) >= room:
                break
        check_prompts(session.model, [ids])
        if n_left_out := questions.index(first):
            what = "question and its answer are" if n_left_out == 1 else f"{n_left_out} questions and answers are"
            log(f"note: the context of {context} tokens is full; the oldest {what} left out from now on.")
        return turns[first:], prompt


def parse_strength(text: str) -> float:
    """Return the number in a text.

    Raises:
        UserError: It is not a finite number.
    """
    try:
        strength = float(text)
    except ValueError:
        strength = float("nan")
    if not abs(strength) < float("inf"):
        raise UserError(f"{text!r} is not a strength; write a number such as 0.5.")
    return strength


# == the terminal ==


@contextmanager
def stopped_by_ctrl_c() -> Iterator[Any]:
    """Yield a function that returns whether Ctrl-C was pressed; pressed twice, it raises `KeyboardInterrupt`."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def line_reader() -> Any:
    """Return a function that reads a message from the terminal, with editing and history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # what a terminal sends for Enter pressed before the prompt appears
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    # standard output is for answers, unless it is the only terminal
    streams = [stream for stream in (sys.__stderr__, sys.__stdout__) if stream is not None and stream.isatty()]
    output = create_output(stdout=streams[0] if streams else sys.__stderr__)
    session: PromptSession[str] = PromptSession(
        "> ", multiline=True, prompt_continuation="  ", key_bindings=keys, output=output
    )
    return session.prompt
