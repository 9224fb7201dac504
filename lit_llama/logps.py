"""Log-probabilities of labels, without the logits of all tokens in memory at once."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -1  # a label that nothing predicts
LOGP_CHUNK = 512  # tokens whose logits are held at once: 66 MB in fp32 for a vocabulary of 32,000


class LabelLogps(nn.Module):
    """A model whose `forward` is its `label_logps`, or without labels its logits (B, T, V).

    This is what training wraps, as Fabric and DDP only wrap `forward`.

    Args:
        module: a `lit_llama.model.LLaMA`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, idx: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.module(idx) if labels is None else self.module.label_logps(idx, labels)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probabilities of tokens.

    A frozen output layer is multiplied once forward and once for the gradient, and nothing of size V is kept. One that
    is trained is multiplied once more in the backward pass.

    Args:
        hidden: (n, C) outputs of the last norm at the positions that predict the tokens.
        weight: (V, C) output layer.
        targets: (n,) token ids.

    Returns:
        (n,) fp32, in nats.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        chunks = zip(hidden.split(LOGP_CHUNK), targets.split(LOGP_CHUNK), strict=True)
        return torch.cat([checkpoint(chunk_logps, h, weight, t, use_reentrant=False)[0] for h, t in chunks])
    return FrozenLogps.apply(hidden, weight, targets, torch.is_grad_enabled() and hidden.requires_grad)


def chunk_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the targets (n,) and of the vocabulary (n, V), fp32."""
    logps = F.linear(hidden, weight).log_softmax(-1, dtype=torch.float32)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1), logps


class FrozenLogps(torch.autograd.Function):
    """`token_logps` for a frozen output layer. The forward pass also computes the gradient of each log-probability,

        d logp_t / d h = W_t - Σ_v p_v W_v,

    while the probabilities are in memory; the backward pass multiplies it, (n, C), by the gradient of the loss.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, differentiable: bool) -> Tensor:
        of_targets, negative_slopes = [], []
        for h, t in zip(hidden.split(LOGP_CHUNK), targets.split(LOGP_CHUNK), strict=True):
            target_logps, logps = chunk_logps(h, weight, t)
            of_targets.append(target_logps)
            if differentiable:
                excess = logps.exp_()  # p, minus 1 at the target
                excess[torch.arange(len(t), device=t.device), t] -= 1
                negative_slopes.append(excess.to(weight.dtype) @ weight)
        if differentiable:
            ctx.save_for_backward(torch.cat(negative_slopes))
        ctx.dtype = hidden.dtype
        return torch.cat(of_targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (negative_slopes,) = ctx.saved_tensors
        return (-grad.unsqueeze(1) * negative_slopes).to(ctx.dtype), None, None, None
