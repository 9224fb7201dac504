"""Quantize a frozen base to 4 or 8 bits per weight, with the linear layers of bitsandbytes.

The projections of attention and MLP are quantized. Embedding, output layer, norms and biases keep the precision of the
run, and adapters stay fp32. Gradients pass through the quantized weights to the adapter (arXiv 2305.14314 for nf4,
arXiv 2208.07339 for int8).

On CUDA, bitsandbytes converts the inputs and outputs of int8 layers to fp16, so values above 65,504 overflow; the
backward pass is in the precision of the run. On a CPU, the weights are dequantized instead, as bitsandbytes does in
training.

Fabric's plugin, `BitsandbytesPrecision`, wraps the same layers. It is not used, because it quantizes only on CUDA, it
runs the complete model in fp16 with int8, which needs loss scaling in training, and generation does not run under
Fabric.
"""

from typing import get_args

import torch
import torch.nn as nn

from lit_llama.console import transient_bar
from lit_llama.model import LLaMA
from lit_llama.settings import Quantize
from lit_llama.utils import UserError

BLOCK = 64  # consecutive weights that share a scale in the 4-bit modes


def check_quantize(mode: str, model: LLaMA, device: torch.device) -> None:
    """Check that a model can be quantized, before its weights are read.

    Raises:
        UserError: The mode is not in `Quantize`, the device is neither CUDA nor a CPU, bitsandbytes is not installed,
            or the width of a layer is not a multiple of the block size of the 4-bit modes.
    """
    if mode not in get_args(Quantize):
        raise UserError(f"quantize is {mode!r}; choose from {', '.join(get_args(Quantize))}.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--quantize {mode} works on CUDA and CPU, not on {device.type}; choose another --accelerator.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"--quantize {mode} needs bitsandbytes, which is not installed: pip install bitsandbytes."
        ) from None
    if not projections(model):
        raise UserError(f"--quantize {mode} does not work with this method, which changes every linear layer.")
    for name, layer in projections(model).items():
        # blocks that span two rows are dequantized wrongly by bitsandbytes 0.50 on CPUs
        if mode != "int8" and layer.in_features % BLOCK:
            raise UserError(
                f"--quantize {mode} needs layers whose width is a multiple of {BLOCK}, and {name} is "
                f"{layer.in_features} wide; int8 has no such limit."
            )


def projections(model: LLaMA) -> dict[str, nn.Linear]:
    """Return the plain linear layers of all blocks by name; those of a method (LoRA's c_attn) are left out."""
    modules = model.transformer.h.named_modules(prefix="transformer.h")
    return {name: layer for name, layer in modules if type(layer) is nn.Linear}


def quantize_(model: LLaMA, mode: str, device: torch.device, dtype: torch.dtype) -> None:
    """Quantize the projections in place, one at a time, so that the device holds at most one unquantized layer.

    Args:
        model: the weights of its projections are on the CPU, in any dtype.
        mode: one of `Quantize`, checked by `check_quantize`.
        device: device of the quantized layers.
        dtype: dtype in which the layers compute, int8 on CUDA in part in fp16.
    """
    layers = list(projections(model).items())
    for name, layer in transient_bar(layers, "Quantizing the base", "layer"):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized(layer, mode, dtype).to(device))


def use_training_mode(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Put a layer in training mode; a forward pre-hook."""
    layer.training = True


def quantized(layer: nn.Linear, mode: str, dtype: torch.dtype) -> nn.Linear:
    """Return the layer of bitsandbytes for a plain one; moving it to its device quantizes it."""
    import bitsandbytes as bnb

    shape = {"input_features": layer.in_features, "output_features": layer.out_features}
    shape |= {"bias": layer.bias is not None, "device": "meta"}
    weight = layer.weight.detach().to(dtype)
    if mode == "int8":
        # input columns with a value above 6 are multiplied without quantization (arXiv 2208.07339, section 3.2)
        new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        # else, on a CPU, the inputs are quantized in evaluation but not in training, and a DPO reference would differ
        new.register_forward_pre_hook(use_training_mode)
    else:
        kind = {"quant_type": mode[:3], "compress_statistics": mode.endswith("-dq")}  # BLOCK is the default
        new = bnb.nn.Linear4bit(**shape, compute_dtype=dtype, **kind)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **kind)
        # else, on CPUs with AVX512-BF16, a no_grad forward pass repacks the weights, and later passes have no gradients
        new.support_avx512bf16_for_cpu = False
    new.bias = layer.bias
    return new
