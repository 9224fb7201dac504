"""A dry run of finetuning, which writes nothing: estimate memory and time from the data and measured steps."""

import math
import time

import numpy as np
import torch

from lit_llama.device import device_name
from lit_llama.memory import Memory, byte_size, count_parameters, generation_memory, memory_table, training_memory
from lit_llama.methods import METHODS
from lit_llama.packing import answers_per_row, packed_length
from lit_llama.rollouts import Rollouts
from lit_llama.run.processes import full_gpu_explained
from lit_llama.run.report import duration
from lit_llama.run.setup import base_dtype
from lit_llama.sharding import count_shards
from lit_llama.train import Trainer
from lit_llama.utils import log

WARM_UP = 30  # seconds; if the first step takes less or compiles, a second one is measured, without one-time costs


def dry_run(trainer: Trainer) -> None:
    """Print to stdout the parameters, the estimated memory, the number of steps and the time of a run.

    The memory is that of the largest micro-batch. The time is that of one step, scaled by the number of tokens,
    including padding; validations and saved states are not included. In reinforcement learning, all
    answers are assumed to have the maximum length.

    Raises:
        UserError: The step does not fit into the memory of the GPU, or its loss is not finite.
    """
    settings, fabric, lengths = trainer.settings, trainer.fabric, trainer.train.lengths
    n_base, n_trained = count_parameters(METHODS[settings.method], trainer.unwrapped.config)
    plan = trainer.plan(lengths, settings.batch_size, settings.micro_batch_size, settings.seed, 0)
    is_first = fabric.global_rank == 0
    if is_first:
        processes = f"{fabric.world_size} process{'es' * (fabric.world_size > 1)} on {device_name(fabric.device)}"
        quantized = f", layers in {settings.quantize}" if settings.quantize else ""
        print(f"parameters   {n_base:,} frozen in {str(base_dtype(fabric)).removeprefix('torch.')}{quantized}, "
              f"{n_trained:,} trained ({settings.method})\n"
              f"data         {len(lengths):,} rows, up to {lengths.max():,} tokens\n"
              f"steps        {trainer.max_steps:,} of {settings.batch_size} rows in {processes}, "
              f"{trainer.steps_per_epoch:,} an epoch\n\n"
              f"memory of each process, estimated\n{memory_table(largest_batches(trainer, plan))}\n")  # fmt: skip
        log("measuring a step")
    first = next(trainer.remaining_steps())
    with full_gpu_explained(settings):
        seconds = timed_step(trainer, first)
        if settings.compile or fabric.broadcast(seconds) < WARM_UP:
            seconds = timed_step(trainer, first)
    if is_first:
        total = seconds * sum(padded_tokens(trainer, step) for step in plan) / padded_tokens(trainer, first)
        total *= trainer.max_steps / len(plan)
        print(f"time         {seconds:.3g} s for a step, measured; about {duration(total)} for {trainer.max_steps:,} "
              "steps, without validations")  # fmt: skip
        if fabric.device.type == "cuda":
            print(f"measured     {byte_size(torch.cuda.max_memory_allocated(fabric.device))} of GPU memory at the peak "
                  "of this step, which need not have the largest micro-batch")  # fmt: skip
        print(f"nothing was written to {settings.out_dir}")


def largest_batches(trainer: Trainer, plan: list[list[np.ndarray]]) -> dict[str, Memory]:
    """Return the estimated memory of each task of a step and, in reinforcement learning, of a validation.

    It is that of the largest micro-batch.
    """
    settings, train, val, config = trainer.settings, trainer.train, trainer.val, trainer.unwrapped.config
    method, micro_batches = METHODS[settings.method], [rows for step in plan for rows in step]
    shared = {"dtype": base_dtype(trainer.fabric), "quantize": settings.quantize, "shards": count_shards(trainer.model)}
    tasks, packed = {}, True
    if isinstance(train, Rollouts):
        sampling, training = zip(*(largest_answers(trainer, train, rows) for rows in micro_batches), strict=True)
        rows, prompt, new = max(sampling, key=lambda s: s[0] * (s[1] + s[2]))
        distinct = rows // train.group_size
        tasks["sampling"] = generation_memory(
            method, config, rows=rows, prompt=prompt, new=new, distinct=distinct, **shared
        )
        rows, prompt = min(settings.answers_at_once, len(val.lengths)), int(val.lengths.max()) - 1
        new = min(settings.max_new_tokens, trainer.unwrapped.max_tokens - prompt)
        tasks["validation"] = generation_memory(method, config, rows=rows, prompt=prompt, new=new, **shared)
        sequences, tokens, labels = max(training, key=lambda s: s[0] * s[1])
    else:
        batch = train.batch(max(micro_batches, key=lambda rows: math.prod(train.shape(rows))))
        (sequences, tokens), labels, packed = batch["idx"].shape, len(batch["label_index"]), "segments" in batch
    checkpointing = settings.gradient_checkpointing
    tasks[f"a step, {sequences} × {tokens:,} tokens"] = training_memory(
        method,
        config,
        sequences=sequences,
        tokens=tokens,
        labels=labels,
        gradient_checkpointing=checkpointing,
        packed=packed,
        **shared,
    )
    return tasks


def largest_answers(
    trainer: Trainer, train: Rollouts, rows: np.ndarray
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the sizes of a micro-batch of prompts in reinforcement learning, if all answers have the maximum length.

    Returns:
        sampling: Number of answers, tokens of the longest prompt, and tokens of its answer.
        training: Number of packed rows, tokens of the longest row, and number of labels.
    """
    most, model, G = trainer.settings.max_new_tokens, trainer.unwrapped, train.group_size
    n_rows = longest_row = labels = 0
    prompts = [int(length) - 1 for length in train.lengths[rows]]
    for prompt in prompts:
        new = min(most, model.max_tokens - prompt)
        size = answers_per_row(prompt, new, G, model.config.n_embd)
        n_rows, labels = n_rows + math.ceil(G / size), labels + G * new
        longest_row = max(longest_row, packed_length(prompt, [new] * size))
    prompt = max(prompts)
    return (len(rows) * G, prompt, min(most, model.max_tokens - prompt)), (n_rows, longest_row, labels)


def padded_tokens(trainer: Trainer, step: list[np.ndarray]) -> int:
    """Return the number of tokens of a step, padding included; in reinforcement learning with the longest answers."""
    train = trainer.train
    if isinstance(train, Rollouts):
        shapes = [largest_answers(trainer, train, rows)[1][:2] for rows in step]
    else:
        shapes = [train.shape(rows) for rows in step]
    return sum(map(math.prod, shapes))


def timed_step(trainer: Trainer, micro_batches: list[np.ndarray]) -> float:
    """Take a step and return how many seconds it took."""
    began = time.perf_counter()
    trainer.read([trainer.train_step(micro_batches)])  # waits for a GPU, and checks that the loss is finite
    return time.perf_counter() - began
