"""Prompt tuning (arXiv 2104.08691): learnt vectors in front of the embedded tokens, and nothing else.

prompt_embedding (P, C) ─┐
                         ├──► P + T places ──► frozen model ──► the last T
tokens, BOS first ──► wte ┘

As in the paper the vectors stand before everything, so before BOS too, and are counted in the rotary positions and in
the context: P fewer tokens fit. They start as embeddings of tokens drawn from the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

import lit_llama.model as llama
from lit_llama.aligner import Prefix
from lit_llama.utils import UserError


@dataclass
class LLaMAConfig(llama.LLaMAConfig):
    """The base's fields and the method's one.

    Args:
        prompt_length: learnt vectors P, from 1 to below `block_size`.
    """

    prompt_length: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.prompt_length < self.block_size:
            raise UserError(f"prompt_length is {self.prompt_length}; it must be from 1 to {self.block_size - 1}.")


class LLaMA(llama.LLaMA):
    config_class = LLaMAConfig

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__(config)
        self.prompt_embedding = Prefix(config.prompt_length, config.n_embd, dtype=torch.float32)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name == "prompt_embedding.weight"

    @staticmethod
    def scaled_parameter(name: str, value: torch.Tensor, strength: float) -> torch.Tensor:
        """All vectors at 1, none at 0.

        Raises:
            UserError: another strength, which vectors among tokens do not have.
        """
        if strength not in (0, 1):
            raise UserError(
                f"The strength is {strength}, and a learnt prompt is there (1) or not (0), nothing between."
            )
        return value if strength else value[:0]

    @staticmethod
    def config_from_state(state_dict: dict[str, torch.Tensor]) -> dict[str, Any] | None:
        prompt = state_dict.get("prompt_embedding.weight")
        return None if prompt is None else {"prompt_length": len(prompt)}

    @property
    def n_virtual_tokens(self) -> int:
        return len(self.prompt_embedding.weight)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draws tokens, none of the padding, and takes their embeddings."""
        tokens = torch.randint(self.config.vocab_size, (self.config.prompt_length,))
        wte = self.transformer.wte
        self.prompt_embedding.weight.copy_(wte(tokens.to(wte.weight.device)))

    def hidden(
        self, idx: torch.Tensor, cache: llama.KVCache | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, C), of the tokens alone; in a cache they stand behind the prompt."""
        x = self.transformer.wte(idx)  # (B, T, C)
        if positions is not None:
            return self.run_blocks(x, cache, positions + self.n_virtual_tokens)
        prompt = self.prompt_embedding.weight.to(x.dtype).expand(len(x), -1, -1)  # (B, P, C)
        return self.run_blocks(torch.cat((prompt, x), dim=1), cache)[:, self.n_virtual_tokens :]
