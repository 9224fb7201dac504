"""Choose the next token: greedily, or by sampling with temperature, top-k and top-p."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lit_llama.settings import Checked, NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveShare, Seed

GREEDY = 1e-6  # divided by a smaller temperature, logits could exceed the range of fp32


@dataclass(frozen=True)
class Sampling(Checked):
    """How the next token is chosen.

    Args:
        max_new_tokens: longest answer, in tokens.
        temperature: 0, or anything below `GREEDY`, is greedy; 1 samples from the model's distribution.
        top_k: sample from the k most likely tokens; 0 means all.
        top_p: sample from the smallest set of most likely tokens that reaches this probability; 1 means all.
        seed: seed of sampling; each row has its own generator, seeded with the pair (seed, row).

    Raises:
        UserError: A value is out of range.
    """

    max_new_tokens: PositiveInt = 100
    temperature: NonNegativeFloat = 0.0
    top_k: NonNegativeInt = 0
    top_p: PositiveShare = 1.0
    seed: Seed = 0

    def generators(self, rows: Iterable[int], device: torch.device) -> list[torch.Generator]:
        """Return one random generator per row."""
        return [torch.Generator(device).manual_seed(self.seed * 1_000_003 + row) for row in rows]


def sample(logits: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]) -> torch.Tensor:
    """Choose the next token of each row.

    Args:
        logits: (B, V).
        generators: one per row; unused when greedy.

    Returns:
        (B,) token ids.
    """
    if sampling.temperature < GREEDY:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        top_p = max(sampling.top_p, torch.finfo(probs.dtype).tiny)  # a lower one can be 0 in fp32, and exclude all
        excluded = ordered.cumsum(-1) - ordered >= top_p  # more likely tokens already reach top_p
        probs = probs.masked_fill(torch.zeros_like(excluded).scatter(1, order, excluded), 0)
    # argmax(p / Exp(1)) is a sample from p that uses only the row's own random numbers
    noise = torch.stack([torch.empty_like(probs[0]).exponential_(generator=g) for g in generators])
    return (probs / noise).argmax(-1)
