"""Several answers to one prompt in a single row, so that a training step computes the prompt once.

    tokens     p_1 p_2 p_3 │ p_4 a_1 a_2 │ p_4 b_1 b_2 b_3 │ …      a prompt of four tokens and its answers a, b, …
    segment     0   0   0  │  1   1   1  │  2   2   2   2  │ …
    position    0   1   2  │  3   4   5  │  3   4   5   6  │ …

A token attends to the earlier tokens of its segment and to segment 0. So every answer has the log-probabilities and
gradients that it has in a row of its prompt and itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_llama.logps import IGNORE_INDEX, find_labels


def pack_answers(groups: Sequence[tuple[list[int], list[list[int]]]]) -> dict[str, Tensor]:
    """Return prompts with their answers, a row for each prompt.

    Args:
        groups: token ids of each prompt, 1 or more, and of each of its answers.

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


def packed_length(prompt: int, answers: Sequence[int]) -> int:
    """Return the number of tokens in a row, without padding, for the lengths of a prompt and of its answers."""
    return prompt - 1 + sum(1 + answer for answer in answers)


def segment_mask(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens each token attends to, (B, 1, T, T) bool, and the position of each token, (B, T) int64."""
    keys = segments.unsqueeze(1)  # (B, 1, T)
    mask = ((keys == segments.unsqueeze(2)) | (keys == 0)).tril()  # (B, T, T)
    return mask.unsqueeze(1), mask.sum(-1) - 1
