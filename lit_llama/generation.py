"""Text generation: prefill, decoding one token at a time, stop conditions.

    prompts ──► prefill ──► sample ──► decode_one_token ──► sample ──► ...      (`decode`, one step per new token)

A row's tokens depend only on its prompt and seed, not on the rest of the batch (on a GPU up to rounding, which depends
on the number of rows). A KV cache lives for one call.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch

from lit_llama.compiled import RecordedStep, Step, eager_unless
from lit_llama.kv_cache import KVCache, cache_dtype
from lit_llama.live_text import LiveText, cut_at_stop, stop_test
from lit_llama.model import LLaMA
from lit_llama.modules import eval_mode
from lit_llama.prompts import PromptStyle
from lit_llama.sampling import Sampling, sample
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

GROUP_TOKENS = 256  # prompts of any lengths share a prefill of up to this many tokens, padding included
MIN_FILL = 0.75  # in a larger prefill, each prompt has at least this fraction of the longest prompt's tokens


def length_groups(lengths: list[int]) -> list[list[int]]:
    """Group rows of similar length, so that padding each group to its longest row adds little work.

    A row joins a group if it has at least `MIN_FILL` of the longest row's tokens, or if the padded group has at most
    `GROUP_TOKENS` tokens: a prefill this small takes about as long as a smaller one.

    Args:
        lengths: number of tokens of each prompt.

    Returns:
        Row numbers, ascending within each group.
    """
    first, *others = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups = [[first]]
    for row in others:
        group = groups[-1]
        longest = lengths[group[0]]
        if lengths[row] >= MIN_FILL * longest or (len(group) + 1) * longest <= GROUP_TOKENS:
            group.append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]


@torch.inference_mode()
def prefill(model: LLaMA, prompts: list[list[int]], cache: KVCache) -> torch.Tensor:
    """Run the prompts through the model and fill the cache.

    Prompts of similar length run together, padded on the right. A prompt that several rows have with the same adapters
    runs once.

    Returns:
        (B, V) logits after each row's last token.

    Raises:
        UserError: The model has adapters for a different number of rows.
    """
    device = cache.k.device
    lengths = [len(prompt) for prompt in prompts]
    cache.length, cache.even = model.n_virtual_tokens + max(lengths), len(set(lengths)) == 1
    first: dict[Any, int] = {}  # prompt and adapters -> the first row with them
    keys = zip(map(tuple, prompts), model.adapters_of_rows(len(prompts)), strict=True)
    source_of = [first.setdefault(key, row) for row, key in enumerate(keys)]
    distinct = list(first.values())
    groups = [[distinct[i] for i in group] for group in length_groups([lengths[row] for row in distinct])]
    logits, order = [], []
    for group in groups:
        rows = [torch.tensor(prompts[row]) for row in group]
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        if len(group) == len(prompts):
            return last_logits(model, idx, last, cache)
        length = model.n_virtual_tokens + idx.size(1)
        group_cache = KVCache(model.config, len(group), length, device, cache.k.dtype)
        with model.selecting(group):
            group_logits = last_logits(model, idx, last, group_cache)
        place = {row: i for i, row in enumerate(group)}
        copies = [(row, place[source]) for row, source in enumerate(source_of) if source in place]
        members, sources = torch.tensor(copies, device=device).unbind(1)
        for buffer, new in ((cache.k, group_cache.k), (cache.v, group_cache.v)):
            if len(copies) == len(group):
                buffer[:, members, :, :length] = new
                continue
            for layer, new_layer in zip(buffer, new, strict=True):  # one at a time, to save memory
                layer[members, :, :length] = new_layer[sources]
        logits.append(group_logits[sources])
        order.append(members)
    return torch.cat(logits)[torch.cat(order).argsort()]


def last_logits(model: LLaMA, idx: torch.Tensor, last: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Return the logits (B, V) at position `last` (B,) of each row of idx (B, T)."""
    x = model.hidden(idx, cache)  # (B, T, C)
    return model.unembed(x[torch.arange(len(x), device=x.device), last])


