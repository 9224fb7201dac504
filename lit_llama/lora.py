"""LoRA (arXiv 2106.09685) on the query and the value projection, in every layer.

x ──► c_attn ────────────────────────────────► q, k, v ──► + ──► attention
  └─► dropout ─► lora_A (2r, C) ─► lora_B ─► × α / r ──────┘     nothing is added to k

The first r rows of lora_A are for the query, the last r for the value; the rows of lora_B (nh·hs + ng·hs, r) likewise.
lora_B is initialized to zero. Names and shapes are those of Lit-LLaMA.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

import lit_llama.model as llama
from lit_llama.modules import Fp32Parameters
from lit_llama.utils import UserError


@dataclass
class LLaMAConfig(llama.LLaMAConfig):
    """The configuration of a base model with LoRA.

    Args:
        lora_r: rank r of each update, 1 or more.
        lora_alpha: α; the update is multiplied by α / r.
        lora_dropout: probability of zeroing an input of the update in training, from 0 to below 1.
    """

    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_r < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"lora_r is {self.lora_r}, lora_alpha {self.lora_alpha} and lora_dropout {self.lora_dropout}; they "
                "must be 1 or more, above 0, and 0 or more and below 1."
            )


class LLaMA(llama.LLaMA):
    """LLaMA with LoRA."""

    config_class = LLaMAConfig

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> llama.CausalSelfAttention:
        return CausalSelfAttention(config)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name.endswith((".lora_A", ".lora_B"))

    @staticmethod
    def scaled_parameter(name: str, value: Tensor, strength: float) -> Tensor:
        return value * strength if name.endswith(".lora_B") else value

    @staticmethod
    def config_from_state(state_dict: dict[str, Tensor]) -> dict[str, Any] | None:
        if any(map(LLaMA.is_adapter_parameter, state_dict)):
            raise UserError("These are LoRA's tensors without a header, which is needed for lora_alpha.")
        return None

    def merge(self) -> None:
        """Add the updates to the frozen weights, in the dtype of the weights."""
        for block in self.transformer.h:
            block.attn.c_attn.merge()

    def unmerge(self) -> None:
        """Restore the frozen weights, bit for bit."""
        for block in self.transformer.h:
            block.attn.c_attn.unmerge()


class CausalSelfAttention(llama.CausalSelfAttention):
    """Attention whose c_attn is a `LoRALinear`."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.c_attn = LoRALinear(config, self.widths)


class LoRALinear(Fp32Parameters, nn.Linear):
    """c_attn with low-rank updates of its query and value rows.

    Args:
        widths: numbers of rows for queries, keys and values.
    """

    of_base = ("weight", "bias")

    def __init__(self, config: LLaMAConfig, widths: list[int]) -> None:
        super().__init__(config.n_embd, sum(widths), bias=config.qkv_bias)
        self.widths = widths
        self.scaling, self.dropout = config.lora_alpha / config.lora_r, config.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(2 * config.lora_r, config.n_embd, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(widths[0] + widths[2], config.lora_r, dtype=torch.float32))
        self.frozen_weight: Tensor | None = None  # while merged: the weight without the update
        self.reset_trained()

    def reset_trained(self) -> None:
        """Draw A like the weight of a linear layer and set B to zero, so that the update is zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Return the queries, keys and values of x (B, T, C), (B, T, sum of widths)."""
        y = super().forward(x)
        if self.frozen_weight is not None:
            return y
        query, value = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype)).chunk(2, dim=-1)
        of_query, of_value = self.lora_B.to(x.dtype).split([self.widths[0], self.widths[2]])
        query, value = F.linear(query, of_query), F.linear(value, of_value)
        q, k, v = y.split(self.widths, dim=-1)
        return torch.cat((q + self.scaling * query, k, v + self.scaling * value), dim=-1)

    @torch.no_grad()
    def merge(self) -> None:
        if self.frozen_weight is None:
            self.frozen_weight = self.weight.detach().clone()
            self.weight += update(self.lora_A, self.lora_B, self.widths, self.scaling).to(self.weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.frozen_weight is not None:
            self.weight.copy_(self.frozen_weight)
            self.frozen_weight = None


def update(lora_A: Tensor, lora_B: Tensor, widths: list[int], scaling: float) -> Tensor:
    """Return α / r × B·A as rows of c_attn, (sum of widths, C) fp32; those of the keys are zero."""
    of_query, of_value = lora_B.float().split([widths[0], widths[2]])
    query, value = lora_A.float().chunk(2)
    return scaling * torch.cat((of_query @ query, lora_A.new_zeros(widths[1], lora_A.size(1)), of_value @ value))
