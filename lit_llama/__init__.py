"""LLaMA, Aligner and other adapter methods, with what is needed to train them and generate with them."""

from importlib import import_module
from typing import Any

MODULES = {"LLaMA": "model", "LLaMAConfig": "config", "Tokenizer": "tokenizer"}
__all__ = ["LLaMA", "LLaMAConfig", "Tokenizer"]


def __getattr__(name: str) -> Any:
    """Import a class when it is first used, so that `aligner --help` does not wait for torch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
