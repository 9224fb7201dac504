"""Estimate the memory of training and generation from shapes, without weights.

The network runs on PyTorch's meta device, where tensors have shapes but no data, and the bytes of all live tensors are
counted, so no formula is needed for what a method keeps for the backward pass. Attention and norms count as CUDA's
fused kernels; on a CPU, norms keep their input in fp32. Kernel workspaces, fragmentation of the allocator and libraries
(with CUDA, its context) are not counted. Training computes the logits of 512 tokens at once; on a GPU it computes more,
which takes up to 1 / 64 of its memory and is not counted (`lit_llama.logps.chunk_size`).
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.quantize import BLOCK, projections
from lit_llama.sharding import sharded_parts
from lit_llama.tables import markdown_table
from lit_llama.utils import UserError
from lit_llama.variant import mark_only_adapter_as_trainable

META = torch.device("meta")
MOST_TOKENS = 2**22  # of a batch
MOMENTS = 8  # bytes of AdamW's two fp32 moments per trained parameter
SCALE_BLOCK = 256  # scales that share a second scale, with "-dq"


@dataclass(frozen=True)
class Memory:
    """The peak memory of a task, in bytes.

    Args:
        base: the frozen weights, or a process's share of them, and the rotary tables.
        adapter: the trained parameters and the moments of their optimizer.
        cache: keys and values of earlier tokens.
        activations: all other live tensors at the peak; in training including the gradients.
    """

    base: int
    adapter: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.cache + self.activations


def training_memory(
    model_class: type[LLaMA],
    config: LLaMAConfig,
    *,
    sequences: int,
    tokens: int,
    labels: int,
    dtype: torch.dtype,
    quantize: str | None = None,
    gradient_checkpointing: bool = False,
    packed: bool = False,
    shards: int = 1,
) -> Memory:
    """Return the memory of a training step with this largest micro-batch.

    Args:
        model_class, config: the class of the method and its configuration.
        sequences: number of sequences in the micro-batch; a pair has one or two (`lit_llama.packing.pair_shape`).
        tokens: length of the longest sequence, to which the others are padded.
        labels: total number of predicted tokens in all sequences.
        dtype: dtype of the base and of the computation.
        quantize: one of `lit_llama.quantize.Quantize`.
        gradient_checkpointing: recompute each layer in the backward pass.
        packed: whether the sequences are rows of `lit_llama.packing.pack_answers`, which need a mask.
        shards: number of processes that share the base; the result is for one of them.

    Raises:
        UserError: The batch is larger than any device can hold; counting its tensors would take hours or overflow.
    """
    _check_tokens(sequences, tokens)
    model = _on_meta(model_class, config, dtype)
    model.gradient_checkpointing = gradient_checkpointing
    for layer in projections(model).values() if quantize == "int8" else ():
        layer.register_forward_pre_hook(lambda _, inputs: _KeptInput.apply(*inputs))
    idx = torch.empty(sequences, tokens, dtype=torch.long, device=META)

    def step() -> None:
        label_index = torch.empty(labels, dtype=torch.long, device=META)
        segments = torch.empty_like(idx) if packed else None
        model.label_logps(idx, torch.empty_like(idx), label_index, segments).sum().backward()

    activations = _peak(step, model)
    adapter = sum(p.nbytes + MOMENTS * p.numel() for p in model.adapter_parameters().values())
    return Memory(base_bytes(model, quantize, shards), adapter, 0, activations + _dequantized(model, quantize))


def generation_memory(
    model_class: type[LLaMA],
    config: LLaMAConfig,
    *,
    rows: int,
    prompt: int,
    new: int,
    dtype: torch.dtype,
    distinct: int | None = None,
    quantize: str | None = None,
    shards: int = 1,
) -> Memory:
    """Return the memory of generation on a GPU; on a CPU, the cache of a bf16 model is in fp32 and twice as large.

    Args:
        model_class, config: the class of the method and its configuration; `LLaMA` for an Aligner of one token, which
            is merged into the base.
        rows: number of prompts in a batch.
        prompt, new: number of tokens in each prompt and each answer.
        distinct: number of distinct prompts, which run once each and are then copied (default: all).
        dtype, quantize, shards: as for `training_memory`.

    Raises:
        UserError: The batch is larger than any device can hold; counting its tensors would take hours or overflow.
    """
    _check_tokens(rows, prompt)
    model, distinct = _on_meta(model_class, config, dtype), distinct or rows
    idx = torch.empty(distinct, prompt, dtype=torch.long, device=META)
    sources = torch.empty(rows, dtype=torch.long, device=META)

    @torch.no_grad()
    def prefill() -> None:
        model.unembed(model.hidden(idx)[:, -1])[sources].float().softmax(-1)

    activations = _peak(prefill, model)
    adapter = sum(p.nbytes for p in model.adapter_parameters().values())
    cache = cache_bytes(config, rows, model.n_virtual_tokens + prompt + new, dtype)
    if distinct < rows:  # a cache of the distinct prompts, until it is copied
        cache += cache_bytes(config, distinct, model.n_virtual_tokens + prompt, dtype)
    return Memory(base_bytes(model, quantize, shards), adapter, cache, activations + _dequantized(model, quantize))


def memory_table(tasks: dict[str, Memory]) -> str:
    """Return a Markdown table of the memory of tasks."""
    heads = ["", "base", "adapter, optimizer", "cache", "activations, gradients", "total"]
    rows = [
        [name, *map(byte_size, (task.base, task.adapter, task.cache, task.activations, task.total))]
        for name, task in tasks.items()
    ]
    return markdown_table(heads, rows)


def byte_size(nbytes: int) -> str:
    """Format bytes as "16.4 GB" or "523 MB"."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def cache_bytes(config: LLaMAConfig, rows: int, length: int, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of `rows` sequences of `length` tokens."""
    return 2 * config.n_layer * rows * config.n_kv_head * length * config.head_size * dtype.itemsize


def base_bytes(model: LLaMA, quantize: str | None = None, shards: int = 1) -> int:
    """Return the bytes of the frozen weights and of the rotary tables.

    With a sharded base, a process holds its share plus three complete copies of the largest part: one in use, one being
    gathered, and one being unpacked.
    """
    adapter = set(model.adapter_parameters().values())
    total = sum(p.nbytes for p in model.parameters() if p not in adapter)
    for layer in projections(model).values() if quantize else ():
        total += _quantized_bytes(layer.weight, quantize) - layer.weight.nbytes
    if shards > 1:
        parts = [sum(p.nbytes for p in part.parameters() if p not in adapter) for part in sharded_parts(model)]
        total += sum(parts) // shards - sum(parts) + 3 * max(parts)
    return total + model.rope.cos.nbytes + model.rope.sin.nbytes


def count_parameters(model_class: type[LLaMA], config: LLaMAConfig) -> tuple[int, int]:
    """Return the number of frozen and of trained parameters."""
    model = _on_meta(model_class, config, torch.bfloat16)
    trained = sum(p.numel() for p in model.adapter_parameters().values())
    return sum(p.numel() for p in model.parameters()) - trained, trained


def _check_tokens(sequences: int, tokens: int) -> None:
    """Raise a `UserError` if a batch is larger than any device can hold."""
    if sequences * tokens > MOST_TOKENS:
        raise UserError(
            f"A batch of {sequences:,} sequences of {tokens:,} tokens has more than {MOST_TOKENS:,} in all, which no "
            "device holds; lower the sequences or the tokens."
        )


def _on_meta(model_class: type[LLaMA], config: LLaMAConfig, dtype: torch.dtype) -> LLaMA:
    with META:
        model = model_class(config)
    mark_only_adapter_as_trainable(model)
    return model.to(META, dtype)


def _quantized_bytes(weight: Tensor, quantize: str) -> int:
    """Return the bytes of a quantized weight and its scales."""
    if quantize == "int8":
        return weight.numel() + 4 * len(weight)  # a scale for each row
    blocks = weight.numel() // BLOCK
    scales = blocks + 4 * blocks // SCALE_BLOCK if quantize.endswith("-dq") else 4 * blocks
    return weight.numel() // 2 + scales


def _dequantized(model: LLaMA, quantize: str | None) -> int:
    """Return the bytes of the largest projection in the dtype of the computation; only one is alive at a time."""
    return max((layer.weight.nbytes for layer in projections(model).values()), default=0) if quantize else 0


class _KeptInput(torch.autograd.Function):
    """The input of an int8 layer, which bitsandbytes keeps for the backward pass.

    It is an attribute there, so gradient checkpointing does not free it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


# == counting ==


def _peak(work: Callable[[], None], model: LLaMA) -> int:
    """Return the peak number of live bytes during `work`, without the model."""
    counter = _AliveBytes(model)
    # a function mode would not reach the layers that the backward pass computes again
    with patch.multiple(F, scaled_dot_product_attention=_flash_attention, rms_norm=_fused_norm), counter:
        work()
    return counter.peak


class _AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return, until they are freed."""

    def __init__(self, model: LLaMA) -> None:
        super().__init__()
        self.alive = self.peak = 0
        tensors = (*model.parameters(), model.rope.cos, model.rope.sin)
        self.known = {t.untyped_storage()._cdata for t in tensors}  # addresses of storages, which views share

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def free(self, address: int, nbytes: int) -> None:
        self.known.discard(address)
        self.alive -= nbytes


def _fused_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """Stand in for `F.rms_norm`, which is fused on CUDA, but not on the meta device."""
    return _FusedNorm.apply(x, weight)


class _FusedNorm(torch.autograd.Function):
    """The tensors of CUDA's kernel: the input, in its dtype, and a normalizer for each row are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Stand in for `F.scaled_dot_product_attention`, which has no fused kernel on the meta device."""
    return _FlashAttention.apply(q, k, v, attn_mask)


class _FlashAttention(torch.autograd.Function):
    """The tensors of flash attention (arXiv 2205.14135): no scores, and the log of each query's normalizer is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, mask, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *_ = ctx.saved_tensors
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), None
