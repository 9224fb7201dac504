"""Generation: prefill, single-token decoding, sampling, stopping. The KV cache lives as long as one call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lit_llama.model import KVCache, LLaMA
from lit_llama.prompts import PromptStyle
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, eval_mode, swapped_parameters

GROUP_TOKENS = 256  # prompts of any lengths are computed together up to so many tokens, padding counted in
LEAST_FILLED = 0.75  # beyond that, those with so many tokens of the longest one's


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: at most so many.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        top_k: only the k most likely; 0 is all.
        top_p: only the smallest set of most likely tokens that reaches this probability; 1 is all.
        seed: row i of a call draws from its own generator, seeded with (seed, i): batching changes nothing.

    Raises:
        UserError: a value out of range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"top_k is {self.top_k} and top_p {self.top_p}; they must be 0 or more, and above 0 and at most 1."
            )


def sample(logits: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]) -> torch.Tensor:
    """The next token of each row: (B, V) logits -> (B,). `generators` has one entry per row, unused when greedy."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the likelier ones reach top_p already
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0)
    # argmax(p / Exp(1)) draws from p, and needs no more than one row's own noise
    noise = torch.stack([torch.empty_like(probs[0]).exponential_(generator=g) for g in generators])
    return (probs / noise).argmax(-1)


def length_groups(lengths: list[int]) -> list[list[int]]:
    """Row numbers, in groups to be padded to their longest: none shorter than LEAST_FILLED of it, unless the group has
    no more than GROUP_TOKENS tokens, which are computed about as fast as fewer.

    Args:
        lengths: tokens of each prompt.
    """
    first, *others = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups = [[first]]
    for row in others:
        group = groups[-1]
        longest = lengths[group[0]]
        if lengths[row] >= LEAST_FILLED * longest or (len(group) + 1) * longest <= GROUP_TOKENS:
            group.append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]


@torch.inference_mode()
def prefill(model: LLaMA, prompts: list[list[int]], cache: KVCache) -> torch.Tensor:
    """Runs the prompts through the model, those of similar length together: logits (B, V) after each row's last token.

    Within a group they are padded on the right.
    """
    device = cache.k.device
    lengths = [len(prompt) for prompt in prompts]
    cache.length, cache.even = model.n_virtual_tokens + max(lengths), len(set(lengths)) == 1
    groups, logits = length_groups(lengths), []
    for group in groups:
        rows = [torch.tensor(prompts[row], device=device) for row in group]
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        if len(groups) == 1:
            return model(idx, cache=cache, last=last)
        length = model.n_virtual_tokens + idx.size(1)
        own = KVCache(model.config, len(group), length, device, cache.k.dtype)
        with model.selecting(group):
            logits.append(model(idx, cache=own, last=last))
        cache.k[:, group, :, :length], cache.v[:, group, :, :length] = own.k, own.v
    order = torch.tensor([row for group in groups for row in group], device=device)
    return torch.cat(logits)[order.argsort()]


