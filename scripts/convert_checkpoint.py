"""Convert a LLaMA checkpoint in Meta's layout: params.json, one or more consolidated.*.pth, and a tokenizer.

Tensors are concatenated from their shards and written one at a time, so that memory never holds the complete model.
Nothing is downloaded.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, PositiveFloat, PositiveInt


@dataclass
class Settings(Checked):
    checkpoint_dir: Path = Path("checkpoints/meta/Llama-2-7B")  # folder with params.json and consolidated.*.pth
    tokenizer_dir: Path | None = None  # folder with tokenizer.model or tokenizer.json (default: checkpoint_dir)
    output_dir: Path | None = None  # folder to write (default: checkpoints/NAME of checkpoint_dir)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the written weights; auto keeps it
    block_size: PositiveInt | None = None  # longest sequence (default: 131072 from Llama 3.1 on, 8192 for 3, else 4096)
    rope_factor: PositiveFloat | None = None  # of Llama 3.1's RoPE scaling (default: 32 with tied embeddings, else 8)


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from lit_llama.checkpoint import write_base
from lit_llama.config import LLAMA3_SCALING, MOST_FLOAT, MOST_INT
from lit_llama.huggingface.tokenizer_files import copy_tokenizer
from lit_llama.huggingface.weights import to_lit
from lit_llama.model import LLaMAConfig
from lit_llama.storage.files import atomic_folder, check_folder
from lit_llama.storage.manifest import BASE_MODEL
from lit_llama.storage.schema import field, read_json
from lit_llama.storage.tensor_files import LazyTensor, check_free, open_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log

SOURCE = "params.json"
LLAMA3_ROPE_BASE = 500000  # of Llama 3, whose context is longer than that of Llama 2
MODULES = {"transformer.wte": ["tok_embeddings"], "transformer.ln_f": ["norm"], "lm_head": ["output"]}
LAYER_MODULES = {
    "rms_1": ["attention_norm"],
    "attn.c_attn": ["attention.wq", "attention.wk", "attention.wv"],
    "attn.c_proj": ["attention.wo"],
    "rms_2": ["ffn_norm"],
    "mlp.c_fc1": ["feed_forward.w1"],
    "mlp.c_fc2": ["feed_forward.w3"],
    "mlp.c_proj": ["feed_forward.w2"],
}
# dimension along which a tensor is split into shards; norms are complete in every shard
SPLIT = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}
IGNORED = "rope.freqs"  # a table in LLaMA 1 and 2 checkpoints that is computed from the configuration instead


def meta_names(name: str) -> list[str]:
    """Return Meta's tensors whose rows make up one of our parameters, in order."""
    module = name.rpartition(".")[0]
    if module in MODULES:
        return [f"{meta_module}.weight" for meta_module in MODULES[module]]
    layer, _, part = module.removeprefix("transformer.h.").partition(".")
    return [f"layers.{layer}.{meta_module}.weight" for meta_module in LAYER_MODULES[part]]


def open_shards(checkpoint_dir: Path) -> list[dict[str, LazyTensor]]:
    """Return the tensors of each shard by name.

    Raises:
        UserError: A shard is missing or damaged, or the shards contain different tensors.
    """
    paths = sorted(checkpoint_dir.glob("consolidated.*.pth"))
    numbers = [path.name.split(".")[1] for path in paths]
    if not paths or numbers != [f"{i:02}" for i in range(len(paths))]:
        names = ", ".join(path.name for path in paths) or "none"
        raise UserError(f"{checkpoint_dir} needs consolidated.00.pth and all that follow it; found: {names}.")
    shards = [open_tensors([path]) for path in paths]
    shards = [{name: tensor for name, tensor in shard.items() if name != IGNORED} for shard in shards]
    for path, shard in zip(paths, shards, strict=True):
        if other := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(f"{path} and {paths[0].name} are not shards of one model: only one of them has {other[0]}.")
    return shards


