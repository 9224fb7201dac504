"""Learning rates over the steps of a run."""

import math


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
