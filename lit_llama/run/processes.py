"""The processes of one run: they wait for each other, fail together, and none outlives the others."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lit_llama.console import is_first_process, quiet_lightning
from lit_llama.run.train_settings import SHARDED, FinetuneSettings, TrainSettings
from lit_llama.utils import UserError, log

PATIENCE = timedelta(minutes=30)  # timeout of waiting for other machines, or for one process that works alone

completing = threading.Lock()  # held in a block, such as an upload, that is completed although another process ended


def fabric_strategy(strategy: str, num_nodes: int = 1) -> str | DDPStrategy | ModelParallelStrategy:
    """Return the strategy for Fabric; with several machines or a sharded base, one with an explicit timeout."""
    if strategy in SHARDED:  # the model comes sharded from `load_model`
        return ModelParallelStrategy(parallelize_fn=lambda model, mesh: model, timeout=PATIENCE)
    return DDPStrategy(timeout=PATIENCE) if num_nodes > 1 and strategy in ("auto", "ddp") else strategy


def launch(fabric: Fabric, num_nodes: int) -> None:
    """Start the other processes on this machine and wait for those of other machines.

    Raises:
        UserError: They did not start in time.
    """
    cluster = getattr(fabric.strategy, "cluster_environment", None)
    if num_nodes > 1 and cluster.local_rank() == 0:
        log(f"Waiting for {num_nodes} machines at {cluster.main_address}:{cluster.main_port}, at most {PATIENCE}. "
            "Start this command on each, with the same MASTER_ADDR and MASTER_PORT, and NODE_RANK from 0 to "
            f"{num_nodes - 1}.")  # fmt: skip
    try:
        fabric.launch()
    except dist.DistError as error:
        raise UserError(
            f"The processes of the run did not find each other within {PATIENCE} "
            f"({str(error).partition(chr(10))[0].rstrip('.')}); check --num_nodes, MASTER_ADDR, MASTER_PORT and "
            "NODE_RANK on each machine."
        ) from None


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Run a block in every process. They wait for each other at its end, and if it fails in one, it fails in all.

    Raises:
        UserError: The error of the first process in which the block failed.
    """
    if fabric.world_size == 1:
        yield
        return
    problem, bug = None, None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except Exception as error:  # a bug of this project, which keeps its traceback
        if isinstance(fabric.strategy, ModelParallelStrategy):
            raise  # the others may be waiting for a part of the base, and end with this process
        bug, problem = error, f"Process {fabric.global_rank} failed ({type(error).__name__})."
    problems: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(problems, problem)
    if bug is not None:
        raise bug
    if first := next(filter(None, problems), None):
        raise UserError(first)


def memory_advice(settings: TrainSettings, what: str) -> str:
    """Return what reduces the memory of a run on a GPU; see `full_gpu_explained`."""
    advice, is_finetuning = [], isinstance(settings, FinetuneSettings)
    is_plain = is_finetuning and not (settings.strategy in SHARDED or settings.quantize or settings.compile)
    if what == "Training":
        if is_finetuning and not settings.gradient_checkpointing:
            advice.append("set --gradient_checkpointing, which --resume accepts")
        if settings.micro_batch_size > 1:
            advice.append("lower --micro_batch_size")
    elif is_plain:
        advice.append("shard it over several GPUs with --strategy fsdp and --devices")
    if is_plain:
        advice.append("set --quantize nf4")
    smaller = "more devices, shorter rows or a smaller base" if what == "Training" else "more devices or a smaller base"
    return ", or ".join(advice or [f"use {smaller}"])


@contextmanager
def full_gpu_explained(settings: TrainSettings, what: Literal["Training", "The base"] = "Training") -> Iterator[None]:
    """Report a GPU without memory for a block; the process in which it occurs prints the error.

    Args:
        settings: The settings of the run; the error names only flags of its script that are not set yet.
        what: What does not fit.

    Raises:
        UserError: The memory of the GPU is full.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        problem = f"{what} does not fit into the memory of the GPU: {memory_advice(settings, what)}."
        if not is_first_process():  # it prints only its own errors
            log(f"error: {problem}")
        raise UserError(problem) from None


def launch_sharded(accelerator: str, devices: int) -> Fabric:
    """Start the processes that generate with a sharded base, one per device of this machine.

    Raises:
        UserError: There are no such devices.
    """
    quiet_lightning()  # again, because this module imports Lightning only now
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, strategy=fabric_strategy("fsdp"))
    except Exception as error:  # Fabric raises several types
        raise UserError(f"Fabric refuses --devices {devices}: {error}") from None
    launch(fabric, 1)
    watch_processes(fabric, advice="")
    return fabric


def base_mesh(fabric: Fabric, strategy: str) -> DeviceMesh | None:
    """Return the processes that share a base: those of all machines for "fsdp", of one machine for "hsdp", else None.

    Args:
        fabric: Fabric, already launched.
    """
    if not isinstance(fabric.strategy, ModelParallelStrategy):
        return None
    if strategy == "hsdp":
        return fabric.strategy.device_mesh["tensor_parallel"]  # Fabric's name for the devices of a machine
    return init_device_mesh(fabric.device.type, (fabric.world_size,))


def watch_processes(fabric: Fabric, advice: str = "; continue it with --resume") -> None:
    """End this process soon after another process of the run on this machine has ended, even while waiting for it.

    gloo notices a lost process by itself, NCCL does not.

    Args:
        advice: The end of the message.
    """
    if fabric.world_size == 1:
        return
    atexit.register(_disconnect)
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":  # Lightning's, in the first process; it would kill silently
            thread._terminate_all = lambda children=thread._child_processes: _give_up(children, advice)
    if os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        threading.Thread(target=_watch_parent, args=(os.getppid(), advice), daemon=True).start()


def _disconnect() -> None:
    """Stop the threads of torch.distributed, which could abort the process while Python exits."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _watch_parent(parent: int, advice: str) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    _give_up([], advice)


def _give_up(children: list[Any], advice: str) -> None:
    time.sleep(3)  # a process that ends by itself reports a more precise error
    if completing.locked():
        with completing:  # after the block has ended; an error after it is printed within seconds
            time.sleep(3)
    for child in children:
        child.kill()
    log(f"error: Another process of this run ended, and the run cannot go on{advice}.")
    sys.stdout.flush()
    os._exit(1)
