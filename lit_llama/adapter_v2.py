"""LLaMA-Adapter v2 (arXiv 2304.15010), as in Lit-LLaMA: version 1 with biases and scales on linear layers and norms.

    linear layer    x ──► W·x + b ──► + adapter_bias ──► × adapter_scale      the output layer included
    norm            x ──► x / rms(x) ──► × scale ──► × adapter_scale

The prefixes and gates are those of lit_llama/adapter.py. Biases start at 0 and scales at 1. Training the adapter_scale
of a norm with a frozen scale amounts to training the norm. An output layer tied to the embedding has neither.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lit_llama.model as llama
from lit_llama import adapter, aligner
from lit_llama.logps import chunk_size
from lit_llama.modules import Fp32Parameters
from lit_llama.variant import layers_of


@dataclass
class LLaMAConfig(adapter.LLaMAConfig):
    """The configuration of a base model with a LLaMA-Adapter v2; the fields are those of version 1."""


class Linear(Fp32Parameters, nn.Linear):
    """A linear layer with a bias and a scale, (out,) each, on its output."""

    of_base = ("weight", "bias")

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.adapter_bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float32))
        self.adapter_scale = nn.Parameter(torch.ones(layer.out_features, dtype=torch.float32))

    def reset_adapter(self) -> None:
        nn.init.zeros_(self.adapter_bias)
        nn.init.ones_(self.adapter_scale)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))


class RMSNorm(Fp32Parameters, llama.RMSNorm):
    """A norm with a second scale (C,)."""

    of_base = ("scale",)

    def __init__(self, norm: llama.RMSNorm) -> None:
        super().__init__(len(norm.scale), norm.eps)
        self.adapter_scale = nn.Parameter(torch.ones(len(norm.scale), dtype=torch.float32))

    def reset_adapter(self) -> None:
        nn.init.ones_(self.adapter_scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.float() * self.adapter_scale
        return F.rms_norm(x.float(), scale.shape, scale, self.eps).to(x.dtype)


class LLaMA(adapter.LLaMA):
    """LLaMA with a LLaMA-Adapter v2."""

    config_class = LLaMAConfig

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        adapted = {nn.Linear: Linear, llama.RMSNorm: RMSNorm}
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if type(child) in adapted:
                    setattr(parent, name, adapted[type(child)](child))

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return adapter.LLaMA.is_adapter_parameter(name) or name.endswith((".adapter_bias", ".adapter_scale"))

    @staticmethod
    def scaled_parameter(name: str, value: Tensor, strength: float) -> Tensor:
        if name.endswith(".adapter_scale"):
            return value if strength == 1 else 1 + strength * (value - 1)
        return value * strength if name.endswith((".gating_factor", ".adapter_bias")) else value

    @staticmethod
    def config_from_state(state_dict: dict[str, Tensor]) -> dict[str, Any] | None:
        layers = layers_of(state_dict, ".adapter_wte.weight")
        if not layers or not any(name.endswith(".adapter_scale") for name in state_dict):
            return None
        prefix = state_dict[f"transformer.h.{min(layers)}.attn.adapter_wte.weight"]
        return {"adapter_prompt_length": len(prefix), "adapter_start_layer": min(layers)}

    def reset_adapter(self) -> None:
        for module in self.modules():
            if isinstance(module, Linear | RMSNorm):
                module.reset_adapter()
            elif isinstance(module, aligner.Prefix | aligner.CausalSelfAttention):
                module.reset_parameters()

    def label_logps(
        self, idx: Tensor, labels: Tensor, label_index: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        if self.lm_head is None:
            return super().label_logps(idx, labels, label_index, segments)
        hidden, targets = self.predicting(idx, labels, label_index, segments)
        size = chunk_size(self.lm_head.weight)
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(self.chunk_logps, h, t, use_reentrant=False) for h, t in chunks])

    def chunk_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities of the targets (n,) for hidden (n, C), fp32."""
        logps = self.unembed(hidden).log_softmax(-1, dtype=torch.float32)
        return logps.gather(1, targets.unsqueeze(1)).squeeze(1)
