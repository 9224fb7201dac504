"""LLaMA-Adapter v1 (arXiv 2303.16199): a prefix of its own for every layer from the start layer on.

Its attention is the Aligner's (see the picture in lit_llama/aligner.py) with `attn.adapter_wte` in place of the one
prefix of all layers. As in Lit-LLaMA the gate is a raw number per head; the authors' own code takes its tanh.
"""

from dataclasses import dataclass
from typing import Any

import torch

import lit_llama.model as llama
from lit_llama import aligner
from lit_llama.variant import layers_of


@dataclass
class LLaMAConfig(aligner.LLaMAConfig):
    """The base's fields and the method's two.

    Args:
        adapter_prompt_length: prefix tokens of each layer, 1 or more.
        adapter_start_layer: the first layer that has a prefix, counted from 0.
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
    def config_from_state(state_dict: dict[str, torch.Tensor]) -> dict[str, Any] | None:
        """Length and start layer; an Aligner's file may repeat its prefix under the same names."""
        layers = layers_of(state_dict, ".adapter_wte.weight")
        if not layers or "global_value_embedding.weight" in state_dict:
            return None
        prefix = state_dict[f"transformer.h.{min(layers)}.attn.adapter_wte.weight"]
        return {"adapter_prompt_length": len(prefix), "adapter_start_layer": min(layers)}


class CausalSelfAttention(aligner.CausalSelfAttention):
    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.adapter_wte = aligner.Prefix(config.adapter_prompt_length, config.n_embd, dtype=torch.float32)
        self.prefix = [self.adapter_wte]
