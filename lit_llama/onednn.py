"""Linear layers with packed weights, for generation on a CPU, where a measurement finds them faster.

Without them PyTorch multiplies the single row of a decoded token on one thread in fp32, and in bf16 it repacks the
weights for each product. How much packing gains depends on the processor, its memory, the threads, the dtype and the
shape. Packed layers pass no gradients, and their weights cannot be read or saved.

This is the only file that calls private operators of PyTorch, those that torch.compile uses for the same purpose. If a
release lacks them, models stay unpacked: slower, but right.
"""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from lit_llama.model import LLaMA

PRIVATE_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")  # in torch.ops.mkldnn

ROWS = (1, 8)  # of the measured products: the tokens of one prompt, and of a batch
MIN_GAIN = 1.1  # layers are packed if that makes them this much faster with one row, and not slower with eight
MIN_WEIGHTS = 2**22  # of all layers of a shape together; fewer are not worth a measurement
SAMPLE_BYTES = 2**25  # of the measured weights; each is read again after all others, so that caches miss
PASSES = 4  # over all of them; the first does not count

Times = tuple[float, ...]  # seconds of a product with each number of ROWS
Kind = tuple[torch.Size, torch.dtype, int]  # shape and dtype of a weight, number of threads

_gains: dict[Kind, bool] = {}  # what was measured in this process


class PackedLinear(nn.Module):
    """A linear layer, (…, in) -> (…, out), in the dtype of its weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Return whether this PyTorch can pack a weight, on this CPU."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in PRIVATE_OPERATORS):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack_(model: LLaMA, choose: Callable[[Sequence[Tensor]], Sequence[bool]] | None = None) -> LLaMA:
    """Replace the plain linear layers that gain from it, in place and one at a time, and return the model.

    Layers of a method (LoRA's c_attn) and tied embeddings stay; to the latter a packed output layer is added. Nothing
    is packed if the copies would fill more than half of the memory: a weight that is mapped from a file can be evicted
    and read again, a copy cannot.

    Args:
        choose: takes weights of different shapes and returns whether to pack each (default: `gain_from_packing`).
    """
    groups = defaultdict(list)  # layers by the shape and dtype of their weights
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and can_pack(layer.weight):
                groups[layer.weight.shape, layer.weight.dtype].append((parent, name, layer.weight, layer.bias))
    if model.lm_head is None and can_pack(model.output_weight):
        head = model.output_weight
        groups[head.shape, head.dtype].append((model, "lm_head", head, None))
    large = [group for group in groups.values() if sum(weight.numel() for _, _, weight, _ in group) >= MIN_WEIGHTS]
    chosen = (choose or gain_from_packing)([group[0][2] for group in large]) if large else []
    layers = [layer for group, gains in zip(large, chosen, strict=True) if gains for layer in group]
    nbytes = sum(weight.nbytes for _, _, weight, _ in layers)
    if nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        return model
    del groups, large
    while layers:  # popped, so that each weight is freed once it is packed
        parent, name, weight, bias = layers.pop()
        setattr(parent, name, PackedLinear(weight, bias))
    return model


def gain_from_packing(weights: Sequence[Tensor]) -> list[bool]:
    """Return for each weight whether its layers are faster when packed.

    A shape is measured once in a process, so that all models of the process are rounded alike.
    """
    kinds = [(weight.shape, weight.dtype, torch.get_num_threads()) for weight in weights]
    new = {kind: weight for kind, weight in zip(kinds, weights, strict=True) if kind not in _gains}
    if new:
        _gains.update(zip(new, (gains(*times) for times in measure([*new.values()])), strict=True))
    return [_gains[kind] for kind in kinds]


def gains(plain: Times, packed: Times) -> bool:
    """Return whether packed products are enough faster with one row, and not slower with more."""
    return packed[0] * MIN_GAIN < plain[0] and all(ours <= theirs for ours, theirs in zip(packed, plain, strict=True))


@torch.inference_mode()
def measure(weights: Sequence[Tensor], clock: Callable[[], float] = time.perf_counter) -> list[tuple[Times, Times]]:
    """Return the times of products with the first rows of each weight, plain and packed: medians over the passes.

    Args:
        clock: returns seconds.
    """
    products = []
    for weight in weights:
        sample = weight[: max(1, SAMPLE_BYTES // len(weights) // weight[0].nbytes)]
        for product in (lambda x, sample=sample: F.linear(x, sample), PackedLinear(sample)):
            products.append((product, [torch.ones(rows, 1, sample.size(1), dtype=sample.dtype) for rows in ROWS]))
    seconds = [[[] for _ in ROWS] for _ in products]
    for _ in range(PASSES):
        for i in range(len(ROWS)):
            for (product, inputs), own in zip(products, seconds, strict=True):
                began = clock()
                product(inputs[i])
                own[i].append(clock() - began)
    times = [tuple(statistics.median(passes[1:]) for passes in own) for own in seconds]
    return [*zip(times[::2], times[1::2], strict=True)]
