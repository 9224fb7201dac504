"""Merges an adapter of one prefix token into its base model, exactly.

With N = 1 the softmax over the prefix is 1, so what a layer adds is a constant: its attention output gains the bias
c_proj.weight @ concat_h(gate_h × v_h), where v is the layer's own value of the prefix. The result is a plain LLaMA with
that bias (`attention_bias` in Hugging Face's config.json) and needs no Aligner code at all.

BitFit's biases are merged in the same way, and LoRA's updates are added to the query and value weights, in the dtype
that is written.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch

from lit_llama import cli, lora
from lit_llama.checkpoint import (
    CONFIG_NAME,
    AdapterFile,
    base_fingerprint,
    check_base,
    read_adapter,
    weights_path,
    write_base,
)
from lit_llama.files import atomic_folder, check_folder, write_text
from lit_llama.hf import check_fit, parameters, to_hf, without_tied_head, write_hf
from lit_llama.hf_tokenizer import copy_tokenizer, fitting_tokenizer
from lit_llama.manifest import MERGED_MODEL
from lit_llama.merge import output_bias
from lit_llama.methods import METHODS
from lit_llama.model import CausalSelfAttention, LLaMAConfig
from lit_llama.tensor_files import LazyTensor, check_space, open_tensors
from lit_llama.utils import UserError, log


@dataclass
class Settings:
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    adapter: Path = Path("aligner_weights/microworld-pirate-n1")  # an Aligner of one prefix token, a LoRA or a BitFit
    output_dir: Path = Path("out/merged/microworld-pirate-n1")  # the folder to write
    format: Literal["hf", "lit"] = "hf"  # for transformers, vLLM and llama.cpp; or this project's own
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the written weights; auto: as the base is
    max_shard_size: str = "5GB"  # hf: larger weights are split into several files


CARD = "aligner.json"  # what was merged into what


def own_config(adapter: AdapterFile, checkpoint_dir: Path) -> LLaMAConfig:
    """The base's configuration, after everything about the adapter was checked against it.

    Raises:
        UserError: the adapter cannot be merged, or belongs to another base.
    """
    if adapter.method not in ("aligner", "lora", "bitfit"):
        raise UserError(
            f"{adapter.path} was made by the method {adapter.method!r}, which no plain LLaMA can imitate: only an "
            f"Aligner of one token, LoRA and BitFit can be merged; use this one with generate/aligner.py."
        )
    if (length := adapter.config.get("adapter_prompt_length", 1)) != 1:
        raise UserError(
            f"{adapter.path} has N = {length} prefix tokens: what they add depends on the query, so only N = 1 can be "
            "merged; use this one with generate/aligner.py."
        )
    config = LLaMAConfig.from_json(checkpoint_dir / CONFIG_NAME)
    check_base(adapter, checkpoint_dir, config)
    network_class = METHODS[adapter.method]
    with torch.device("meta"):
        network = network_class(network_class.config_class.from_json(checkpoint_dir / CONFIG_NAME, **adapter.config))
    network.load_state_dict(adapter.state, assign=True)
    return config


def merge(
    tensors: dict[str, LazyTensor], config: LLaMAConfig, adapter: AdapterFile
) -> tuple[dict[str, LazyTensor], LLaMAConfig]:
    """The base's tensors with what the adapter adds to each layer's attention, and their configuration."""
    tensors = without_tied_head(tensors, config, "transformer.wte.weight")
    check_fit(tensors, parameters(config), CONFIG_NAME)
    if adapter.method != "lora":
        config = replace(config, proj_bias=True)
    added = {"aligner": aligner_bias, "bitfit": bitfit_bias, "lora": updated_weight}[adapter.method]
    kind = "c_attn.weight" if adapter.method == "lora" else "c_proj.bias"
    merged = {}
    for name, shape in parameters(config).items():
        if name.endswith(f".attn.{kind}"):
            layer = name.removesuffix(kind)
            attn = {kind: t for kind in KINDS if (t := tensors.get(f"{layer}{kind}"))}
            own = {key.removeprefix(layer): t for key, t in adapter.state.items()}
            merged[name] = LazyTensor(
                shape, attn["c_proj.weight"].dtype, partial(added, attn, own, config, adapter.config)
            )
        else:
            merged[name] = tensors[name]
    return merged, config


KINDS = ("c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias")


def aligner_bias(
    attn: dict[str, LazyTensor], own: dict[str, torch.Tensor], config: LLaMAConfig, of_method: dict[str, Any]
) -> torch.Tensor:
    """Return the bias (C,) of one layer's attention output with an Aligner, in fp32.

    Args:
        attn: the layer's `KINDS`, biases only where the base has them.
        own: the adapter's tensors, those of the layer without its name: gating_factor (1, nh, 1, 1), which layers below
            the start layer lack, and global_value_embedding.weight (1, C).
        of_method: the adapter's own configuration.
    """
    if "gating_factor" not in own:
        return attn["c_proj.bias"].read().float() if "c_proj.bias" in attn else torch.zeros(config.n_embd)
    config = replace(config, proj_bias="c_proj.bias" in attn)
    with torch.device("meta"):
        layer = CausalSelfAttention(config)
    layer.load_state_dict({kind: tensor.read().float() for kind, tensor in attn.items()}, assign=True)
    return output_bias(layer, [(own["global_value_embedding.weight"].float(), own["gating_factor"].float())])


def bitfit_bias(
    attn: dict[str, LazyTensor], own: dict[str, torch.Tensor], config: LLaMAConfig, of_method: dict[str, Any]
) -> torch.Tensor:
    """Return the same for BitFit, from its adapter_bias (C,)."""
    bias = own["adapter_bias"].float()
    return attn["c_proj.bias"].read().float() + bias if "c_proj.bias" in attn else bias


def updated_weight(
    attn: dict[str, LazyTensor], own: dict[str, torch.Tensor], config: LLaMAConfig, of_method: dict[str, Any]
) -> torch.Tensor:
    """c_attn.weight with the update of c_attn.lora_A and c_attn.lora_B, in fp32."""
    widths = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    scaling = of_method["lora_alpha"] / of_method["lora_r"]
    return attn["c_attn.weight"].read().float() + lora.update(
        own["c_attn.lora_A"], own["c_attn.lora_B"], widths, scaling
    )


def main(args: Settings) -> None:
    check_folder(args.output_dir, MERGED_MODEL, args.checkpoint_dir, args.adapter)
    adapter = read_adapter(args.adapter)
    config = own_config(adapter, args.checkpoint_dir)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    base = open_tensors([weights_path(args.checkpoint_dir)])
    fitting_tokenizer(args.checkpoint_dir, config)
    tensors, config = merge(base, config, adapter)
    card = {"adapter": f"{adapter.path}", "base": base_fingerprint(args.checkpoint_dir), **adapter.meta}
    with atomic_folder(args.output_dir, MERGED_MODEL) as folder:
        if args.format == "hf":
            tensors = to_hf(tensors, config, dtype)
            write_hf(folder, tensors, config, args.checkpoint_dir, args.max_shard_size)
        else:
            tensors = {name: replace(t, dtype=dtype or t.dtype) for name, t in tensors.items()}
            check_space(args.output_dir, tensors)
            write_base(folder, config, tensors)
            copy_tokenizer(args.checkpoint_dir, folder)
        write_text(folder / CARD, json.dumps(card, indent=2, default=str) + "\n")
    log(f"prompts for it are written in the style: {adapter.meta.get('prompt_style', 'not in the file')}")
    print(args.output_dir)


if __name__ == "__main__":
    cli.run(main, Settings)
