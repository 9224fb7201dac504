"""Converts a LLaMA checkpoint in Hugging Face layout: config.json, safetensors or .bin weights, tokenizer.model.

Names change, the rows of q, k and v are joined into one matrix, and those of q and k go from the half-split order of
Hugging Face's rotary embedding to the interleaved order of Meta's. Nothing is downloaded.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch
from jsonargparse import Namespace
from tqdm import tqdm

from lit_llama import cli
from lit_llama.checkpoint import CONFIG_NAME, TOKENIZER_NAME, read_state, save_base
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.utils import UserError, atomic_write, log

checkpoint_dir: Path = Path("checkpoints/hf/Llama-2-7B")  # the Hugging Face folder
output_dir: Path = Path("checkpoints/Llama-2-7B")  # the folder to write
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the written weights; auto: as they are

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
COPIED = (TOKENIZER_NAME, "tokenizer.json", "tokenizer_config.json", "generation_config.json")

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


def hf_names(name: str) -> list[str]:
    """The Hugging Face tensors whose rows make up one of our parameters, in order."""
    module, _, kind = name.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if module in MODULES:
        return [f"{theirs}.{kind}" for theirs in MODULES[module]]
    layer, _, part = module.removeprefix("transformer.h.").partition(".")
    return [f"model.layers.{layer}.{theirs}.{kind}" for theirs in LAYER_MODULES[part]]


def convert_config(hf: dict[str, Any]) -> LLaMAConfig:
    """A config.json as our configuration; what it may leave out has the defaults of Hugging Face's LlamaConfig.

    Raises:
        UserError: another architecture, a field is missing, or a feature is not supported.
    """
    architectures = hf.get("architectures") or [hf.get("model_type")]
    if "LlamaForCausalLM" not in architectures and architectures != ["llama"]:
        raise UserError(f"The architecture is {architectures[0]}; only LlamaForCausalLM can be converted.")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in sizes if not isinstance(hf.get(name), int)]:
        raise UserError(f"config.json has no number for {', '.join(missing)}.")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"The activation is {hf['hidden_act']}; LLaMA has silu, and nothing else can be converted.")
    if hf.get("quantization_config"):
        raise UserError("The weights are quantized; convert the unquantized checkpoint.")
    rope_base, rope_scaling = convert_rope(hf)
    return LLaMAConfig(
        block_size=hf.get("max_position_embeddings", 2048),
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
        qkv_bias=hf.get("attention_bias", False),
        proj_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
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


def interleave(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rows of q or k, (heads · hs, ...): each head's (0, hs/2, 1, hs/2 + 1, ...) become its rows 0, 1, 2, 3, ..."""
    halves = rows.unflatten(0, (-1, 2, head_size // 2))  # (heads, 2, hs / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


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
        raise UserError(f"There is no {path.name} in {path.parent}; --checkpoint_dir is a Hugging Face model's folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__} where an object belongs.")
    return content


def convert_weights(
    tensors: dict[str, torch.Tensor], config: LLaMAConfig, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors as our state dict, one parameter at a time.

    Args:
        tensors: by name; memory-mapped ones stay in their file until their turn. Emptied on the way.
        config: the model they must fit exactly.
        dtype: to cast to; None keeps each tensor's own.

    Raises:
        UserError: a tensor is missing, left over or mis-shaped; the sentence names it.
    """
    with torch.device("meta"):
        wanted = dict(LLaMA(config).named_parameters())
    shapes = {}
    for name, parameter in wanted.items():
        theirs = hf_names(name)
        rows = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        rows = rows if len(theirs) > 1 else [len(parameter)]
        shapes |= {hf: (n, *parameter.shape[1:]) for hf, n in zip(theirs, rows, strict=True)}
    for name in [name for name in tensors if name.endswith(IGNORED)]:
        del tensors[name]
    if config.tie_embeddings and "lm_head.weight" in tensors:
        if not torch.equal(tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight", torch.empty(0))):
            raise UserError("config.json ties lm_head.weight to the embedding, but the file holds a different one.")
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} does not belong to this model" for name in tensors if name not in shapes]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} where config.json makes it {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"The weights do not fit config.json: {'; '.join(problems[:3])}{more}.")

    state = {}
    for name in tqdm(wanted, desc="Converting", unit="tensor"):
        parts = [tensors.pop(theirs).to(dtype) for theirs in hf_names(name)]
        if len(parts) > 1:
            q, k, v = parts
            parts = [torch.cat((interleave(q, config.head_size), interleave(k, config.head_size), v))]
        state[name] = parts[0]
    return state


def main(args: Namespace) -> None:
    config = convert_config(read_json(args.checkpoint_dir / "config.json"))
    if not (args.checkpoint_dir / TOKENIZER_NAME).is_file():
        raise UserError(f"There is no {TOKENIZER_NAME} in {args.checkpoint_dir}; download it too.")
    tensors = {name: t for path in weight_files(args.checkpoint_dir) for name, t in read_state(path).items()}
    with atomic_write(args.output_dir, marker=CONFIG_NAME) as folder:
        state = convert_weights(tensors, config, None if args.dtype == "auto" else getattr(torch, args.dtype))
        save_base(folder, config, state)
        for name in COPIED:
            if (args.checkpoint_dir / name).is_file():
                shutil.copyfile(args.checkpoint_dir / name, folder / name)
    log(f"{sum(t.numel() for t in state.values()):,} parameters, {len(state)} tensors")
    print(args.output_dir)


if __name__ == "__main__":
    cli.run(main, __file__, globals())
