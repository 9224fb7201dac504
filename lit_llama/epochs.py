"""The order in which the rows of a dataset are trained on."""

import numpy as np


def plan_epoch(
    lengths: np.ndarray, batch_size: int, micro_batch_size: int, seed: int, epoch: int, sorted_batches: int = 16
) -> list[list[np.ndarray]]:
    """Return the micro-batches of an epoch: every row once, in random order, next to rows of similar length.

    Rows are shuffled, sorted by length within groups of batches and split into micro-batches, which are shuffled within
    their group. The result depends only on the arguments, so a resumed run sees the same batches.

    Args:
        lengths: (rows,) number of tokens of each row.
        sorted_batches: number of batches in a group; with 1, the rows of a step are drawn from all rows.

    Returns:
        One list of micro-batches (row numbers) per optimizer step; the last step and its last micro-batch can be
        smaller.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    steps: list[list[np.ndarray]] = []
    for group in np.split(order, range(sorted_batches * batch_size, len(order), sorted_batches * batch_size)):
        group = group[np.argsort(lengths[group], kind="stable")]
        full = len(group) // batch_size * batch_size
        # the rows of a short step are drawn at random, so that they are not always the longest
        rest = np.sort(rng.choice(len(group), len(group) - full, replace=False))
        short, group = group[rest], np.delete(group, rest)
        micro = np.array_split(group, range(micro_batch_size, len(group), micro_batch_size)) if full else []
        micro = [micro[i] for i in rng.permutation(len(micro))]
        per_step = batch_size // micro_batch_size
        steps += [micro[i : i + per_step] for i in range(0, len(micro), per_step)]
        if len(short):
            steps.append(np.array_split(short, range(micro_batch_size, len(short), micro_batch_size)))
    return steps


def plan_fixed_epoch(
    lengths: np.ndarray, batch_size: int, micro_batch_size: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """Return the micro-batches of an epoch as `plan_epoch` does, but always the same ones, in random order.

    The rounding of precomputed reference log-probabilities depends on the micro-batch. With fixed micro-batches they
    are rounded exactly like those of the policy in training.
    """
    fixed = [micro for step in plan_epoch(lengths, batch_size, micro_batch_size, 0, 0) for micro in step]
    order = np.random.default_rng((seed, epoch)).permutation(len(fixed))
    per_step = batch_size // micro_batch_size
    return [[fixed[i] for i in order[start : start + per_step]] for start in range(0, len(order), per_step)]


def plan_validation(lengths: np.ndarray, micro_batch_size: int) -> list[np.ndarray]:
    """Return all rows, sorted by length, as micro-batches (row numbers)."""
    order = np.argsort(lengths, kind="stable")
    return np.array_split(order, range(micro_batch_size, len(order), micro_batch_size))
