"""A decoder-only LLaMA with Lit-LLaMA's module structure and parameter names.

Shapes in the comments:
    B  batch                 T  tokens of the input        S  tokens attended to
    C  width (n_embd)        V  padded vocabulary          N  prefix tokens (adapters)
    nh query heads           ng key/value heads            hs head size

A variant (Aligner, LLaMA-Adapter, LoRA, ...) subclasses `LLaMA`, overrides `make_attention` to replace the attention
module of the layers that it changes, and there overrides a single step, usually `CausalSelfAttention.attend`.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_llama.config import LLaMAConfig, llama_configs  # noqa: F401
from lit_llama.kv_cache import KVCache, LayerCache
from lit_llama.logps import find_labels, token_logps
from lit_llama.modules import attention_dtype
from lit_llama.packing import segment_mask
from lit_llama.rope import RoPE, rotate
from lit_llama.utils import UserError
from lit_llama.variant import Variant


class LLaMA(Variant):
    """The language model: embedding, `n_layer` blocks, RMSNorm, output layer."""

    config_class = LLaMAConfig  # variants override it

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        blocks = nn.ModuleList(Block(config, self.make_attention(config, i)) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict(dict(wte=wte, h=blocks, ln_f=RMSNorm(config.n_embd, config.norm_eps)))
        head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.register_module("lm_head", head)
        self.rope = RoPE(config)
        self.gradient_checkpointing = False

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> "CausalSelfAttention":
        """Return the attention module of a layer."""
        return CausalSelfAttention(config)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "LLaMA":
        """Return a randomly initialized model of a known size, see `LLaMAConfig.from_name`."""
        return cls(cls.config_class.from_name(name, **overrides))

    def forward(self, idx: Tensor, *, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V).

        Args:
            idx: (B, T) token ids. Pad on the right with any id: attention is causal, so padding affects no other token.
            cache: keys and values of earlier tokens; this call adds its own. It must be empty if `positions` is None.
            positions: (B, T) position of each token in its row; needs `cache` (default: 0 … T-1).

        Raises:
            UserError: T is greater than `max_tokens`.
        """
        return self.unembed(self.hidden(idx, cache, positions))

    def label_logps(
        self, idx: Tensor, labels: Tensor, label_index: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Return the log-probabilities of n labels, (n,) fp32 in row-major order.

        The output layer is applied only to the positions that predict a label.

        Args:
            idx: (B, T) token ids, as for `forward`.
            labels: (B, T) token ids, not shifted; -1 where nothing is predicted.
            label_index: (n,) from `find_labels`; if None, it is computed here, which synchronizes with a GPU.
            segments: (B, T) from `lit_llama.packing.pack_answers`, for rows with several answers to a prompt. A prompt
                with one of its answers must fit into `max_tokens`; this is not checked.
        """
        index = find_labels(labels) if label_index is None else label_index
        x = self.hidden(idx, segments=segments).flatten(0, 1).index_select(0, index)  # (n, C)
        return self.hidden_logps(x, labels.flatten().index_select(0, index + 1))

    def hidden_logps(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities of tokens, (n,) fp32, for normalized hidden states (n, C) and token ids (n,)."""
        return token_logps(x, self.output_weight, targets)

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Return the normalized output of the last block, (B, T, C).

        The arguments are those of `forward` and `label_logps`. Pass either `segments`, or `cache` and `positions`.
        """
        return self.run_blocks(self.transformer.wte(idx), cache, positions, segments)

    def run_blocks(
        self, x: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Return what `hidden` does, for embedded tokens (B, T, C)."""
        mask = None  # (B, 1, T, S)
        if segments is not None:
            mask, positions = segment_mask(segments, attention_dtype(x))
        elif positions is not None:
            mask = cache.mask(positions)
        elif x.size(1) > self.config.block_size:
            n_tokens = x.size(1) - self.n_virtual_tokens
            raise UserError(f"A sequence of {n_tokens} tokens is longer than the model's {self.max_tokens}.")
        angles = self.rope(slice(x.size(1)) if positions is None else positions)
        layers = [None] * self.config.n_layer if cache is None else cache.layers(positions)
        for block, kv, rotary in zip(self.transformer.h, layers, self.config.rotary_layers, strict=True):
            rope = angles if rotary else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, kv, use_reentrant=False)
            else:
                x = block(x, rope, mask, kv)
        return self.transformer.ln_f(x)

    def unembed(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of normalized hidden states (..., C)."""
        return F.linear(x, self.output_weight) if self.lm_head is None else self.lm_head(x)

    @property
    def output_weight(self) -> Tensor:
        """The weight of the output layer, (V, C)."""
        return self.transformer.wte.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def n_virtual_tokens(self) -> int:
        """The number of positions before the first token that a variant fills with learned vectors."""
        return 0

    @property
    def max_tokens(self) -> int:
        """The length of the longest sequence, in tokens."""
        return self.config.block_size - self.n_virtual_tokens

    def normalize_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop an output layer that repeats the embedding, if the two are tied."""
        state_dict = super().normalize_state_dict(state_dict)
        if self.config.tie_embeddings and "lm_head.weight" in state_dict:
            head, embedding = state_dict.pop("lm_head.weight"), state_dict.get("transformer.wte.weight")
            if embedding is None or not torch.equal(head, embedding):
                raise UserError("lm_head.weight differs from the embedding, but this model's config ties the two.")
        return state_dict


class Block(nn.Module):
    """One layer of the transformer. `rope`, `mask` and `kv` are passed to `CausalSelfAttention`."""

    def __init__(self, config: LLaMAConfig, attn: "CausalSelfAttention") -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = attn
        self.rms_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None = None, kv: LayerCache | None = None
    ) -> Tensor:
        x = x + self.attn(self.rms_1(x), rope, mask, kv)
        return x + self.mlp(self.rms_2(x))


