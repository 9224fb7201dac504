"""What a training run shows and records: the bar on the terminal, metrics.csv, the loss curve, the closing lines."""

import csv
import os
import shlex
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from lit_llama.files import atomic_write
from lit_llama.tables import markdown_table  # noqa: F401  (imported from here by files that are being moved)
from lit_llama.utils import UserError, log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MetricsLog(Logger):
    """`metrics.csv` as a Fabric logger: one row per step, numbers unrounded.

    The file is written whole under a temporary name every few seconds and at every saved state, so that a kill leaves
    a readable one, and what was logged before a state is there when that state is.
    """

    name, version = "metrics", ""
    interval = 10  # seconds between writes

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.rows: dict[int, dict[str, float]] = {}
        self.written = time.monotonic()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.setdefault(step, {}).update(metrics)
        if time.monotonic() - self.written > self.interval:
            self.save()

    def log_hyperparams(self, params: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        columns = ["step", *sorted({name for row in self.rows.values() for name in row})]
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))
        self.written = time.monotonic()

    def take_up(self, step: int) -> None:
        """Reads what an earlier process logged before it saved the state of `step`: that step's validation, not its
        training."""
        rows = {n: row for n, row in read_metrics(self.path).items() if n <= step}
        rows[step] = {name: value for name, value in rows.get(step, {}).items() if name.startswith("val/")}
        self.rows = {n: row for n, row in rows.items() if row}


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """A run's metrics.csv as {step: {name: value}}; empty where there is none."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            int(row["step"]): {name: float(value) for name, value in row.items() if name != "step" and value}
            for row in csv.DictReader(file)
        }


class Progress:
    """How far a run is: a bar on a terminal, a line now and then in a log file.

    Args:
        done, total: steps.
        enabled: whether this process shows anything.
    """

    interval = 15  # seconds between lines in a log file

    def __init__(self, done: int, total: int, enabled: bool) -> None:
        self.first, self.done, self.total, self.enabled = done, done, total, enabled
        self.bar: tqdm | None = None

    def start(self) -> None:
        """The clock of the remaining time starts."""
        self.began = self.shown = time.monotonic()
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=self.done, unit="step", dynamic_ncols=True)

    def advance(self, loss: float, lr: float, tokens_per_s: float) -> None:
        self.done += 1
        status = f"loss {loss:.3f}, lr {lr:.2e}, {tokens_per_s:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update()
        elif self.enabled and time.monotonic() - self.shown > self.interval:
            self.shown = time.monotonic()
            left = (self.shown - self.began) / (self.done - self.first) * (self.total - self.done)
            log(f"step {self.done} of {self.total}: {status}, {duration(left)} left")

    def write(self, text: str) -> None:
        """A message above the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """h:mm:ss"""
    return str(timedelta(seconds=round(seconds)))


def print_summary(summary: dict[str, Any], out_dir: Path, generate_command: Iterable[str]) -> None:
    """The closing lines of a run, on stdout."""
    print(
        f"\ntrained      {summary['trainable_parameters']:,} parameters, {summary['steps']} steps in "
        f"{duration(summary['seconds'])}\n"
        f"validation   loss {summary['val_loss_before']:.4f} before, {summary['best_val_loss']:.4f} at best "
        f"(step {summary['best_step']}), {summary['last_val_loss']:.4f} at the end\n"
        f"in {out_dir}{os.sep}: best.safetensors, last.safetensors, loss.png, metrics.csv, samples.jsonl\n"
        f"generate     {shlex.join(generate_command)}"
    )


def plot_losses(metrics: Path, image: Path) -> None:
    """Training and validation loss over steps, from a run's metrics.csv."""
    plot_metrics(metrics, image, {"loss (nats per target)": ["loss"]})


def plot_metrics(metrics: Path, image: Path, panels: dict[str, list[str]]) -> None:
    """Curves over steps, from a run's metrics.csv.

    Args:
        panels: what the axis of each panel says -> the metrics in it, drawn where they are in training and validation.
    """
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(metrics)
    known = {name.rpartition("/")[2] for row in rows.values() for name in row}
    panels = {label: names for label, names in panels.items() if known & set(names)}
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = make_figure(6 * columns, 3.6 * lines)
    for axes, (label, names) in zip(figure.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False):
        for i, name in enumerate(names):
            which = f"{name}, ".replace("_", " ") if len(names) > 1 else ""
            curves = {
                f"train/{name}": ("training, each step", {"lw": 1, "alpha": 0.5}),
                f"val/{name}": ("validation", {"marker": "o", "ms": 4}),
                name: ("each step", {"lw": 1}),
            }
            for column, (what, style) in curves.items():
                points = [(step, row[column]) for step, row in rows.items() if column in row]
                if points:
                    color = f"C{2 * i + column.startswith('val/')}"
                    axes.plot(*zip(*points, strict=True), label=which + what, color=color, **style)
        axes.set(xlabel="optimiser step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, image)


def make_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches, which needs no display and belongs to no session of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path, overwrite: bool = True) -> None:
    """Writes a figure as its path's ending says.

    Raises:
        UserError: that is not .png, .svg or .pdf.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path} is not a .png, .svg or .pdf.")
    with atomic_write(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=130)
