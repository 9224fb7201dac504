"""Estimate the memory of SFT, DPO and generation from a model's configuration; no weights are needed.

The model is a known size, the Hub's name of one of these, or a folder with a lit_config.json or a config.json. With
--table, print the table of howto/models.md: all known sizes. The finetuning scripts compute the same for their data
with --dry_run.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, NonNegativeInt, PositiveInt, PositiveShare, Quantize


@dataclass
class Settings(Checked):
    # == Model ==
    model: str = "Llama-2-7B"  # a size of lit_llama/config.py, or the Hub's name of one, as in --table
    checkpoint_dir: Path | None = None  # instead: a folder with lit_config.json or config.json, or the file itself
    precision: Literal["bf16", "bf16-true", "fp32", "32", "32-true"] = "bf16"  # precision of the frozen weights
    quantize: Quantize | None = None  # store the base's layers in 4 or 8 bits

    # == Method ==
    method: str = "aligner"  # or another name in lit_llama/methods.py: adapter, adapter_v2, lora, bitfit, …
    method_config: dict[str, Any] | None = None  # further settings of the method, such as {"lora_r": 4}
    adapter_prompt_length: PositiveInt = 1  # number of prefix tokens N
    adapter_start_layer: NonNegativeInt = 2  # first layer that attends to them, counted from 0

    # == Training ==
    micro_batch_size: PositiveInt = 4  # sequences per micro-batch in SFT, pairs in DPO
    tokens: PositiveInt = 512  # tokens of the longest prompt with a response
    response_share: PositiveShare = 0.5  # share of the tokens that belong to responses
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass

    # == Generation ==
    batch_size: PositiveInt = 1  # prompts that are answered together
    prompt_tokens: PositiveInt = 1024  # tokens of each prompt
    new_tokens: PositiveInt = 1024  # tokens of each answer

    # == Output ==
    table: bool = False  # print one row for each known size

    def __post_init__(self) -> None:
        super().__post_init__()
        names = {"bf16-true": "bf16", "32": "fp32", "32-true": "fp32"}  # of the other scripts
        self.precision = names.get(self.precision, self.precision)


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np
import torch
from tqdm import tqdm

from lit_llama.checkpoint import CONFIG_NAME
from lit_llama.config import llama_configs
from lit_llama.huggingface.config import convert_config
from lit_llama.memory import Memory, byte_size, count_parameters, generation_memory, memory_table, training_memory
from lit_llama.methods import METHODS, method_config
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.packing import pair_shape
from lit_llama.storage.schema import read_json
from lit_llama.tables import markdown_table
from lit_llama.utils import UserError

HUB = {
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-2-13B": "meta-llama/Llama-2-13b-hf",
    "Llama-2-70B": "meta-llama/Llama-2-70b-hf",
    "Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "TinyLlama-1.1B": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
OWNERS = {"Llama-3": "meta-llama", "SmolLM": "HuggingFaceTB", "Qwen": "Qwen", "Mistral": "mistralai"}


def hub_name(size: str) -> str | None:
    """Return the name of a size's base model on the Hub, or None if it is not there."""
    owner = next((owner for start, owner in OWNERS.items() if size.startswith(start)), None)
    return HUB.get(size) or (f"{owner}/{size}" if owner else None)


def base_config(settings: Settings) -> LLaMAConfig:
    """Return the configuration of the model that the settings name.

    Raises:
        UserError: There is no such model, or its architecture is not supported.
    """
    path = settings.checkpoint_dir
    if path is None:
        by_hub_name = {hub_name(size): size for size in llama_configs}
        size = by_hub_name.get(settings.model, settings.model)
        if size not in llama_configs:
            raise UserError(
                f"{settings.model!r} is not one of the models that --table lists; pass a folder with its config.json "
                "as --checkpoint_dir."
            )
        return LLaMAConfig.from_name(size)
    if path.is_dir():
        names = [path / name for name in (CONFIG_NAME, "config.json") if (path / name).is_file()]
        if not names:
            raise UserError(f"{path} holds neither {CONFIG_NAME} nor config.json.")
        path = names[0]
    about = read_json(path, what="model configuration")
    is_ours = "n_layer" in about and "architectures" not in about
    return LLaMAConfig.from_json(path) if is_ours else convert_config(about)


