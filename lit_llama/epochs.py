"""The order in which the rows of a dataset are trained on."""

import numpy as np


def plan_epoch(
    lengths: np.ndarray, batch_size: int, micro_batch_size: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """Return the micro-batches of an epoch: every row once, in random order, next to rows of similar length.

    Rows are shuffled, sorted by length within groups of 16 batches and cut into micro-batches, which are shuffled
    within their group. A pure function of its arguments, so that a resumed run sees the same batches.

    Returns:
        One list of micro-batches (row numbers) per optimizer step; the last step and its last micro-batch can be
        smaller.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    steps: list[list[np.ndarray]] = []
    for group in np.split(order, range(16 * batch_size, len(order), 16 * batch_size)):
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
    """Return the micro-batches of an epoch like `plan_epoch`, but always the same ones, in random order.

    Precomputed reference log-probabilities depend on the micro-batch by rounding. With fixed micro-batches they are
    rounded exactly like those of the policy in training.
    """
    fixed = [micro for step in plan_epoch(lengths, batch_size, micro_batch_size, 0, 0) for micro in step]
    order = np.random.default_rng((seed, epoch)).permutation(len(fixed))
    per_step = batch_size // micro_batch_size
    return [[fixed[i] for i in order[start : start + per_step]] for start in range(0, len(order), per_step)]


def plan_random_epoch(
    lengths: np.ndarray, batch_size: int, micro_batch_size: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """Return the micro-batches of an epoch like `plan_epoch`, but draw the rows of a step from all rows.

    Prompts of one kind have similar lengths. With rows of similar length a step of RL would see one kind of prompt, and
    the next step undo it for another.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    steps = np.split(order, range(batch_size, len(order), batch_size))
    by_length = [step[np.argsort(lengths[step], kind="stable")] for step in steps]
    return [np.split(step, range(micro_batch_size, len(step), micro_batch_size)) for step in by_length]


def plan_validation(lengths: np.ndarray, micro_batch_size: int) -> list[np.ndarray]:
    """Return all rows, sorted by length, as micro-batches (row numbers)."""
    order = np.argsort(lengths, kind="stable")
    return np.array_split(order, range(micro_batch_size, len(order), micro_batch_size))