class CausalSelfAttention(nn.Module):
    """Causal attention with rotary embeddings; with fewer key/value heads than query heads, grouped-query attention."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        # the rows of c_attn: all queries, then all keys, then all values
        self.widths = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.proj_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps)
        self.cached: Any = None  # the result of `constants`, within `LLaMA.inference`

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None = None, kv: LayerCache | None = None
    ) -> Tensor:
        """Return the output (B, T, C) for x (B, T, C).

        Args:
            rope: from `RoPE`; None leaves out the rotation.
            mask: as for `attend`.
            kv: keys and values of earlier tokens.
        """
        qk, v = self.heads(x)
        if rope is not None:
            qk = rotate(qk, *rope)
            # autograd keeps v, and as a view it would keep queries and keys before the rotation; norms keep them, too
            if kv is None and not self.config.qk_norm:
                v = v.contiguous()
        q, k = qk.split((self.config.n_head, self.config.n_kv_head), dim=1)
        if kv is not None:
            k, v = kv.update(k, v)
        y = self.attend(q, k, v, mask)  # (B, nh, T, hs), in the dtype of the cache
        return self.c_proj(y.transpose(1, 2).flatten(2).to(x.dtype))  # (B, T, C)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries and keys of x (B, T, C) in one tensor, (B, nh + ng, T, hs), and the values (B, ng, T, hs).

        Queries and keys are not rotated; they are normalized if the architecture has norms for them.
        """
        nh, ng = self.config.n_head, self.config.n_kv_head
        qk, v = self.c_attn(x).unflatten(-1, (-1, self.config.head_size)).transpose(1, 2).split((nh + ng, ng), dim=1)
        if self.config.qk_norm:
            q, k = qk.split((nh, ng), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        return qk, v

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return only the keys and values of x (B, T, C), (B, ng, T, hs) each.

        Variants use it for additional tokens to attend to. The keys are normalized if the queries are, as in `heads`.
        """
        if type(self.c_attn) is not nn.Linear:  # its weight may be packed, quantized or adapted
            qk, v = self.heads(x)
            return qk[:, self.config.n_head :], v
        rows = slice(self.widths[0], None)
        kv = F.linear(x, self.c_attn.weight[rows], None if self.c_attn.bias is None else self.c_attn.bias[rows])
        k, v = kv.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2).chunk(2, dim=1)
        return (self.k_norm(k) if self.config.qk_norm else k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention output (B, nh, T, hs), before the output projection. Variants override this step.

        Args:
            q: (B, nh, T, hs), rotated.
            k, v: (B, ng, S, hs), k rotated; attention is computed in their dtype, which may be that of a cache.
            mask: (B, 1, T, S), 0 where a token attends to a key and -inf elsewhere, in the dtype of k. None is causal
                attention with S = T, or attention to all keys for T = 1.
        """
        if q.size(1) != k.size(1) and q.size(2) == 1:  # query heads that share a key head become query positions
            groups = q.unflatten(1, (k.size(1), -1)).squeeze(3).to(k.dtype)  # (B, ng, nh / ng, hs)
            masks = None if mask is None else mask.expand(-1, -1, groups.size(2), -1)
            return F.scaled_dot_product_attention(groups, k, v, attn_mask=masks).flatten(1, 2).unsqueeze(2)
        # CUDA has no fused kernel for grouped queries with a mask or in fp32
        if q.size(1) != k.size(1) and (mask is not None or (k.is_cuda and k.dtype == torch.float32)):
            k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        # a plain bool, even where torch.compile makes the length a symbol
        is_causal = True if mask is None and q.size(2) > 1 else False
        return F.scaled_dot_product_attention(
            q.to(k.dtype), k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=k.size(1) != q.size(1)
        )

    def constants(self, dtype: torch.dtype) -> Any:
        """Return, in `dtype`, the tensors that a variant's `attend` needs and that do not depend on the text."""
        return None


class MLP(nn.Module):
    """The gated feed-forward layer, SwiGLU (arXiv 2002.05202): c_proj(silu(c_fc1(x)) · c_fc2(x))."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.c_fc1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.c_fc2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.c_fc1(x), self.c_fc2(x)
        # generation does not pay for autograd: a decoding step of a small model takes 4% longer with `apply`
        return self.c_proj(SwiGLU.apply(gate, x) if torch.is_grad_enabled() else F.silu(gate).mul_(x))


class SwiGLU(torch.autograd.Function):
    """Return silu(gate) · x for two tensors of the same shape.

    The backward pass recomputes silu(gate), so autograd stores two tensors instead of three.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return F.silu(gate).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * x, gate), F.silu(gate).mul_(grad)


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv 1910.07467), computed in fp32. On CUDA, autograd stores x in its dtype."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.scale.dtype), self.scale.shape, self.scale, self.eps).to(x.dtype)
