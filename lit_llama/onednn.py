"""Linear layers with packed weights, for generation on a CPU.

Without them PyTorch multiplies the single row of a decoded token on one thread in fp32, and in bf16 it repacks the
weights for each product. Packed layers pass no gradients, and their weights cannot be read or saved.

This is the only file that calls private operators of PyTorch, those that torch.compile uses for the same purpose. If a
release lacks them, models stay unpacked: slower, but right.
"""

import os

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.model import LLaMA

MIN_WEIGHTS = 2**18  # of a layer in fp32; smaller ones gain nothing
PRIVATE_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")  # in torch.ops.mkldnn


class PackedLinear(nn.Module):
    """A linear layer, (…, in) -> (…, out), in the dtype of its weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack() -> bool:
    """Return whether this PyTorch has oneDNN and the private operators."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in PRIVATE_OPERATORS)


def gains(weight: Tensor) -> bool:
    """Return whether a layer with this weight is faster when packed."""
    if weight.device.type != "cpu" or not can_pack():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.numel() >= MIN_WEIGHTS and torch.get_num_threads() > 1


def pack_(model: LLaMA) -> LLaMA:
    """Replace the plain linear layers that gain from it, in place and one at a time, and return the model.

    Layers of a method (LoRA's c_attn) and tied embeddings stay; to the latter a packed output layer is added. Nothing
    is packed if the copies would fill more than half of the memory: a weight that is mapped from a file can be evicted
    and read again, a copy cannot.
    """
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and gains(layer.weight)
    ]
    add_head = model.lm_head is None and gains(model.output_weight)
    nbytes = sum(layer.weight.nbytes for _, _, layer in layers) + add_head * model.output_weight.nbytes
    if nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        return model
    while layers:  # popped, so that each weight is freed once it is packed
        parent, name, layer = layers.pop()
        setattr(parent, name, PackedLinear(layer.weight, layer.bias))
    if add_head:
        model.lm_head = PackedLinear(model.output_weight)
    return model
