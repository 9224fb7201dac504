"""Steps whose metrics stay on the device until they are read, and batches that are built ahead of time.

The program synchronizes with a GPU only once per `log_interval` steps, and a GPU never waits for a batch. There
are two exceptions: int8 layers of bitsandbytes synchronize in every forward pass, and several devices in every step, so
that all processes know whether to stop.
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
        number: index of the step, counted from 0.
        sums: sums of the losses over the targets of this process, () fp32 on the device.
        total: total weight of all targets of the step.
        norm: norm of the gradient, () on the device.
        lr: learning rate.
        tokens: number of tokens of all processes.
        micro_batches: row numbers of each micro-batch.
        bad: for each micro-batch of this process, as in `share_of_process`: whether its loss is not finite, () on the
            device.
        began: `time.perf_counter()` at the start of the step.
        further: further metrics, already known.
    """

    number: int
    sums: dict[str, Tensor]
    total: float
    norm: Tensor
    lr: float
    tokens: int
    micro_batches: list[np.ndarray]
    bad: list[Tensor]
    began: float
    further: dict[str, float]

    def problem(self, fabric: Fabric, metrics: dict[str, float]) -> str | None:
        """Return a phrase about the loss or gradient norm of this step that is not finite, or None.

        It names the rows whose loss is not finite, or all rows if only the gradient is not. All processes must call
        this together, with the same metrics.
        """
        for name, value in (("loss", metrics["train/loss"]), ("gradient norm", metrics["grad_norm"])):
            if not math.isfinite(value):
                by_process = fabric.all_gather(torch.stack(self.bad)).view(fabric.world_size, -1)
                in_order = by_process.T.flatten().tolist()  # longer than `micro_batches` if a process repeated one
                bad = [rows for is_bad, rows in zip(in_order, self.micro_batches, strict=False) if is_bad]
                rows = np.concatenate(bad or self.micro_batches).tolist()
                listed = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
                return f"The {name} is {value} in step {self.number}, rows {listed}, at lr {self.lr:.1e}"
        return None


def steps_between_reads(fabric: Fabric, log_interval: int) -> int:
    """Return after how many steps the metrics are read: `log_interval` on a single GPU, and 1 elsewhere.

    A CPU has nothing to wait for, and several processes have to agree in each step whether to stop.
    """
    return log_interval if fabric.world_size == 1 and fabric.device.type != "cpu" else 1


def read_metrics(fabric: Fabric, steps: list[Step]) -> list[dict[str, float]]:
    """Return the metrics of steps, with losses averaged over the targets of all processes.

    This synchronizes with the device once.
    """
    local_sums = torch.stack([torch.stack(list(step.sums.values())) for step in steps])  # (steps, losses)
    sums = fabric.all_reduce(local_sums, reduce_op="sum")
    values = torch.cat((sums, torch.stack([step.norm for step in steps]).unsqueeze(1)), dim=1).tolist()
    per_second = sum(step.tokens for step in steps) / (time.perf_counter() - steps[0].began)
    metrics = []
    for step, (*step_sums, norm) in zip(steps, values, strict=True):
        losses = {f"train/{name}": value / step.total for name, value in zip(step.sums, step_sums, strict=True)}
        metrics.append({**losses, "lr": step.lr, "grad_norm": norm, "tokens_per_s": per_second, **step.further})
    return metrics


def share_of_process(fabric: Fabric, micro_batches: list[np.ndarray]) -> list[tuple[np.ndarray, float]]:
    """Return the micro-batches of this process and the factors of their losses.

    All processes need the same number of micro-batches, because they exchange gradients and may shard the base. A
    process with fewer also computes the first micro-batch of the step, with a factor of 0.
    """
    mine = [(rows, 1.0) for rows in micro_batches[fabric.global_rank :: fabric.world_size]]
    missing = math.ceil(len(micro_batches) / fabric.world_size) - len(mine)
    return mine + missing * [(micro_batches[0], 0.0)]


def mean_over_processes(fabric: Fabric, sums: dict[str, Tensor], total: float) -> dict[str, float]:
    """Return the sums of all processes divided by the total weight; this synchronizes with the device."""
    stacked = fabric.all_reduce(torch.stack(list(sums.values())), reduce_op="sum")
    return {name: value / total for name, value in zip(sums, stacked.tolist(), strict=True)}


class Batches:
    """The training batches of a process, on its device.

    Args:
        data: the rows to build them from.
        ahead: build the batches of the next step in a thread, in pinned memory for a GPU, while the current step runs
            (default: only if the device is not the CPU, which computes the steps itself).
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
        """Yield the micro-batches of each step, after starting to build the batches of the next one."""
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
