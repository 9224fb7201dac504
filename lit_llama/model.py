"""A decoder-only LLaMA, in Lit-LLaMA's shape and with its parameter names.

Shapes in the comments:
    B  batch                 T  tokens of the input        S  tokens attended to
    C  width (n_embd)        V  padded vocabulary          P  prefix tokens (adapters)
    nh query heads           ng key/value heads            hs head size

A variant (Aligner, LLaMA-Adapter, LoRA, ...) subclasses `LLaMA`, replaces the attention module of the layers
it touches through `make_attention`, and overrides one step there: `CausalSelfAttention.attend`.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_llama.utils import UserError, find_multiple
from lit_llama.variant import Variant

LLAMA3_SCALING = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
LLAMA32_SCALING = {**LLAMA3_SCALING, "factor": 32.0}
ROPE_SCALINGS = {"llama3": set(LLAMA3_SCALING), "linear": {"rope_type", "factor"}}  # the fields of each kind

# fmt: off
llama_configs: dict[str, dict[str, Any]] = {
    "7B":  dict(n_layer=32, n_head=32, n_embd=4096, norm_eps=1e-6),
    "13B": dict(n_layer=40, n_head=40, n_embd=5120, norm_eps=1e-6),
    "30B": dict(n_layer=60, n_head=52, n_embd=6656, norm_eps=1e-6),
    "65B": dict(n_layer=80, n_head=64, n_embd=8192),
    "Llama-2-7B":  dict(block_size=4096, n_layer=32, n_head=32, n_embd=4096),
    "Llama-2-13B": dict(block_size=4096, n_layer=40, n_head=40, n_embd=5120),
    "Llama-2-70B": dict(block_size=4096, n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, intermediate_size=28672),
    "Llama-3-8B":   dict(block_size=8192, vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                         intermediate_size=14336, rope_base=500000),
    "Llama-3.1-8B": dict(block_size=131072, vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                         intermediate_size=14336, rope_base=500000, rope_scaling=LLAMA3_SCALING),
    "Llama-3.2-1B": dict(block_size=131072, vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048,
                         intermediate_size=8192, rope_base=500000, rope_scaling=LLAMA32_SCALING, tie_embeddings=True),
    "Llama-3.2-3B": dict(block_size=131072, vocab_size=128256, n_layer=28, n_head=24, n_kv_head=8, n_embd=3072,
                         intermediate_size=8192, rope_base=500000, rope_scaling=LLAMA32_SCALING, tie_embeddings=True),
    "TinyLlama-1.1B": dict(n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, intermediate_size=5632),
    "SmolLM2-135M": dict(block_size=8192, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576,
                         intermediate_size=1536, rope_base=100000, tie_embeddings=True),
    "SmolLM2-360M": dict(block_size=8192, vocab_size=49152, n_layer=32, n_head=15, n_kv_head=5, n_embd=960,
                         intermediate_size=2560, rope_base=100000, tie_embeddings=True),
    "SmolLM2-1.7B": dict(block_size=8192, vocab_size=49152, n_layer=24, n_head=32, n_embd=2048,
                         intermediate_size=8192, rope_base=130000, tie_embeddings=True),
    "microworld": dict(block_size=256, vocab_size=2048, n_layer=8, n_head=8, n_embd=192, tie_embeddings=True),
}
# fmt: on


@dataclass
class LLaMAConfig:
    """The architecture of a LLaMA-family checkpoint.

    Args:
        block_size: longest sequence, in tokens.
        vocab_size: tokens the tokenizer knows.
        padded_vocab_size: rows of the embedding and the output layer (default: `vocab_size` rounded up to a
            multiple of 64).
        n_layer, n_head, n_embd: layers, query heads, width.
        n_kv_head: key/value heads; fewer than `n_head` is grouped-query attention (default: `n_head`).
        head_size: width of one head (default: `n_embd / n_head`).
        intermediate_size: width of the MLP (default: int(8·n_embd/3) rounded up to a multiple of 256).
        norm_eps: added to the mean square in RMSNorm.
        rope_base: base of the rotary frequencies.
        rope_scaling: None, or Llama-3's ``{"rope_type": "llama3", "factor", "low_freq_factor",
            "high_freq_factor", "original_max_position_embeddings"}``, or ``{"rope_type": "linear", "factor"}``.
        tie_embeddings: the output layer is the embedding; there is no ``lm_head.weight``.
        qkv_bias, proj_bias, mlp_bias: biases on the q/k/v, the attention output and the MLP projections.

    Raises:
        UserError: sizes that do not divide, or a rope scaling this code does not know.
    """

    block_size: int = 2048
    vocab_size: int = 32000
    padded_vocab_size: int | None = None
    n_layer: int = 32
    n_head: int = 32
    n_embd: int = 4096
    n_kv_head: int | None = None
    head_size: int | None = None
    intermediate_size: int | None = None
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in fields(LLaMAConfig) if f.type in (int, int | None)}
        for name, size in sizes.items():
            if size is not None and (type(size) is not int or size < 1):
                raise UserError(f"{name} is {size!r}; it must be a whole number, 1 or more.")
        if self.head_size is None:
            if self.n_embd % self.n_head:
                raise UserError(f"n_embd ({self.n_embd}) is not a multiple of n_head ({self.n_head}).")
            self.head_size = self.n_embd // self.n_head
        if self.head_size % 2:
            raise UserError(f"head_size ({self.head_size}) is odd; rotary positions turn pairs.")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head ({self.n_head}) is not a multiple of n_kv_head ({self.n_kv_head}).")
        if self.padded_vocab_size is None:
            self.padded_vocab_size = find_multiple(self.vocab_size, 64)
        if self.padded_vocab_size < self.vocab_size:
            raise UserError(f"padded_vocab_size ({self.padded_vocab_size}) is below vocab_size ({self.vocab_size}).")
        if self.intermediate_size is None:
            self.intermediate_size = find_multiple(int(8 * self.n_embd / 3), 256)
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            if kind not in ROPE_SCALINGS:
                raise UserError(f"Rope scaling {kind!r} is not supported; known are {' and '.join(ROPE_SCALINGS)}.")
            missing = sorted(ROPE_SCALINGS[kind] - self.rope_scaling.keys())
            if missing:
                raise UserError(f"Rope scaling {kind!r} lacks {', '.join(missing)}.")

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "LLaMAConfig":
        """The configuration of a known model; `overrides` replace single fields.

        Raises:
            UserError: the name is not known.
        """
        if name not in llama_configs:
            raise UserError(f"There is no model named {name!r}; known are {', '.join(llama_configs)}.")
        return cls(**{**llama_configs[name], **overrides})

    @classmethod
    def from_json(cls, path: Path, **overrides: Any) -> "LLaMAConfig":
        """Reads what `to_json` wrote; `overrides` add or replace fields.

        Raises:
            UserError: the file is missing, is not JSON, or has fields this class does not know.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"There is no model configuration at {path}.") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is not JSON ({error}).") from None
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            left_over = sorted(set(values) - known) if isinstance(values, dict) else type(values).__name__
            raise UserError(f"{path} is not a model configuration of this project: it has {left_over}.")
        return cls(**{**values, **overrides})

    def to_json(self) -> str:
        """The base model's fields as JSON text (a variant's own fields belong to the adapter, not to the base)."""
        base = {f.name for f in fields(LLaMAConfig)}
        return json.dumps({k: v for k, v in asdict(self).items() if k in base}, indent=2) + "\n"


