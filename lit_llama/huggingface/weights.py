"""Weights in Hugging Face's layout, in both directions.

Tensors are renamed, the rows of q, k and v are concatenated or split, and the rows of q and k are reordered between the
half-split order of Hugging Face's rotary embedding and the interleaved order that Meta and this project use.
"""

import json
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import torch
from tqdm import tqdm

from lit_llama.huggingface.config import has_attention_bias, hf_config
from lit_llama.huggingface.tokenizer_files import write_hf_tokenizer
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.storage.files import write_text
from lit_llama.storage.schema import field, read_json
from lit_llama.storage.tensor_files import LazyTensor, check_free, write_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, plain_name
from lit_llama.variant import check_shapes

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# our module -> Hugging Face's; the rows of several are concatenated
MODULES = {"transformer.wte": ["model.embed_tokens"], "transformer.ln_f": ["model.norm"], "lm_head": ["lm_head"]}
LAYER_MODULES = {
    "rms_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "rms_2": ["post_attention_layernorm"],
    "mlp.c_fc1": ["mlp.gate_proj"],
    "mlp.c_fc2": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
HALF_SPLIT = tuple(f".{name}_{part}" for name in "qk" for part in ("proj.weight", "proj.bias", "norm.weight"))
IGNORED = ".rotary_emb.inv_freq"  # a table in old files, which follows from the configuration


# == names and row order ==


def hf_names(name: str) -> list[str]:
    """Return the Hugging Face tensors whose rows make up one of our parameters, in order."""
    module, _, kind = name.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if module in MODULES:
        return [f"{hf_module}.{kind}" for hf_module in MODULES[module]]
    layer, _, part = module.removeprefix("transformer.h.").partition(".")
    return [f"model.layers.{layer}.{hf_module}.{kind}" for hf_module in LAYER_MODULES[part]]


def interleave(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Reorder the rows of q or k, (nh · hs, ...), or of the norm of their heads, (hs,).

    Rows 0, hs/2, 1, hs/2 + 1, ... of each head become 0, 1, 2, 3, ...
    """
    halves = rows.unflatten(0, (-1, 2, head_size // 2))  # (nh, 2, hs / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


def deinterleave(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Undo `interleave`."""
    pairs = rows.unflatten(0, (-1, head_size // 2, 2))  # (nh, hs / 2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)


def qkv_rows(config: LLaMAConfig) -> list[int]:
    """Return the number of rows of q, k and v."""
    return [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]


# == files ==


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """Return the weight files of a folder in Hugging Face's layout, those named by the index if there is one.

    Raises:
        UserError: There are no weights, or the index is damaged or names a missing file.
    """
    path = next((checkpoint_dir / name for name in WEIGHTS if (checkpoint_dir / name).is_file()), None)
    if path is None:
        raise UserError(f"{checkpoint_dir} has no weights: none of {', '.join(WEIGHTS)}.")
    if path.suffix != ".json":
        return [path]
    weight_map = field(read_json(path), "weight_map", dict, path)
    names = [plain_name(name, path) for name in weight_map.values()]
    files = [checkpoint_dir / name for name in sorted(set(names))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path} names {', '.join(missing)}, which is not in the folder; download it again.")
    return files


# == tensors ==


def parameters(config: LLaMAConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by name."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LLaMA(config).named_parameters()}


def without_tied_head(tensors: dict[str, LazyTensor], config: LLaMAConfig, embedding: str) -> dict[str, LazyTensor]:
    """Drop an output layer that is stored although it is tied to the tensor named `embedding`.

    Raises:
        UserError: The two differ.
    """
    if not config.tie_embeddings or "lm_head.weight" not in tensors:
        return tensors
    if embedding in tensors and not torch.equal(tensors["lm_head.weight"].read(), tensors[embedding].read()):
        raise UserError("The configuration ties lm_head.weight to the embedding, but the file holds a different one.")
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def to_lit(
    tensors: dict[str, LazyTensor],
    config: LLaMAConfig,
    dtype: torch.dtype | None = None,
    *,
    names: Callable[[str], list[str]] = hf_names,
    source: str = "config.json",
    half_split: bool = True,
) -> dict[str, LazyTensor]:
    """Convert Hugging Face's tensors to our parameters.

    Args:
        tensors: Tensors by name.
        config: Configuration that they must fit exactly.
        dtype: Dtype to convert to; None keeps each tensor's dtype.
        names: Names in the source layout, if it is not Hugging Face's; see `hf_names`.
        source: File that the configuration comes from, for error messages.
        half_split: Whether q and k have the half-split order.

    Raises:
        UserError: A tensor is missing, unexpected, or of another shape.
    """
    shapes = parameters(config)
    expected = {}
    for name, shape in shapes.items():
        parts = names(name)
        rows = qkv_rows(config) if len(parts) > 1 else [shape[0]]
        expected |= {part: (n, *shape[1:]) for part, n in zip(parts, rows, strict=True)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}
    tensors = without_tied_head(tensors, config, "model.embed_tokens.weight")
    check_shapes(tensors, expected, f"The weights do not fit {source}")

    def read(parts: list[str]) -> torch.Tensor:
        rows = {part: tensors[part].read() for part in parts}
        if half_split:
            rows |= {p: interleave(rows[p], config.head_size) for p in parts if p.endswith(HALF_SPLIT)}
        return rows[parts[0]] if len(parts) == 1 else torch.cat([rows[part] for part in parts])

    converted = {}
    for name, shape in shapes.items():
        common = reduce(torch.promote_types, (tensors[part].dtype for part in names(name)))
        converted[name] = LazyTensor(shape, dtype or common, partial(read, names(name)))
    return converted


def to_hf(
    tensors: dict[str, LazyTensor], config: LLaMAConfig, dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """Convert our parameters to Hugging Face's tensors. Rows beyond the vocabulary are dropped.

    If only some of q, k, v and o have biases, the others get zeros: Hugging Face's LLaMA has biases on all or none. The
    exception is a model with biases on q, k and v only, which is written as a Qwen2.

    Args:
        tensors: Tensors by name.
        config: Configuration that they must fit exactly.
        dtype: Dtype to convert to; None keeps each tensor's dtype.

    Raises:
        UserError: A tensor is missing, unexpected, or of another shape.
    """
    tensors = without_tied_head(tensors, config, "transformer.wte.weight")
    check_shapes(tensors, parameters(config), "The weights do not fit lit_config.json")

    def read(tensor: LazyTensor, first: int, last: int, part: str) -> torch.Tensor:
        rows = tensor.read()[first:last]
        return deinterleave(rows, config.head_size) if part.endswith(HALF_SPLIT) else rows

    converted: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        parts, counts = hf_names(name), [tensor.shape[0]]
        if len(parts) > 1:
            counts = qkv_rows(config)
        elif module in ("transformer.wte", "lm_head"):
            counts = [config.vocab_size]
        biased = module.endswith((".c_attn", ".attn.c_proj")) and has_attention_bias(config)
        needs_bias = kind == "weight" and biased and f"{module}.bias" not in tensors
        first = 0
        for part, count in zip(parts, counts, strict=True):
            rows = partial(read, tensor, first, first + count, part)
            converted[part] = LazyTensor((count, *tensor.shape[1:]), dtype or tensor.dtype, rows)
            if needs_bias:
                bias = f"{part.removesuffix('weight')}bias"
                converted[bias] = LazyTensor((count,), dtype or tensor.dtype, partial(torch.zeros, count))
            first += count
    return converted


# == folders ==


def write_hf(
    folder: Path, tensors: dict[str, LazyTensor], config: LLaMAConfig, checkpoint_dir: Path, max_shard_size: str
) -> None:
    """Write a folder that transformers loads.

    Args:
        folder: Folder to write.
        tensors: Tensors as returned by `to_hf`.
        config: Configuration of the model.
        checkpoint_dir: Folder whose tokenizer is copied.
        max_shard_size: Size such as "5GB" or "200MB". Larger weights are written to several files with an index. A
            tensor is never split, so a file can be larger.

    Raises:
        UserError: The tokenizer is missing or does not fit, the size is invalid, or the disk has too little space.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    tokenizer = Tokenizer(checkpoint_dir)
    tokenizer.check_fit(config)
    try:
        if float(max_shard_size.strip()[:-2]) <= 0:
            raise ValueError
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (ValueError, OverflowError):
        raise UserError(f"{max_shard_size!r} is not a size; write it like 5GB or 200MB.") from None
    total = sum(t.nbytes for t in tensors.values())
    check_free(folder, total)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=total, desc="Writing", unit="B", unit_scale=True) as bar:
        for file, names in split.filename_to_tensors.items():
            write_tensors(folder / file, {name: tensors[name] for name in names}, bar.update)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    dtype = tensors["model.embed_tokens.weight"].dtype
    write_text(folder / "config.json", json.dumps(hf_config(config, dtype, tokenizer), indent=2) + "\n")
    write_hf_tokenizer(folder, tokenizer, config.block_size)
