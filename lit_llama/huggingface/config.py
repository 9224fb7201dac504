"""Configurations in Hugging Face's format, `config.json`, in both directions."""

from typing import Any

import torch

from lit_llama.config import MOST, MOST_FLOAT, MOST_INT
from lit_llama.huggingface.tokenizer_files import token_ids
from lit_llama.model import LLaMAConfig
from lit_llama.storage.schema import REQUIRED, field, shown
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log

SOURCE = "config.json"
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
                 "Qwen3ForCausalLM": "qwen3", "SmolLM3ForCausalLM": "smollm3"}  # fmt: skip
# defaults of fields that a config.json lacks, where the architectures differ
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128, "sliding_window": 4096},
    "smollm3": {"rope_theta": 2000000.0, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
}
BIASED = ("llama", "qwen3", "smollm3")  # attention_bias is for all of q, k, v and o
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {  # what each supported kind of rope scaling needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def convert_config(hf: dict[str, Any]) -> LLaMAConfig:
    """Convert the content of a config.json.

    The sizes must be there, except `head_dim`, and `num_key_value_heads` and `max_position_embeddings` of the
    architecture llama; all other fields may be missing and have the defaults of transformers. As in transformers, null
    as `num_key_value_heads` means as many as `num_attention_heads`.

    The context is `max_position_embeddings`, or `max_sequence_length` if that is larger (Vicuna v1.5 16k, whose RoPE is
    scaled). A sliding window, such as Mistral's, becomes its limit: within it, attention is the usual one.

    Raises:
        UserError: The architecture or a feature is not supported, or a field is missing, of the wrong type or out of
            range.
    """
    kind = _architecture(hf)
    hf = {**DEFAULTS.get(kind, {}), **hf}
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"The activation is {shown(hf['hidden_act'])}; only silu, LLaMA's, can be converted.")
    if hf.get("quantization_config"):
        raise UserError("The weights are quantized; convert the unquantized checkpoint.")

    def size(name: str, default: Any = REQUIRED) -> Any:
        return field(hf, name, int, SOURCE, default, least=1, most=MOST_INT)

    def flag(name: str) -> bool:
        return field(hf, name, bool, SOURCE, False)

    rope_base, rope_scaling = convert_rope(hf)
    block_size = max(size("max_position_embeddings"), size("max_sequence_length", 1))
    if block_size > (most := MOST["block_size"]):
        log(f"note: the context is limited to {most:,} tokens; {SOURCE} allows {block_size:,}")
        block_size = most
    if kind == "mistral" or (kind != "llama" and flag("use_sliding_window")):
        block_size = min(block_size, size("sliding_window", block_size))
    biased = kind in BIASED and flag("attention_bias")
    return LLaMAConfig(
        block_size=block_size,
        vocab_size=size("vocab_size"),
        padded_vocab_size=size("vocab_size"),
        n_layer=size("num_hidden_layers"),
        n_head=size("num_attention_heads"),
        n_embd=size("hidden_size"),
        n_kv_head=size("num_key_value_heads", None if kind == "llama" or "num_key_value_heads" in hf else REQUIRED),
        head_size=size("head_dim", None),
        intermediate_size=size("intermediate_size"),
        norm_eps=field(hf, "rms_norm_eps", float, SOURCE, 1e-6, least=0, most=1),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=flag("tie_word_embeddings"),
        qkv_bias=biased or kind == "qwen2",
        proj_bias=biased,
        mlp_bias=kind in ("llama", "smollm3") and flag("mlp_bias"),
        qk_norm=kind == "qwen3",
        nope_layers=convert_nope_layers(hf) if kind == "smollm3" else None,
    )


def _architecture(hf: dict[str, Any]) -> str:
    """Return a value of `ARCHITECTURES`."""
    named = field(hf, "architectures", list, SOURCE, None) or [hf.get("model_type")]
    kind = next((kind for name, kind in ARCHITECTURES.items() if name in named or kind in named), None)
    if kind is None:
        raise UserError(f"The architecture is {shown(named[0])}; only {', '.join(ARCHITECTURES)} can be converted.")
    return kind


