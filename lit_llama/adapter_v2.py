"""LLaMA-Adapter v2 (arXiv 2304.15010), as in Lit-LLaMA: version 1 with biases and scales on linear layers and norms.

    linear layer    x ──► W·x + b ──► + adapter_bias ──► × adapter_scale      the output layer included
    norm            x ──► x / rms(x) ──► × scale ──► × adapter_scale

The prefixes and gates are those of lit_llama/adapter.py. Biases start at 0 and scales at 1. Training the adapter_scale
of a norm with a frozen scale amounts to training the norm. An output layer tied to the embedding has neither.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lit_llama.model as llama
from lit_llama import adapter
from lit_llama.adapter import LLaMAConfig
from lit_llama.logps import chunk_size
from lit_llama.modules import Fp32Parameters


class Linear(Fp32Parameters, nn.Linear):
    """A linear layer with a bias and a scale, (out,) each, on its output."""

    of_base = ("weight", "bias")

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.adapter_bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float32))
        self.adapter_scale = nn.Parameter(torch.ones(layer.out_features, dtype=torch.float32))

    def reset_trained(self) -> None:
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

    def reset_trained(self) -> None:
        nn.init.ones_(self.adapter_scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.float() * self.adapter_scale
        return F.rms_norm(x.float(), scale.shape, scale, self.eps).to(x.dtype)


class LLaMA(adapter.LLaMA):
    """LLaMA with a LLaMA-Adapter v2."""

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
        version_1 = {name: t for name, t in state_dict.items() if not name.endswith(".adapter_scale")}
        return adapter.LLaMA.config_from_state(version_1) if len(version_1) < len(state_dict) else None

    def hidden_logps(self, x: Tensor, targets: Tensor) -> Tensor:
        if self.lm_head is None:
            return super().hidden_logps(x, targets)
        size = chunk_size(self.lm_head.weight)
        chunks = zip(x.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(self.chunk_logps, h, t, use_reentrant=False) for h, t in chunks])

    def chunk_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities of the targets (n,) for hidden (n, C), fp32."""
        logps = self.unembed(hidden).log_softmax(-1, dtype=torch.float32)
        return logps.gather(1, targets.unsqueeze(1)).squeeze(1)
