"""Prompt styles: templates that turn an instruction into the text that the model continues."""

from dataclasses import dataclass

from lit_llama.utils import UserError


@dataclass(frozen=True)
class PromptStyle:
    """A prompt template.

    Args:
        name: for `--prompt_style`.
        template: text with `{instruction}`.
        template_with_input: text with `{instruction}` and `{input}`, for instructions with an input; None joins the two
            with a newline and uses `template`.
        stop: texts that end an answer, because they begin the next turn.
        continues: the prompt is a text to continue, and is shown with its continuation.
    """

    name: str
    template: str
    template_with_input: str | None = None
    stop: tuple[str, ...] = ()
    continues: bool = False

    def render(self, instruction: str, input: str = "") -> str:
        """Return the prompt.

        Raises:
            UserError: The instruction is empty.
        """
        if not instruction.strip():
            raise UserError("The prompt is empty; write what the model should do.")
        if not input:
            return self.template.replace("{instruction}", instruction)
        if self.template_with_input is None:
            return self.render(f"{instruction}\n{input}")
        before, after = self.template_with_input.split("{instruction}")
        return before + instruction + after.replace("{input}", input)


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


def get_prompt_style(name: str) -> PromptStyle:
    """Return the prompt style of that name.

    Raises:
        UserError: There is none.
    """
    if name not in PROMPT_STYLES:
        raise UserError(f"There is no prompt style {name!r}; known are {', '.join(PROMPT_STYLES)}.")
    return PROMPT_STYLES[name]
