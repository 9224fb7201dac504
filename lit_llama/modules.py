"""Tools for PyTorch modules: evaluation mode, temporary parameter values, parameters that stay fp32, masks."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.config import round_up


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Temporarily put a model into evaluation mode, without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the LLaMA inside a `LabelLogps`, which may be wrapped by Fabric."""
    while hasattr(model, "module"):
        model = model.module
    return model


@contextmanager
def swapped_parameters(model: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """Temporarily replace parameter values. Gradients must not be computed across the change.

    Args:
        model: a `LLaMA`, which may be inside a `LabelLogps` or wrapped by Fabric.
        state: new values by parameter name.
    """
    parameters = dict(unwrapped(model).named_parameters())
    original = {name: parameters[name].data for name in state}
    for name, values in state.items():
        parameters[name].data = values
    try:
        yield
    finally:
        for name, values in original.items():
            parameters[name].data = values


class Fp32Parameters:
    """Mixin for a module whose parameters stay fp32 when the model is cast.

    bf16 has 8 bits of precision: an AdamW step of 1e-4 on a value of 1 is rounded away. `model.to(torch.bfloat16)` and
    Fabric's `bf16-true` cast every parameter of a module; this mixin restores the unrounded values.
    """

    of_base: tuple[str, ...] = ()  # names of parameters that belong to the base and are cast

    def _apply(self: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
        in_fp32 = {name: p.data for name, p in self.named_parameters(recurse=False) if name not in self.of_base}
        super()._apply(fn, recurse)
        for name, values in in_fp32.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = values.to(parameter.device)
        return self


def attention_mask(attends: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask (B, 1, T, S) of a bool tensor (B, T, S): 0 where it is True, and -inf elsewhere.

    A bool mask would be converted in each layer, and each layer would keep a copy for the backward pass.

    Args:
        dtype: The dtype of attention.
    """
    *rows, S = attends.shape
    # CUDA's kernel would copy a mask whose rows are not aligned
    aligned = torch.full((*rows, round_up(S, 16)), -math.inf, dtype=dtype, device=attends.device)
    return aligned[..., :S].masked_fill_(attends, 0).unsqueeze(1)


def attention_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of attention in a layer with the input x: that of autocast where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def add_scaled(sums: dict[str, torch.Tensor], losses: dict[str, torch.Tensor], scale: float) -> None:
    """Add metrics, times a factor and without gradient, to the sums of the same name."""
    for name, value in losses.items():
        sums[name] = sums[name] + scale * value.detach()