@torch.inference_mode()
def decode_one_token(model: LLaMA, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """One more token per row: (B,) ids at (B,) positions -> logits (B, V)."""
    cache.length = min(cache.length + 1, cache.k.size(3))
    return model(tokens.unsqueeze(1), cache=cache, positions=positions.unsqueeze(1))[:, -1]


@torch.inference_mode()
def decode(
    model: LLaMA, prompts: list[list[int]], sampling: Sampling, rows: list[int] | None = None
) -> Iterator[torch.Tensor]:
    """Yields the next tokens (B,) of all rows, step by step, until `max_new_tokens` or every context is full.

    What a row yields after `remaining_context(model, prompt)` tokens, while shorter prompts still have room, means nothing.

    Args:
        prompts: token ids, of any lengths.
        rows: the prompts' numbers among all prompts of the caller, for the seeds (default: 0, 1, ...).

    Raises:
        UserError: a prompt is empty or leaves no room in the context.
    """
    check_prompts(model, prompts)
    vocab_size = model.config.vocab_size
    n_new = min(sampling.max_new_tokens, max(remaining_context(model, prompt) for prompt in prompts))
    weight = model.transformer.wte.weight
    generators = [
        torch.Generator(weight.device).manual_seed(sampling.seed * 1_000_003 + row)
        for row in rows or range(len(prompts))
    ]
    max_length = min(max(map(len, prompts)) + n_new, model.max_tokens)
    cache = KVCache(model.config, len(prompts), model.n_virtual_tokens + max_length, weight.device, weight.dtype)
    positions = torch.tensor([len(p) for p in prompts], device=weight.device)
    with eval_mode(model), model.inference():
        logits = prefill(model, prompts, cache)
        for i in range(n_new):
            tokens = sample(logits[:, :vocab_size], sampling, generators)  # never a row of the padding
            yield tokens
            if i + 1 < n_new:
                # a row that is full writes its last slot again
                logits = decode_one_token(model, tokens, (positions + i).clamp(max=model.max_tokens - 1), cache)


def remaining_context(model: LLaMA, prompt: list[int]) -> int:
    """New tokens that fit into the context behind a prompt."""
    return model.max_tokens - len(prompt)


def check_prompts(model: LLaMA, prompts: list[list[int]]) -> None:
    """Raises: UserError: a prompt is empty or leaves no room in the context; it is named by its number."""
    for number, prompt in enumerate(prompts, 1):
        name = "The prompt" if len(prompts) == 1 else f"Prompt {number} of {len(prompts)}"
        if not prompt:
            raise UserError(f"{name} has no tokens.")
        if remaining_context(model, prompt) < 1:
            raise UserError(
                f"{name} has {len(prompt)} tokens and the model's context {model.max_tokens}: no room for an answer."
            )


def generate(
    model: LLaMA,
    prompts: list[list[int]],
    sampling: Sampling,
    stop_ids: tuple[int, ...] = (),
    finished: Callable[[list[int]], bool] = lambda ids: False,
    rows: list[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt.

    Args:
        prompts, rows: as in `decode`.
        stop_ids: tokens that end an answer; they are not returned.
        finished: told the new tokens of a row so far, whether the answer has ended with them.
    """
    new: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for tokens in decode(model, prompts, sampling, rows):
        for row, token in enumerate(tokens.tolist()):
            if row not in running:
                continue
            if token not in stop_ids:
                new[row].append(token)
            if token in stop_ids or finished(new[row]) or len(new[row]) == remaining_context(model, prompts[row]):
                running.discard(row)
        if not running:
            break
    return new


def stream(
    model: LLaMA,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    stop: tuple[str, ...] = (),
    whole: bool = False,
) -> Iterator[str]:
    """The answer to one prompt, piece by piece, as soon as its text is certain; with `whole`, after the prompt."""
    encoded = tokenizer.encode(prompt, bos=True)
    ids: list[int] = encoded[:] if whole else []
    said = 0
    text = ""
    for token in decode(model, [encoded], sampling):
        if token.item() in tokenizer.stop_ids:
            break
        ids.append(token.item())
        text, stopped = cut_at_stop(tokenizer.decode(ids), stop)
        if stopped:
            break
        # a character may still be incomplete, and the end may be the beginning of a stop text
        certain = len(text) - max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if not text.endswith("\ufffd") and certain > said:
            yield text[said:certain]
            said = certain
    if len(text) > said:
        yield text[said:]


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """`text` before the first of the stop texts, and whether there was one."""
    ends = [text.find(s) for s in stop if s in text]
    return (text[: min(ends)], True) if ends else (text, False)


def answer(
    model: LLaMA,
    tokenizer: Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    stop: tuple[str, ...] = (),
    batch_size: int = 16,
    whole: bool = False,
    rows: list[int] | None = None,
    adapters: list[str | None] | None = None,
) -> list[str]:
    """The answers to whole prompt texts, in their order; prompts of similar length share a batch.

    With `whole`, each text with its continuation, unstripped, instead of the answer alone.

    Args:
        rows: as in `decode`.
        adapters: for a model with a bank (lit_llama/bank.py), the name of each prompt's adapter; None is the base.

    Raises:
        UserError: a prompt is longer than the context, or there is no such adapter.
    """
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    check_prompts(model, encoded)  # before the first answer, not in the middle
    for name in filter(None, adapters or []):
        model.bank.slot(name)
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answers = [""] * len(prompts)

    def finished(ids: list[int]) -> bool:
        return bool(stop) and cut_at_stop(tokenizer.decode(ids), stop)[1]

    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        numbers = [rows[i] for i in batch] if rows else batch
        with model.using([adapters[i] for i in batch]) if adapters else nullcontext():
            new = generate(model, [encoded[i] for i in batch], sampling, tokenizer.stop_ids, finished, numbers)
        for i, ids in zip(batch, new, strict=True):
            if whole:
                answers[i] = tokenizer.decode(encoded[i] + ids)
            else:
                answers[i] = cut_at_stop(tokenizer.decode(ids), stop)[0].strip()
    return answers


@contextmanager
def gates_scaled(model: LLaMA, strength: float) -> Iterator[None]:
    """Inside, the adapter counts `strength` times: 0 is the base model bit for bit, 1 the adapter as trained.

    What is multiplied are the gates, LoRA's B or BitFit's biases; see each method's `scaled_parameter`.

    Raises:
        UserError: the method knows no such strength.
    """
    trained = {name: p.data for name, p in model.named_parameters() if model.is_adapter_parameter(name)}
    with swapped_parameters(
        model, {name: model.scaled_parameter(name, value, strength) for name, value in trained.items()}
    ):
        yield


def instruct(
    model: LLaMA, tokenizer: Tokenizer, instructions: list[str], style: PromptStyle, sampling: Sampling, **kwargs: Any
) -> list[str]:
    """`answer` for instructions in a prompt style."""
    return answer(model, tokenizer, [style.render(i) for i in instructions], sampling, style.stop, **kwargs)
