"""Random models and data for the benchmarks, and the FLOPs and bytes that computing with them takes."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from lit_llama.checkpoint import AdapterFile, weights_path, write_base
from lit_llama.data import PREFERENCE_FORMAT, SFT_FORMAT
from lit_llama.huggingface.weights import hf_config, parameters, to_hf
from lit_llama.model import LLaMAConfig, llama_configs
from lit_llama.prepare import write_dataset
from lit_llama.storage.files import atomic_folder, write_text
from lit_llama.storage.tensor_files import LazyTensor, open_tensors, write_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

START = 2  # first aligned layer
MICROWORLD = Path(__file__).parent.parent / "checkpoints" / "microworld"

# a LLaMA of 110M parameters: large enough to be limited by its matrix products, small enough for a CPU
SIZE_110M = dict(block_size=1024, vocab_size=32000, n_layer=12, n_head=12, n_embd=768, intermediate_size=2048,
                 tie_embeddings=True)  # fmt: skip

# lengths of 999 Alpaca rows in tokens of LLaMA's tokenizer, in the Alpaca template with BOS and EOS: the 0, 5, 10, …
# 100% quantiles of prompt and response
PROMPT_QUANTILES = [40, 43, 44, 46, 46, 47, 48, 49, 50, 51, 53, 57, 65, 69, 72, 74, 77, 81, 87, 97, 224]
RESPONSE_QUANTILES = [2, 9, 13, 16, 22, 29, 38, 53, 71, 92, 120, 150, 179, 212, 251, 290, 325, 366, 405, 460, 663]


def shape(size: str) -> LLaMAConfig:
    """Return the configuration of a size: "110M", or a name of `lit_llama.model.llama_configs`.

    Raises:
        UserError: There is no such size.
    """
    if size == "110M":
        return LLaMAConfig(**SIZE_110M)
    if size not in llama_configs:
        raise UserError(f"There is no size {size!r}; choose from 110M, {', '.join(llama_configs)}.")
    return LLaMAConfig.from_name(size)


def random_weights(out_dir: Path, size: str, dtype: torch.dtype) -> Path:
    """Write a base of a size with random weights, unless it exists, and return its folder.

    Its folder `hf` has the same weights in Hugging Face's format.
    """
    folder, config = out_dir / f"weights-{size}-{dtype_name(dtype)}", shape(size)
    about = json.dumps({"config": config.to_json(), "dtype": str(dtype)})
    done = folder / "benchmark.json"
    if done.is_file() and done.read_text(encoding="utf-8") == about:
        return folder

    def random(name: str, dims: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(dims) if name.endswith("scale") else 0.02 * torch.randn(dims)

    torch.manual_seed(0)
    tensors = {name: LazyTensor(dims, dtype, partial(random, name, dims)) for name, dims in parameters(config).items()}
    with atomic_folder(folder, "random model") as new:
        write_base(new, config, tensors)
        (new / "hf").mkdir()
        write_tensors(new / "hf" / "model.safetensors", to_hf(open_tensors([weights_path(new)]), config))
        write_text(new / "hf" / "config.json", json.dumps(hf_config(config, dtype, Tokenizer(MICROWORLD))))
        write_text(new / done.name, about)
    return folder


def dtype_name(dtype: torch.dtype) -> str:
    """Return "fp32", "bf16" or "fp16"."""
    return str(dtype).removeprefix("torch.").replace("float", "f" if dtype == torch.bfloat16 else "fp")


def random_adapter(config: LLaMAConfig, length: int) -> AdapterFile:
    """Return an Aligner with random nonzero gates."""
    state = {"global_value_embedding.weight": torch.randn(length, config.n_embd)}
    for layer in range(START, config.n_layer):
        state[f"transformer.h.{layer}.attn.gating_factor"] = 0.1 * torch.randn(1, config.n_head, 1, 1)
    about = {"adapter_prompt_length": length, "adapter_start_layer": START}
    return AdapterFile(state, {"method": "aligner", "config": about}, Path("random"))


def alpaca_lengths(rows: int, max_length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths (rows,) of prompts, and of prompts with their responses, drawn from Alpaca's quantiles.

    Args:
        max_length: longer rows are cut to this length.
    """
    rng = np.random.default_rng(seed)
    levels = np.linspace(0, 1, len(PROMPT_QUANTILES))
    prompts, responses = (
        np.interp(rng.random(rows), levels, quantiles).round().astype(int)
        for quantiles in (PROMPT_QUANTILES, RESPONSE_QUANTILES)
    )
    prompts = np.minimum(prompts, max_length - 2)
    return prompts, np.minimum(prompts + responses, max_length)


def write_data(folder: Path, prompts: np.ndarray, lengths: np.ndarray, vocab_size: int) -> None:
    """Write random tokens as prepared datasets of these lengths: `sft`, and `pairs` of two equally long responses."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(3, vocab_size, count).tolist()

    sizes = list(zip(prompts.tolist(), lengths.tolist(), strict=True))
    sft = {"input_ids": [tokens(n) for _, n in sizes], "prompt_length": prompts.tolist()}
    pairs = {"prompt": [tokens(p) for p, _ in sizes]}
    pairs |= {side: [tokens(n - p) for p, n in sizes] for side in ("chosen", "rejected")}
    for name, columns, format in (("sft", sft, SFT_FORMAT), ("pairs", pairs, PREFERENCE_FORMAT)):
        meta = {"format": format, "mask_prompt": True, "tokenizer_sha256": ""}
        write_dataset(folder / name, {"train": Dataset.from_dict(columns)}, meta)


def matmul_parameters(config: LLaMAConfig) -> int:
    """Return the number of weights in the matrix products of every token: projections of the blocks, output layer."""
    attention = config.n_embd * config.head_size * (2 * config.n_head + 2 * config.n_kv_head)
    mlp = 3 * config.n_embd * config.intermediate_size
    return config.n_layer * (attention + mlp) + config.padded_vocab_size * config.n_embd


def training_flops(config: LLaMAConfig, lengths: Iterable[int]) -> int:
    """Return the model FLOPs of a training step on a frozen base: 4 per weight and token, forward and backward.

    Causal attention adds, per layer and per pair of a token and one that it attends to, 2 products of 2·nh·hs FLOPs in
    the forward pass and 4 in the backward pass. Padding does not count. Work that an implementation skips (the output
    layer where nothing is predicted, gradients below the first aligned layer) counts, as is usual for MFU.
    """
    pairs = sum(int(t) * (int(t) + 1) // 2 for t in lengths)
    width = config.n_head * config.head_size
    return 4 * matmul_parameters(config) * int(sum(lengths)) + 12 * config.n_layer * width * pairs


def decode_bytes(config: LLaMAConfig, dtype: torch.dtype, batch_size: int, context: float) -> float:
    """Return the bytes that a decoding step must read: all weights once, and the keys and values of every row."""
    cache = 2 * config.n_layer * config.n_kv_head * config.head_size * batch_size * context
    return (matmul_parameters(config) + cache) * dtype.itemsize


def padding_share(lengths: np.ndarray, batches: Iterable[np.ndarray]) -> float:
    """Return the share of padding among all tokens of the batches, 0 to 1."""
    batches = list(batches)
    computed = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 1 - sum(int(lengths[rows].sum()) for rows in batches) / computed
