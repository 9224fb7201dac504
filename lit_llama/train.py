"""The training loop that all scripts share; they differ only in their data and loss.

A step is always an optimizer step. Its gradient is that of the mean loss over all targets of the step (label tokens for
SFT, pairs for DPO), regardless of how the rows are split into micro-batches and across processes. A step depends only
on the seed, its number and the weights, so a resumed run reaches the same losses (on a GPU up to rounding).
"""

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from lit_llama.console import transient_bar
from lit_llama.data import Data, check_rows, rows_sha256
from lit_llama.epochs import plan_epoch, plan_validation
from lit_llama.model import LLaMA
from lit_llama.modules import add_scaled, eval_mode
from lit_llama.run.folder import RunFolder
from lit_llama.run.report import Progress, print_notes, write_above_bar
from lit_llama.run.samples import summarize
from lit_llama.run.saved_state import best_of, check_saved_state
from lit_llama.run.schedule import count_steps, lr_at, stops_early
from lit_llama.run.setup import Setup
from lit_llama.run.steps import Batches, Step, mean_over_processes, read_metrics, share_of_process, steps_between_reads
from lit_llama.sharding import average_gradients, in_step
from lit_llama.utils import UserError, log


class Loss(Protocol):
    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return sums over the batch, fp32: "loss" is minimized, the others are logged. `model` is a `LabelLogps`."""


class SFTLoss:
    """The negative log-likelihood of the labels, in nats."""

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": -model(batch["idx"], batch["labels"], batch["label_index"]).sum()}


class Trainer:
    """One training run.

    Args:
        setup: Fabric, the model, the optimizers and the metadata of adapter files. The learning rate of a parameter
            group is that of `lr_at`, times its `lr_scale` if it has one.
        train, val: The training and the validation data.
        loss: The loss to minimize.
        run: The run folder, with the settings of the run.
        val_loss: The loss on `val`, if it needs a separate object (default: `loss`).
        val_metrics: Called with the unwrapped model at each validation; returns further metrics.
        sample_answers: Called with the unwrapped model at each validation; returns records
            {"prompt", "answer", ...} for samples.jsonl.
        plan: Returns the micro-batches of an epoch; takes the arguments of `plan_epoch`.

    Raises:
        UserError: There are no rows, or a row is longer than the model's context.
    """

    def __init__(
        self,
        setup: Setup,
        train: Data,
        val: Data,
        loss: Loss,
        run: RunFolder,
        *,
        val_loss: Loss | None = None,
        val_metrics: Callable[[LLaMA], dict[str, float]] = lambda model: {},
        sample_answers: Callable[[LLaMA], list[dict[str, str]]] = lambda model: [],
        plan: Callable[[np.ndarray, int, int, int, int], list[list[np.ndarray]]] = plan_epoch,
    ) -> None:
        self.fabric, self.model, self.optimizers = setup.fabric, setup.model, setup.optimizers
        self.train, self.val, self.loss, self.val_loss = train, val, loss, val_loss or loss
        self.run, self.settings, self.adapter_meta = run, run.settings, setup.adapter_meta
        self.val_metrics, self.sample_answers, self.plan = val_metrics, sample_answers, plan
        self.log_interval = steps_between_reads(setup.fabric, self.settings.log_interval)
        self.unwrapped, self.batches = setup.unwrapped, Batches(train, setup.fabric)
        self.trainable = {name: p for name, p in self.unwrapped.named_parameters() if p.requires_grad}
        wrong = [name for name, p in self.trainable.items() if p.dtype != torch.float32]
        assert not wrong, f"trainable parameters must be fp32: {wrong}"
        check_rows(train, "training", self.unwrapped.max_tokens)
        check_rows(val, "validation", self.unwrapped.max_tokens)

        self.steps_per_epoch, self.max_steps, self.warmup_steps = count_steps(self.settings, len(train.lengths))
        self.step, self.seconds, self.tokens = 0, 0.0, 0  # of the whole run, including earlier processes
        self.val_losses: list[tuple[int, float]] = []
        self.best: dict[str, torch.Tensor] = {}  # the adapter with the lowest validation loss
        self.stopping = False  # whether a process of the run has received SIGTERM

    def fit(self) -> dict[str, Any]:
        """Train to the last step and return the content of summary.json.

        Raises:
            UserError: The run folder holds a run with other settings, a loss is not finite, or the disk is full.
        """
        settings, run = self.settings, self.run
        with run.occupied(self.fabric, self.adapter_meta, rows_sha256(self.train, self.val)):
            state = run.read_state()
            self.load_state(state)
            run.open(state)
            if run.is_first:
                n_parameters = sum(p.numel() for p in self.trainable.values())
                log(f"{n_parameters:,} trainable parameters, {len(self.train.lengths):,} rows, {self.max_steps} steps "
                    f"on {run.device}, {run.identity['precision']}")  # fmt: skip
                print_notes(settings, len(self.train.lengths), self.step, self.fabric.world_size)
            with run.recording():
                if state is None:  # before the first step
                    self.evaluate()
                    self.save_state()
                with Progress(self.step, self.max_steps, enabled=run.is_first) as progress:
                    started, unread = time.perf_counter() - self.seconds, []
                    for micro_batches in self.batches.look_ahead(self.remaining_steps()):
                        unread.append(self.train_step(micro_batches))
                        self.step += 1
                        evaluates = self.step == self.max_steps or self.step % settings.eval_interval == 0
                        saves = self.step % settings.save_interval == 0 or run.stops_alone
                        if evaluates or saves or len(unread) == self.log_interval:
                            metrics = self.read(unread)
                            for step, values in zip(unread, metrics, strict=True):
                                run.log_metrics(step.number, values)
                            progress.advance(metrics)
                            unread = []
                        if evaluates:
                            self.evaluate()
                        is_last = self.is_over
                        self.seconds = time.perf_counter() - started
                        if saves or is_last or self.stopping or (evaluates and run.stops_alone):
                            self.save_state()
                        if is_last:
                            break  # `look_ahead` may have planned another step
            summary = self.summary()
            run.finish(summary)
        return summary

    @property
    def is_over(self) -> bool:
        """Whether training has ended: all steps are done, or the validation loss has stopped improving."""
        return self.step == self.max_steps or stops_early(self.val_losses, self.settings.early_stopping)

    def remaining_steps(self) -> Iterator[list[np.ndarray]]:
        """Yield the micro-batches (row numbers) of every step from `self.step` on."""
        settings = self.settings
        for epoch in range(self.step // self.steps_per_epoch, math.ceil(self.max_steps / self.steps_per_epoch)):
            plan = self.plan(self.train.lengths, settings.batch_size, settings.micro_batch_size, settings.seed, epoch)
            for offset, micro_batches in enumerate(plan):
                if self.step <= epoch * self.steps_per_epoch + offset < self.max_steps and not self.is_over:
                    yield micro_batches

    def train_step(self, micro_batches: list[np.ndarray]) -> Step:
        """Take one optimizer step, without waiting for the device."""
        fabric, settings, began = self.fabric, self.settings, time.perf_counter()
        lr = self.set_learning_rate()
        total = sum(float(self.train.weights[rows].sum()) for rows in micro_batches)

        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=fabric.device))
        bad, share = [], share_of_process(fabric, micro_batches)
        for i, (rows, scale) in enumerate(share):
            number = fabric.global_rank + i * fabric.world_size  # index of the micro-batch in the step
            # for methods with dropout: a micro-batch has the same seed in whichever process it runs. A CPU uses only
            # the low 32 bits, in which multiples of this prime are far apart.
            torch.manual_seed((settings.seed * 1_000_003 + self.step + number * 2_654_435_761) % 2**64)
            batch = self.batches[rows]
            with fabric.no_backward_sync(self.model, enabled=i + 1 < len(share)):
                losses = self.loss(self.model, batch)
                # DDP averages the gradients of the processes, but their sum is needed
                fabric.backward(losses["loss"] * (scale * fabric.world_size / total))
            add_scaled(sums, losses, scale)
            bad.append(~losses["loss"].detach().isfinite())
        average_gradients(fabric, self.model)
        sums["stopping"] = torch.full((), float(self.run.stopping), device=fabric.device)
        norm = torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), settings.grad_clip or math.inf)
        tokens = sum(int(self.train.tokens[rows].sum()) for rows in micro_batches)
        step = Step(self.step, dict(sums), total, norm, lr, tokens, micro_batches, bad, began, {})
        if norm.device.type == "cpu" and not norm.isfinite():
            self.read([step])  # raises before the weights change; on a GPU this would synchronize in every step
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += tokens
        return step

    def read(self, steps: list[Step]) -> list[dict[str, float]]:
        """Return the metrics of steps; this synchronizes with the device.

        Raises:
            UserError: A loss or gradient is not finite. On a GPU the optimizer has already used it; nothing is saved.
        """
        metrics = read_metrics(self.fabric, steps)
        for step, values in zip(steps, metrics, strict=True):
            self.stopping = values.pop("train/stopping") > 0
            if problem := step.problem(self.fabric, values):
                raise self.diverged(problem, step.number)
        return metrics

    def set_learning_rate(self) -> float:
        """Set the learning rate of the current step in all optimizers and return it."""
        lr = lr_at(self.step, peak=self.settings.learning_rate, warmup_steps=self.warmup_steps,
                   max_steps=self.max_steps, schedule=self.settings.lr_schedule)  # fmt: skip
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the mean losses over the validation data, always in the same batches."""
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.fabric.device))
        batches = share_of_process(self.fabric, plan_validation(self.val.lengths, self.settings.micro_batch_size))
        with eval_mode(self.model):
            for rows, scale in transient_bar(batches, "Validation", "batch"):
                batch = self.fabric.to_device(self.val.batch(rows))
                add_scaled(sums, self.val_loss(self.model, batch), scale)
        return mean_over_processes(self.fabric, sums, float(self.val.weights.sum()))

    def evaluate(self) -> None:
        """Validate, keep the best adapter and answer validation prompts."""
        metrics = self.validate()
        self.run.log_metrics(self.step, {f"val/{name}": value for name, value in metrics.items()})
        if not math.isfinite(metrics["loss"]):
            raise self.diverged(f"The validation loss is {metrics['loss']} after {self.step} steps", self.step)
        lowest = min((loss for _, loss in self.val_losses), default=math.inf)
        self.val_losses.append((self.step, metrics["loss"]))
        is_best = metrics["loss"] <= lowest
        if is_best:
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.trainable.items()}
        with self.run.together(), in_step(self.model):
            if not self.run.is_first:
                return
            if is_best:
                self.run.save_adapter("best", self.best, *self.val_losses[-1])
            more = self.val_metrics(self.unwrapped)
            self.run.log_metrics(self.step, {f"val/{name}": value for name, value in more.items()})
            records = self.sample_answers(self.unwrapped)
            self.run.add_samples(self.step, records)
            note = ", the best so far" if metrics["loss"] < lowest < math.inf else ""
            line = f"step {self.step}: validation loss {metrics['loss']:.4f}{note}"
            write_above_bar("\n".join([line, *map(summarize, records)]))

    def save_state(self) -> None:
        """Save everything needed to resume the run, and end it if it received SIGTERM; called between two steps."""
        with self.run.together():
            self.run.save_state({
                "step": self.step,
                "adapter": {name: p.detach() for name, p in self.trainable.items()},
                "best": self.best,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "val_losses": self.val_losses,
                "seconds": self.seconds,
                "tokens": self.tokens,
            })  # fmt: skip
        if (self.stopping or self.run.stops_alone) and not self.is_over:
            self.run.leave(128 + signal.SIGTERM)

    @torch.no_grad()
    def load_state(self, state: dict[str, Any] | None) -> None:
        """Restore a state that `save_state` saved; None starts a new run.

        Raises:
            UserError: The state does not fit this run, or contains values that are not finite.
        """
        if state is None:
            return
        with self.run.together():
            check_saved_state(self.run.state_path, state, self.trainable, self.optimizers)
        for name, p in self.trainable.items():
            p.copy_(state["adapter"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        self.val_losses, self.best = [tuple(pair) for pair in state["val_losses"]], state.get("best") or {}

    def summary(self) -> dict[str, Any]:
        best_step, best = best_of(self.val_losses)
        return {
            "trainable_parameters": sum(p.numel() for p in self.trainable.values()),
            "steps": self.step,
            "stopped_early": self.step < self.max_steps,
            "seconds": round(self.seconds, 1),
            "tokens_per_s": round(self.tokens / self.seconds) if self.seconds else 0,
            "val_loss_before": self.val_losses[0][1],
            "best_val_loss": best,
            "best_step": best_step,
            "last_val_loss": self.val_losses[-1][1],
        }

    def diverged(self, problem: str, step: int) -> UserError:
        """Return the error for a loss or gradient that is not finite in or after a step."""
        if step > 0:
            best = self.run.path / "best.safetensors"
            return UserError(f"{problem}: lower --learning_rate and start again with --overwrite, or keep {best}.")
        advice = "check the base, the initial adapter and the data"
        if any(optimizer.state for optimizer in self.optimizers):  # on a GPU, or with several updates in a step
            return UserError(f"{problem}: lower --learning_rate, or {advice}.")
        return UserError(f"{problem}: nothing is trained yet, so {advice}.")
