"""The training loop that every script shares: they differ in their data and their loss (`Task`).

"Step" is always an optimiser step. A step's gradient is the mean over all targets of the step (label tokens for SFT),
however they are spread over micro-batches and processes. What a step computes depends on the seed, its number and the
weights alone, so a run that was killed continues to the same losses.
"""

import csv
import json
import math
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger, TensorBoardLogger
from tqdm import tqdm

from lit_llama.checkpoint import save_adapter, versions, write_text
from lit_llama.data import SFTData, plan_epoch
from lit_llama.generation import Sampling, generate
from lit_llama.model import LLaMA
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, atomic_write, log


class Task(Protocol):
    """Data and loss of a training script, one split of it.

    Attributes:
        lengths: (rows,) tokens of each row, for grouping.
        weights: (rows,) what each row counts in the step's mean: label tokens for SFT, 1 per pair for DPO.
    """

    lengths: np.ndarray
    weights: np.ndarray

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The rows as tensors on the CPU."""

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the batch, fp32 scalars; "loss" is what is minimised, the others are logged."""


@dataclass
class TrainConfig:
    """What the loop itself needs to know; finetune/aligner.py explains each value."""

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
        problems = [
            f"{name} is {getattr(self, name)} and must be above 0"
            for name in ("epochs", "batch_size", "micro_batch_size", "learning_rate", "eval_interval", "save_interval")
            if getattr(self, name) <= 0
        ]
        problems += [
            f"{name} is {getattr(self, name)} and must not be negative"
            for name in ("warmup_epochs", "weight_decay", "grad_clip")
            if getattr(self, name) < 0
        ]
        if not problems and self.batch_size % self.micro_batch_size:
            problems.append(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if problems:
            raise UserError("; ".join(problems).capitalize() + ".")


def lr_at(step: int, *, peak: float, warmup_steps: int, max_steps: int, schedule: str = "constant") -> float:
    """The learning rate of optimiser step `step`, counted from 0.

    It rises linearly and reaches `peak` in step `warmup_steps`; after that it stays, or follows half a cosine down to
    a tenth of the peak in the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_fabric(*, devices: int | str, num_nodes: int, strategy: str, precision: str, out_dir: Path) -> Fabric:
    """Fabric from a script's flags, or from `fabric run` when that launched the script.

    `precision="auto"` is a bf16 base on a GPU that computes in bf16, and fp32 elsewhere.

    Raises:
        UserError: Fabric refuses the combination.
    """
    if precision == "auto":
        precision = "bf16-true" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"
    own = dict(devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision)
    if os.environ.get("LT_CLI_USED"):  # what `fabric run` sets must not be set twice
        own = {} if os.environ.get("LT_PRECISION") else {"precision": precision}
    if "fsdp" in strategy or "deepspeed" in strategy:
        raise UserError(
            f"strategy {strategy!r} shards the base, which the shared prefix does not support; use 'ddp', which keeps "
            "a whole base on each device."
        )
    loggers = [
        CSVLogger(root_dir=out_dir, name="", version="", flush_logs_every_n_steps=10**9),
        TensorBoardLogger(root_dir=out_dir, name="tensorboard", version=""),
    ]
    try:
        fabric = Fabric(**own, loggers=loggers)
    except Exception as error:
        raise UserError(f"Fabric refuses these settings: {error}") from None
    fabric.launch()
    return fabric


def base_dtype(fabric: Fabric) -> torch.dtype:
    """The dtype of the frozen base under the run's precision."""
    return torch.bfloat16 if fabric.strategy.precision.precision == "bf16-true" else torch.float32


def answer_samples(
    val: SFTData, tokenizer: Tokenizer, count: int, max_new_tokens: int
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
    """AdamW on what requires a gradient, without weight decay on the gates."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (no_decay if name.endswith("gating_factor") else decay).append(p)
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
        make_optimizers: what updates the trainable parameters; a group's learning rate is its `lr_scale` (default 1)
            times that of `lr_at`.
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
        make_optimizers: Callable[[LLaMA, TrainConfig], list[torch.optim.Optimizer]] = adamw,
    ) -> None:
        self.fabric, self.train, self.val, self.config = fabric, train, val, config
        self.settings, self.adapter_meta, self.sample_answers = settings, adapter_meta, sample_answers
        self.bare = model
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
        self.val_losses: list[tuple[int, float]] = []

    # == the loop ==

    def fit(self) -> dict[str, Any]:
        """Trains to the end and returns the summary that `summary.json` holds.

        Raises:
            UserError: the out folder holds another run, or a loss is not finite.
        """
        self.open_out_dir()
        start = time.perf_counter()
        first, seen_tokens = self.step, 0
        if self.step == 0:
            self.evaluate()
            self.save_state()
        bar = tqdm(
            total=self.max_steps, initial=self.step, unit="step", disable=self.fabric.global_rank > 0, desc="training",
            mininterval=0.5 if os.isatty(2) else 15, dynamic_ncols=True,
        )  # fmt: skip
        for micro_batches in self.remaining_steps():
            began = time.perf_counter()
            metrics = self.train_step(micro_batches)
            tokens = sum(int(self.train.lengths[m].sum()) for m in micro_batches)
            seen_tokens += tokens
            metrics["tokens_per_s"] = tokens / (time.perf_counter() - began)
            self.fabric.log_dict({f"train/{k}" if k == "loss" else k: v for k, v in metrics.items()}, self.step)
            self.step += 1
            bar.update()
            bar.set_postfix_str(
                f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.2e}, {metrics['tokens_per_s']:.0f} tok/s"
            )
            last = self.step == self.max_steps
            if self.step % self.config.eval_interval == 0 or last:
                self.evaluate()
            if self.step % self.config.save_interval == 0 or last:
                self.save_state()
        bar.close()
        return self.close_out_dir(time.perf_counter() - start, seen_tokens, self.step - first)

    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def remaining_steps(self) -> Iterator[list[np.ndarray]]:
        """The micro-batches (row numbers) of every step from `self.step` on."""
        config = self.config
        for epoch in range(self.step // self.steps_per_epoch, math.ceil(self.max_steps / self.steps_per_epoch)):
            plan = plan_epoch(self.train.lengths, config.batch_size, config.micro_batch_size, config.seed, epoch)
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
        for i, (rows, scale) in enumerate(zip(mine, scales, strict=True)):
            batch = fabric.to_device(self.train.batch(rows))
            with fabric.no_backward_sync(self.model, enabled=i + 1 < len(mine)):
                losses = self.train.losses(self.model, batch)
                # DDP averages over processes; the sum over all of them is wanted
                fabric.backward(losses["loss"] * (scale * fabric.world_size / total))
            for name, value in losses.items():
                sums[name] = sums[name] + scale * value.detach()
        metrics = self.reduce(sums, total)
        if not math.isfinite(metrics["loss"]):
            rows = np.concatenate(micro_batches)
            raise UserError(
                f"The loss is {metrics['loss']} in step {self.step} (rows {', '.join(map(str, rows[:8]))}, …); lower "
                f"the learning rate ({lr:.2e} there) and go on from the last saved state with --resume true."
            )
        parameters = list(self.trainable.values())
        clip = config.grad_clip or math.inf
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {**metrics, "lr": lr}

    def reduce(self, sums: dict[str, torch.Tensor], total: float) -> dict[str, float]:
        """Sums of this process -> means over all."""
        stacked = torch.stack(list(sums.values())).double()
        stacked = self.fabric.all_reduce(stacked, reduce_op="sum") / total
        return dict(zip(sums, stacked.tolist(), strict=True))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the whole validation split, always in the same batches."""
        order = np.argsort(self.val.lengths, kind="stable")
        size = self.config.micro_batch_size
        batches = np.array_split(order, range(size, len(order), size))
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
        self.val_losses.append((self.step, metrics["loss"]))
        self.fabric.log_dict({f"val/{name}": value for name, value in metrics.items()}, self.step)
        if self.fabric.global_rank == 0:
            lines = [f"step {self.step}: validation loss {metrics['loss']:.4f}"]
            if self.sample_answers is not None:
                records = [{"step": self.step, **record} for record in self.sample_answers(self.bare)]
                with (self.config.out_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(record) + "\n" for record in records)
                lines += [f"  …{r['prompt'][-70:]!r} -> {r['answer']!r}" for r in records]
            tqdm.write("\n".join(lines), file=sys.stderr)
            if metrics["loss"] == min(loss for _, loss in self.val_losses):
                self.save_adapter("best")
        self.fabric.barrier()

    # == files ==

    @property
    def state_path(self) -> Path:
        return self.config.out_dir / "state.pt"

    def open_out_dir(self) -> None:
        """Starts the folder, or takes up the run in it."""
        out_dir, fabric = self.config.out_dir, self.fabric
        has_run = self.state_path.is_file()
        if has_run and not self.config.resume and not self.config.overwrite:
            raise UserError(
                f"{out_dir} holds a run already: continue it with --resume true, replace it with --overwrite true, or "
                "choose another --out_dir."
            )
        earlier: list[dict[str, str]] = []
        if has_run and self.config.resume:
            self.load_state()
            with (out_dir / "metrics.csv").open(newline="") as file:
                earlier = [row for row in csv.DictReader(file) if int(row["step"]) <= self.step]
            # the step that comes next has not been logged as trained yet, only as validated
            for row in earlier:
                if int(row["step"]) == self.step:
                    row.update({k: "" for k in row if k != "step" and not k.startswith("val/")})
        fabric.barrier()
        if fabric.global_rank > 0:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "metrics.csv").unlink(missing_ok=True)
        samples = out_dir / "samples.jsonl"
        kept = [line for line in _lines(samples) if earlier and json.loads(line)["step"] <= self.step]
        if samples.exists():
            write_text(samples, "".join(kept))
        for row in earlier:
            values = {k: float(v) for k, v in row.items() if k != "step" and v}
            if values:
                fabric.loggers[0].log_metrics(values, int(row["step"]))
        write_text(out_dir / "config.yaml", _yaml(self.settings))
        write_text(out_dir / "environment.json", json.dumps(self.environment(), indent=2) + "\n")

    def environment(self) -> dict[str, Any]:
        fabric = self.fabric
        device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else "cpu"
        strategy = type(fabric.strategy).__name__
        return {**versions(), "device": device, "processes": fabric.world_size, "strategy": strategy,
                "precision": fabric.strategy.precision.precision, "base": self.adapter_meta["base"]}  # fmt: skip

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
                "settings": json.dumps(self.settings, default=str),
            }
            self.save_adapter("last")
            with atomic_write(self.state_path) as path:
                torch.save(state, path)
        self.fabric.barrier()

    # settings that may change between a run and its continuation
    FREE = ("out_dir", "resume", "overwrite", "devices", "num_nodes", "strategy", "eval_interval", "save_interval",
            "sample_prompts")  # fmt: skip

    def load_state(self) -> None:
        """Raises: UserError: the saved run had other settings."""
        state = torch.load(self.state_path, map_location=self.fabric.device, weights_only=True)
        then, now = json.loads(state["settings"]), json.loads(json.dumps(self.settings, default=str))
        differing = [k for k in now if k not in self.FREE and then.get(k) != now[k]]
        if differing:
            changes = ", ".join(f"{k} ({then.get(k)} then, {now[k]} now)" for k in differing)
            raise UserError(f"The run in {self.config.out_dir} had other settings: {changes}.")
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(state["adapter"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.val_losses = [tuple(pair) for pair in state["val_losses"]]
        if self.fabric.global_rank == 0:
            log(f"Continuing {self.config.out_dir} from step {self.step}.")

    def save_adapter(self, name: str) -> Path:
        path = self.config.out_dir / f"{name}.safetensors"
        training = {"step": self.step, "settings": self.settings, "val_loss": self.val_losses[-1][1]}
        save_adapter(path, self.trainable, {**self.adapter_meta, "training": training, "versions": versions()})
        return path

    def close_out_dir(self, seconds: float, tokens: int, steps: int) -> dict[str, Any]:
        best_step, best = min(self.val_losses, key=lambda pair: pair[1])
        summary = {
            "trainable_parameters": sum(p.numel() for p in self.trainable.values()),
            "steps": self.step,
            "seconds": round(seconds, 1),
            "tokens_per_s": round(tokens / seconds) if steps else None,
            "val_loss_before": self.val_losses[0][1],
            "best_val_loss": best,
            "best_step": best_step,
            "last_val_loss": self.val_losses[-1][1],
        }
        if self.fabric.global_rank == 0:
            for logger in self.fabric.loggers:
                logger.save()
                logger.finalize("success")
            plot_losses(self.config.out_dir / "metrics.csv", self.config.out_dir / "loss.png")
            write_text(self.config.out_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def print_summary(summary: dict[str, Any], out_dir: Path, generate_command: Iterable[str]) -> None:
    """The closing lines of a run, on stdout."""
    print(
        f"\ntrained      {summary['trainable_parameters']:,} parameters, {summary['steps']} steps in "
        f"{summary['seconds']:.0f} s\n"
        f"validation   loss {summary['val_loss_before']:.4f} before, {summary['best_val_loss']:.4f} at best "
        f"(step {summary['best_step']}), {summary['last_val_loss']:.4f} at the end\n"
        f"in {out_dir}: best.safetensors, last.safetensors, loss.png, metrics.csv, samples.jsonl\n"
        f"generate     {shlex.join(generate_command)}"
    )


def plot_losses(metrics: Path, image: Path) -> None:
    """Training and validation loss over steps, from a run's metrics.csv."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for column, style in (("train/loss", {"alpha": 0.4, "lw": 1}), ("val/loss", {"marker": "o", "ms": 3})):
        points = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
        if points:
            axes.plot(*zip(*points, strict=True), label=column.replace("/", " "), **style)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per target)")
    axes.legend()
    with atomic_write(image) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
