"""Converts a LLaMA checkpoint in Hugging Face layout: config.json, safetensors or .bin weights, a tokenizer.

With --reverse it converts one of this project's base models to Hugging Face layout. One tensor after the other is read
and written, so memory holds neither model. Nothing is downloaded.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch

from lit_llama import cli
from lit_llama.checkpoint import CONFIG_NAME, load_model, weights_path, write_base
from lit_llama.files import atomic_folder, check_folder
from lit_llama.hf import read_json, to_hf, to_lit, weight_files, write_hf
from lit_llama.hf_config import convert_config
from lit_llama.hf_tokenizer import copy_tokenizer, fitting_tokenizer
from lit_llama.manifest import BASE_MODEL, HF_MODEL
from lit_llama.model import LLaMAConfig
from lit_llama.tensor_files import LazyTensor, check_space, open_tensors
from lit_llama.utils import UserError, log


@dataclass
class Settings:
    checkpoint_dir: Path = Path("checkpoints/hf/Llama-2-7B")  # the folder to read: Hugging Face's
    output_dir: Path = Path("checkpoints/Llama-2-7B")  # the folder to write
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the written weights; auto: as they are
    verify: bool = False  # compare the logits with those of transformers, which must be installed
    reverse: bool = False  # the other way round: checkpoint_dir is this project's, output_dir becomes Hugging Face's
    max_shard_size: str = "5GB"  # with reverse: larger weights are split into several files


TOLERANCE = 1e-3  # of --verify: the largest difference of any logit


def to_ours(args: Settings, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Hugging Face's folder to ours."""
    config = convert_config(read_json(args.checkpoint_dir / "config.json"))
    fitting_tokenizer(args.checkpoint_dir, config)
    state = to_lit(open_tensors(weight_files(args.checkpoint_dir)), config, dtype)
    check_space(args.output_dir, state)
    with atomic_folder(args.output_dir, BASE_MODEL) as folder:
        write_base(folder, config, state)
        copy_tokenizer(args.checkpoint_dir, folder)
        if args.verify:
            compare(args.checkpoint_dir, folder, dtype)
    return state


def to_theirs(args: Settings, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Our folder to Hugging Face's."""
    config = LLaMAConfig.from_json(args.checkpoint_dir / CONFIG_NAME)
    tensors = to_hf(open_tensors([weights_path(args.checkpoint_dir)]), config, dtype)
    with atomic_folder(args.output_dir, HF_MODEL) as folder:
        write_hf(folder, tensors, config, args.checkpoint_dir, args.max_shard_size)
        if args.verify:
            compare(folder, args.checkpoint_dir, dtype)
    return tensors


@torch.no_grad()
def compare(hf_dir: Path, lit_dir: Path, dtype: torch.dtype | None) -> None:
    """Runs both models in fp32, after both were rounded to `dtype`.

    Raises:
        UserError: a logit differs by more than `TOLERANCE`.
    """
    from transformers import AutoModelForCausalLM

    config = LLaMAConfig.from_json(lit_dir / CONFIG_NAME)
    idx = torch.randint(config.vocab_size, (2, min(64, config.block_size)), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype or "auto").float().eval()
    theirs = model(idx).logits
    del model  # one at a time: 7B takes 28 GB
    ours = load_model(lit_dir)(idx)[..., : config.vocab_size]
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"The converted model's logits differ from those of transformers by up to {difference:.2g}, which is more "
            f"than {TOLERANCE:g}; nothing was written."
        )
    log(f"logits differ from those of transformers by {difference:.2g} at most")


def main(args: Settings) -> None:
    check_folder(args.output_dir, HF_MODEL if args.reverse else BASE_MODEL, args.checkpoint_dir)
    if args.verify:
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise UserError("--verify needs transformers, which is not installed: pip install transformers.") from None
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    tensors = (to_theirs if args.reverse else to_ours)(args, dtype)
    log(f"{sum(torch.Size(t.shape).numel() for t in tensors.values()):,} parameters, {len(tensors)} tensors")
    print(args.output_dir)


if __name__ == "__main__":
    cli.run(main, Settings)
