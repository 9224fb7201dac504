"""Continues a text with a base model, without any adapter; stdout is the text and its continuation.

With --prompt_style the prompt is put into a template first, and stdout is the answer alone.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.chat import gather_requests, open_session, save_answers, show
from lit_llama.checkpoint import load_model
from lit_llama.device import pick_device
from lit_llama.generation import Sampling
from lit_llama.prompts import get_prompt_style
from lit_llama.quantize import Quantize


@dataclass
class Settings:
    # == Model ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder

    # == Prompts ==
    prompt: tuple[str, ...] = ("Arr, the capital of Pilmaria",)  # texts to continue
    input: str = ""  # context that goes with them, in styles that have a place for it
    prompt_file: Path | None = None  # JSON or JSON lines (prompt, instruction or turns), or lines of text
    prompt_style: str = "plain"  # plain continues the text itself; alpaca, orca, beaver and hh are templates
    interactive: bool = False  # chat: read prompts from stdin, stream what follows
    output_file: Path | None = None  # also write prompts and answers here, as JSON

    # == Sampling ==
    temperature: float = 0.8  # 0 is greedy; 1 the model's own distribution
    top_k: int = 0  # only the k most likely tokens; 0 is all
    top_p: float = 1.0  # only the likeliest tokens that reach this probability together; 1 is all
    max_new_tokens: int = 100  # longest continuation, in tokens
    seed: int = 1234  # of sampling; the same prompts give the same answers
    batch_size: int = 16  # prompts continued at a time

    # == Device ==
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda, mps
    precision: str = "auto"  # 32, bf16 or 16; auto is bf16 on GPUs that have it, else 32
    quantize: Quantize | None = None  # hold the base's layers in 4 or 8 bits, with bitsandbytes (default: as precision)


def main(args: Settings) -> None:
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    device, dtype = pick_device(args.accelerator, args.precision)
    requests = [] if args.interactive else gather_requests(args.prompt, args.input, args.prompt_file)
    style = get_prompt_style(args.prompt_style)
    session = open_session(
        lambda: load_model(args.checkpoint_dir, device=device, dtype=dtype, quantize=args.quantize),
        args.checkpoint_dir,
        style,
        sampling,
        args.batch_size,
    )
    if args.interactive:
        return session.chat()
    responses = session.answers(requests)
    if style.continues:
        print("\n\n".join(responses))
    else:
        show(requests, {"base": responses})
    if args.output_file:
        about = {"base": args.checkpoint_dir, "style": style.name}
        save_answers(args.output_file, requests, {"response": responses}, sampling, about)


if __name__ == "__main__":
    cli.run(main, Settings)
