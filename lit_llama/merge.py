"""Merge Aligners of one prefix token into a plain LLaMA, as output biases.

With one token the softmax over the prefix is 1, so what an Aligner adds to a layer's heads is a constant, gate × V_p.
After the output projection it is a bias: the merged model computes the same function and needs no Aligner code.
"""

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.aligner import gated_kv
from lit_llama.model import CausalSelfAttention, LLaMA
from lit_llama.utils import UserError


@torch.no_grad()
def output_bias(attn: CausalSelfAttention, aligners: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the bias of a layer's output projection with Aligners merged into it: (C,).

    Args:
        attn: the layer's attention; its own bias, if any, is included.
        aligners: prefix (1, C), in the compute dtype of the layer, and gate (1, nh, 1, 1) of each.
    """
    values = sum(
        gated_kv(*attn.keys_values(prefix.unsqueeze(0)), gate)[1] for prefix, gate in aligners
    )  # (1, nh, 1, hs)
    return attn.c_proj(values.flatten(1)).squeeze(0)


def merge_aligners_(model: LLaMA, aligners: Iterable[tuple[dict[str, Tensor], float]]) -> None:
    """Merge Aligners of one token into a plain model, in place.

    Args:
        model: without an adapter; its linear layers may be quantized, but not packed (lit_llama/onednn.py).
        aligners: state dict and strength of each. Strengths scale the gates.

    Raises:
        UserError: An Aligner has more than one prefix token.
    """
    weight, aligners = model.transformer.wte.weight, list(aligners)
    for state, _ in aligners:
        if (length := len(state["global_value_embedding.weight"])) > 1:
            raise UserError(f"An Aligner of N = {length} prefix tokens cannot be merged, only one of N = 1.")
    for layer, block in enumerate(model.transformer.h):
        terms = []
        for state, strength in aligners:
            gate = state.get(f"transformer.h.{layer}.attn.gating_factor")  # layers below the start layer have none
            if gate is not None:
                prefix = state["global_value_embedding.weight"].to(weight)
                terms.append((prefix, strength * gate.float().to(weight.device)))
        if terms:
            block.attn.c_proj.bias = nn.Parameter(output_bias(block.attn, terms), requires_grad=False)
