"""Checkpoints in Hugging Face's layout, in both directions.

Names change, the rows of q, k and v are joined into one matrix or taken apart, and those of q and k go between the
half-split order of Hugging Face's rotary embedding and the interleaved order of Meta's and ours.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import tokenizers
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, processors
from tqdm import tqdm

from lit_llama.checkpoint import TOKENIZER_NAME, write_text
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.tensor_files import LazyTensor, check_space, write_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (TOKENIZER_NAME, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "generation_config.json")  # fmt: skip
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}

# our module -> theirs; several are joined by rows
MODULES = {"transformer.wte": ["model.embed_tokens"], "transformer.ln_f": ["model.norm"], "lm_head": ["lm_head"]}
LAYER_MODULES = {
    "rms_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "rms_2": ["post_attention_layernorm"],
    "mlp.c_fc1": ["mlp.gate_proj"],
    "mlp.c_fc2": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
IGNORED = ".rotary_emb.inv_freq"  # a table that old files carry; it follows from the configuration


# == names and orders ==


def hf_names(name: str) -> list[str]:
    """The Hugging Face tensors whose rows make up one of our parameters, in order."""
    module, _, kind = name.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if module in MODULES:
        return [f"{theirs}.{kind}" for theirs in MODULES[module]]
    layer, _, part = module.removeprefix("transformer.h.").partition(".")
    return [f"model.layers.{layer}.{theirs}.{kind}" for theirs in LAYER_MODULES[part]]


def interleave(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rows of q or k, (heads · hs, ...): each head's (0, hs/2, 1, hs/2 + 1, ...) become its rows 0, 1, 2, 3, ..."""
    halves = rows.unflatten(0, (-1, 2, head_size // 2))  # (heads, 2, hs / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


def deinterleave(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """What `interleave` moved, back in its place."""
    pairs = rows.unflatten(0, (-1, head_size // 2, 2))  # (heads, hs / 2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)


# == configurations ==


def convert_config(hf: dict[str, Any]) -> LLaMAConfig:
    """A config.json as our configuration; what it may leave out has the defaults of Hugging Face's LlamaConfig.

    A sliding window (Mistral's) limits the context: within it, attention is the plain one.

    Raises:
        UserError: another architecture, a field is missing, or a feature is not supported.
    """
    named = hf.get("architectures") or [hf.get("model_type")]
    kind = next((kind for name, kind in ARCHITECTURES.items() if name in named or kind in named), None)
    if kind is None:
        raise UserError(f"The architecture is {named[0]}; only {', '.join(ARCHITECTURES)} can be converted.")
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if kind != "llama":
        sizes += ["num_key_value_heads", "max_position_embeddings"]
    if missing := [name for name in sizes if not isinstance(hf.get(name), int)]:
        raise UserError(f"config.json has no number for {', '.join(missing)}.")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"The activation is {hf['hidden_act']}; LLaMA has silu, and nothing else can be converted.")
    if hf.get("quantization_config"):
        raise UserError("The weights are quantized; convert the unquantized checkpoint.")
    rope_base, rope_scaling = convert_rope(hf)
    block_size = hf.get("max_position_embeddings", 2048)
    if kind == "mistral" or (kind == "qwen2" and hf.get("use_sliding_window")):
        block_size = min(block_size, hf.get("sliding_window", 4096) or block_size)
    biased = kind == "llama" and hf.get("attention_bias", False)
    return LLaMAConfig(
        block_size=block_size,
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_embd=hf["hidden_size"],
        n_kv_head=hf.get("num_key_value_heads"),
        head_size=hf.get("head_dim"),
        intermediate_size=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=biased or kind == "qwen2",
        proj_bias=biased,
        mlp_bias=kind == "llama" and hf.get("mlp_bias", False),
    )


def convert_rope(hf: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """The rotary base and scaling: `rope_theta` and `rope_scaling`, or both in `rope_parameters` (transformers 5).

    Raises:
        UserError: the scaling is not supported or lacks a number.
    """
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
    rope.update(hf.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("Only a part of each head is rotated (partial_rotary_factor), which is not supported.")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise UserError(f"Rope scaling {kind!r} is not supported; known are {', '.join(map(repr, needed))}.")
    if missing := [name for name in needed[kind] if not isinstance(rope.get(name), int | float)]:
        raise UserError(f"The rope scaling {kind!r} in config.json has no number for {', '.join(missing)}.")
    scaling = {"rope_type": kind, **{name: rope[name] for name in needed[kind]}}
    return float(rope["rope_theta"]), None if kind == "default" else scaling


def hf_config(config: LLaMAConfig, dtype: torch.dtype, tokenizer: Tokenizer) -> dict[str, Any]:
    """Our configuration as a config.json, in the spelling that every version of transformers reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": config.rope_scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": has_attention_bias(config),
        "mlp_bias": config.mlp_bias,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **token_ids(tokenizer),
    }


def has_attention_bias(config: LLaMAConfig) -> bool:
    """Hugging Face's LLaMA has biases on all of q, k, v and o, or on none."""
    return config.qkv_bias or config.proj_bias


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens, as config.json and generation_config.json name them."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {name: i if i >= 0 else None for name, i in ids.items()}


# == weights ==


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The files that hold the weights, as the index names them where there is one.

    Raises:
        UserError: there is none, or the index is damaged or names a missing file.
    """
    found = next((checkpoint_dir / name for name in WEIGHTS if (checkpoint_dir / name).is_file()), None)
    if found is None:
        raise UserError(f"{checkpoint_dir} holds no weights: none of {', '.join(WEIGHTS)}.")
    if found.suffix != ".json":
        return [found]
    weight_map = read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{found} is not an index of weight files: it has no weight_map.")
    files = [checkpoint_dir / str(name) for name in sorted(set(map(str, weight_map.values())))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"{found} names {', '.join(missing)}, which is not in the folder; download it again.")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, or something else in it.
    """
    if not path.is_file():
        raise UserError(f"There is no {path.name} in {path.parent}; --checkpoint_dir is a model's folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__} where an object belongs.")
    return content


def parameters(config: LLaMAConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters of a model, and their shapes."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LLaMA(config).named_parameters()}


def check_fit(tensors: dict[str, LazyTensor], shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raises: UserError: a tensor is missing, left over or mis-shaped; the sentence names it."""
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} does not belong to this model" for name in tensors if name not in shapes]
    problems += [
        f"{name} is {tensors[name].shape} where {source} makes it {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"The weights do not fit {source}: {'; '.join(problems[:3])}{more}.")


def without_tied_head(tensors: dict[str, LazyTensor], config: LLaMAConfig, embedding: str) -> dict[str, LazyTensor]:
    """Drops an output layer that is written out although it is the embedding.

    Raises:
        UserError: it is another matrix.
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
    """Hugging Face's tensors as our parameters.

    Args:
        config: the model they must fit exactly.
        dtype: to cast to; None keeps each tensor's own.
        names, source, half_split: another layout's names, its file with the sizes, and whether q and k are to be
            interleaved.

    Raises:
        UserError: a tensor is missing, left over or mis-shaped; the sentence names it.
    """
    widths = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    wanted, shapes = parameters(config), {}
    for name, shape in wanted.items():
        theirs = names(name)
        rows = widths if len(theirs) > 1 else [shape[0]]
        shapes |= {their: (n, *shape[1:]) for their, n in zip(theirs, rows, strict=True)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}
    tensors = without_tied_head(tensors, config, "model.embed_tokens.weight")
    check_fit(tensors, shapes, source)

    def joined(parts: list[LazyTensor]) -> torch.Tensor:
        if len(parts) == 1:
            return parts[0].read()
        q, k, v = (part.read() for part in parts)
        if half_split:
            q, k = (interleave(rows, config.head_size) for rows in (q, k))
        return torch.cat((q, k, v))

    found = {name: [tensors[theirs] for theirs in names(name)] for name in wanted}
    return {
        name: LazyTensor(
            wanted[name], dtype or reduce(torch.promote_types, (p.dtype for p in parts)), partial(joined, parts)
        )
        for name, parts in found.items()
    }


def to_hf(
    tensors: dict[str, LazyTensor], config: LLaMAConfig, dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """Our parameters as Hugging Face's tensors; rows beyond the vocabulary are left out.

    Where only some of q, k, v and o have biases, the others get zeros: Hugging Face's LLaMA has all or none.

    Raises:
        UserError: a tensor is missing, left over or mis-shaped; the sentence names it.
    """
    tensors = without_tied_head(tensors, config, "transformer.wte.weight")
    check_fit(tensors, parameters(config), "lit_config.json")
    widths = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]

    def rows(tensor: LazyTensor, first: int, last: int, rotary: bool) -> torch.Tensor:
        part = tensor.read()[first:last]
        return deinterleave(part, config.head_size) if rotary else part

    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        theirs = hf_names(name)
        if len(theirs) == 1:
            counts = [config.vocab_size if name in ("transformer.wte.weight", "lm_head.weight") else tensor.shape[0]]
        else:
            counts = widths
        first = 0
        for i, (hf, count) in enumerate(zip(theirs, counts, strict=True)):
            read = partial(rows, tensor, first, first + count, rotary=len(theirs) > 1 and i < 2)
            found[hf] = LazyTensor((count, *tensor.shape[1:]), dtype or tensor.dtype, read)
            first += count
        module, _, kind = name.rpartition(".")
        if module.endswith((".c_attn", ".attn.c_proj")) and kind == "weight" and has_attention_bias(config):
            for hf, count in zip(theirs, counts, strict=True):
                if f"{module}.bias" not in tensors:
                    zeros = partial(torch.zeros, count)
                    found[f"{hf.removesuffix('weight')}bias"] = LazyTensor((count,), dtype or tensor.dtype, zeros)
    return found


def write_hf(
    folder: Path, tensors: dict[str, LazyTensor], config: LLaMAConfig, checkpoint_dir: Path, max_shard_size: str
) -> None:
    """Writes a folder that transformers loads: weights, configuration, and the tokenizer of `checkpoint_dir`.

    Args:
        tensors: as `to_hf` gives them.
        max_shard_size: "5GB", "200MB": larger weights are split into several files with an index. A tensor is never
            split, so a file can be larger.

    Raises:
        UserError: the tokenizer is missing or does not fit, the size is none, or the disk is too small.
    """
    tokenizer = fitting_tokenizer(checkpoint_dir, config)
    limit = parse_size(max_shard_size)
    check_space(folder, tensors)
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(t.nbytes for t in tensors.values())
    with tqdm(total=total, desc="Writing", unit="B", unit_scale=True) as bar:
        for name, shard in zip(names, shards, strict=True):
            write_tensors(folder / name, shard, bar.update)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    dtype = tensors["model.embed_tokens.weight"].dtype
    write_text(folder / "config.json", json.dumps(hf_config(config, dtype, tokenizer), indent=2) + "\n")
    copy_tokenizer(checkpoint_dir, folder)
    if not (folder / "generation_config.json").is_file():
        write_text(folder / "generation_config.json", json.dumps(token_ids(tokenizer), indent=2) + "\n")
    if not (folder / "tokenizer.json").is_file() and tokenizer.path.name == TOKENIZER_NAME:
        if engine := as_tokenizer_json(tokenizer.path):
            write_text(folder / "tokenizer.json", engine.to_str(pretty=False))
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                     "model_max_length": config.block_size}  # fmt: skip
            about |= {"bos_token": engine.id_to_token(tokenizer.bos_id), "unk_token": engine.model.unk_token,
                      "eos_token": engine.id_to_token(tokenizer.eos_id)}  # fmt: skip
            write_text(folder / "tokenizer_config.json", json.dumps(about, indent=2) + "\n")


def as_tokenizer_json(path: Path) -> tokenizers.Tokenizer | None:
    """A SentencePiece model of LLaMA's kind for the `tokenizers` library, with the same ids for every text.

    transformers' own conversion leaves out the space that SentencePiece puts before a text which begins with one.

    Returns:
        None for another kind: not BPE, without byte fallback, or with a normalisation of texts.
    """
    spec = ModelProto.FromString(path.read_bytes())
    trained, rules = spec.trainer_spec, spec.normalizer_spec
    known = trained.model_type == trained.BPE and trained.byte_fallback and rules.add_dummy_prefix
    if not known or rules.remove_extra_whitespaces or rules.precompiled_charsmap:
        return None
    vocab = {piece.piece: i for i, piece in enumerate(spec.pieces)}
    # the pairs that make up a piece, the likeliest piece first
    normal = {piece.piece: piece.score for piece in spec.pieces if piece.type == piece.NORMAL}
    merges = []
    for text in sorted(normal, key=lambda text: -normal[text]):
        pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [(left, right) for left, right in pairs if left in normal and right in normal]
    unknown = next(piece.piece for piece in spec.pieces if piece.type == piece.UNKNOWN)
    engine = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [p.piece for p in spec.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    own = [p.piece for p in spec.pieces if p.type == p.USER_DEFINED]
    engine.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in control])
    engine.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in own])
    bos = trained.bos_piece
    if trained.bos_id >= 0:
        engine.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return engine


def fitting_tokenizer(checkpoint_dir: Path, config: LLaMAConfig) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        UserError: it is missing, or knows more tokens than the model.
    """
    tokenizer = Tokenizer(checkpoint_dir)
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise UserError(
            f"{tokenizer.path} knows {tokenizer.vocab_size:,} tokens and the model {config.padded_vocab_size:,}: they "
            "do not belong together."
        )
    return tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to the tokenizer."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def parse_size(text: str) -> int:
    """ "5GB" as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B", text.strip().upper())
    if not match or float(match[1]) == 0:
        raise UserError(f"{text!r} is not a size; write it like 5GB or 200MB.")
    return round(float(match[1]) * 1000 ** ("KMG".find(match[2]) + 1 if match[2] else 0))
