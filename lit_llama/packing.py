"""Several answers to one prompt in a single row, so that a training step computes the prompt once.

    tokens     p_1 p_2 p_3 │ p_4 a_1 a_2 │ p_4 b_1 b_2 b_3 │ …      a prompt of four tokens and its answers a, b, …
    segment     0   0   0  │  1   1   1  │  2   2   2   2  │ …
    position    0   1   2  │  3   4   5  │  3   4   5   6  │ …

A token attends to itself, to earlier tokens of its segment and to segment 0. Each answer therefore has the same
log-probabilities and gradients as in a separate row with its prompt.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lit_llama.logps import IGNORE_INDEX, find_labels
from lit_llama.modules import attention_mask


def answers_per_row(prompt: float, answer: float, count: int, n_embd: int) -> int:
    """Return how many of the answers to a prompt a row should take, so that packing saves work.

    Another answer saves the linear layers of a prompt, 24·n_embd² FLOPs per token and layer in a forward pass. In
    exchange, its A tokens and the T tokens of the row get scores for each other: 8·n_embd·T·A FLOPs, here counted
    twice, because attention with a mask is slower than causal attention. So T is at most 1.5·n_embd·prompt / A.

    Args:
        prompt, answer: mean number of tokens of a prompt and of an answer.
        count: number of answers, which are divided into rows of about equal size.
        n_embd: width of the model.
    """
    most = max(1, int((1.5 * n_embd * prompt / answer - prompt) / (answer + 1)))
    return math.ceil(count / math.ceil(count / most))


def pair_shape(n_prompt: np.ndarray, n_responses: np.ndarray, n_embd: int) -> tuple[int, int]:
    """Return the number of sequences and of tokens per sequence for a batch of prompts with two responses each.

    Both responses share a sequence if `answers_per_row` is 2 for the mean lengths, and that saves at least a tenth of
    the tokens, padding included.

    Args:
        n_prompt, n_responses: (B,) and (2, B) numbers of tokens.
        n_embd: width of the model; 0: responses never share a sequence.
    """
    B, separate = len(n_prompt), int((n_prompt + n_responses).max())
    shared = int((n_prompt + 1 + n_responses.sum(0)).max())  # as in `packed_length`
    saves_tokens = n_embd > 0 and shared <= 0.9 * 2 * separate
    if saves_tokens and answers_per_row(n_prompt.mean(), n_responses.mean(), 2, n_embd) == 2:
        return B, shared
    return 2 * B, separate


def pack_answers(groups: Sequence[tuple[list[int], list[list[int]]]]) -> dict[str, Tensor]:
    """Return a row for each group of answers to a prompt.

    Args:
        groups: token ids of each prompt, 1 or more, and of each of its answers, 1 or more as well.

    Returns:
        idx, labels: (B, T) int64, padded on the right; labels are the tokens of the answers, and -1 elsewhere.
        segments: (B, T) int64 as above; each token of the padding is a further segment.
        label_index: (n,) from `find_labels`; the order of the labels is that of the answers.
    """
    idx, labels, segments = [], [], []
    for (*shared, last), answers in groups:
        ids, targets, numbers = list(shared), [IGNORE_INDEX] * len(shared), [0] * len(shared)
        for number, answer in enumerate(answers, 1):
            ids += [last, *answer]
            targets += [IGNORE_INDEX, *answer]
            numbers += [number] * (1 + len(answer))
        idx.append(ids)
        labels.append(targets)
        segments.append(numbers)
    longest = max(map(len, idx))
    for ids, targets, numbers in zip(idx, labels, segments, strict=True):
        missing = longest - len(ids)
        ids += [0] * missing
        targets += [IGNORE_INDEX] * missing
        numbers += range(numbers[-1] + 1, numbers[-1] + 1 + missing)
    padded = torch.tensor(labels)
    tensors = {"idx": torch.tensor(idx), "labels": padded, "segments": torch.tensor(segments)}
    return {**tensors, "label_index": find_labels(padded)}


def packed_length(prompt: int, answers: Iterable[int]) -> int:
    """Return the number of tokens in a row, without padding, for the lengths of a prompt and of its answers."""
    return prompt - 1 + sum(1 + answer for answer in answers)


def segment_mask(segments: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the `attention_mask` (B, 1, T, T) and the position of each token, (B, T) int64, for segments (B, T)."""
    keys = segments.unsqueeze(1)  # (B, 1, T)
    attends = ((keys == segments.unsqueeze(2)) | (keys == 0)).tril()  # (B, T, T)
    return attention_mask(attends, dtype), attends.sum(-1) - 1
