"""A frozen base in 4 or 8 bits per weight, through the linear layers of bitsandbytes.

The projections of attention and MLP are quantised; embedding, output layer, norms and biases keep the run's precision,
and an adapter stays fp32. The weights are only read, so gradients pass through them to the adapter as before
(arXiv 2305.14314 for nf4, arXiv 2208.07339 for int8).

Fabric's plugin, `BitsandbytesPrecision`, wraps the same layers. It is not used: it quantises on CUDA alone, int8 would
set the whole model to fp16, which needs loss scaling in training, and generation runs without Fabric.
"""

from typing import Literal, get_args

import torch
import torch.nn as nn

from lit_llama.model import LLaMA
from lit_llama.utils import UserError

Quantize = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]  # dq: the blocks' scales are quantised as well
BLOCK = 64  # weights that share a scale in the 4-bit modes


def check_quantize(mode: str, model: LLaMA, device: torch.device) -> None:
    """Says what would go wrong before the weights are read.

    Raises:
        UserError: no such mode, another device than CUDA's or a CPU, bitsandbytes is not installed, or a layer's rows
            are no whole number of the 4-bit modes' blocks.
    """
    if mode not in get_args(Quantize):
        raise UserError(f"quantize is {mode!r}; known are {', '.join(get_args(Quantize))}.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--quantize {mode} works on CUDA and CPU, not on {device.type}; choose another --accelerator.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"--quantize {mode} needs bitsandbytes, which is not installed: pip install bitsandbytes."
        ) from None
    for name, layer in projections(model).items():
        # blocks across two rows are dequantised wrongly by bitsandbytes 0.50 on CPUs
        if mode != "int8" and layer.in_features % BLOCK:
            raise UserError(
                f"--quantize {mode} needs layers whose width is a multiple of {BLOCK}, and {name} is "
                f"{layer.in_features} wide; int8 has no such limit."
            )


def projections(model: LLaMA) -> dict[str, nn.Linear]:
    """The plain linear layers of all blocks by name; one that a method extends (LoRA's c_attn) is left as it is."""
    modules = model.transformer.h.named_modules(prefix="transformer.h")
    return {name: layer for name, layer in modules if type(layer) is nn.Linear}


def quantize_(model: LLaMA, mode: str, device: torch.device, dtype: torch.dtype) -> None:
    """Replaces the projections in place, one at a time, so that the device never holds two whole layers unquantised.

    Args:
        mode: one of `Quantize`, checked by `check_quantize`.
        device: where the quantised layers shall be; the projections' own weights are on the CPU, in any dtype.
        dtype: in which the layers compute.
    """
    for name, layer in projections(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized(layer, mode, dtype).to(device))


def quantized(layer: nn.Linear, mode: str, dtype: torch.dtype) -> nn.Linear:
    """A layer of bitsandbytes for a plain one; it is quantised when it is moved to its device."""
    import bitsandbytes as bnb

    shape = {"input_features": layer.in_features, "output_features": layer.out_features}
    shape |= {"bias": layer.bias is not None, "device": "meta"}
    weight = layer.weight.detach().to(dtype)
    if mode == "int8":
        # columns of the input with a value above 6 are multiplied unquantised (section 3.2 of the paper)
        new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        kind = {"quant_type": mode[:3], "compress_statistics": mode.endswith("-dq")}  # and blocks of 64, the default
        new = bnb.nn.Linear4bit(**shape, compute_dtype=dtype, **kind)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **kind)
        # CPUs with AVX512-BF16: a forward pass without gradients would repack the weights, and later ones pass none on
        new.support_avx512bf16_for_cpu = False
    new.bias = layer.bias
    return new
