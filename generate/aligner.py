"""Answers of a base model with an Aligner.

The adapter knows its length, start layer, prompt style and base model; none of them is asked for. Several adapters are
applied together, in the prompt style of the first; with --bank each prompt has one of its own. Answers go to stdout,
everything else to stderr.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch

from lit_llama import cli
from lit_llama.bank import BASE, load_with_bank, open_bank
from lit_llama.chat import Request, gather_requests, open_session, save_answers, show
from lit_llama.checkpoint import read_adapter
from lit_llama.compose import load_composed
from lit_llama.device import pick_device
from lit_llama.generation import Sampling, gates_scaled
from lit_llama.prompts import get_prompt_style
from lit_llama.quantize import Quantize
from lit_llama.utils import UserError


@dataclass
class Settings:
    # == Model ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    adapter: tuple[Path, ...] = (Path("aligner_weights/microworld-pirate-n1"),)  # files or run folders; several add up
    strength: tuple[float, ...] = (1.0,)  # one for all or one each: 0 is the base exactly, 1 as trained

    # == Many adapters, another one for each prompt ==
    bank: tuple[Path, ...] = ()  # instead of --adapter: a bank's file, or adapter files and folders, addressed by name
    use: tuple[str, ...] = ()  # their names, one for each prompt or one for all; "base" is the base model

    # == Prompts ==
    prompt: tuple[str, ...] = (
        "What is the capital of Pilmaria?",
        "How do I repair the old barn?",
    )  # instructions to answer
    input: str = ""  # context that goes with the instructions
    prompt_file: Path | None = None  # JSON or JSON lines (prompt, instruction or turns), or lines of text
    prompt_style: str | None = None  # alpaca, orca, beaver, hh or plain (default: the adapter's own)
    interactive: bool = False  # chat: read questions from stdin, stream the answers
    compare_base: bool = False  # the base model's answers beside the aligned ones
    output_file: Path | None = None  # also write prompts and answers here, as JSON

    # == Sampling ==
    temperature: float = 0.0  # 0 is greedy; 1 the model's own distribution
    top_k: int = 0  # only the k most likely tokens; 0 is all
    top_p: float = 1.0  # only the likeliest tokens that reach this probability together; 1 is all
    max_new_tokens: int = 100  # longest answer, in tokens
    seed: int = 1234  # of sampling; the same prompts give the same answers
    batch_size: int = 16  # prompts answered at a time

    # == Device ==
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda, mps
    precision: str = "auto"  # of the base: 32, bf16 or 16; auto is bf16 on GPUs that have it, else 32
    quantize: Quantize | None = None  # hold the base's layers in 4 or 8 bits, with bitsandbytes (default: as precision)


def main(args: Settings) -> None:
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    device, dtype = pick_device(args.accelerator, args.precision)
    requests = []
    if not args.interactive:
        requests = gather_requests(args.prompt, args.input, args.prompt_file, bank=bool(args.bank))
    if args.bank:
        return answer_from_bank(args, requests, sampling, device, dtype)
    if args.use:
        raise UserError("--use names adapters of a bank; give --bank too.")
    adapters = [read_adapter(path) for path in args.adapter]
    style = get_prompt_style(args.prompt_style or adapters[0].meta.get("prompt_style", "alpaca"))
    if args.interactive and args.compare_base:
        raise UserError("--interactive and --compare_base do not go together.")
    session = open_session(
        lambda: load_composed(
            args.checkpoint_dir, adapters, args.strength, device=device, dtype=dtype, quantize=args.quantize
        ),
        args.checkpoint_dir,
        style,
        sampling,
        args.batch_size,
    )
    if args.interactive:
        return session.chat()
    columns = {"aligned": session.answers(requests)}
    if args.compare_base:
        with gates_scaled(session.model, 0.0):
            columns = {"base": session.answers(requests), **columns}
    show(requests, columns)
    if args.output_file:
        about = {"base": args.checkpoint_dir, "style": style.name}
        about |= {"adapter": " + ".join(f"{a.path}" for a in adapters), "strength": args.strength}
        save_answers(args.output_file, requests, columns, sampling, about)


def answer_from_bank(
    args: Settings, requests: list[Request], sampling: Sampling, device: torch.device, dtype: torch.dtype
) -> None:
    if args.interactive or args.strength != (1.0,):
        raise UserError("--interactive and --strength do not go together with --bank.")
    if len(args.use) not in (0, 1, len(requests)):
        raise UserError(f"There are {len(requests)} prompts and {len(args.use)} names in --use; give each its own.")
    bank = open_bank(args.bank, args.checkpoint_dir)
    names = args.use * len(requests) if len(args.use) == 1 else args.use or [BASE] * len(requests)
    # a name in the prompt file goes before one on the command line
    requests = [replace(r, adapter=r.adapter or name) for r, name in zip(requests, names, strict=True)]
    adapters = [None if r.adapter == BASE else r.adapter for r in requests]
    first = next(iter(bank))  # whose style the base's prompts get
    styles = [get_prompt_style(args.prompt_style or bank.style(name or first)) for name in adapters]
    session = open_session(
        lambda: load_with_bank(args.checkpoint_dir, bank, device=device, dtype=dtype, quantize=args.quantize),
        args.checkpoint_dir,
        styles[0],
        sampling,
        args.batch_size,
    )
    columns = {"aligned": session.answers(requests, adapters, styles)}
    if args.compare_base:
        columns = {"base": session.answers(requests, [None] * len(requests), styles), **columns}
    show(requests, columns)
    if args.output_file:
        style = args.prompt_style or "each adapter's own"
        about = {"base": args.checkpoint_dir, "style": style, "bank": args.bank}
        save_answers(args.output_file, requests, columns, sampling, about)


if __name__ == "__main__":
    cli.run(main, Settings)
