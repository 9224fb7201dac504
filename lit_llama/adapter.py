"""LLaMA-Adapter v1 (arXiv 2303.16199): each layer from the start layer on has its own prefix.

The attention is the Aligner's (see the diagram in lit_llama/aligner.py), with `attn.adapter_wte` in place of the prefix
shared by all layers. As in Lit-LLaMA the gate is used as it is; the authors' code applies tanh to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lit_llama.model as llama
from lit_llama import aligner
from lit_llama.variant import layers_of


@dataclass
class LLaMAConfig(aligner.LLaMAConfig):
    """The configuration of a base model with a LLaMA-Adapter.

    Args:
        adapter_prompt_length: number of prefix tokens of each layer, 1 or more.
        adapter_start_layer: first layer that has a prefix, counted from 0.
    """

    adapter_prompt_length: int = 10


class LLaMA(llama.LLaMA):
    """LLaMA with a LLaMA-Adapter."""

    config_class = LLaMAConfig
    scaled_parameter = staticmethod(aligner.LLaMA.scaled_parameter)  # scales the gates

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> llama.CausalSelfAttention:
        adapted = layer >= config.adapter_start_layer
        return CausalSelfAttention(config) if adapted else llama.CausalSelfAttention(config)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name.endswith((".gating_factor", ".adapter_wte.weight"))

    @staticmethod
    def config_from_state(state_dict: dict[str, Tensor]) -> dict[str, Any] | None:
        layers = layers_of(state_dict, ".adapter_wte.weight")
        # the authors' Aligner files repeat the prefix under these names, and version 2 has scales as well
        others = ("global_value_embedding.weight", ".adapter_scale")
        if not layers or any(name.endswith(others) for name in state_dict):
            return None
        prefix = state_dict[f"transformer.h.{min(layers)}.attn.adapter_wte.weight"]
        return {"adapter_prompt_length": len(prefix), "adapter_start_layer": min(layers)}


class CausalSelfAttention(aligner.CausalSelfAttention):
    """Attention to the text plus gated attention to the layer's own prefix."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.adapter_wte = aligner.Prefix(config.adapter_prompt_length, config.n_embd, dtype=torch.float32)
        self.prefix = [self.adapter_wte]
