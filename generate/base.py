"""Continue a text with a base model, without any adapter; stdout is the text and its continuation.

With --prompt_style, a template turns the prompt into an instruction, and stdout is the answer alone.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.answer_settings import AnswerSettings


@dataclass
class Settings(AnswerSettings):
    # == Prompts ==
    prompt: tuple[str, ...] = ("Arr, the capital of Pilmaria",)  # texts to continue
    prompt_style: str = "plain"  # plain continues the text itself; alpaca, orca, beaver, hh and chat are templates

    # == Sampling ==
    temperature: float = 0.8  # 0 is greedy; 1 samples from the model's distribution


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from generate.interactive import Adapters, Chat
from lit_llama.answering import gather_requests, is_terminal, open_session, open_tokenizer, save_answers, show
from lit_llama.checkpoint import load_model
from lit_llama.prompts import get_prompt_style
from lit_llama.sharding import in_step, only_assists


def main(settings: Settings) -> None:
    settings.check_output()
    requests, tokenizer = gather_requests(settings), open_tokenizer(settings)
    style = get_prompt_style(settings.prompt_style, tokenizer)
    session = open_session(settings, tokenizer, lambda: load_model(settings.checkpoint_dir, **settings.model_options))
    if settings.interactive:
        return Chat(session, Adapters(style)).run() if is_terminal() else session.answer_lines(style)
    with in_step(session.model):
        if only_assists(session.model):
            return
        responses = session.answers(requests, [style] * len(requests))
    try:  # first, since showing them ends the program if standard output is closed
        save_answers(settings, requests, {"response": responses}, {"style": style.name})
    finally:
        if style.continues:
            print("\n\n".join(responses))
        else:
            show(requests, {"base": responses})


if __name__ == "__main__":
    cli.run(main, settings)
