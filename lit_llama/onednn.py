"""Linear layers on a CPU for generation: weights laid out once as oneDNN multiplies them.

Otherwise PyTorch multiplies the one row of a decoded token on a single thread in fp32, and in bf16 lays the weights out
anew for every product. No gradients pass packed layers, and their weights can no longer be read or saved.
"""

import os

import torch
import torch.nn as nn

from lit_llama.model import LLaMA

LEAST_WEIGHTS = 2**18  # of a layer in fp32: a smaller one takes no longer than oneDNN's call


class PackedLinear(nn.Module):
    """What a linear layer does, (…, in) -> (…, out), in the dtype of its weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packs(weight: torch.Tensor) -> bool:
    """Whether a layer of these weights would be faster packed, on a CPU and with a PyTorch that can."""
    ops = torch.ops.mkldnn  # what torch.compile uses; private, so another release may lack it
    able = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not able:
        return False
    if weight.dtype == torch.bfloat16:
        return ops._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.numel() >= LEAST_WEIGHTS and torch.get_num_threads() > 1


def pack_(model: LLaMA) -> LLaMA:
    """Replaces plain linear layers where `packs` says so, in place and one at a time, and the model comes back.

    Layers that a method extends (LoRA's c_attn) stay. Tied embeddings stay too, and a packed output layer joins them.
    Nothing is packed if it would fill more than half of the machine's memory: what is mapped from a file can be dropped
    and read again, a copy cannot.
    """
    places = [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and packs(layer.weight)
    ]
    tied = model.lm_head is None and packs(model.output_weight)
    nbytes = sum(getattr(*place).weight.nbytes for place in places) + tied * model.output_weight.nbytes
    if nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        return model
    for parent, name in places:
        layer = getattr(parent, name)
        setattr(parent, name, PackedLinear(layer.weight, layer.bias))
    if tied:
        model.lm_head = PackedLinear(model.output_weight)
    return model
