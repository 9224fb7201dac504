"""Configurations in Hugging Face's format, `config.json`, in both directions."""

from typing import Any

import torch

from lit_llama.hf_tokenizer import token_ids
from lit_llama.model import LLaMAConfig
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {  # what each supported kind of rope scaling needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def convert_config(hf: dict[str, Any]) -> LLaMAConfig:
    """Convert the content of a config.json. Missing fields have the defaults of transformers' LlamaConfig.

    A sliding window, as Mistral's, becomes the limit of the context: within it, attention is the usual one.

    Raises:
        UserError: The architecture or a feature is not supported, or a field is missing.
    """
    kind = _architecture(hf)
    _check_supported(hf, kind)
    rope_base, rope_scaling = convert_rope(hf)
    block_size = hf.get("max_position_embeddings", 2048)
    if kind == "mistral" or (kind == "qwen2" and hf.get("use_sliding_window")):
        block_size = min(block_size, hf.get("sliding_window", 4096) or block_size)
    biased = kind == "llama" and hf.get("attention_bias", False)
    return LLaMAConfig(
        block_size=block_size,
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_embd=hf["hidden_size"],
        n_kv_head=hf.get("num_key_value_heads"),
        head_size=hf.get("head_dim"),
        intermediate_size=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=biased or kind == "qwen2",
        proj_bias=biased,
        mlp_bias=kind == "llama" and hf.get("mlp_bias", False),
    )


def _architecture(hf: dict[str, Any]) -> str:
    """Return "llama", "mistral" or "qwen2"."""
    named = hf.get("architectures") or [hf.get("model_type")]
    kind = next((kind for name, kind in ARCHITECTURES.items() if name in named or kind in named), None)
    if kind is None:
        raise UserError(f"The architecture is {named[0]}; only {', '.join(ARCHITECTURES)} can be converted.")
    return kind


def _check_supported(hf: dict[str, Any], kind: str) -> None:
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if kind != "llama":
        sizes += ["num_key_value_heads", "max_position_embeddings"]
    if missing := [name for name in sizes if not isinstance(hf.get(name), int)]:
        raise UserError(f"config.json has no number for {', '.join(missing)}.")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"The activation is {hf['hidden_act']}; only silu, LLaMA's, can be converted.")
    if hf.get("quantization_config"):
        raise UserError("The weights are quantized; convert the unquantized checkpoint.")


def convert_rope(hf: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return the base and scaling of the rotary embedding.

    config.json has them in `rope_theta` and `rope_scaling`, or, since transformers 5, both in `rope_parameters`.

    Raises:
        UserError: The scaling is not supported or lacks a number.
    """
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
    rope.update(hf.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("Only a part of each head is rotated (partial_rotary_factor), which is not supported.")
    if kind not in ROPE_NUMBERS:
        raise UserError(f"Rope scaling {kind!r} is not supported; known are {', '.join(map(repr, ROPE_NUMBERS))}.")
    if missing := [name for name in ROPE_NUMBERS[kind] if not isinstance(rope.get(name), int | float)]:
        raise UserError(f"The rope scaling {kind!r} in config.json has no number for {', '.join(missing)}.")
    scaling = {"rope_type": kind, **{name: rope[name] for name in ROPE_NUMBERS[kind]}}
    return float(rope["rope_theta"]), None if kind == "default" else scaling


def hf_config(config: LLaMAConfig, dtype: torch.dtype, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a config.json, with the field names that every version of transformers reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": config.rope_scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": has_attention_bias(config),
        "mlp_bias": config.mlp_bias,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **token_ids(tokenizer),
    }


def has_attention_bias(config: LLaMAConfig) -> bool:
    """Return whether the model has biases in Hugging Face's layout: on all of q, k, v and o, or on none."""
    return config.qkv_bias or config.proj_bias