def method_of(settings: Settings, config: LLaMAConfig) -> tuple[type[LLaMA], LLaMAConfig]:
    """Return the class of the method, and its configuration for a base model.

    Raises:
        UserError: There is no such method, or it has no such settings.
    """
    overrides, method = method_config(settings), METHODS[settings.method]  # in this order: it checks the name
    return method, method.config_class(**{**vars(config), **overrides})


def estimates(config: LLaMAConfig, settings: Settings) -> dict[str, Memory]:
    """Estimate the memory of each task; the lengths in the settings must be those of `within_context`."""
    method, with_method = method_of(settings, config)
    shared = {"dtype": torch.bfloat16 if settings.precision == "bf16" else torch.float32, "quantize": settings.quantize}

    rows, n_response = settings.micro_batch_size, max(1, round(settings.tokens * settings.response_share))
    n_prompt, n_responses = np.array([settings.tokens - n_response]), np.full((2, 1), n_response)
    per_pair, pair_tokens = pair_shape(n_prompt, n_responses, config.n_embd)

    def training(sequences: int, tokens: int, labels: int, packed: bool = False) -> Memory:
        return training_memory(
            method, with_method, sequences=sequences, tokens=tokens, labels=labels, packed=packed,
            gradient_checkpointing=settings.gradient_checkpointing, **shared,
        )  # fmt: skip

    is_merged = settings.method == "aligner" and settings.adapter_prompt_length == 1
    return {
        "SFT": training(rows, settings.tokens, rows * n_response),
        "DPO": training(rows * per_pair, pair_tokens, 2 * rows * n_response, packed=per_pair == 1),
        "generation": generation_memory(
            LLaMA if is_merged else method, config if is_merged else with_method, rows=settings.batch_size,
            prompt=settings.prompt_tokens, new=settings.new_tokens, **shared,
        ),
    }  # fmt: skip


def within_context(settings: Settings, config: LLaMAConfig) -> Settings:
    """Return the settings with lengths that fit into the model's context, next to the method's virtual tokens."""
    method, with_method = method_of(settings, config)
    with torch.device("meta"):
        context = method(with_method).max_tokens
    tokens, new = min(settings.tokens, context), min(settings.new_tokens, context // 2)
    prompt = min(settings.prompt_tokens, context - new)
    return replace(settings, tokens=tokens, prompt_tokens=prompt, new_tokens=new)


def describe(settings: Settings) -> str:
    """Describe the workload that the estimates are for."""
    layers = f" with layers in {settings.quantize}" if settings.quantize else ""
    recomputed = ", gradient checkpointing" if settings.gradient_checkpointing else ""
    return (
        f"Peak memory with a base in {settings.precision}{layers}. SFT: a micro-batch of {settings.micro_batch_size} × "
        f"{settings.tokens:,} tokens, {settings.response_share:.0%} of them labels{recomputed}. DPO: a micro-batch of "
        f"{settings.micro_batch_size} pairs of this length, whose responses share a row where training packs them. "
        f"Generation: a batch of {settings.batch_size}, with prompts of {settings.prompt_tokens:,} tokens and answers "
        f"of {settings.new_tokens:,} tokens."
    )


def main(settings: Settings) -> None:
    if settings.table:
        rows = []
        for size in tqdm([size for size in llama_configs if hub_name(size)], desc="Models"):
            config = LLaMAConfig.from_name(size)
            count = count_parameters(LLaMA, config)[0]
            sizes = [byte_size(memory.total) for memory in estimates(config, within_context(settings, config)).values()]
            rows.append([hub_name(size), f"{count:,}", f"{config.block_size:,}", *sizes])
        print(describe(settings) + "\n")
        print(markdown_table(["model", "parameters", "context", "SFT", "DPO", "generation"], rows))
        return
    config = base_config(settings)
    settings = within_context(settings, config)
    n_base, n_trained = count_parameters(*method_of(settings, config))
    print(f"{settings.checkpoint_dir or settings.model}: {n_base:,} parameters and {n_trained:,} trainable ones "
          f"({settings.method}).\n{describe(settings)}\n")  # fmt: skip
    print(memory_table(estimates(config, settings)))


if __name__ == "__main__":
    cli.run(main, settings)
