"""Prompt styles: how an instruction becomes the text the model continues."""

from dataclasses import dataclass

from lit_llama.utils import UserError


@dataclass(frozen=True)
class PromptStyle:
    """A template with `{instruction}`, and another for when there is an `{input}`.

    Args:
        name: what `--prompt_style` calls it.
        template: without an input.
        template_with_input: with one; None joins instruction and input with a newline.
        stop: texts that end an answer: the model has begun the next turn by itself.
        continues: the prompt is a text to be continued, and belongs to the answer.
    """

    name: str
    template: str
    template_with_input: str | None = None
    stop: tuple[str, ...] = ()
    continues: bool = False

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt's text.

        Raises:
            UserError: the instruction is empty.
        """
        if not instruction.strip():
            raise UserError("The prompt is empty; say what the model should do.")
        if not input:
            return self.template.replace("{instruction}", instruction)
        if self.template_with_input is None:
            return self.render(f"{instruction}\n{input}")
        before, after = self.template_with_input.split("{instruction}")
        return before + instruction + after.replace("{input}", input)


# Alpaca's two texts are those of tatsu-lab/stanford_alpaca; the others are those of the authors' generate script.
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
    """The style of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PROMPT_STYLES:
        raise UserError(f"There is no prompt style {name!r}; known are {', '.join(PROMPT_STYLES)}.")
    return PROMPT_STYLES[name]
