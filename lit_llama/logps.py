"""Log-probabilities of labels, computed without holding the logits of all tokens in memory."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -1  # the label of tokens that are not predicted
LOGP_CHUNK = 512  # minimum number of tokens whose logits are computed at once: 66 MB in fp32 for a vocabulary of 32,000
GPU_SHARE = 64  # on a GPU these logits may take 1 / 64 of its memory


class LabelLogps(nn.Module):
    """A model whose `forward` returns `label_logps`, or without labels the logits (B, T, V).

    Training wraps this module, because Fabric and DDP wrap only `forward`.

    Args:
        module: a `lit_llama.model.LLaMA`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        idx: Tensor,
        labels: Tensor | None = None,
        label_index: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        return self.module(idx) if labels is None else self.module.label_logps(idx, labels, label_index, segments)


def find_labels(labels: Tensor) -> Tensor:
    """Return the positions that predict a label, (n,) int64, as indices of the tokens b·T + t in row-major order.

    Their number depends on the data, so on a GPU this would synchronize: call it on the CPU when batches are built.

    Args:
        labels: (B, T) token ids, not shifted; -1 where nothing is predicted.
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return predicts.flatten().nonzero().squeeze(1)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probabilities of tokens.

    A frozen output layer needs one product for the result and one for the gradient, and no tensor of size V is kept. A
    trained output layer needs one more product in the backward pass.

    Args:
        hidden: (n, C) outputs of the last norm at the positions that predict the tokens.
        weight: (V, C) output layer.
        targets: (n,) token ids.

    Returns:
        (n,) fp32, in nats.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        size = chunk_size(weight)
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(chunk_logps, h, weight, t, use_reentrant=False)[0] for h, t in chunks])
    return FrozenLogps.apply(hidden, weight, targets, torch.is_grad_enabled() and hidden.requires_grad)


def chunk_size(weight: Tensor) -> int:
    """Return the number of tokens whose logits are computed at once, for an output layer (V, C).

    On a GPU it grows with the memory of the device, up to 8192, because larger products are faster. It does not depend
    on the memory that happens to be free, because a resumed run and a DPO reference must be rounded in the same way.
    """
    if weight.device.type != "cuda":
        return LOGP_CHUNK
    memory = torch.cuda.get_device_properties(weight.device).total_memory
    tokens = memory // GPU_SHARE // (weight.size(0) * (4 + 2 * weight.element_size()))  # fp32, and two in its dtype
    return min(8192, max(LOGP_CHUNK, 1 << max(0, tokens.bit_length() - 1)))


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
        size = chunk_size(weight)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True):
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