class LLaMA(Variant):
    """The language model: embedding, `n_layer` blocks, RMSNorm, output layer."""

    config_class = LLaMAConfig  # a variant names its own

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                h=nn.ModuleList(Block(config, self.make_attention(config, i)) for i in range(config.n_layer)),
                ln_f=RMSNorm(config.n_embd, config.norm_eps),
            )
        )
        head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.register_module("lm_head", head)
        self.gradient_checkpointing = False
        self._rope: RoPE | None = None

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> "CausalSelfAttention":
        """The attention module of one layer: what a variant overrides."""
        return CausalSelfAttention(config)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "LLaMA":
        return cls(cls.config_class.from_name(name, **overrides))

    def forward(
        self,
        idx: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        cache: "KVCache | None" = None,
        positions: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the model.

        Args:
            idx: (B, T) token ids. Pad on the right with any id: causal attention keeps padding out of the rest.
            labels: (B, T) token ids, -1 where nothing is to be predicted, not yet shifted. The output layer is
                applied to the positions that predict a label and to no other.
            cache: keys and values of earlier tokens; this call adds its own. Without `positions` it is a prefill
                of an empty cache.
            positions: (B, T) place of each token in its own row; needs `cache`. Default: 0 … T-1 in every row.
            last: (B,) return the logits of this one position per row.

        Returns:
            logits (B, T, V); with `last` (B, V); with `labels` the log-probabilities (n,) fp32 of the n labels,
            in row-major order.

        Raises:
            UserError: T is above `max_tokens`.
        """
        if idx.size(1) > self.max_tokens:
            raise UserError(f"A sequence of {idx.size(1)} tokens is longer than the model's {self.max_tokens}.")
        x = self.hidden(idx, cache, positions)  # (B, T, C)
        if labels is not None:
            predicts = labels[:, 1:] != -1
            return token_logps(x[:, :-1][predicts], self.output_weight, labels[:, 1:][predicts])
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last]  # (B, C)
        return F.linear(x, self.output_weight) if self.lm_head is None else self.lm_head(x)

    def hidden(
        self, idx: torch.Tensor, cache: "KVCache | None" = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The normalised output of the last block, (B, T, C): what the output layer sees."""
        return self.run_blocks(self.transformer.wte(idx), cache, positions)

    def run_blocks(
        self, x: torch.Tensor, cache: "KVCache | None" = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `hidden`, for embedded tokens (B, T, C)."""
        if self._rope is None or self._rope.turns.device != x.device:
            with torch.inference_mode(False):  # kept for training too
                self._rope = RoPE(self.config, x.device)
        rope, mask, slots = self._rope[: x.size(1)], None, None
        if positions is not None:
            rope = self._rope[positions]
            mask = cache.mask(positions)  # (B, 1, T, S)
            slots = cache.slots(positions)

        for layer, block in enumerate(self.transformer.h):
            kv = None if cache is None else cache.layer(layer, slots)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, kv, use_reentrant=False)
            else:
                x = block(x, rope, mask, kv)
        return self.transformer.ln_f(x)

    @property
    def n_virtual_tokens(self) -> int:
        """Places before the first token that a variant fills with something else."""
        return 0

    @property
    def max_tokens(self) -> int:
        """Longest sequence of tokens."""
        return self.config.block_size - self.n_virtual_tokens

    @property
    def output_weight(self) -> torch.Tensor:
        """(V, C), the embedding itself where they are tied."""
        return self.transformer.wte.weight if self.config.tie_embeddings else self.lm_head.weight

    def normalize_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Drop the output layer that other programs write beside tied embeddings.

        Raises:
            UserError: It differs from the embedding.
        """
        state_dict = super().normalize_state_dict(state_dict)
        if self.config.tie_embeddings and "lm_head.weight" in state_dict:
            head, embedding = state_dict.pop("lm_head.weight"), state_dict.get("transformer.wte.weight")
            if embedding is None or not torch.equal(head, embedding):
                raise UserError("lm_head.weight differs from the embedding, but this model's config ties the two.")
        return state_dict


class Block(nn.Module):
    def __init__(self, config: LLaMAConfig, attn: "CausalSelfAttention") -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = attn
        self.rms_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, rope: "RoPE", mask: torch.Tensor | None = None, kv: "LayerCache | None" = None
    ) -> torch.Tensor:
        x = x + self.attn(self.rms_1(x), rope, mask, kv)
        return x + self.mlp(self.rms_2(x))


class CausalSelfAttention(nn.Module):
    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        # the rows of c_attn are all queries, then all keys, then all values
        self.widths = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.proj_bias)
        self.cached: Any = None  # inside `LLaMA.inference`: what `constants` returned

    def forward(
        self, x: torch.Tensor, rope: "RoPE", mask: torch.Tensor | None = None, kv: "LayerCache | None" = None
    ) -> torch.Tensor:
        heads, nh, ng = self.heads(x), self.config.n_head, self.config.n_kv_head
        q, k = rope.apply(heads[:, : nh + ng]).split((nh, ng), dim=1)
        v = heads[:, nh + ng :]
        if kv is not None:
            k, v = kv.update(k, v)
        y = self.attend(q, k, v, mask)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, C) -> q (B, nh, T, hs), k and v (B, ng, T, hs), before any rotary."""
        nh, ng = self.config.n_head, self.config.n_kv_head
        return self.heads(x).split((nh, ng, ng), dim=1)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, nh + 2·ng, T, hs): all queries, then all keys, then all values."""
        return self.c_attn(x).unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)

    def constants(self, dtype: torch.dtype) -> Any:
        """Return what a variant's `attend` needs and no text changes, in `dtype`."""
        return None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The step a variant overrides.

        Args:
            q: (B, nh, T, hs), rotated.
            k, v: (B, ng, S, hs), k rotated.
            mask: (B, 1, T, S), True where a key may be seen; None is plain causal attention with S = T, or for T = 1
                attention to all keys.

        Returns:
            (B, nh, T, hs), before the output projection.
        """
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1, enable_gqa=k.size(1) != q.size(1)
        )


class MLP(nn.Module):
    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.c_fc1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.c_fc2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.silu(self.c_fc1(x)) * self.c_fc2(x))


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467), computed in fp32 whatever the dtype of `x` and `scale`."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), self.eps).to(x.dtype)


class RoPE:
    """Rotary position tables (arXiv 2104.09864) over interleaved pairs, fp32 on every device.

    They are no buffers of the model, so no `.to(torch.bfloat16)` can round them: in bf16 the positions above 256
    collide. Indexing with a slice or a (B, T) tensor selects positions.
    """

    def __init__(self, config: LLaMAConfig, device: torch.device | None = None) -> None:
        positions = torch.arange(config.block_size, dtype=torch.float32)
        angles = torch.outer(positions, rope_frequencies(config))  # (block_size, hs / 2)
        self.turns = torch.complex(angles.cos(), angles.sin()).to(device)

    def __getitem__(self, index: slice | torch.Tensor) -> "RoPE":
        selected = object.__new__(RoPE)
        turns = self.turns[index]
        # (T, hs / 2), or (B, 1, T, hs / 2) so that it broadcasts over heads
        selected.turns = turns.unsqueeze(1) if turns.dim() == 3 else turns
        return selected

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates each pair (x[2i], x[2i+1]) of (B, nh, T, hs) by its position's angle: a complex product."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, nh, T, hs / 2)
        return torch.view_as_real(pairs * self.turns).flatten(-2).to(x.dtype)


def rope_frequencies(config: LLaMAConfig) -> torch.Tensor:
    """(hs / 2,) radians per position, fp32; slowed down where the config scales them for a longer context."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_base**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    # Llama 3.1: wavelengths that turn often within the original context stay, rare ones are slowed, in between
    # the two are blended.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * slow


