"""Convert a LLaMA checkpoint in Hugging Face's layout: config.json, safetensors or .bin weights, and a tokenizer.

With --reverse, convert one of this project's base models to Hugging Face's layout. Tensors are read and written one at
a time, so that memory never holds the complete model. Nothing is downloaded.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked


@dataclass
class Settings(Checked):
    checkpoint_dir: Path = Path("checkpoints/hf/Llama-2-7B")  # folder to read, in Hugging Face's layout
    output_dir: Path | None = None  # folder to write (default: checkpoints/NAME of the input; reversed, out/hf/NAME)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the written weights; auto keeps it
    verify: bool = False  # compare the logits with those of transformers, which must be installed
    reverse: bool = False  # read one of this project's base models and write Hugging Face's layout
    max_shard_size: str = "5GB"  # with --reverse: split larger weights into several files


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from lit_llama.checkpoint import CONFIG_NAME, load_model, weights_path, write_base
from lit_llama.huggingface.config import convert_config
from lit_llama.huggingface.tokenizer_files import copy_tokenizer
from lit_llama.huggingface.weights import to_hf, to_lit, weight_files, write_hf
from lit_llama.model import LLaMAConfig
from lit_llama.storage.files import atomic_folder, check_folder
from lit_llama.storage.manifest import BASE_MODEL, HF_MODEL
from lit_llama.storage.schema import read_json
from lit_llama.storage.tensor_files import LazyTensor, check_free, open_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log

TOLERANCE = 1e-3  # largest logit difference that --verify accepts


def convert_from_hf(settings: Settings, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Convert a folder in Hugging Face's layout to a base model, and return the tensors written."""
    config = convert_config(read_json(settings.checkpoint_dir / "config.json"))
    Tokenizer(settings.checkpoint_dir).check_fit(config)
    state = to_lit(open_tensors(weight_files(settings.checkpoint_dir)), config, dtype)
    check_free(settings.output_dir, sum(t.nbytes for t in state.values()))
    with atomic_folder(settings.output_dir, BASE_MODEL) as folder:
        write_base(folder, config, state)
        copy_tokenizer(settings.checkpoint_dir, folder)
        if settings.verify:
            compare(settings.checkpoint_dir, folder, dtype)
    return state


def convert_to_hf(settings: Settings, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Convert a base model to Hugging Face's layout, and return the tensors written."""
    config = LLaMAConfig.from_json(settings.checkpoint_dir / CONFIG_NAME)
    tensors = to_hf(open_tensors([weights_path(settings.checkpoint_dir)]), config, dtype)
    with atomic_folder(settings.output_dir, HF_MODEL) as folder:
        write_hf(folder, tensors, config, settings.checkpoint_dir, settings.max_shard_size)
        if settings.verify:
            compare(folder, settings.checkpoint_dir, dtype)
    return tensors


@torch.no_grad()
def compare(hf_dir: Path, lit_dir: Path, dtype: torch.dtype | None) -> None:
    """Compare the logits of both models in fp32, with their weights rounded to `dtype` if it is not None.

    Raises:
        UserError: A logit differs by more than `TOLERANCE`.
    """
    from transformers import AutoModelForCausalLM

    config = LLaMAConfig.from_json(lit_dir / CONFIG_NAME)
    idx = torch.randint(config.vocab_size, (2, min(64, config.block_size)), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype or torch.float32).float().eval()
    expected = model(idx).logits
    del model  # one at a time: 7B takes 28 GB
    logits = load_model(lit_dir)(idx)[..., : config.vocab_size]
    difference = (logits - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"The converted model's logits differ from those of transformers by up to {difference:.2g}, which is more "
            f"than {TOLERANCE:g}; nothing was written."
        )
    log(f"logits differ from those of transformers by {difference:.2g} at most")


def model_name(folder: Path) -> str:
    """Return the name of a folder; for a snapshot in the cache of huggingface_hub, the name of the repository."""
    folder = folder.resolve()
    repository = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    return repository.rpartition("--")[2] if repository.startswith("models--") else folder.name


def main(settings: Settings) -> None:
    parent = Path("out/hf" if settings.reverse else "checkpoints")
    settings = replace(settings, output_dir=settings.output_dir or parent / model_name(settings.checkpoint_dir))
    check_folder(settings.output_dir, HF_MODEL if settings.reverse else BASE_MODEL, settings.checkpoint_dir)
    if settings.verify:
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise UserError("--verify needs transformers, which is not installed: pip install transformers.") from None
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    tensors = (convert_to_hf if settings.reverse else convert_from_hf)(settings, dtype)
    log(f"{sum(torch.Size(t.shape).numel() for t in tensors.values()):,} parameters, {len(tensors)} tensors")
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
