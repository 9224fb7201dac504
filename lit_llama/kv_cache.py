"""The KV cache: keys and values of earlier tokens, for generation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.modules import attention_mask

Slots = Tensor | tuple[Tensor, Tensor, Tensor] | None  # see `LayerCache`


def cache_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the cache for a model with this weight: on a CPU at least fp32, elsewhere that of the weight.

    On a CPU, attention of single queries is two to five times as fast in fp32 as in bf16 (howto/performance.md).
    """
    return torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype


class KVCache:
    """Keys and values of every layer, in buffers that are allocated once.

    The rows of a batch may have different lengths. Prompts are padded on the right, and the next token of a row is
    written at its own position, over the padding.

    Args:
        batch_size: number of rows.
        max_length: number of tokens a row can hold.
        dtype: see `cache_dtype`; decoding computes attention in it.
        static: attend to all slots and mask those after each token, so that the shapes of a decoding step never change
            (for lit_llama/compiled.py). Otherwise slots that no row has reached are left out, which is faster.
    """

    def __init__(
        self,
        config: LLaMAConfig,
        batch_size: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        static: bool = False,
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, max_length, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.static = static
        self.length = 0  # of the longest row; slots beyond it are not read
        self.even = False  # whether all rows have the same length
        self.rows = torch.arange(batch_size, device=device).view(-1, 1, 1)  # (B, 1, 1)
        self.heads = torch.arange(config.n_kv_head, device=device).view(-1, 1)  # (ng, 1)
        # (B, ng, 1) index of each head's first slot in a layer's buffer
        self.starts = (self.rows * config.n_kv_head + self.heads) * max_length

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, (n,) int64, in the same buffers: copies would be alive together with the old ones."""
        n = len(rows)
        for layer in (*self.k, *self.v):
            layer[:n] = layer[rows]
        self.k, self.v, self.starts = self.k[:, :n], self.v[:, :n], self.starts[:n]

    def layers(self, positions: Tensor | None) -> "list[LayerCache]":
        """Return a view of each layer, for tokens at `positions` (B, T), or at 0 … T-1 of an empty cache if None."""
        slots: Slots = None
        if positions is not None and self.static:
            slots = self.rows, self.heads, positions.unsqueeze(1)
        elif positions is not None:
            slots = (self.starts + positions.unsqueeze(1)).flatten()
        return [LayerCache(self, k, v, slots) for k, v in zip(self.k, self.v, strict=True)]

    def mask(self, positions: Tensor) -> Tensor | None:
        """Return the `attention_mask` (B, 1, T, S) of the slots up to each position (B, T); None for all slots."""
        if self.even and positions.size(1) == 1 and not self.static:
            return None
        slots = torch.arange(self.k.size(3) if self.static else self.length, device=positions.device)
        return attention_mask(slots <= positions.unsqueeze(-1), self.k.dtype)


@dataclass
class LayerCache:
    """One layer of a `KVCache`.

    Args:
        k, v: (B, ng, max_length, hs).
        slots: (B·ng·T,) where the next tokens are written in k and v as (B·ng·max_length, hs); None for a prefill. A
            static cache has the indices (B, 1, 1), (ng, 1) and (B, 1, T) of row, head and position instead, which
            compiled code writes in place; it would copy the view. Eager code is slower with them.
    """

    cache: KVCache
    k: Tensor
    v: Tensor
    slots: Slots

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, ng, T, hs) and return those to attend to, (B, ng, S, hs).

        A prefill attends to the keys and values as they are, a decoding step to those in the cache, in its dtype.
        """
        if self.slots is None:
            T = k.size(2)
            self.k[:, :, :T], self.v[:, :, :T] = k, v
            return k, v
        if self.cache.static:
            self.k[self.slots], self.v[self.slots] = k.to(self.k.dtype), v.to(self.v.dtype)
            return self.k, self.v
        for buffer, new in ((self.k, k), (self.v, v)):
            heads = new.to(buffer.dtype).reshape(-1, buffer.size(-1))
            buffer.view(-1, buffer.size(-1)).index_copy_(0, self.slots, heads)
        return self.k[:, :, : self.cache.length], self.v[:, :, : self.cache.length]
