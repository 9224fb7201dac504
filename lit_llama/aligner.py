"""Aligner: one set of prefix tokens, shared by every layer (arXiv 2312.05503, section 3).

    x ──► norm ──► c_attn ──► q, k, v ──► rotary ──► Attn(q, k, v) ──► + ──► c_proj ──► + x      layer l ≥ start
                      ▲          │                                     ▲
                      │          └──► softmax(q·K_pᵀ/√hs)·V_p × gate ──┘
                      │                             ▲
    prefix (N, C) ────┴────────────────────────► K_p, V_p, not rotated; no layer norm

The trained parameters are the prefix (`global_value_embedding`) and a gate per head and layer (`gating_factor`), which
starts at zero. For N = 1 the softmax is 1, so each layer adds the constant gate × V_p: see lit_llama/merge.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

import lit_llama.model as llama
from lit_llama.modules import Fp32Parameters
from lit_llama.utils import UserError
from lit_llama.variant import layers_of, mark_only_adapter_as_trainable, without_aliases  # noqa: F401


@dataclass
class LLaMAConfig(llama.LLaMAConfig):
    """The configuration of a base model with an Aligner.

    Args:
        adapter_prompt_length: number of prefix tokens N, 1 or more.
        adapter_start_layer: first layer that attends to the prefix, counted from 0.
    """

    adapter_prompt_length: int = 1
    adapter_start_layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_prompt_length < 1:
            raise UserError(f"adapter_prompt_length is {self.adapter_prompt_length}; it must be 1 or more.")
        start, last = self.adapter_start_layer, self.n_layer - 1
        if not 0 <= start <= last:
            raise UserError(f"adapter_start_layer is {start}; it must be from 0 to {last}.")


def gated_kv(keys: Tensor, values: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and gated values of the prefix tokens, repeated for each query head: (m, nh, N, hs) each.

    Args:
        keys, values: (m, ng, N, hs), not rotated, from the layer's `keys_values`.
        gate: (m, nh, 1, 1), fp32.
    """
    groups = gate.size(1) // keys.size(1)
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
    return keys, (gate * values).to(keys.dtype)  # the gate commutes with softmax(…)·V


def prefix_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return softmax(q·Kᵀ/√hs)·V, (B, nh, T, hs). For N = 1 the softmax is 1, and the result is `values` itself.

    Args:
        q: (B, nh, T, hs), rotated; its dtype is that of the result.
        keys, values: (B or 1, nh, N, hs), from `gated_kv`.
    """
    values = values.to(q.dtype)
    if keys.size(2) == 1:
        return values
    keys, values = (t.expand(len(q), -1, -1, -1) for t in (keys.to(q.dtype), values))
    return F.scaled_dot_product_attention(q, keys, values)


class Prefix(Fp32Parameters, nn.Embedding):
    """Prefix tokens (N, C), drawn from the standard normal distribution."""


class CausalSelfAttention(Fp32Parameters, llama.CausalSelfAttention):
    """Causal self-attention plus gated attention to the prefix."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.gating_factor = nn.Parameter(torch.zeros(1, config.n_head, 1, 1, dtype=torch.float32))
        self.prefix: list[Prefix] = []  # a list, so that only the model registers the parameter

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gating_factor)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        keys, values = self.cached or self.constants(q.dtype)
        return super().attend(q, k, v, mask) + prefix_attention(q.to(k.dtype), keys, values)

    def constants(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and gated values of the prefix, (1, nh, N, hs) each, in `dtype`."""
        keys, values = self.keys_values(self.prefix[0].weight.to(dtype).unsqueeze(0))
        return gated_kv(keys, values, self.gating_factor)


class LLaMA(llama.LLaMA):
    """LLaMA with an Aligner."""

    config_class = LLaMAConfig

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.global_value_embedding = Prefix(config.adapter_prompt_length, config.n_embd, dtype=torch.float32)
        for block in self.transformer.h[config.adapter_start_layer :]:
            block.attn.prefix = [self.global_value_embedding]

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> llama.CausalSelfAttention:
        return CausalSelfAttention(config) if layer >= config.adapter_start_layer else llama.CausalSelfAttention(config)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name == "global_value_embedding.weight" or name.endswith((".gating_factor", ".adapter_wte.weight"))

    @staticmethod
    def scaled_parameter(name: str, value: Tensor, strength: float) -> Tensor:
        return value * strength if name.endswith(".gating_factor") else value

    @staticmethod
    def config_from_state(state_dict: dict[str, Tensor]) -> dict[str, Any] | None:
        prefix, layers = state_dict.get("global_value_embedding.weight"), layers_of(state_dict, ".gating_factor")
        if prefix is None or not layers:
            return None
        return {"adapter_prompt_length": len(prefix), "adapter_start_layer": min(layers)}

    def normalize_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return without_aliases(super().normalize_state_dict(state_dict))
