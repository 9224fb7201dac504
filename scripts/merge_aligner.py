"""Merge an adapter into its base model: an Aligner of one prefix token, a LoRA or a BitFit.

The result is a plain LLaMA that needs no code from this project. An Aligner with N = 1 becomes a bias of each layer's
attention output, exactly (see lit_llama/merge.py; `attention_bias` in Hugging Face's config.json). So do the biases of
BitFit. LoRA's updates are added to the query and value weights and rounded to the dtype that is written.
"""

import copy
import json
import sys
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked


@dataclass
class Settings(Checked):
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    adapter: Path = Path("aligner_weights/microworld-pirate-n1")  # an Aligner of one prefix token, a LoRA or a BitFit
    output_dir: Path | None = None  # the folder to write (default: out/merged/NAME of the adapter)
    format: Literal["hf", "lit"] = "hf"  # for transformers, vLLM and llama.cpp; or this project's
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the written weights; auto keeps it
    max_shard_size: str = "5GB"  # hf: larger weights are split into several files


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from lit_llama import aligner, bitfit, lora
from lit_llama.bank import adapter_name
from lit_llama.checkpoint import (
    CONFIG_NAME,
    AdapterFile,
    base_fingerprint,
    check_base,
    read_adapter,
    weights_path,
    write_base,
)
from lit_llama.huggingface.tokenizer_files import copy_tokenizer
from lit_llama.huggingface.weights import parameters, to_hf, without_tied_head, write_hf
from lit_llama.merge import output_bias
from lit_llama.methods import METHODS
from lit_llama.model import CausalSelfAttention, LLaMA, LLaMAConfig
from lit_llama.storage.files import atomic_folder, check_folder, write_text
from lit_llama.storage.manifest import MERGED_MODEL
from lit_llama.storage.tensor_files import LazyTensor, check_free, open_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log
from lit_llama.variant import check_shapes

CARD = "aligner.json"  # records the adapter and the base that were merged
MERGED_TENSOR = {"aligner": "c_proj.bias", "bitfit": "c_proj.bias", "lora": "c_attn.weight"}  # of each attention


def default_output(adapter: Path) -> Path:
    """Return out/merged/NAME, from the names of the adapter's folder and, if the path is a file, of the file."""
    name = adapter_name(adapter)
    return Path("out/merged") / (f"{adapter.resolve().parent.name}-{name}" if adapter.is_file() else name)


def load_adapter(adapter: AdapterFile, checkpoint_dir: Path) -> LLaMA:
    """Return a model with the adapter's parameters; those of its base are on the meta device.

    Raises:
        UserError: The adapter cannot be merged, or belongs to another base.
    """
    if adapter.method not in MERGED_TENSOR:
        raise UserError(
            f"{adapter.path} was made by the method {adapter.method!r}, but only an Aligner of one token, LoRA and "
            "BitFit can be merged into a plain LLaMA; use this one with generate/aligner.py."
        )
    if (length := adapter.config.get("adapter_prompt_length", 1)) != 1:
        raise UserError(
            f"{adapter.path} has N = {length} prefix tokens: what they add depends on the query, so only N = 1 can be "
            "merged; use this one with generate/aligner.py."
        )
    model_class = METHODS[adapter.method]
    config = model_class.config_class.from_json(checkpoint_dir / CONFIG_NAME, **adapter.config)
    check_base(adapter, checkpoint_dir, config)
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(adapter.state, assign=True)
    return model


def merge(tensors: dict[str, LazyTensor], model: LLaMA, changed: str) -> tuple[dict[str, LazyTensor], LLaMAConfig]:
    """Return the tensors of the merged model, and its configuration.

    Args:
        tensors: the base's tensors.
        model: from `load_adapter`.
        changed: the tensor of each attention that changes, from `MERGED_TENSOR`.
    """
    config = LLaMAConfig(**json.loads(model.config.to_json()))
    tensors = without_tied_head(tensors, config, "transformer.wte.weight")
    check_shapes(tensors, parameters(config), f"The weights do not fit {CONFIG_NAME}")
    config = replace(config, proj_bias=config.proj_bias or changed == "c_proj.bias")

    @lru_cache(maxsize=1)  # Hugging Face's format reads the rows of q, k and v in turn
    def read(layer: int) -> torch.Tensor:
        prefix = f"transformer.h.{layer}.attn."
        base = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return merge_layer(model.transformer.h[layer].attn, base)

    shapes = parameters(config)
    merged = {name: tensors.get(name) for name in shapes}
    for layer in range(config.n_layer):
        attn = f"transformer.h.{layer}.attn."
        dtype = tensors[f"{attn}c_proj.weight"].dtype
        merged[attn + changed] = LazyTensor(shapes[attn + changed], dtype, partial(read, layer))
    return merged, config


@torch.no_grad()
def merge_layer(attn: CausalSelfAttention, base: dict[str, LazyTensor]) -> torch.Tensor:
    """Return the merged tensor of a layer in fp32.

    Args:
        attn: the attention of any method, with the adapter's parameters.
        base: the base's parameters of this attention.
    """
    attn = copy.deepcopy(attn)  # so that the weights are freed afterwards
    attn.load_state_dict({name: tensor.read().float() for name, tensor in base.items()}, strict=False, assign=True)
    if isinstance(attn, lora.CausalSelfAttention):
        attn.c_attn.merge()
        return attn.c_attn.weight
    if isinstance(attn, aligner.CausalSelfAttention):
        return output_bias(attn, [(attn.prefix[0].weight, attn.gating_factor)])
    bias = torch.zeros(attn.config.n_embd) if attn.c_proj.bias is None else attn.c_proj.bias
    return bias + attn.adapter_bias if isinstance(attn, bitfit.CausalSelfAttention) else bias


def main(args: Settings) -> None:
    args = replace(args, output_dir=args.output_dir or default_output(args.adapter))
    check_folder(args.output_dir, MERGED_MODEL, args.checkpoint_dir, args.adapter)
    adapter = read_adapter(args.adapter)
    model = load_adapter(adapter, args.checkpoint_dir)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    base = open_tensors([weights_path(args.checkpoint_dir)])
    Tokenizer(args.checkpoint_dir)  # raises an error if it does not fit
    tensors, config = merge(base, model, MERGED_TENSOR[adapter.method])
    card = {"adapter": f"{adapter.path}", "base": base_fingerprint(args.checkpoint_dir), **adapter.meta}
    with atomic_folder(args.output_dir, MERGED_MODEL) as folder:
        if args.format == "hf":
            tensors = to_hf(tensors, config, dtype)
            write_hf(folder, tensors, config, args.checkpoint_dir, args.max_shard_size)
        else:
            tensors = {name: replace(t, dtype=dtype or t.dtype) for name, t in tensors.items()}
            check_free(args.output_dir, sum(t.nbytes for t in tensors.values()))
            write_base(folder, config, tensors)
            copy_tokenizer(args.checkpoint_dir, folder)
        write_text(folder / CARD, json.dumps(card, indent=2, default=str) + "\n")
    if args.format == "hf" and config.qk_norm and config.proj_bias:
        log("note: vLLM's Qwen3 has no bias on the attention output and would ignore the adapter; serve this model "
            "with transformers, or the adapter with generate/serve.py.")  # fmt: skip
    log(f"The adapter's prompt style: {adapter.meta.get('prompt_style', 'not recorded in its file')}")
    print(args.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
