"""Steps whose numbers stay on the device until they are read, and batches that are built before they are needed.

So a GPU waits for the program once per `log_interval` steps, and for no batch.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_llama.data import Data

Batch = dict[str, Tensor]


class Step(NamedTuple):
    """An optimizer step that was taken.

    Args:
        number: how many steps came before it.
        sums: of the losses over the targets of this process, () fp32 on the device.
        total: weight of all targets of the step.
        norm: of the gradient, () on the device.
        lr: learning rate.
        tokens: of all processes.
        micro_batches: row numbers.
        bad: whether the loss of each micro-batch of this process is not finite, () on the device, and its rows.
        began: `time.perf_counter()` at its beginning.
        further: metrics that are known already.
    """

    number: int
    sums: dict[str, Tensor]
    total: float
    norm: Tensor
    lr: float
    tokens: int
    micro_batches: list[np.ndarray]
    bad: list[tuple[Tensor, np.ndarray]]
    began: float
    further: dict[str, float]

    def problem(self, metrics: dict[str, float]) -> str | None:
        """Return a phrase about what is not finite in the metrics of this step, or None.

        It names the rows with such a loss, or all rows if only the gradient is not finite.
        """
        for name, value in (("loss", metrics["train/loss"]), ("gradient norm", metrics["grad_norm"])):
            if not math.isfinite(value):
                bad = [rows for is_bad, rows in self.bad if is_bad]
                rows = np.concatenate(bad or self.micro_batches).tolist()
                listed = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
                return f"The {name} is {value} in step {self.number}, rows {listed}, at lr {self.lr:.1e}"
        return None


def read_metrics(fabric: Fabric, steps: list[Step]) -> list[dict[str, float]]:
    """Return the metrics of steps, with losses that are means over the targets of all processes.

    This waits for the device, once.
    """
    own = torch.stack([torch.stack(list(step.sums.values())) for step in steps])  # (steps, losses)
    sums = fabric.all_reduce(own, reduce_op="sum")
    values = torch.cat((sums, torch.stack([step.norm for step in steps]).unsqueeze(1)), dim=1).tolist()
    per_second = sum(step.tokens for step in steps) / (time.perf_counter() - steps[0].began)
    metrics = []
    for step, (*of_step, norm) in zip(steps, values, strict=True):
        losses = {f"train/{name}": value / step.total for name, value in zip(step.sums, of_step, strict=True)}
        metrics.append({**losses, "lr": step.lr, "grad_norm": norm, "tokens_per_s": per_second, **step.further})
    return metrics


def share_of_process(fabric: Fabric, micro_batches: list[np.ndarray]) -> list[tuple[np.ndarray, float]]:
    """Return the micro-batches of this process and the factor of their losses.

    All processes have the same number, because they exchange gradients and may share the base: those with fewer compute
    the first one again, with a factor of 0.
    """
    mine = [(rows, 1.0) for rows in micro_batches[fabric.global_rank :: fabric.world_size]]
    missing = math.ceil(len(micro_batches) / fabric.world_size) - len(mine)
    return mine + missing * [(micro_batches[0], 0.0)]


def mean_over_processes(fabric: Fabric, sums: dict[str, Tensor], total: float) -> dict[str, float]:
    """Return the sums of all processes divided by the total weight; this waits for the device."""
    stacked = fabric.all_reduce(torch.stack(list(sums.values())), reduce_op="sum")
    return {name: value / total for name, value in zip(sums, stacked.tolist(), strict=True)}


class Batches:
    """The training batches of a process, on its device.

    Args:
        data: of which they are made.
        ahead: build the batches of the next step in a thread, in pinned memory for a GPU, while the present step runs
            (default: not on a CPU, where nothing runs beside the program).
    """

    def __init__(self, data: Data, fabric: Fabric, ahead: bool | None = None) -> None:
        self.data, self.fabric = data, fabric
        ahead = fabric.device.type != "cpu" if ahead is None else ahead
        self.pool = ThreadPoolExecutor(1) if ahead else None
        self.ready: dict[bytes, Future[Batch]] = {}  # by row numbers

    def __getitem__(self, rows: np.ndarray) -> Batch:
        future = self.ready.pop(rows.tobytes(), None)
        return self.fabric.to_device(self._build(rows) if future is None else future.result())

    def look_ahead(self, steps: Iterator[list[np.ndarray]]) -> Iterator[list[np.ndarray]]:
        """Yield the micro-batches of each step once the batches of the step after it are being built."""
        before = None
        for micro_batches in steps:
            if self.pool is not None:
                for rows, _ in share_of_process(self.fabric, micro_batches):
                    self.ready[rows.tobytes()] = self.pool.submit(self._build, rows)
            if before is not None:
                yield before
            before = micro_batches
        if before is not None:
            yield before

    def _build(self, rows: np.ndarray) -> Batch:
        batch = self.data.batch(rows)
        pin = self.pool is not None and self.fabric.device.type == "cuda"
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch
