"""The training loop that every script shares: they differ in their data and their loss (`Task`).

"Step" is always an optimiser step. A step's gradient is the mean over all targets of the step (label tokens for SFT),
however they are spread over micro-batches and processes. What a step computes depends on the seed, its number and the
weights alone, so a run that was killed continues to the same losses.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy

from lit_llama import aligner
from lit_llama.checkpoint import base_fingerprint, load_model, read_adapter, save_adapter, versions, write_text
from lit_llama.data import SFTData, plan_epoch
from lit_llama.device import computes_bf16
from lit_llama.dpo import DPOData
from lit_llama.generation import Sampling, generate
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.report import MetricsLog, Progress, plot_losses
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, atomic_write, log, unwritable

Precision = Literal["auto", "32-true", "bf16-true", "bf16-mixed"]  # fp16 would need loss scaling


class Task(Protocol):
    """Data and loss of a training script, one split of it.

    Attributes:
        lengths: (rows,) tokens of each row, of its longest sequence where it has several.
        tokens: (rows,) tokens of each row, of all its sequences.
        weights: (rows,) what each row counts in the step's mean: label tokens for SFT, 1 per pair for DPO.
    """

    lengths: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The rows as tensors on the CPU."""

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the batch, fp32 scalars; "loss" is what is minimised, the others are logged."""


@dataclass
class TrainConfig:
    """What the loop itself needs to know; finetune/aligner.py explains each value.

    Raises:
        UserError: a value out of range, or `out_dir` holds a run that is neither continued nor replaced.
    """

    out_dir: Path
    epochs: float
    max_steps: int | None
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_epochs: float
    lr_schedule: Literal["constant", "cosine"]
    weight_decay: float
    grad_clip: float
    eval_interval: int
    save_interval: int
    seed: int
    resume: bool
    overwrite: bool

    def __post_init__(self) -> None:
        problems = []
        for name in ("epochs", "max_steps", "batch_size", "micro_batch_size", "learning_rate", "eval_interval",
                     "save_interval"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                problems.append(f"{name} is {value} and must be above 0")
        for name in ("warmup_epochs", "weight_decay", "grad_clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"{name} is {getattr(self, name)} and must be 0 or more")
        if not problems and self.batch_size % self.micro_batch_size:
            problems.append(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.resume and self.overwrite:
            problems.append("--resume and --overwrite exclude each other")
        if problems:
            raise UserError("; ".join(problems) + ".")
        adapter, state = (self.out_dir / name for name in ("last.safetensors", "state.pt"))
        if not self.resume and not self.overwrite and (adapter.is_file() or state.is_file()):
            raise UserError(
                f"{self.out_dir} holds a run already: continue it with --resume, replace it with --overwrite, or "
                "choose another --out_dir."
            )
        if self.resume and adapter.is_file() and not state.is_file():
            raise UserError(f"{self.out_dir} holds a run without its state.pt, so there is nothing to continue from.")


def lr_at(step: int, *, peak: float, warmup_steps: int, max_steps: int, schedule: str = "constant") -> float:
    """The learning rate of optimiser step `step`, counted from 0.

    It rises linearly and reaches `peak` in step `warmup_steps`; after that it stays, or follows half a cosine that
    would reach 0 in step `max_steps`, the first one not taken.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_fabric(
    *, devices: int | str, num_nodes: int, strategy: str, precision: str, out_dir: Path, accelerator: str = "auto"
) -> Fabric:
    """Fabric from a script's flags; where `fabric run` launched the script, its flags go first.

    `precision="auto"` is a bf16 base on a GPU that computes in bf16, and fp32 elsewhere.

    Raises:
        UserError: Fabric refuses the combination, or the loop does.
    """
    if precision == "auto":
        precision = "bf16-true" if computes_bf16(os.environ.get("LT_ACCELERATOR", accelerator)) else "32-true"
    flags = dict(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision)
    flags = {name: value for name, value in flags.items() if f"LT_{name.upper()}" not in os.environ}
    loggers = [MetricsLog(out_dir / "metrics.csv"), TensorBoardLogger(root_dir=out_dir, name="tensorboard", version="")]
    try:
        fabric = Fabric(**flags, loggers=loggers)
    except Exception as error:  # of many kinds, all about the flags
        raise UserError(f"Fabric refuses these settings: {error}") from None
    if type(fabric.strategy) not in (SingleDeviceStrategy, DDPStrategy) or "spawn" in strategy or "fork" in strategy:
        raise UserError(
            f"The strategy {strategy!r} ({type(fabric.strategy).__name__}) is not supported: every device needs a "
            "process of its own with the whole base; use 'ddp' for several devices."
        )
    known = get_args(Precision)[1:]
    if fabric.strategy.precision.precision not in known:
        raise UserError(
            f"The precision {fabric.strategy.precision.precision} is not supported; use {', '.join(known)}."
        )
    if "LT_CLI_USED" not in os.environ:  # else the processes are there already
        fabric.launch()
    return fabric


