"""Prompt styles: templates that turn an instruction, or a conversation, into the text that the model continues."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llama.chat_template import TEMPLATE_NAME, ChatTemplate, ChatText, Message, Rendered, without_system
from lit_llama.utils import UserError

if TYPE_CHECKING:
    from lit_llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptStyle:
    """A prompt template.

    Args:
        name: for `--prompt_style`.
        template: text with `{instruction}`.
        template_with_input: text with `{instruction}` and `{input}`, for instructions with an input; None joins the two
            with a newline and uses `template`.
        stop: texts that end an answer, because they begin the next turn.
        continues: whether the prompt is a text to continue, which is shown with its continuation.
    """

    name: str
    template: str
    template_with_input: str | None = None
    stop: tuple[str, ...] = ()
    continues: bool = False

    def render(self, instruction: str, input: str = "", system: str = "") -> str:
        """Return the prompt.

        Args:
            instruction: What the model should do.
            input: Context of the instruction.
            system: System message, put before the instruction and separated by an empty line. A blank one is ignored.

        Raises:
            UserError: The instruction is empty.
        """
        if not instruction.strip():
            raise UserError("The prompt is empty; write what the model should do.")
        if system.strip():
            return self.render(f"{system}\n\n{instruction}", input)
        if not input:
            return self.template.replace("{instruction}", instruction)
        if self.template_with_input is None:
            return self.render(f"{instruction}\n{input}")
        before, after = self.template_with_input.split("{instruction}")
        return before + instruction + after.replace("{input}", input)

    def render_messages(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Rendered:
        """Return the prompt of a conversation.

        A single question is rendered as by `render`. Earlier turns come before it, each as its prompt, a space and its
        answer. Turns are separated by an empty line, or by a space in one-line styles. System messages are put before
        the first question and separated by an empty line; blank ones are ignored.

        Raises:
            UserError: The last message is not the user's, or a message is empty or has a role that the style lacks.
        """
        if tools or (others := [m["role"] for m in messages if m["role"] not in ("system", "user", "assistant")]):
            what = "tools" if tools else f"messages with the role {others[0]!r}"
            raise UserError(f"The prompt style {self.name!r} does not support {what}; a chat template may.")
        turns = [message for message in messages if message["role"] != "system"]
        check_turns(turns)
        gap = "\n\n" if "\n" in self.template else " "
        first, prompt = turns[0]["content"], ""
        for message in without_system(messages):
            if message["role"] == "user":
                prompt += gap * bool(prompt) + self.render(message["content"])
            else:
                prompt = f"{prompt.rstrip()} {message['content'].strip()}"
        return Rendered(prompt, first)

    def reply(self, prompt: str, response: str) -> str:
        """Return the text that follows a prompt answered with `response`, for training."""
        return response

    @property
    def about(self) -> dict[str, Any]:
        """Entries of a dataset's `meta.json` that identify the style."""
        return {"prompt_style": self.name}


@dataclass(frozen=True)
class ChatStyle(PromptStyle):
    """The chat template of a checkpoint, with the variables that the style's name sets.

    Args:
        chat: The template.
    """

    chat: ChatTemplate | None = None

    def render(self, instruction: str, input: str = "", system: str = "") -> ChatText:
        if not instruction.strip():
            raise UserError("The prompt is empty; write what the model should do.")
        content = f"{instruction}\n{input}" if input else instruction
        messages = [{"role": "system", "content": system}] * bool(system)
        return self.render_messages([*messages, {"role": "user", "content": content}])

    def render_messages(self, messages: Sequence[Message], tools: list[Any] | None = None) -> ChatText:
        check_turns([message for message in messages if message["role"] != "system"])
        return self.chat.render(messages, tools=tools)

    def reply(self, prompt: str, response: str) -> ChatText | str:
        """Return what the template writes after a prompt for the answer `response`, with the token that ends it.

        Args:
            prompt: From `render` or `render_messages`.
            response: The answer; whitespace around it is removed.

        Raises:
            UserError: The template begins a finished answer differently from its generation prompt.
        """
        if not (prompt and response.strip()):
            return ""
        messages = [*prompt.messages, {"role": "assistant", "content": response.strip()}]
        text, ((start, end),) = self.chat.answer_spans(messages, only_last=True, tools=prompt.tools)
        return text.part(start, end)

    @property
    def about(self) -> dict[str, Any]:
        return {"prompt_style": self.name, "chat_template_sha256": self.chat.sha256}


