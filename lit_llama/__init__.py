"""A small LLaMA, the Aligner variant of it, and what training and generating with them takes."""

from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.tokenizer import Tokenizer

__all__ = ["LLaMA", "LLaMAConfig", "Tokenizer"]
