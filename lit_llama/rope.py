"""Rotary position embeddings (arXiv 2104.09864) over interleaved pairs: tables of angles, and the rotation."""

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.config import LLaMAConfig


class RoPE(nn.Module):
    """Tables of rotary position embeddings (arXiv 2104.09864), fp32.

    They are not buffers, so that casting the model does not round them: in bf16, positions above 256 collide.
    """

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        positions = torch.arange(config.block_size, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, rope_frequencies(config))  # (block_size, hs / 2)
        self.cos, self.sin = (table.repeat_interleave(2, dim=-1) for table in (angles.cos(), angles.sin()))

    def _apply(self, fn: Any, recurse: bool = True) -> "RoPE":
        device = fn(self.cos[:0]).device
        self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return self

    def forward(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return the cos and sin of the angles at positions, each value twice: once for each number of a pair.

        Args:
            positions: a slice of T positions, or a tensor (B, T).

        Returns:
            (T, hs) each, or (B, 1, T, hs).
        """
        cos, sin = self.cos[positions], self.sin[positions]
        return (cos, sin) if cos.dim() == 2 else (cos.unsqueeze(1), sin.unsqueeze(1))


def rope_frequencies(config: LLaMAConfig) -> Tensor:
    """Return the rotary frequencies, (hs / 2,) fp32 in radians per position, scaled for a longer context if set."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu") / config.head_size
    frequencies = 1.0 / config.rope_base**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    # Llama 3.1: frequencies with many rotations in the original context are kept, those with few are slowed down
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * slow


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) of x (B, nh, T, hs) by its angle, in fp32; cos and sin are from `RoPE`."""
    return Rotation.apply(x, cos, sin)


class Rotation(torch.autograd.Function):
    """See `rotate`. A custom function halves the time of the backward pass, which rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        x32 = x.float()
        by_cos, by_sin = x32 * cos, x32 * sin
        by_cos[..., ::2].sub_(by_sin[..., 1::2])
        by_cos[..., 1::2].add_(by_sin[..., ::2])
        return by_cos.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Rotation.apply(grad, cos, -sin), None, None