def check_turns(turns: Sequence[Message]) -> None:
    """Check the turns of a conversation that the model should continue.

    Raises:
        UserError: There are no turns, the last one is an answer, or a question is empty.
    """
    if not turns or turns[-1]["role"] == "assistant":
        raise UserError("The last message must be the user's.")
    if any(message["role"] == "user" and not message["content"].strip() for message in turns):
        raise UserError("The prompt is empty; write what the model should do.")


CHAT = "chat"  # the name of the checkpoint's own style
# Alpaca's templates are those of tatsu-lab/stanford_alpaca, the others those of the authors' generate script.
PROMPT_STYLES: dict[str, PromptStyle] = {
    style.name: style
    for style in (
        PromptStyle(
            "alpaca",
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
            stop=("### Instruction",),
        ),
        PromptStyle("orca", "[|User|] {instruction} [|AI Assistant|] ", stop=("[|User|]",)),
        PromptStyle("beaver", "[User] {instruction} [Assistant] ", stop=("[User]",)),
        PromptStyle("hh", "Human: {instruction} Assistant: ", stop=("Human:",)),
        PromptStyle("plain", "{instruction}", continues=True),
    )
}


def instruction_of(prompt: str) -> str:
    """Return the instruction in a prompt, for display; the prompt itself if it has none of `PROMPT_STYLES`."""
    for style in PROMPT_STYLES.values():
        before, after = (part.strip() for part in style.template.split("{instruction}"))
        if after and prompt.startswith(before) and prompt.rstrip().endswith(after):
            return prompt.rstrip()[len(before) : -len(after)].strip()
    return prompt


def get_prompt_style(name: str, base: "Tokenizer | Path | None" = None) -> PromptStyle:
    """Return the prompt style of a name.

    Args:
        name: One of `PROMPT_STYLES`, or "chat", the chat template of a checkpoint. Values for variables of the template
            may follow, as in "chat:enable_thinking=false".
        base: The checkpoint's tokenizer or folder, for "chat".

    Raises:
        UserError: There is no such style, the checkpoint has no chat template, or the template has no such variable.
    """
    if name in PROMPT_STYLES:
        return PROMPT_STYLES[name]
    variables = template_variables(check_style_name(name))
    from lit_llama.tokenizer import Tokenizer

    tokenizer = base if isinstance(base, Tokenizer) else Tokenizer(base)
    if tokenizer.template is None:
        raise UserError(
            f"The prompt style 'chat' needs a chat template: {tokenizer.path.parent / TEMPLATE_NAME}, or an entry in "
            "tokenizer_config.json. Convert an instruct model again, or choose another style."
        )
    return ChatStyle(name, "", chat=tokenizer.template.with_variables(variables) if variables else tokenizer.template)


def check_style_name(name: str) -> str:
    """Return the name of a prompt style, after checking it.

    Raises:
        UserError: There is no such style.
    """
    if name not in PROMPT_STYLES and not is_chat(name):
        raise UserError(f"There is no prompt style {name!r}; choose from {', '.join((*PROMPT_STYLES, CHAT))}.")
    template_variables(name)
    return name


def is_chat(name: str) -> bool:
    """Return whether a prompt style is the checkpoint's own chat template."""
    return name.partition(":")[0] == CHAT


def template_variables(name: str) -> dict[str, Any]:
    """Return the variables that the name of a chat style sets: booleans, null and numbers as such, all else as text.

    Raises:
        UserError: The name is not of the form "chat:NAME=VALUE,NAME=VALUE".
    """
    _, colon, assignments = name.partition(":")
    variables: dict[str, Any] = {}
    for assignment in assignments.split(",") if colon else ():
        variable, equals, value = assignment.partition("=")
        if not (equals and variable.isidentifier()) or variable in variables:
            raise UserError(f"The prompt style {name!r} is not of the form chat:NAME=VALUE,NAME=VALUE, each name once.")
        variables[variable] = value
        with suppress(ValueError, RecursionError):
            parsed = json.loads(value.lower())
            variables[variable] = value if isinstance(parsed, str | list | dict) else parsed
    return variables
