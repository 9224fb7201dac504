"""Compute the paper's Table 1: trainable parameters of each method, and how many adapters fit on a GPU with the base.

No weights are loaded. The base and the adapters take 2 bytes per parameter (bf16), and the adapters fill all GPU memory
that the base leaves free; activations are ignored. (The paper prints 4.19 K parameters for 10 tokens at 7B; the correct
number is 41.92 K.)
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, Range


@dataclass
class Settings(Checked):
    models: tuple[str, ...] = ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B", "microworld")  # model sizes
    beside: str = "Llama-2-7B"  # base model that shares a GPU with its adapters
    memory_gib: Annotated[float, Range(above=0, most=10**6)] = 24.0  # memory of that GPU


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.memory import count_parameters
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.tables import markdown_table

BYTES = 2  # per number in bf16


@dataclass(frozen=True)
class Variant:
    """A method at one size.

    Args:
        label: its name in tables and figures.
        method: a name of `lit_llama.methods.METHODS`.
        settings: the fields of the method's `LLaMAConfig` that determine its size.
    """

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "aligner1": Variant("Aligner, N = 1", "aligner", {"adapter_prompt_length": 1}),
    "aligner10": Variant("Aligner, N = 10", "aligner", {"adapter_prompt_length": 10}),
    "aligner100": Variant("Aligner, N = 100", "aligner", {"adapter_prompt_length": 100}),
    "adapter": Variant("LLaMA-Adapter, 10 tokens", "adapter", {"adapter_prompt_length": 10}),
    "lora": Variant("LoRA, r = 8", "lora", {"lora_r": 8}),
    "bitfit": Variant("BitFit", "bitfit"),
    "prompt_tuning": Variant("prompt tuning, 10 tokens", "prompt_tuning", {"prompt_length": 10}),
}

ALIGNER300 = Variant("Aligner, N = 300", "aligner", {"adapter_prompt_length": 300})
ADAPTER_V2 = Variant("LLaMA-Adapter v2, 10 tokens", "adapter_v2", {"adapter_prompt_length": 10})
# Aligners first
ROWS = sorted([*VARIANTS.values(), ALIGNER300, ADAPTER_V2], key=lambda variant: variant.method != "aligner")


def count(name: str, variant: Variant) -> int:
    """Return the number of trainable parameters of a method on a base model."""
    model_class = METHODS[variant.method]
    return count_parameters(model_class, model_class.config_class.from_name(name, **variant.settings))[1]


def main(settings: Settings) -> None:
    sizes = {
        name: count_parameters(LLaMA, LLaMAConfig.from_name(name))[0] for name in (*settings.models, settings.beside)
    }
    free = settings.memory_gib * 2**30 - BYTES * sizes[settings.beside]
    heads = ["method", *settings.models, f"in {settings.memory_gib:g} GiB beside {settings.beside}"]
    lines = [["the base itself", *(f"{sizes[name]:,}" for name in settings.models), ""]]
    for variant in ROWS:
        counts = [f"{count(name, variant):,}" for name in settings.models]
        fit = max(0, int(free // (BYTES * count(settings.beside, variant))))
        lines.append([variant.label, *counts, f"{fit:,}"])
    print(markdown_table(heads, lines))


if __name__ == "__main__":
    cli.run(main, settings)
