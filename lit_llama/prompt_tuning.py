"""Prompt tuning (arXiv 2104.08691): trained vectors before the embedded tokens, and nothing else.

prompt_embedding (P, C) ─┐
                         ├──► P + T positions ──► frozen model ──► the last T
tokens, BOS first ──► wte ┘

As in the paper the vectors come before everything, including BOS. They take up rotary positions and context, so P fewer
tokens fit. They are initialized with the embeddings of random tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import lit_llama.model as llama
from lit_llama.aligner import Prefix
from lit_llama.kv_cache import KVCache
from lit_llama.utils import UserError


@dataclass
class LLaMAConfig(llama.LLaMAConfig):
    """The configuration of a base model with a trained prompt.

    Args:
        prompt_length: number of vectors P, from 1 to `block_size` - 1.
    """

    prompt_length: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.prompt_length < self.block_size:
            raise UserError(f"prompt_length is {self.prompt_length}; it must be from 1 to {self.block_size - 1}.")


class LLaMA(llama.LLaMA):
    """LLaMA with a trained prompt."""

    config_class = LLaMAConfig

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.prompt_embedding = Prefix(config.prompt_length, config.n_embd, dtype=torch.float32)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name == "prompt_embedding.weight"

    @staticmethod
    def scaled_parameter(name: str, value: Tensor, strength: float) -> Tensor:
        if strength not in (0, 1):
            raise UserError(f"The strength is {strength}, but a trained prompt can only be used (1) or left out (0).")
        return value if strength else value[:0]

    @staticmethod
    def config_from_state(state_dict: dict[str, Tensor]) -> dict[str, Any] | None:
        prompt = state_dict.get("prompt_embedding.weight")
        return None if prompt is None else {"prompt_length": len(prompt)}

    @property
    def n_virtual_tokens(self) -> int:
        return len(self.prompt_embedding.weight)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        tokens = torch.randint(self.config.vocab_size, (self.config.prompt_length,))  # without vocabulary padding
        wte = self.transformer.wte
        self.prompt_embedding.weight.copy_(wte(tokens.to(wte.weight.device)))

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        x = self.transformer.wte(idx)  # (B, T, C)
        if positions is not None:
            return self.run_blocks(x, cache, positions + self.n_virtual_tokens)
        prompt = self.prompt_embedding.weight.to(x.dtype).expand(len(x), -1, -1)  # (B, P, C)
        if segments is not None:
            segments = F.pad(segments, (self.n_virtual_tokens, 0))  # the prompt's vectors are in segment 0
        return self.run_blocks(torch.cat((prompt, x), dim=1), cache, None, segments)[:, self.n_virtual_tokens :]