def base_dtype(fabric: Fabric) -> torch.dtype:
    """The dtype of the frozen base under the run's precision."""
    return torch.bfloat16 if fabric.strategy.precision.precision == "bf16-true" else torch.float32


def start_finetuning(
    args: Any, prepared: dict[str, Any], method: str = "aligner"
) -> tuple[Fabric, LLaMA, dict[str, Any]]:
    """What the finetuning scripts begin with: Fabric, the model with a fresh or the initial adapter, and what the
    trained adapter's file shall say of itself.

    Args:
        args: a script's settings, the method's own among them; the initial adapter's replace these.
        prepared: `meta.json` of the data.
        method: a name in `lit_llama.methods.METHODS`.

    Raises:
        UserError: a file is missing or does not fit, is of another method, or Fabric refuses a setting.
    """
    adapter = None if args.init_adapter is None else read_adapter(args.init_adapter)
    if adapter is not None and adapter.method != method:
        raise UserError(
            f"{adapter.path} was made by the method {adapter.method!r} and cannot start a training of {method!r}."
        )
    own = method_config(method, args)
    if adapter is not None:
        own = adapter.config
        for name in own.keys() & vars(args).keys():
            setattr(args, name, own[name])
    fabric = make_fabric(
        **{k: getattr(args, k) for k in ("accelerator", "devices", "num_nodes", "strategy", "precision", "out_dir")}
    )
    fabric.seed_everything(args.seed, verbose=False)
    model = load_model(
        args.checkpoint_dir,
        adapter,
        method=method,
        method_config=own,
        device=fabric.device,
        dtype=base_dtype(fabric),
        quantize=args.quantize,
    )
    aligner.mark_only_adapter_as_trainable(model)
    model.gradient_checkpointing = args.gradient_checkpointing
    meta = {
        "method": method,
        "config": own,
        "base": base_fingerprint(args.checkpoint_dir),
        "prompt_style": prepared["prompt_style"],
        "data": {k: prepared[k] for k in ("source", "counts", "max_seq_length")},
    }
    return fabric, model, meta


def method_config(method: str, args: Any) -> dict[str, Any]:
    """The method's own configuration: a script's settings of these names, what its `method_config` says, or defaults.

    Raises:
        UserError: `method_config` has a name that is none of the method's.
    """
    of_base = {field.name for field in fields(LLaMAConfig)}
    own = {
        f.name: getattr(args, f.name, f.default) for f in fields(METHODS[method].config_class) if f.name not in of_base
    }
    further = getattr(args, "method_config", None) or {}
    if unknown := sorted(further.keys() - own.keys()):
        known = f"it has {', '.join(own)}" if own else "it has none"
        raise UserError(f"method_config: {unknown[0]!r} is no setting of the method {method!r}; {known}.")
    return {**own, **further}


def answer_samples(
    val: SFTData | DPOData, tokenizer: Tokenizer, count: int, max_new_tokens: int
) -> Callable[[LLaMA], list[dict]]:
    """Greedy answers to the first validation prompts, beside the reference, for `Trainer.sample_answers`."""
    pairs = val.prompts(count)

    def sample(model: LLaMA) -> list[dict[str, str]]:
        answers = generate(model, [p for p, _ in pairs], Sampling(max_new_tokens), tokenizer.stop_ids) if pairs else []
        return [
            {name: tokenizer.decode(ids) for name, ids in (("prompt", p), ("answer", a), ("reference", r))}
            for (p, r), a in zip(pairs, answers, strict=True)
        ]

    return sample