def join_shards(shards: list[dict[str, LazyTensor]], width: int) -> dict[str, LazyTensor]:
    """Join the shards of each tensor.

    Args:
        shards: Tensors of each shard by name.
        width: Width of the model. An embedding this wide is split along the vocabulary, as in Llama 3 and later.

    Raises:
        UserError: The parts of a tensor do not fit together.
    """
    complete = {}
    for name, first in shards[0].items():
        parts = [shard[name] for shard in shards]
        dim = SPLIT.get(name.split(".")[-2] if "." in name else name)
        if name == "tok_embeddings.weight" and first.shape[-1:] == (width,):
            dim = 0
        if dim is None or len(parts) == 1:
            complete[name] = first
            continue
        if any(len(p.shape) != 2 or p.shape[1 - dim] != first.shape[1 - dim] for p in parts):
            raise UserError(f"The shards do not fit together: {name} is {' and '.join(str(p.shape) for p in parts)}.")
        size = sum(part.shape[dim] for part in parts)
        shape = (size, first.shape[1]) if dim == 0 else (first.shape[0], size)
        complete[name] = LazyTensor(shape, first.dtype, partial(concatenate, parts, dim))
    return complete


def concatenate(parts: list[LazyTensor], dim: int) -> torch.Tensor:
    return torch.cat([part.read() for part in parts], dim)


def convert_params(
    params: dict[str, Any], tensors: dict[str, LazyTensor], block_size: int | None, rope_factor: float | None
) -> LLaMAConfig:
    """Convert the content of a params.json. Sizes that it does not state are taken from the tensors.

    Raises:
        UserError: A number or a tensor is missing, or a number has the wrong type or is out of range.
    """
    embedding, head, gate = (
        tensors.get(f"{name}.weight") for name in ("tok_embeddings", "output", "layers.0.feed_forward.w1")
    )
    if embedding is None or gate is None or len(embedding.shape) != 2 or len(gate.shape) != 2:
        raise UserError(
            "The weights do not fit params.json: tok_embeddings or feed_forward.w1 is missing or is not a matrix."
        )
    tied = head is None or (head.shape == embedding.shape and torch.equal(head.read(), embedding.read()))
    rope_base = float(field(params, "rope_theta", float, SOURCE, 10000.0, least=1, most=MOST_FLOAT))
    is_scaled, scaling = field(params, "use_scaled_rope", bool, SOURCE, False), None
    if is_scaled:
        factor = rope_factor or field(params, "rope_scaling_factor", float, SOURCE, 32.0 if tied else 8.0)
        log(f"rope scaling of Llama 3.1 with factor {factor:g}")
        scaling = {**LLAMA3_SCALING, "factor": float(factor)}
    if block_size is None:
        block_size = 131072 if is_scaled else 8192 if rope_base == LLAMA3_ROPE_BASE else 4096
    return LLaMAConfig(
        block_size=block_size,
        vocab_size=embedding.shape[0],
        padded_vocab_size=embedding.shape[0],
        n_layer=field(params, "n_layers", int, SOURCE, least=1, most=MOST_INT),
        n_head=field(params, "n_heads", int, SOURCE, least=1, most=MOST_INT),
        n_embd=field(params, "dim", int, SOURCE, least=1, most=MOST_INT),
        n_kv_head=field(params, "n_kv_heads", int, SOURCE, None, least=1, most=MOST_INT),
        intermediate_size=gate.shape[0],
        norm_eps=field(params, "norm_eps", float, SOURCE, 1e-5, least=0, most=1),
        rope_base=rope_base,
        rope_scaling=scaling,
        tie_embeddings=tied,
    )


def main(settings: Settings) -> None:
    output_dir = settings.output_dir or Path("checkpoints") / settings.checkpoint_dir.resolve().name
    settings = replace(settings, output_dir=output_dir)
    check_folder(settings.output_dir, BASE_MODEL, settings.checkpoint_dir, settings.tokenizer_dir)
    params = read_json(settings.checkpoint_dir / "params.json")
    tensors = join_shards(open_shards(settings.checkpoint_dir), field(params, "dim", int, SOURCE))
    config = convert_params(params, tensors, settings.block_size, settings.rope_factor)
    tokenizer_dir = settings.tokenizer_dir or settings.checkpoint_dir
    Tokenizer(tokenizer_dir).check_fit(config)
    if config.tie_embeddings:
        tensors.pop("output.weight", None)
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    state = to_lit(tensors, config, dtype, names=meta_names, source=SOURCE, half_split=False)
    check_free(settings.output_dir, sum(t.nbytes for t in state.values()))
    with atomic_folder(settings.output_dir, BASE_MODEL) as folder:
        write_base(folder, config, state)
        copy_tokenizer(tokenizer_dir, folder)
    if settings.block_size is None:
        log(f"longest sequence: {config.block_size:,} tokens; change it with --block_size (2048 for LLaMA 1)")
    log(f"{sum(torch.Size(t.shape).numel() for t in state.values()):,} parameters, {len(state)} tensors")
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
