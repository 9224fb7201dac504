"""Log-probabilities of the letters A to D after a prompt, in one forward pass."""

from dataclasses import dataclass

import torch

from lit_llama.model import LLaMA
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

LETTERS = "ABCD"


@dataclass(frozen=True)
class Letters:
    """How a tokenizer encodes the letters after a prompt: as " A", " B", ... in one text with it, or as responses.

    Args:
        response: the letters are encoded separately from the prompt, as responses in training.
        space: tokens to append to the prompt: those before a letter, if the tokenizer splits off the space.
        tokens: for each letter, its token and how many of `space` precede it. "▁B" may be one token while "▁", "A"
            are two.
    """

    response: bool
    space: tuple[int, ...]
    tokens: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, response: bool = False) -> "Letters":
        """Encode the letters.

        Raises:
            UserError: the letters cannot be compared in one forward pass.
        """
        encoded = [tokenizer.encode(letter if response else f"Answer: {letter}") for letter in LETTERS]
        shared = next((i for i, ids in enumerate(zip(*encoded, strict=False)) if len(set(ids)) > 1), None)
        if shared is None:
            raise UserError(f"{tokenizer.path} gives the letters A to D the same tokens; use --scoring generate.")
        encoded = [ids[shared:] for ids in encoded]
        space = max((ids[:-1] for ids in encoded), key=len)
        if any(ids[:-1] != space[: len(ids) - 1] for ids in encoded):
            raise UserError(f"{tokenizer.path} splits the letters A to D unevenly; use --scoring generate.")
        return cls(response, tuple(space), tuple((ids[-1], len(ids) - 1) for ids in encoded))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Return the tokens of a prompt, to which `space` is appended.

        Unless the letters are responses, the prompt loses the whitespace at its end.
        """
        count = self.tokens[0][1] + 1  # tokens of the first letter
        if self.response:
            ids = [*tokenizer.encode(text, bos=True), *tokenizer.encode(LETTERS[0])]
        else:
            ids = tokenizer.encode(f"{text.rstrip()} {LETTERS[0]}", bos=True)
        return [*ids[:-count], *self.space]


def length_batches(lengths: dict[str, int], batch_tokens: int) -> list[list[str]]:
    """Group ids of similar length, longest first, so that a padded batch has at most `batch_tokens` tokens.

    A longer prompt gets its own batch.
    """
    batches: list[list[str]] = []
    for id in sorted(lengths, key=lambda id: -lengths[id]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(id)
        else:
            batches.append([id])
    return batches


def pad(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """Return token ids (B, T), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True).to(device)


@torch.inference_mode()
def letter_logps(model: LLaMA, prompts: list[list[int]], letters: Letters) -> torch.Tensor:
    """Return the log-probabilities (B, 4), fp32, of the letters after each prompt, in one forward pass.

    Prompts are padded on the right, where causal attention does not see the padding.
    """
    device = model.transformer.wte.weight.device
    idx = pad(prompts, device)
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
    n_space, rows = len(letters.space), torch.arange(len(prompts), device=device)
    if n_space == 0:
        logits = model.unembed(model.hidden(idx)[rows, last]).unsqueeze(1)
    else:
        logits = model(idx)[rows[:, None], last[:, None] + torch.arange(-n_space, 1, device=device)]
    logps = logits[..., : model.config.vocab_size].float().log_softmax(-1)  # (B, n_space + 1, V)
    before = torch.zeros(len(prompts), n_space + 1, device=device)  # of the tokens of `space` so far
    for i, token in enumerate(letters.space):
        before[:, i + 1] = before[:, i] + logps[:, i, token]
    return torch.stack([before[:, n] + logps[:, n, token] for token, n in letters.tokens], dim=1).cpu()
