"""BitFit (arXiv 2106.10199) on one projection: a bias on the attention output, in every layer.

x ──► frozen attention ──► c_proj ──► + adapter_bias (C,), zero at the start

An Aligner of one token also adds a constant to each layer, c_proj.weight × (gate × V_p). All its constants derive from
the same C numbers and a gate per head, so it is this method with tied weights.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import lit_llama.model as llama
from lit_llama.kv_cache import LayerCache
from lit_llama.model import LLaMAConfig
from lit_llama.modules import Fp32Parameters


class LLaMA(llama.LLaMA):
    """LLaMA with trained biases."""

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> llama.CausalSelfAttention:
        return CausalSelfAttention(config)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name.endswith(".attn.adapter_bias")

    @staticmethod
    def scaled_parameter(name: str, value: Tensor, strength: float) -> Tensor:
        return value * strength

    @staticmethod
    def config_from_state(state_dict: dict[str, Tensor]) -> dict[str, Any] | None:
        return {} if any(map(LLaMA.is_adapter_parameter, state_dict)) else None


class CausalSelfAttention(Fp32Parameters, llama.CausalSelfAttention):
    """Attention with a trained bias on its output, in addition to the base's bias if there is one."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.adapter_bias = nn.Parameter(torch.zeros(config.n_embd, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.adapter_bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None = None, kv: LayerCache | None = None
    ) -> Tensor:
        y = super().forward(x, rope, mask, kv)  # (B, T, C)
        return y + self.adapter_bias.to(y.dtype)