class KVCache:
    """Keys and values of every layer in buffers allocated once; the caller makes it and lets it go.

    Rows may hold different numbers of tokens: prompts are padded on the right, and each row's next token is
    written at its own position, over the padding.

    Args:
        batch_size: rows.
        max_length: tokens a row can hold.
    """

    def __init__(
        self, config: LLaMAConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, max_length, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # slots in use in the fullest row: nothing beyond is read
        self.even = False  # all rows hold equally many tokens
        rows = torch.arange(batch_size * config.n_kv_head, device=device) * max_length
        self.starts = rows.view(batch_size, config.n_kv_head, 1)  # of each row's heads in `slots`

    def layer(self, layer: int, slots: torch.Tensor | None) -> "LayerCache":
        return LayerCache(self, layer, slots)

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Where tokens at `positions` (B, T) are stored: (B·ng·T,) row numbers in a layer's buffer as (B·ng·S, hs)."""
        return (self.starts + positions.unsqueeze(1)).flatten()

    def mask(self, positions: torch.Tensor) -> torch.Tensor | None:
        """(B, 1, T, S): a token sees the slots up to its own position; None where one token a row sees all of them."""
        if self.even and positions.size(1) == 1:
            return None
        slots = torch.arange(self.length, device=positions.device)
        return (slots <= positions.unsqueeze(-1)).unsqueeze(1)


@dataclass
class LayerCache:
    """One layer's view of a `KVCache`; `slots` as it gives them, None for a prefill."""

    cache: KVCache
    index: int
    slots: torch.Tensor | None

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (B, ng, T, hs) and returns the keys and values to attend to."""
        cache_k, cache_v = self.cache.k[self.index], self.cache.v[self.index]
        if self.slots is None:
            T = k.size(2)
            cache_k[:, :, :T], cache_v[:, :, :T] = k, v
            return k, v
        for buffer, new in ((cache_k, k), (cache_v, v)):
            buffer.view(-1, buffer.size(-1)).index_copy_(0, self.slots, new.reshape(-1, buffer.size(-1)))
        return cache_k[:, :, : self.cache.length], cache_v[:, :, : self.cache.length]


LOGP_CHUNK = 512  # tokens whose logits exist at once: 66 MB in fp32 for 32,000 pieces


def token_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of `targets` in fp32, without ever holding all logits.

    Args:
        hidden: (n, C) outputs of the last norm at the positions that predict.
        weight: (V, C) output layer; frozen, it costs one product forward and one for the gradient, and nothing of
            size V is kept. One that is trained itself is multiplied once more in the backward pass.
        targets: (n,) token ids.

    Returns:
        (n,) fp32.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        chunks = zip(hidden.split(LOGP_CHUNK), targets.split(LOGP_CHUNK), strict=True)
        return torch.cat([checkpoint(chunk_logps, h, weight, t, use_reentrant=False)[0] for h, t in chunks])
    return FrozenLogps.apply(hidden, weight, targets, torch.is_grad_enabled() and hidden.requires_grad)


def chunk_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets (n,) and of all tokens (n, V), fp32."""
    logps = F.linear(hidden, weight).log_softmax(-1, dtype=torch.float32)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1), logps


class FrozenLogps(torch.autograd.Function):
    """`token_logps` for a frozen output layer: how each one changes with its hidden state is computed with it,

        d logp_t / d h = W_t - Σ_v p_v W_v,

    while the probabilities are there, so that the backward pass only multiplies (n, C) by the loss's own slopes.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, differentiable: bool
    ) -> torch.Tensor:
        found, slopes = [], []
        for h, t in zip(hidden.split(LOGP_CHUNK), targets.split(LOGP_CHUNK), strict=True):
            of_targets, logps = chunk_logps(h, weight, t)
            found.append(of_targets)
            if differentiable:
                excess = logps.exp_()  # probabilities, minus 1 at the target
                excess[torch.arange(len(t), device=t.device), t] -= 1
                slopes.append(excess.to(weight.dtype) @ weight)
        if differentiable:
            ctx.save_for_backward(torch.cat(slopes))
        ctx.dtype = hidden.dtype
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (-grad.unsqueeze(1) * slopes).to(ctx.dtype), None, None, None