@torch.inference_mode()
def decode_one_token(model: LLaMA, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Run one more token of each row: (B,) ids at (B,) positions -> (B, V) logits."""
    cache.length = min(cache.length + 1, cache.k.size(3))
    return model(tokens.unsqueeze(1), cache=cache, positions=positions.unsqueeze(1))[:, -1]


@torch.inference_mode()
def decode(
    model: LLaMA,
    prompts: list[list[int]],
    sampling: Sampling,
    rows: list[int] | None = None,
    running: Collection[int] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the next token of every row, (B,), until `max_new_tokens` or until every row's context is full.

    Tokens of a row beyond its `remaining_context` are undefined; they appear while shorter prompts continue.

    Args:
        prompts: token ids, of any lengths.
        rows: the number of each row, which seeds its random numbers (default: 0, 1, ...). A caller that splits prompts
            into batches passes their indices among all prompts, so that batching does not change the answers.
        running: indices of the prompts that still need tokens; the caller removes those that have ended. Once at most
            half of the rows are left, the others are no longer computed, and their tokens are 0.

    Raises:
        UserError: A prompt is empty or leaves no room in the context.
    """
    check_prompts(model, prompts)
    weight = model.transformer.wte.weight
    n_new = min(sampling.max_new_tokens, max(remaining_context(model, prompt) for prompt in prompts))
    max_length = min(max(map(len, prompts)) + n_new, model.max_tokens)
    is_compiled = model.compiled == "decoding"
    slots = model.n_virtual_tokens + max_length
    cache = KVCache(model.config, len(prompts), slots, weight.device, cache_dtype(weight), static=is_compiled)
    step: Step = partial(decode_one_token, model, cache=cache)
    if is_compiled and weight.device.type == "cuda":
        step = RecordedStep(step)
    generators = sampling.generators(range(len(prompts)) if rows is None else rows, weight.device)
    positions = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    computed = list(range(len(prompts)))  # the prompt of each row of the cache
    places: torch.Tensor | None = None  # `computed` as a tensor on the device, once rows were dropped
    with eval_mode(model), model.inference(), ExitStack() as selections:
        with eager_unless(model, "prefill"):
            logits = prefill(model, prompts, cache)
        for i in range(n_new):
            tokens = sample(logits[:, : model.config.vocab_size], sampling, generators)  # without vocabulary padding
            yield tokens if places is None else tokens.new_zeros(len(prompts)).index_copy(0, places, tokens)
            if running and len(running) <= len(computed) // 2 and not is_compiled:
                kept = [row for row, prompt in enumerate(computed) if prompt in running]
                computed, generators = [computed[row] for row in kept], [generators[row] for row in kept]
                selections.enter_context(model.selecting(kept))
                places, rows_kept = torch.tensor([computed, kept], device=weight.device)
                cache.keep(rows_kept)
                tokens, positions = tokens[rows_kept], positions[rows_kept]
            if i + 1 < n_new:
                # a row whose context is full overwrites its last slot
                with eager_unless(model, "decoding"):
                    logits = step(tokens, (positions + i).clamp(max=model.max_tokens - 1))


def read(steps: Iterator[torch.Tensor]) -> Iterator[list[int]]:
    """Yield the tokens of each step of `decode` as a list of ids.

    On a GPU a step is read while the next one runs, so that the device does not wait for the program. The cost is one
    wasted step at the end.
    """
    before: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for tokens in steps:
        if not tokens.is_cuda:
            yield tokens.tolist()
            continue
        copied = torch.cuda.Event()
        now = tokens.to("cpu", non_blocking=True), copied  # into pinned memory
        copied.record(torch.cuda.current_stream(tokens.device))
        if before is not None:
            yield finished_copy(*before)
        before = now
    if before is not None:
        yield finished_copy(*before)


def finished_copy(tokens: torch.Tensor, copied: torch.cuda.Event) -> list[int]:
    """Return the tokens of a copy once it is complete, without waiting for later work of the device."""
    copied.synchronize()
    return tokens.tolist()


def remaining_context(model: LLaMA, prompt: list[int]) -> int:
    """Return how many new tokens fit into the context after a prompt."""
    return model.max_tokens - len(prompt)


def check_prompts(model: LLaMA, prompts: list[list[int]]) -> None:
    """Raise an error that names the first prompt that cannot be answered.

    Raises:
        UserError: A prompt is empty or leaves no room in the context.
    """
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
    """Return the new tokens of each prompt.

    Args:
        prompts, rows: see `decode`.
        stop_ids: tokens that end an answer; they are not returned.
        finished: called with the new tokens of an answer; returns whether the answer is complete.
    """
    new: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for tokens in read(decode(model, prompts, sampling, rows, running)):
        for row, token in enumerate(tokens):
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
    echo: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """Yield the answer to one prompt in pieces, each as soon as its text is final.

    Args:
        stop: texts that end the answer; they are not returned.
        echo: yield the prompt too; otherwise whitespace around the answer is removed.
        is_stopped: called after each token; returns whether to end the answer before it.
    """
    ids = tokenizer.encode(prompt, bos=True)
    check_prompts(model, [ids])
    text = LiveText(tokenizer, ids if echo else [], stop, strip=not echo)
    if echo:
        yield tokenizer.decode(ids)
    for (token,) in read(decode(model, [ids], sampling)):
        if token in tokenizer.stop_ids or is_stopped():
            break
        text.push(token)
        if text.stopped:
            break
        if piece := text.take():
            yield piece
    if piece := text.take(last=True):
        yield piece


def answer(
    model: LLaMA,
    tokenizer: Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    stop: tuple[str, ...] = (),
    batch_size: int = 16,
    echo: bool = False,
    rows: list[int] | None = None,
    adapters: Sequence[Any] | None = None,
    on_batch: Callable[[int], Any] = lambda n_answers: None,
) -> list[str]:
    """Return the answers to complete prompt texts, in the same order.

    Prompts of similar length share a batch. The longest run first, so that a batch too large for memory fails at once.

    Args:
        stop: texts that end an answer; they are not returned.
        echo: return each prompt with its continuation, unstripped.
        rows: see `decode`.
        adapters: each prompt's adapters, for a model with adapters per row; see `lit_llama.compose.LLaMA.using`.
        on_batch: Called after each batch with its number of answers.

    Raises:
        UserError: A prompt is empty or longer than the context, or an adapter does not exist.
    """
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    check_prompts(model, encoded)  # before the first answer
    if adapters is not None:
        model.check_rows(adapters)
    rows = list(range(len(prompts))) if rows is None else rows
    answers, finished = [""] * len(prompts), stop_test(tokenizer, stop)
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with nullcontext() if adapters is None else model.using([adapters[i] for i in batch]):
            new = generate(
                model, [encoded[i] for i in batch], sampling, tokenizer.stop_ids, finished, [rows[i] for i in batch]
            )
        for i, ids in zip(batch, new, strict=True):
            text = tokenizer.decode(encoded[i] + ids) if echo else cut_at_stop(tokenizer.decode(ids), stop)[0].strip()
            answers[i] = text
        on_batch(len(batch))
    return answers


def instruct(
    model: LLaMA, tokenizer: Tokenizer, instructions: list[str], style: PromptStyle, sampling: Sampling, **kwargs: Any
) -> list[str]:
    """Return the answers to instructions in a prompt style; `kwargs` are those of `answer`."""
    return answer(model, tokenizer, [style.render(i) for i in instructions], sampling, style.stop, **kwargs)
