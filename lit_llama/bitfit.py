"""BitFit (arXiv 2106.10199) on one projection: a bias on the attention's output, in every layer.

x ──► frozen attention ──► c_proj ──► + adapter_bias (C,), zero at the start

With one prefix token an Aligner adds c_proj.weight × (gate × V_p), a constant too, but one whose values all layers make
from the same C numbers and a gate per head: it is this method with tied weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

import lit_llama.model as llama
from lit_llama.utils import Fp32Parameters


@dataclass
class LLaMAConfig(llama.LLaMAConfig):
    """The base's fields; the method has none of its own."""


class LLaMA(llama.LLaMA):
    config_class = LLaMAConfig

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> llama.CausalSelfAttention:
        return CausalSelfAttention(config)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name.endswith(".attn.adapter_bias")

    @staticmethod
    def scaled_parameter(name: str, value: torch.Tensor, strength: float) -> torch.Tensor:
        """Scales the biases."""
        return value * strength

    @staticmethod
    def config_from_state(state_dict: dict[str, torch.Tensor]) -> dict[str, Any] | None:
        return {} if any(map(LLaMA.is_adapter_parameter, state_dict)) else None


class CausalSelfAttention(Fp32Parameters, llama.CausalSelfAttention):
    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        # what is added to the base's own bias, where it has one
        self.adapter_bias = nn.Parameter(torch.zeros(config.n_embd, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Adds nothing."""
        nn.init.zeros_(self.adapter_bias)

    def forward(
        self,
        x: torch.Tensor,
        rope: llama.RoPE,
        mask: torch.Tensor | None = None,
        kv: llama.LayerCache | None = None,
    ) -> torch.Tensor:
        y = super().forward(x, rope, mask, kv)  # (B, T, C)
        return y + self.adapter_bias.to(y.dtype)