def adamw(model: LLaMA, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW on what requires a gradient, without weight decay on gates and biases."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (no_decay if name.endswith(("gating_factor", "bias")) else decay).append(p)
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, weight_decay=config.weight_decay)]


class Trainer:
    """One training run: its state, its files, its loop.

    Args:
        fabric: launched.
        model: only what is to be trained requires a gradient.
        train, val: what to learn and what to check it on.
        config: the loop's settings.
        settings: all of the script's settings, for the record and for `--resume`.
        adapter_meta: what the adapter's file shall say of itself.
        sample_answers: called with the bare model before, during and after training; returns records
            {"prompt", "answer", ...} for samples.jsonl.
        plan: the micro-batches of an epoch, with the arguments of `plan_epoch`.
        make_optimizers: what updates the trainable parameters; a group's learning rate is its `lr_scale` (default 1)
            times that of `lr_at`.

    Raises:
        UserError: there is nothing to train or to validate on, or a row is longer than the model's context.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: LLaMA,
        train: Task,
        val: Task,
        config: TrainConfig,
        settings: dict[str, Any],
        adapter_meta: dict[str, Any],
        sample_answers: Callable[[LLaMA], list[dict[str, str]]] | None = None,
        plan: Callable[[np.ndarray, int, int, int, int], list[list[np.ndarray]]] = plan_epoch,
        make_optimizers: Callable[[LLaMA, TrainConfig], list[torch.optim.Optimizer]] = adamw,
    ) -> None:
        self.fabric, self.train, self.val, self.config = fabric, train, val, config
        self.settings, self.adapter_meta, self.sample_answers = settings, adapter_meta, sample_answers
        self.unwrapped, self.plan = model, plan
        for split, task in (("training", train), ("validation", val)):
            if len(task.lengths) == 0:
                raise UserError(f"There are no {split} rows.")
            if task.lengths.max() > model.max_tokens:
                raise UserError(
                    f"A {split} row has {task.lengths.max()} tokens and the model's context is "
                    f"{model.max_tokens}; prepare the data with a smaller --max_seq_length."
                )
        self.model, *self.optimizers = fabric.setup(model, *make_optimizers(model, config))
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wrong = [name for name, p in self.trainable.items() if p.dtype != torch.float32]
        assert not wrong, f"trainable parameters must stay fp32 after fabric.setup: {wrong}"

        self.steps_per_epoch = math.ceil(len(train.lengths) / config.batch_size)
        self.max_steps = max(1, round(config.epochs * self.steps_per_epoch))
        if config.max_steps is not None:
            self.max_steps = min(self.max_steps, config.max_steps)
        self.warmup_steps = round(config.warmup_epochs * self.steps_per_epoch)
        self.step = 0
        self.seconds, self.tokens = 0.0, 0  # of this and all earlier processes of the run
        self.val_losses: list[tuple[int, float]] = []
        self.progress: Progress | None = None

    # == the loop ==

    def fit(self) -> dict[str, Any]:
        """Trains to the end and returns the summary that `summary.json` holds.

        Ctrl-C ends the process with a line that tells how to go on.

        Raises:
            UserError: the run in the out folder had other settings, a loss is not finite, or the disk is full.
        """
        self.open_out_dir()
        self.give_advice()
        is_first = self.fabric.global_rank == 0
        self.progress = Progress(self.step, self.max_steps, enabled=is_first)
        try:
            self.loop()
        except KeyboardInterrupt:
            self.progress.close()
            if is_first:
                log(
                    f"Interrupted in step {self.step}; what is saved goes on with: "
                    f"python {shlex.quote(sys.argv[0])} --config {shlex.quote(str(self.config.out_dir))}/config.yaml "
                    "--resume"
                )
            raise SystemExit(130) from None
        except OSError as error:
            raise unwritable(self.config.out_dir, error) or error from None
        finally:
            self.progress.close()
            for logger in self.fabric.loggers:
                logger.finalize("")
        return self.close_out_dir()

    def loop(self) -> None:
        """Validates, steps, saves; the state on disk is always that of a moment between two steps."""
        if self.step == 0:
            self.evaluate()
            self.save_state()
        self.progress.start()
        began, before = time.perf_counter(), self.seconds
        for micro_batches in self.remaining_steps():
            step_began = time.perf_counter()
            metrics = self.train_step(micro_batches)
            tokens = sum(int(self.train.tokens[m].sum()) for m in micro_batches)
            self.tokens += tokens
            metrics["tokens_per_s"] = tokens / (time.perf_counter() - step_began)
            of_loop = ("lr", "grad_norm", "tokens_per_s")
            self.fabric.log_dict({k if k in of_loop else f"train/{k}": v for k, v in metrics.items()}, self.step)
            self.step += 1
            self.progress.advance(metrics["loss"], metrics["lr"], metrics["tokens_per_s"])
            last = self.step == self.max_steps
            if self.step % self.config.eval_interval == 0 or last:
                self.evaluate()
            self.seconds = before + time.perf_counter() - began
            if self.step % self.config.save_interval == 0 or last:
                self.save_state()

    def give_advice(self) -> None:
        """Settings that are allowed and probably not meant."""
        if self.fabric.global_rank > 0 or self.step >= self.max_steps:
            return
        world, config = self.fabric.world_size, self.config
        if self.warmup_steps >= self.max_steps:
            log(
                f"note: the warmup takes {self.warmup_steps} steps and the run ends after {self.max_steps}, before the "
                "learning rate reaches its peak."
            )
        if world > config.batch_size // config.micro_batch_size:
            log(
                f"note: a step has {config.batch_size // config.micro_batch_size} micro-batches for {world} processes, "
                f"so some have nothing to do; lower --micro_batch_size to {max(1, config.batch_size // world)}."
            )

    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def remaining_steps(self) -> Iterator[list[np.ndarray]]:
        """The micro-batches (row numbers) of every step from `self.step` on."""
        config = self.config
        for epoch in range(self.step // self.steps_per_epoch, math.ceil(self.max_steps / self.steps_per_epoch)):
            plan = self.plan(self.train.lengths, config.batch_size, config.micro_batch_size, config.seed, epoch)
            for offset, micro_batches in enumerate(plan):
                if self.step <= epoch * self.steps_per_epoch + offset < self.max_steps:
                    yield micro_batches

    def train_step(self, micro_batches: list[np.ndarray]) -> dict[str, float]:
        """One optimiser step; returns means over the step's targets, over all processes."""
        fabric, config = self.fabric, self.config
        torch.manual_seed(config.seed * 1_000_003 + self.step)  # dropout, where a method has any
        lr = lr_at(
            self.step,
            peak=config.learning_rate,
            warmup_steps=self.warmup_steps,
            max_steps=self.max_steps,
            schedule=config.lr_schedule,
        )
        for group in self.param_groups():
            group["lr"] = lr * group.get("lr_scale", 1.0)
        total = sum(float(self.train.weights[m].sum()) for m in micro_batches)
        mine = micro_batches[fabric.global_rank :: fabric.world_size]
        # in a short last step a process may have nothing: it takes part in the exchange with a weight of 0
        scales = [1.0] * len(mine) or [0.0]
        mine = mine or micro_batches[:1]

        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=fabric.device))
        each = []
        for i, (rows, scale) in enumerate(zip(mine, scales, strict=True)):
            batch = fabric.to_device(self.train.batch(rows))
            with fabric.no_backward_sync(self.model, enabled=i + 1 < len(mine)):
                losses = self.train.losses(self.model, batch)
                # DDP averages over processes; the sum over all of them is wanted
                fabric.backward(losses["loss"] * (scale * fabric.world_size / total))
            each.append(losses["loss"].detach())
            for name, value in losses.items():
                sums[name] = sums[name] + scale * value.detach()
        metrics = self.reduce(sums, total)
        norm = torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), config.grad_clip or math.inf)
        metrics["grad_norm"] = norm.item()
        for what in ("loss", "grad_norm"):
            if not math.isfinite(metrics[what]):
                bad = [rows for rows, loss in zip(mine, each, strict=True) if not loss.isfinite()] or micro_batches
                rows = np.concatenate(bad).tolist()
                named = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
                raise self.diverged(f"The {what} is {metrics[what]} in step {self.step}, rows {named}, at lr {lr:.1e}")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {**metrics, "lr": lr}

    def diverged(self, what: str) -> UserError:
        """The error of a value that is not finite."""
        if self.step:
            return UserError(
                f"{what}: lower --learning_rate and start again with --overwrite, or keep "
                f"{self.config.out_dir / 'best.safetensors'}."
            )
        return UserError(f"{what}: nothing is trained yet, so the base, the initial adapter or the data are at fault.")

    def reduce(self, sums: dict[str, torch.Tensor], total: float) -> dict[str, float]:
        """Sums of this process -> means over all."""
        stacked = self.fabric.all_reduce(torch.stack(list(sums.values())), reduce_op="sum")
        return {name: value / total for name, value in zip(sums, stacked.tolist(), strict=True)}

    def val_batches(self) -> list[np.ndarray]:
        """The validation rows in the batches of every validation."""
        order = np.argsort(self.val.lengths, kind="stable")
        size = self.config.micro_batch_size
        return np.array_split(order, range(size, len(order), size))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the whole validation split, always in the same batches."""
        batches = self.val_batches()
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.fabric.device))
        self.model.eval()
        mine = batches[self.fabric.global_rank :: self.fabric.world_size]
        for rows in mine or batches[:1]:
            scale = 1.0 if mine else 0.0
            for name, value in self.val.losses(self.model, self.fabric.to_device(self.val.batch(rows))).items():
                sums[name] = sums[name] + scale * value
        self.model.train()
        return self.reduce(sums, float(self.val.weights.sum()))

    def evaluate(self) -> None:
        """Validation, sample answers, and the best adapter so far."""
        metrics = self.validate()
        self.fabric.log_dict({f"val/{name}": value for name, value in metrics.items()}, self.step)
        if not math.isfinite(metrics["loss"]):
            raise self.diverged(f"The validation loss is {metrics['loss']} after {self.step} steps")
        self.val_losses.append((self.step, metrics["loss"]))
        if self.fabric.global_rank == 0:
            best = metrics["loss"] == min(loss for _, loss in self.val_losses)
            if best:
                self.save_adapter("best")
            lines = [f"step {self.step}: validation loss {metrics['loss']:.4f}"]
            if best and self.step:
                lines[0] += ", the best so far"
            if self.sample_answers is not None:
                records = [{"step": self.step, **record} for record in self.sample_answers(self.unwrapped)]
                with (self.config.out_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                lines += [f"  {_shorten(r['prompt'], 50, end=True)} -> {_shorten(r['answer'], 90)}" for r in records]
            self.progress.write("\n".join(lines))
        self.fabric.barrier()

    # == files ==

    @property
    def state_path(self) -> Path:
        return self.config.out_dir / "state.pt"

    def open_out_dir(self) -> None:
        """Starts the folder, or takes up the run in it."""
        out_dir, fabric = self.config.out_dir, self.fabric
        resumed = self.config.resume and self.state_path.is_file()
        if resumed:
            self.load_state()
        fabric.barrier()
        if fabric.global_rank > 0:
            return
        if self.config.resume:
            log(f"Continuing {out_dir} from step {self.step}." if resumed else f"{out_dir} has no state.pt: starting.")
        if out_dir.is_dir():
            for left_over in out_dir.glob(".*.tmp"):  # of a kill in the middle of a write
                left_over.unlink()
        # the state goes first and comes back last: files of two runs are never mixed
        for name in () if resumed else ("state.pt", "best.safetensors", "last.safetensors", "metrics.csv",
                                        "samples.jsonl", "loss.png", "metrics.png", "summary.json"):  # fmt: skip
            (out_dir / name).unlink(missing_ok=True)
        shutil.rmtree(out_dir / "tensorboard", ignore_errors=True)
        if resumed:
            samples = out_dir / "samples.jsonl"
            write_text(samples, "".join(_lines_until(samples, self.step)))
            metrics, *others = fabric.loggers
            metrics.take_up(self.step)
            metrics.save()
            for logger in others:
                for step, values in metrics.rows.items():
                    logger.log_metrics(values, step)
        write_text(out_dir / "config.yaml", _yaml({**self.settings, "resume": False, "overwrite": False}))
        write_text(out_dir / "environment.json", json.dumps(self.environment(), indent=2) + "\n")

    def environment(self) -> dict[str, Any]:
        fabric = self.fabric
        device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else fabric.device.type
        return {**versions(), "platform": platform.platform(), "device": device, "processes": fabric.world_size,
                "threads": torch.get_num_threads(), "strategy": type(fabric.strategy).__name__,
                "precision": fabric.strategy.precision.precision, "command": shlex.join(sys.argv),
                "base": self.adapter_meta["base"]}  # fmt: skip

    def save_state(self) -> None:
        """Everything a run needs to go on, in one file, after the metrics that lead to it."""
        if self.fabric.global_rank == 0:
            for logger in self.fabric.loggers:
                logger.save()
            state = {
                "step": self.step,
                "adapter": {name: p.detach() for name, p in self.trainable.items()},
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "val_losses": self.val_losses,
                "seconds": self.seconds,
                "tokens": self.tokens,
                "settings": json.dumps(self.settings, default=str),
                "identity": json.dumps(self.identity(), default=str),
            }
            with atomic_write(self.state_path) as path:
                torch.save(state, path)
            self.save_adapter("last")
        self.fabric.barrier()

    def identity(self) -> dict[str, Any]:
        """What a run and its continuation must share beside the settings: the content of folders, which may move."""
        rows = hashlib.sha256()
        for task in (self.train, self.val):
            rows.update(np.asarray(task.lengths, np.int64).tobytes() + np.asarray(task.weights, np.float64).tobytes())
        return {**self.adapter_meta, "rows": rows.hexdigest(), "precision": self.fabric.strategy.precision.precision}

    # settings that may change between a run and its continuation
    FREE = ("out_dir", "checkpoint_dir", "data_dir", "resume", "overwrite", "accelerator", "devices", "num_nodes",
            "strategy", "save_interval", "sample_prompts", "max_new_tokens", "gradient_checkpointing",
            "precompute_reference", "drift_prompts")  # fmt: skip

    def load_state(self) -> None:
        """Raises: UserError: the saved run had other settings, another base or other data."""
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        except Exception:  # pickle has many
            raise UserError(f"{self.state_path} is damaged; start again with --overwrite.") from None
        then, now = json.loads(state["settings"]), json.loads(json.dumps(self.settings, default=str))
        differing = [
            f"{k} ({then.get(k)} then, {now[k]} now)" for k in now if k not in self.FREE and then.get(k) != now[k]
        ]
        if not differing:
            then, now = json.loads(state["identity"]), json.loads(json.dumps(self.identity(), default=str))
            differing = [f"another {k}" for k in now if then.get(k) != now[k]]
        if differing:
            raise UserError(
                f"The run in {self.config.out_dir} had other settings: {', '.join(differing)}; continue it with its "
                "own, or begin a new one in another --out_dir."
            )
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(state["adapter"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        self.val_losses = [tuple(pair) for pair in state["val_losses"]]

    def save_adapter(self, name: str) -> Path:
        path = self.config.out_dir / f"{name}.safetensors"
        training = {"step": self.step, "settings": self.settings, "val_loss": self.val_losses[-1][1]}
        save_adapter(path, self.trainable, {**self.adapter_meta, "training": training, "versions": versions()})
        return path

    def close_out_dir(self) -> dict[str, Any]:
        best_step, best = min(self.val_losses, key=lambda pair: pair[1])
        summary = {
            "trainable_parameters": sum(p.numel() for p in self.trainable.values()),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "tokens_per_s": round(self.tokens / self.seconds),
            "val_loss_before": self.val_losses[0][1],
            "best_val_loss": best,
            "best_step": best_step,
            "last_val_loss": self.val_losses[-1][1],
        }
        if self.fabric.global_rank == 0:
            plot_losses(self.config.out_dir / "metrics.csv", self.config.out_dir / "loss.png")
            write_text(self.config.out_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False)


def _lines_until(samples: Path, step: int) -> list[str]:
    """The lines of a samples.jsonl up to a step; a kill may have cut the last line."""
    lines = samples.read_text(encoding="utf-8").splitlines(keepends=True) if samples.is_file() else []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


def _shorten(text: str, width: int, end: bool = False) -> str:
    """One line of a text, its beginning or its end."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return text if len(text) <= width else "…" + text[-width:] if end else text[:width] + "…"
