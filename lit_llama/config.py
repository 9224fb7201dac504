"""The configuration of a LLaMA-family model, and the configurations of known models."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lit_llama.storage.schema import check, field, read_json
from lit_llama.utils import UserError

CONFIG_NAME = "lit_config.json"
LLAMA3_SCALING = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
LLAMA32_SCALING = {**LLAMA3_SCALING, "factor": 32.0}
QWEN25 = dict(block_size=131072, vocab_size=151936, norm_eps=1e-6, rope_base=1000000, qkv_bias=True)
QWEN3 = dict(block_size=40960, vocab_size=151936, n_kv_head=8, head_size=128, norm_eps=1e-6, rope_base=1000000,
             qk_norm=True)  # fmt: skip
ROPE_SCALINGS = {"llama3": set(LLAMA3_SCALING), "linear": {"rope_type", "factor"}}  # the fields of each type
MOST = {"n_layer": 1024, "block_size": 2**20, "n_embd": 2**17, "intermediate_size": 2**20, "norm_eps": 1.0}
MOST_INT, MOST_FLOAT = 2**24, 10**12  # of all other fields
MOST_ANGLES = 2**27  # block_size × head_size: the rotary table of a million tokens

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
    "Llama-3.1-70B": dict(block_size=131072, vocab_size=128256, n_layer=80, n_head=64, n_kv_head=8, n_embd=8192,
                          intermediate_size=28672, rope_base=500000, rope_scaling=LLAMA3_SCALING),
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
    "SmolLM3-3B": dict(block_size=65536, vocab_size=128256, n_layer=36, n_head=16, n_kv_head=4, n_embd=2048,
                       intermediate_size=11008, norm_eps=1e-6, rope_base=5000000, tie_embeddings=True,
                       nope_layers=list(range(3, 36, 4))),
    "Qwen2.5-0.5B": dict(QWEN25, block_size=32768, n_layer=24, n_head=14, n_kv_head=2, n_embd=896,
                         intermediate_size=4864, tie_embeddings=True),
    "Qwen2.5-1.5B": dict(QWEN25, n_layer=28, n_head=12, n_kv_head=2, n_embd=1536, intermediate_size=8960,
                         tie_embeddings=True),
    "Qwen2.5-3B":   dict(QWEN25, block_size=32768, n_layer=36, n_head=16, n_kv_head=2, n_embd=2048,
                         intermediate_size=11008, tie_embeddings=True),
    "Qwen2.5-7B":   dict(QWEN25, vocab_size=152064, n_layer=28, n_head=28, n_kv_head=4, n_embd=3584,
                         intermediate_size=18944),
    "Qwen2.5-14B":  dict(QWEN25, vocab_size=152064, n_layer=48, n_head=40, n_kv_head=8, n_embd=5120,
                         intermediate_size=13824, norm_eps=1e-5),
    "Qwen2.5-32B":  dict(QWEN25, vocab_size=152064, n_layer=64, n_head=40, n_kv_head=8, n_embd=5120,
                         intermediate_size=27648, norm_eps=1e-5),
    "Qwen3-0.6B": dict(QWEN3, n_layer=28, n_head=16, n_embd=1024, intermediate_size=3072, tie_embeddings=True),
    "Qwen3-1.7B": dict(QWEN3, n_layer=28, n_head=16, n_embd=2048, intermediate_size=6144, tie_embeddings=True),
    "Qwen3-4B":   dict(QWEN3, n_layer=36, n_head=32, n_embd=2560, intermediate_size=9728, tie_embeddings=True),
    "Qwen3-8B":   dict(QWEN3, n_layer=36, n_head=32, n_embd=4096, intermediate_size=12288),
    "Qwen3-14B":  dict(QWEN3, n_layer=40, n_head=40, n_embd=5120, intermediate_size=17408),
    "Qwen3-32B":  dict(QWEN3, n_layer=64, n_head=64, n_embd=5120, intermediate_size=25600),
    "Mistral-7B-v0.1": dict(block_size=4096, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, intermediate_size=14336),
    "Mistral-7B-v0.3": dict(block_size=32768, vocab_size=32768, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                            intermediate_size=14336, rope_base=1000000),
    "microworld": dict(block_size=256, vocab_size=2048, n_layer=8, n_head=8, n_embd=192, tie_embeddings=True),
}
# fmt: on


@dataclass
class LLaMAConfig:
    """The architecture of a LLaMA-family checkpoint.

    Args:
        block_size: longest sequence, in tokens.
        vocab_size: size of the tokenizer's vocabulary.
        padded_vocab_size: rows of the embedding and the output layer (default: `vocab_size` rounded up to a
            multiple of 64).
        n_layer, n_head, n_embd: number of layers, number of query heads, width.
        n_kv_head: number of key/value heads; fewer than `n_head` is grouped-query attention (default: `n_head`).
        head_size: width of one head (default: `n_embd / n_head`).
        intermediate_size: width of the MLP (default: int(8·n_embd/3) rounded up to a multiple of 256).
        norm_eps: added to the mean square in RMSNorm.
        rope_base: base of the rotary frequencies.
        rope_scaling: None, or Llama-3's ``{"rope_type": "llama3", "factor", "low_freq_factor",
            "high_freq_factor", "original_max_position_embeddings"}``, or ``{"rope_type": "linear", "factor"}``.
        tie_embeddings: use the embedding as output layer; there is no ``lm_head.weight``.
        qkv_bias, proj_bias, mlp_bias: whether the q/k/v, the attention output and the MLP projections have biases.
        qk_norm: whether queries and keys pass an RMSNorm over each head before they are rotated (Qwen3).
        nope_layers: layers without rotary positions (NoPE, SmolLM3), counted from 0 (default: none).

    Raises:
        UserError: A field has the wrong type or is out of range, a size does not divide another, or the rope scaling is
            not supported.
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
    qk_norm: bool = False
    nope_layers: list[int] | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            least = 1 if f.name in LLaMAConfig.__dataclass_fields__ and f.name != "norm_eps" else 0
            most = MOST.get(f.name, MOST_INT if f.type in (int, int | None) else MOST_FLOAT)
            check(getattr(self, f.name), f.type, f.name, least=least, most=most)
        if self.head_size is None:
            if self.n_embd % self.n_head:
                raise UserError(f"n_embd ({self.n_embd}) is not a multiple of n_head ({self.n_head}).")
            self.head_size = self.n_embd // self.n_head
        if self.head_size % 2:
            raise UserError(f"head_size ({self.head_size}) is odd; rotary positions rotate pairs.")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head ({self.n_head}) is not a multiple of n_kv_head ({self.n_kv_head}).")
        if self.padded_vocab_size is None:
            self.padded_vocab_size = round_up(self.vocab_size, 64)
        if self.padded_vocab_size < self.vocab_size:
            raise UserError(f"padded_vocab_size ({self.padded_vocab_size}) is below vocab_size ({self.vocab_size}).")
        if self.intermediate_size is None:
            self.intermediate_size = round_up(int(8 * self.n_embd / 3), 256)
        for layer in self.nope_layers or []:
            check(layer, int, "A layer in nope_layers", least=0, most=self.n_layer - 1)
        self.nope_layers = sorted(set(self.nope_layers or [])) or None
        if self.block_size * self.head_size > MOST_ANGLES:
            sizes = f"block_size ({self.block_size:,}) × head_size ({self.head_size:,})"
            raise UserError(f"{sizes} is above {MOST_ANGLES:,}.")
        if self.rope_scaling is not None:
            kind = field(self.rope_scaling, "rope_type", str | None, "rope_scaling", None)
            if kind not in ROPE_SCALINGS:
                raise UserError(f"Rope scaling {kind!r} is not supported, only {' and '.join(ROPE_SCALINGS)}.")
            missing = sorted(ROPE_SCALINGS[kind] - self.rope_scaling.keys())
            if missing:
                raise UserError(f"Rope scaling {kind!r} lacks {', '.join(missing)}.")
            for name in ROPE_SCALINGS[kind] - {"rope_type"}:
                field(self.rope_scaling, name, float, "rope_scaling", least=1e-6, most=MOST_FLOAT)

    @property
    def rotary_layers(self) -> list[bool]:
        """Whether each layer rotates its queries and keys."""
        return [layer not in (self.nope_layers or []) for layer in range(self.n_layer)]

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "LLaMAConfig":
        """Return the configuration of a known model, with `overrides` in place of single fields.

        Raises:
            UserError: The name is not in `llama_configs`.
        """
        if name not in llama_configs:
            raise UserError(f"There is no model named {name!r}; choose from {', '.join(llama_configs)}.")
        return cls(**{**llama_configs[name], **overrides})

    @classmethod
    def from_json(cls, path: Path, **overrides: Any) -> "LLaMAConfig":
        """Read a file written by `to_json`; `overrides` add or replace fields.

        Raises:
            UserError: The file is missing, is not JSON, has unknown fields, or has values that are out of range.
        """
        if not path.exists() and path.with_name("config.json").is_file():
            raise UserError(
                f"{path.parent} has Hugging Face's layout; convert it with scripts/convert_hf_checkpoint.py, and name "
                "the new folder."
            )
        values = read_json(path, what="model configuration")
        if unknown := sorted(values.keys() - {f.name for f in fields(LLaMAConfig)}):
            raise UserError(f"{path} is not a model configuration of this project: it has {unknown}.")
        try:
            LLaMAConfig(**values)
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}") from None
        return cls(**{**values, **overrides})

    def to_json(self) -> str:
        """Return the base model's fields as JSON; the fields of a variant are saved with its adapter."""
        base = {f.name for f in fields(LLaMAConfig)}
        return json.dumps({k: v for k, v in asdict(self).items() if k in base}, indent=2) + "\n"


def round_up(n: int, multiple: int) -> int:
    """Round n up to a multiple."""
    return -(-n // multiple) * multiple
