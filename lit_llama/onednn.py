"""Linear layers with packed weights, for generation on a CPU if a measurement shows that they are faster.

Without packing, PyTorch multiplies the single row of a decoded token on one thread in fp32, and in bf16 it repacks the
weights for each product. The speedup depends on the processor, its memory, the number of threads and the dtype. Packed
layers pass no gradients, and their weights cannot be read or saved.

This is the only file that calls private operators of PyTorch, which torch.compile uses for the same purpose. If a
release lacks them, models stay unpacked: slower, but correct.
"""

import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from lit_llama.model import LLaMA

PRIVATE_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")  # in torch.ops.mkldnn

ROWS = (1, 8)  # numbers of rows of the measured products: the tokens of one prompt, and of a batch
MIN_GAIN = 1.1  # a model is packed if this makes products faster by at least this factor (geometric mean over ROWS)
MAX_LOSS = 1.05  # and, for each number of rows, slower by at most this factor (the noise of such measurements)
MIN_WEIGHTS = 2**23  # parameters of the linear layers; smaller models stay plain without a measurement
SAMPLE_BYTES = 2**25  # size of the measured weights; each is read again after all others, so that caches miss
PASSES = 12  # passes over all of them; the first does not count
MIN_PASSES, MAX_SECONDS = 4, 0.3  # no pass after MIN_PASSES begins after MAX_SECONDS (on a busy machine)

Times = tuple[float, ...]  # seconds of the products for each number in ROWS

_gains: dict[tuple[torch.Size, torch.dtype, int], bool] = {}  # the measurements in this process


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


def pack_(model: LLaMA, choose: Callable[[Sequence[Tensor]], bool] | None = None) -> LLaMA:
    """Pack the weights of all plain linear layers, in place and one at a time, if that is faster; return the model.

    Layers of a method (LoRA's c_attn) and tied embeddings stay unpacked; for the latter, a packed output layer is
    added. Nothing is packed if the copies would fill more than half of the memory: a weight that is mapped from a file
    can be evicted and read again, a copy cannot.

    Args:
        choose: takes the weights and returns whether to pack them (default: `gains_from_packing`).
    """
    layers = [
        (parent, name, layer.weight, layer.bias)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and can_pack(layer.weight)
    ]
    if model.lm_head is None and can_pack(model.output_weight):
        layers.append((model, "lm_head", model.output_weight, None))
    weights = [weight for _, _, weight, _ in layers]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(weight.numel() for weight in weights) < MIN_WEIGHTS or sum(weight.nbytes for weight in weights) > memory / 2:
        return model
    if not (choose or gains_from_packing)(weights):
        return model
    del weights
    while layers:  # popped, so that each weight is freed once it is packed
        parent, name, weight, bias = layers.pop()
        setattr(parent, name, PackedLinear(weight, bias))
    return model


def gains_from_packing(weights: Sequence[Tensor]) -> bool:
    """Return whether decoding with these weights is faster when they are packed.

    It is measured once per process for models with the same largest weight, so that a base and its variants are rounded
    in the same way.
    """
    largest = max(weights, key=Tensor.numel)
    kind = largest.shape, largest.dtype, torch.get_num_threads()
    if kind not in _gains:
        _gains[kind] = gains(*measure(weights))
    return _gains[kind]


def gains(plain: Times, packed: Times) -> bool:
    """Return whether packed products are fast enough on average, and not slower for any number of rows."""
    if not all(times > 0 for times in packed):
        return False
    ratios = [p / q for p, q in zip(plain, packed, strict=True)]
    return statistics.geometric_mean(ratios) >= MIN_GAIN and min(ratios) >= 1 / MAX_LOSS


@torch.inference_mode()
def measure(weights: Sequence[Tensor], clock: Callable[[], float] = time.perf_counter) -> tuple[Times, Times]:
    """Return the times of products with all weights, plain and packed.

    They are estimated from products with the first rows of one weight of each shape, as medians over the passes.

    Args:
        clock: returns the time in seconds.
    """
    shapes = defaultdict(list)
    for weight in weights:
        shapes[weight.shape].append(weight)
    samples, shares = [], []  # weights, and the ratio of all weights of the shape to the sample
    for group in shapes.values():
        sample = group[0][: max(1, SAMPLE_BYTES // len(shapes) // group[0][0].nbytes)]
        samples.append(sample)
        shares.append(len(group) * group[0].numel() / sample.numel())
    products = [(partial(F.linear, weight=sample), PackedLinear(sample)) for sample in samples]
    passes: list[Tensor] = []
    start = clock()
    while len(passes) < MIN_PASSES or (len(passes) < PASSES and clock() - start < MAX_SECONDS):
        seconds = torch.zeros(len(ROWS), len(samples), 2, dtype=torch.float64)
        for j, k in itertools.product(*map(range, seconds.shape[:2])):
            x = torch.ones(ROWS[j], 1, samples[k].size(1), dtype=samples[k].dtype)
            for kind, product in enumerate(products[k]):
                began = clock()
                product(x)
                seconds[j, k, kind] = clock() - began
        passes.append(seconds)
    medians = torch.stack(passes[1:]).median(0).values  # (rows, samples, 2)
    plain, packed = (medians * torch.tensor(shares, dtype=torch.float64)[:, None]).sum(1).T.tolist()
    return tuple(plain), tuple(packed)
