"""Aligner: one set of prefix tokens, shared by every layer (arXiv 2312.05503, section 3).

                 frozen layer l ≥ start                                 learnable
    x ──► norm ──► c_attn ──► q, k, v ──► rotary ──► Attn(q, k, v)      global_value_embedding (P, C)
                     │          │                         │                │  one for all layers
                     │          └──► softmax(q·K_pᵀ/√hs)·V_p ◄── K_p, V_p ◄┘  (this layer's c_attn, no rotary)
                     │                       │
                     │              × gating_factor (1, nh, 1, 1), zero at the start
                     │                       │
                     └──────────────► sum ◄──┘ ──► c_proj ──► + x

For one token the softmax is 1 and the added term is a constant of the layer: gate × V_p.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.nn import functional as F

import lit_llama.model as llama
from lit_llama.utils import Fp32Parameters, UserError


@dataclass
class LLaMAConfig(llama.LLaMAConfig):
    """The base's fields and the Aligner's two.

    Args:
        adapter_prompt_length: prefix tokens N, 1 or more.
        adapter_start_layer: the first layer that attends to them, counted from 0.
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


class Prefix(Fp32Parameters, nn.Embedding):
    """The global prefix, (P, C), drawn from N(0, 1)."""


class GatedLLaMA(llama.LLaMA):
    """What Aligner and LLaMA-Adapter (lit_llama/adapter.py) share: gated attention to prefixes, wherever they are."""

    @staticmethod
    def scaled_parameter(name: str, value: torch.Tensor, strength: float) -> torch.Tensor:
        """Scales the gates."""
        return value * strength if name.endswith(".gating_factor") else value

    def aligned_attention(self) -> "list[CausalSelfAttention]":
        attention = [block.attn for block in self.transformer.h if isinstance(block.attn, CausalSelfAttention)]
        return attention + [other for attn in attention for other in attn.others]

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside, what does not depend on the text is computed once. Never active in training.

        That is each layer's prefix keys and values; with one token it is the whole term, which then is a bias of the
        output projection and costs nothing.
        """
        attention = [block.attn for block in self.transformer.h if isinstance(block.attn, CausalSelfAttention)]
        biases = [attn.c_proj.bias for attn in attention]
        try:
            with torch.no_grad():
                for attn in attention:
                    attn.keep_constants(self.transformer.wte.weight.dtype)
            yield
        finally:
            for attn, bias in zip(attention, biases, strict=True):
                attn.c_proj.bias, attn.term_is_bias = bias, False
                for adapted in (attn, *attn.others):
                    adapted.constant_kv = None


class LLaMA(GatedLLaMA):
    config_class = LLaMAConfig

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.global_value_embedding = Prefix(config.adapter_prompt_length, config.n_embd, dtype=torch.float32)
        for attn in self.aligned_attention():
            attn.prefix = [self.global_value_embedding]  # in a list: the model owns it, the layers only read it

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> llama.CausalSelfAttention:
        aligned = layer >= config.adapter_start_layer
        return CausalSelfAttention(config) if aligned else llama.CausalSelfAttention(config)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name == "global_value_embedding.weight" or name.endswith((".gating_factor", ".adapter_wte.weight"))

    @staticmethod
    def config_from_state(state_dict: dict[str, torch.Tensor]) -> dict[str, Any] | None:
        """Length and start layer."""
        prefix, layers = state_dict.get("global_value_embedding.weight"), layers_of(state_dict, ".gating_factor")
        if prefix is None or not layers:
            return None
        return {"adapter_prompt_length": len(prefix), "adapter_start_layer": min(layers)}

    def normalize_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `without_aliases`."""
        return without_aliases(super().normalize_state_dict(state_dict))


class CausalSelfAttention(Fp32Parameters, llama.CausalSelfAttention):
    """Attention that adds what its queries read from the global prefix."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.gating_factor = nn.Parameter(torch.zeros(1, config.n_head, 1, 1, dtype=torch.float32))
        self.prefix: list[Prefix] = []
        self.constant_kv: tuple[torch.Tensor, torch.Tensor] | None = None
        self.term_is_bias = False  # inside `inference`: c_proj adds it
        self.others = nn.ModuleList()  # attention of this layer with other adapters, see lit_llama/compose.py

    def reset_parameters(self) -> None:
        """Closes the gates."""
        nn.init.zeros_(self.gating_factor)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = super().attend(q, k, v, mask)
        for adapted in () if self.term_is_bias else (self, *self.others):
            y = y + adapted.adapter_term(q).to(y.dtype)
        return y

    def adapter_term(self, q: torch.Tensor) -> torch.Tensor:
        """gating_factor × softmax(q·K_pᵀ/√hs)·V_p for q (B, nh, T, hs): (B, nh, T, hs), or (1, nh, 1, hs) for P = 1."""
        groups = self.config.n_head // self.config.n_kv_head
        keys_values = self.constant_kv or self.prefix_kv(q.dtype)  # (1, ng, P, hs) each
        keys, values = (t.repeat_interleave(groups, dim=1) for t in keys_values)
        values = self.gating_factor * values  # here it meets P rows, behind the softmax it would meet B·T
        if values.size(2) == 1:
            return values
        keys, values = (t.expand(len(q), -1, -1, -1) for t in (keys, values.to(q.dtype)))
        return F.scaled_dot_product_attention(q, keys, values)

    def keep_constants(self, dtype: torch.dtype) -> None:
        """What `inference` says, for a base in `dtype`."""
        terms = []
        for adapted in (self, *self.others):
            adapted.constant_kv = adapted.prefix_kv(dtype)
            values = adapted.constant_kv[1]
            if values.size(2) == 1:  # then every query reads the same
                terms.append(adapted.adapter_term(values))
        if len(terms) == 1 + len(self.others):
            term = sum(terms).to(dtype)  # (1, nh, 1, hs)
            self.c_proj.bias = nn.Parameter(self.c_proj(term.flatten(1)).squeeze(0), requires_grad=False)
            self.term_is_bias = True

    def prefix_kv(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's own k and v of the raw prefix, no norm and no rotary: (1, ng, P, hs) each, in `dtype`."""
        _, keys, values = self.qkv(self.prefix[0].weight.to(dtype).unsqueeze(0))
        return keys, values


def without_aliases(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' files hold the prefix once more under every layer's name (`attn.adapter_wte.weight`).

    Raises:
        UserError: such an alias differs from the prefix; that is a LLaMA-Adapter file.
    """
    prefix = state_dict.get("global_value_embedding.weight")
    aliases = {name for name in state_dict if name.endswith(".attn.adapter_wte.weight")}
    for name in sorted(aliases):
        if prefix is None or not torch.equal(state_dict[name], prefix):
            raise UserError(f"{name} is not the global prefix: these are a LLaMA-Adapter's weights, no Aligner's.")
    return {name: tensor for name, tensor in state_dict.items() if name not in aliases}


def layers_of(state_dict: dict[str, torch.Tensor], ending: str) -> list[int]:
    """The layers that have a tensor of a name with this ending."""
    return [int(name.split(".")[2]) for name in state_dict if name.endswith(ending)]


def mark_only_adapter_as_trainable(model: LLaMA) -> None:
    """Freezes every parameter that is not the adapter's."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.is_adapter_parameter(name))


def adapter_state_from_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's part of a full state dict."""
    return {name: tensor for name, tensor in state_dict.items() if LLaMA.is_adapter_parameter(name)}