def convert_nope_layers(hf: dict[str, Any]) -> list[int]:
    """Return the layers without rotary positions: those that `no_rope_layers` lists as 0, or every nth.

    Raises:
        UserError: A field is missing, of the wrong type or out of range.
    """
    n_layer = field(hf, "num_hidden_layers", int, SOURCE, least=1, most=MOST["n_layer"])
    rotated = field(hf, "no_rope_layers", list, SOURCE, None)
    if rotated is None:
        interval = field(hf, "no_rope_layer_interval", int, SOURCE, least=1, most=MOST_INT)
        return list(range(interval - 1, n_layer, interval))
    if len(rotated) < n_layer or any(value not in (0, 1) for value in rotated):
        raise UserError(f"{SOURCE}: no_rope_layers must list 1 (with RoPE) or 0 for each of the {n_layer} layers.")
    return [layer for layer in range(n_layer) if not rotated[layer]]


def convert_rope(hf: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return the base and scaling of the rotary embedding.

    config.json has them in `rope_theta` and `rope_scaling`, or, since transformers 5, both in `rope_parameters`. A
    scaling in `rope_scaling` takes precedence, as in transformers; the base is that of `rope_parameters`.

    Raises:
        UserError: The scaling is not supported, or a number is missing or out of range.
    """
    parameters = field(hf, "rope_parameters", dict, SOURCE, {})
    rope = {
        "rope_theta": parameters.get("rope_theta", hf.get("rope_theta", 10000.0)),
        "partial_rotary_factor": hf.get("partial_rotary_factor"),
        **(field(hf, "rope_scaling", dict, SOURCE, {}) or parameters),
    }
    kind = field(rope, "rope_type", str, SOURCE, None) or field(rope, "type", str, SOURCE, None) or "default"
    if field(rope, "partial_rotary_factor", float, SOURCE, 1.0) != 1.0:
        raise UserError("Only a part of each head is rotated (partial_rotary_factor), which is not supported.")
    if kind not in ROPE_NUMBERS:
        raise UserError(f"Rope scaling {kind!r} is not supported, only {', '.join(map(repr, ROPE_NUMBERS))}.")
    label = f"{SOURCE}: rope scaling {kind!r}"
    scaling = {"rope_type": kind, **{name: field(rope, name, float, label) for name in ROPE_NUMBERS[kind]}}
    base = field(rope, "rope_theta", float, SOURCE, least=1, most=MOST_FLOAT)
    return float(base), None if kind == "default" else scaling


def hf_config(config: LLaMAConfig, dtype: torch.dtype, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a config.json, with the field names that every version of transformers reads.

    Raises:
        UserError: No architecture of transformers has all of this model's features.
    """
    biases = {"attention_bias": has_attention_bias(config), "mlp_bias": config.mlp_bias}
    return {
        **_hf_architecture(config),
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
        **({} if is_qwen2(config) else biases),
        "torch_dtype": str(dtype).removeprefix("torch."),
        **token_ids(tokenizer),
    }


def _hf_architecture(config: LLaMAConfig) -> dict[str, Any]:
    """Return the architecture, and the fields that only it has."""
    if config.qk_norm and (config.nope_layers or config.mlp_bias):
        raise UserError("No architecture of transformers has both norms of queries and keys (qk_norm) and MLP biases "
                        "or layers without RoPE (nope_layers).")  # fmt: skip
    if config.qk_norm:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
    if is_qwen2(config):
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    if config.nope_layers:
        rotated = [int(rotary) for rotary in config.rotary_layers]
        about = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": rotated}
        return {**about, "use_sliding_window": False, "pad_token_id": None}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def is_qwen2(config: LLaMAConfig) -> bool:
    """Return whether a model is written as a Qwen2, which always has biases on q, k and v, and no others."""
    others = config.proj_bias or config.mlp_bias or config.qk_norm or config.nope_layers
    return config.qkv_bias and not others


def has_attention_bias(config: LLaMAConfig) -> bool:
    """Return whether the model has biases on all of q, k, v and o in Hugging Face's layout."""
    return (config.qkv_bias or config.proj_bias) and not is_qwen2(config)
