"""Tiny random models, and a malicious pickle.

Every parameter is random: a norm scale of 1 or a gate of 0 would hide errors.
"""

from typing import Any

import torch

from lit_llama import aligner, model

SIZES: dict[str, Any] = dict(
    block_size=64, vocab_size=50, padded_vocab_size=50, n_layer=3, n_head=4, n_embd=32, intermediate_size=40
)
# the architectures of real checkpoints
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": dict(n_kv_head=2),
    "one kv head": dict(n_kv_head=1),
    "tied": dict(n_kv_head=2, tie_embeddings=True),
    "biases": dict(n_kv_head=2, qkv_bias=True, proj_bias=True, mlp_bias=True),
    "narrow heads": dict(n_kv_head=2, head_size=6, norm_eps=1e-6),
    "llama3 rope": dict(
        rope_base=1000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "qk norm": dict(n_kv_head=2, head_size=12, qk_norm=True, tie_embeddings=True),  # Qwen3
    "qk norm, biases": dict(n_kv_head=2, qk_norm=True, qkv_bias=True, proj_bias=True),
    "nope": dict(n_kv_head=2, nope_layers=[0, 2]),  # SmolLM3
    "linear rope": dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
}


def randomize(network: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("scale"):
            noise = 1 + 0.3 * noise
        elif parameter.dim() == 2 and "embedding" not in name:
            noise = 1.5 * noise / parameter.size(1) ** 0.5
        parameter.data.copy_(noise)


def base(seed: int = 0, **overrides: Any) -> model.LLaMA:
    network = model.LLaMA(model.LLaMAConfig(**{**SIZES, **overrides}))
    randomize(network, seed)
    return network


def aligned(length: int = 3, start: int = 1, seed: int = 0, **overrides: Any) -> aligner.LLaMA:
    """Return an Aligner with nonzero gates and a frozen base."""
    config = aligner.LLaMAConfig(**{**SIZES, **overrides}, adapter_prompt_length=length, adapter_start_layer=start)
    network = aligner.LLaMA(config)
    randomize(network, seed)
    aligner.mark_only_adapter_as_trainable(network)
    return network


def prefix_layers(network: model.LLaMA) -> list[aligner.CausalSelfAttention]:
    """Return the attention modules with a prefix."""
    return [block.attn for block in network.transformer.h if isinstance(block.attn, aligner.CausalSelfAttention)]


def adapter_state(network: model.LLaMA) -> dict[str, torch.Tensor]:
    """Return the adapter's part of the state dict."""
    return {name: t for name, t in network.state_dict().items() if network.is_adapter_parameter(name)}


def token_ids(rows: int, length: int, seed: int = 0, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def prompts(*lengths: int, seed: int = 0, vocab_size: int = 50) -> list[list[int]]:
    return [token_ids(1, n, seed + i, vocab_size)[0].tolist() for i, n in enumerate(lengths)]


class RunsCode:
    """An object whose pickle ends the program when it is loaded."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the code ran')",)
