"""Configurations in Hugging Face's format, `config.json`, in both directions."""

from typing import Any

import torch

from lit_llama.config import MOST_FLOAT, MOST_INT
from lit_llama.huggingface.tokenizer_files import token_ids
from lit_llama.model import LLaMAConfig
from lit_llama.storage.schema import REQUIRED, field, shown
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

SOURCE = "config.json"
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
        UserError: The architecture or a feature is not supported, or a field is missing, of another type or out of
            range.
    """
    kind = _architecture(hf)
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"The activation is {shown(hf['hidden_act'])}; only silu, LLaMA's, can be converted.")
    if hf.get("quantization_config"):
        raise UserError("The weights are quantized; convert the unquantized checkpoint.")

    def size(name: str, default: Any = REQUIRED) -> Any:
        return field(hf, name, int, SOURCE, default, least=1, most=MOST_INT)

    def flag(name: str) -> bool:
        return field(hf, name, bool, SOURCE, False)

    rope_base, rope_scaling = convert_rope(hf)
    block_size = size("max_position_embeddings", 2048 if kind == "llama" else REQUIRED)
    if kind == "mistral" or (kind == "qwen2" and flag("use_sliding_window")):
        block_size = min(block_size, size("sliding_window", 4096 if "sliding_window" not in hf else block_size))
    biased = kind == "llama" and flag("attention_bias")
    return LLaMAConfig(
        block_size=block_size,
        vocab_size=size("vocab_size"),
        padded_vocab_size=size("vocab_size"),
        n_layer=size("num_hidden_layers"),
        n_head=size("num_attention_heads"),
        n_embd=size("hidden_size"),
        n_kv_head=size("num_key_value_heads", None if kind == "llama" else REQUIRED),
        head_size=size("head_dim", None),
        intermediate_size=size("intermediate_size"),
        norm_eps=field(hf, "rms_norm_eps", float, SOURCE, 1e-6, least=0, most=1),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=flag("tie_word_embeddings"),
        qkv_bias=biased or kind == "qwen2",
        proj_bias=biased,
        mlp_bias=kind == "llama" and flag("mlp_bias"),
    )


def _architecture(hf: dict[str, Any]) -> str:
    """Return "llama", "mistral" or "qwen2"."""
    named = field(hf, "architectures", list, SOURCE, None) or [hf.get("model_type")]
    kind = next((kind for name, kind in ARCHITECTURES.items() if name in named or kind in named), None)
    if kind is None:
        raise UserError(f"The architecture is {shown(named[0])}; only {', '.join(ARCHITECTURES)} can be converted.")
    return kind


def convert_rope(hf: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return the base and scaling of the rotary embedding.

    config.json has them in `rope_theta` and `rope_scaling`, or, since transformers 5, both in `rope_parameters`.

    Raises:
        UserError: The scaling is not supported, or a number is missing or out of range.
    """
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **field(hf, "rope_scaling", dict, SOURCE, {})}
    rope.update(field(hf, "rope_parameters", dict, SOURCE, {}))
    kind = field(rope, "rope_type", str, SOURCE, None) or field(rope, "type", str, SOURCE, None) or "default"
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("Only a part of each head is rotated (partial_rotary_factor), which is not supported.")
    if kind not in ROPE_NUMBERS:
        raise UserError(f"Rope scaling {kind!r} is not supported; known are {', '.join(map(repr, ROPE_NUMBERS))}.")
    label = f"{SOURCE}: rope scaling {kind!r}"
    scaling = {"rope_type": kind, **{name: field(rope, name, float, label) for name in ROPE_NUMBERS[kind]}}
    base = field(rope, "rope_theta", float, SOURCE, least=1, most=MOST_FLOAT)
    return float(base), None if kind == "default" else scaling


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
