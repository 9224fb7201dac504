"""The number of steps of a run, the learning-rate schedule, and early stopping."""

import math
from collections.abc import Sequence

from lit_llama.run.train_settings import TrainSettings


def lr_at(step: int, *, peak: float, warmup_steps: int, max_steps: int, schedule: str = "constant") -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    It rises linearly and reaches `peak` in step `warmup_steps`. Then it stays constant, or follows half a cosine that
    would reach 0 in step `max_steps`, one after the last.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def count_steps(settings: TrainSettings, n_rows: int) -> tuple[int, int, int]:
    """Return the number of optimizer steps in an epoch, in the run and in its warmup."""
    per_epoch = math.ceil(n_rows / settings.batch_size)
    steps = max(1, round(min(settings.epochs, 1e9) * per_epoch))
    return per_epoch, min(steps, settings.max_steps or steps), round(min(settings.warmup_epochs, 1e9) * per_epoch)


def stops_early(val_losses: Sequence[tuple[int, float]], patience: int | None) -> bool:
    """Return whether none of the last `patience` validations had a lower loss than all before; False for None."""
    losses = [loss for _, loss in val_losses]
    return patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])
