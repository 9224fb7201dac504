"""Progress, metrics, plots and tables of a training run."""

import csv
import os
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lit_llama.device import computes_bf16
from lit_llama.run.schedule import count_steps
from lit_llama.run.train_settings import SHARDED, FinetuneSettings, TrainSettings
from lit_llama.storage.files import atomic_write
from lit_llama.storage.schema import check_readable, unreadable
from lit_llama.utils import UserError, log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_FIGURE = {"loss.png": {"loss": ["loss"]}}


class MetricsLog:
    """metrics.csv: one row per step, with unrounded numbers.

    The file is replaced atomically, every few seconds and by `save`, so it stays readable if the process is killed.
    """

    interval = 10  # seconds between writes

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[int, dict[str, float]] = {}
        self.written = time.monotonic()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add values to the row of a step."""
        self.rows.setdefault(step, {}).update(values)
        if time.monotonic() - self.written > self.interval:
            self.save()

    def first(self, name: str) -> float | None:
        """Return the earliest value of a metric, None if there is none."""
        return next((row[name] for _, row in sorted(self.rows.items()) if name in row), None)

    def save(self) -> None:
        columns = ["step", *sorted({name for row in self.rows.values() for name in row})]
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))
        self.written = time.monotonic()

    def resume(self, step: int) -> None:
        """Read the metrics of the steps before `step`, and of `step` itself only the validation; drop later ones."""
        rows = {n: row for n, row in read_metrics(self.path).items() if n <= step}
        rows[step] = {name: value for name, value in rows.get(step, {}).items() if name.startswith("val/")}
        self.rows = {n: row for n, row in rows.items() if row}


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Return a metrics.csv as {step: {name: value}}, empty if there is no such file.

    Raises:
        UserError: It cannot be read, or is damaged.
    """
    try:
        if not os.path.lexists(path):
            return {}
        check_readable(path)
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if names[:1] != ["step"] or len(set(names)) < len(names):
                raise ValueError
            rows = {
                int(row["step"]): {name: float(value) for name, value in row.items() if name != "step" and value}
                for row in reader
            }
            if not all(0 <= step < 2**53 for step in rows):
                raise ValueError
            return rows
    except OSError as error:
        raise unreadable(path, error) from None
    except UserError:
        raise
    except (ValueError, TypeError, csv.Error):
        raise UserError(f"{path} is not a table of metrics; move it away to continue without it.") from None


class Progress:
    """Progress of a run on stderr, as a context manager: a bar on a terminal, a line every few seconds in a log file.

    Args:
        done, total: Steps.
        enabled: Whether this process shows anything.
    """

    interval = 15  # seconds between lines in a log file

    def __init__(self, done: int, total: int, enabled: bool) -> None:
        self.first, self.done, self.total, self.enabled = done, done, total, enabled
        self.began = self.shown = time.monotonic()
        on_terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if on_terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, steps: list[dict[str, float]]) -> None:
        """Count steps and show the metrics of the last: the reward in reinforcement learning, the loss otherwise."""
        metrics = steps[-1]
        self.done += len(steps)
        shown = "reward" if "train/reward" in metrics else "loss"
        status = (
            f"{shown} {metrics[f'train/{shown}']:.3f}, lr {metrics['lr']:.2e}, {metrics['tokens_per_s']:,.0f} tokens/s"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update(len(steps))
        elif self.enabled and time.monotonic() - self.shown > self.interval:
            self.shown = time.monotonic()
            left = (self.shown - self.began) / (self.done - self.first) * (self.total - self.done)
            log(f"step {self.done} of {self.total}: {status}, {duration(left)} left")


def print_notes(settings: TrainSettings, n_rows: int, step: int, processes: int) -> None:
    """Print notes on settings that are allowed but probably not intended."""
    per_epoch, max_steps, warmup_steps = count_steps(settings, n_rows)
    script = type(settings)
    has_default_limit = settings.max_steps is not None and settings.max_steps == script.max_steps
    if has_default_limit and settings.epochs != script.epochs and settings.epochs * per_epoch > max_steps + 0.5:
        log(f"note: max_steps {max_steps}, the default, ends the run after {max_steps / per_epoch:.2g} of "
            f"{settings.epochs:g} epochs; pass --max_steps null to complete them.")  # fmt: skip
    if warmup_steps >= max_steps > step:
        log(f"note: the warmup has {warmup_steps} steps and the run {max_steps}, so the learning rate never reaches "
            "its peak.")  # fmt: skip
    per_step = settings.batch_size // settings.micro_batch_size
    if processes > settings.batch_size:
        log(f"note: a step has {settings.batch_size} rows for {processes} processes; raise --batch_size or use fewer "
            "devices.")  # fmt: skip
    elif processes > per_step:
        most = settings.batch_size // processes
        divisor = next(size for size in range(most, 0, -1) if settings.batch_size % size == 0)
        log(f"note: a step has {per_step} micro-batches for {processes} processes; lower --micro_batch_size to "
            f"{divisor}.")  # fmt: skip


def write_above_bar(text: str) -> None:
    """Write a message to stderr without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def generate_command(settings: FinetuneSettings) -> str:
    """Return the command that answers a prompt with the adapter of a finetuning run."""
    script = os.path.relpath(Path(__file__).parents[2] / "generate/aligner.py")
    command = ["python", script, "--checkpoint_dir", str(settings.checkpoint_dir), "--adapter", str(settings.out_dir)]
    command += ["--quantize", settings.quantize] if settings.quantize else []
    command += ["--accelerator", settings.accelerator] if settings.accelerator != "auto" else []
    if settings.precision == "bf16-true" and not computes_bf16(settings.accelerator):
        command += ["--precision", "bf16-true"]  # "auto" would be fp32, which needs twice the memory
    if settings.strategy in SHARDED:  # a base that needs several devices
        devices = settings.devices if isinstance(settings.devices, int) else max(1, torch.cuda.device_count())
        command += ["--devices", str(devices)]
    return shlex.join([*command, "--prompt", "your instruction"])


def early_end(summary: dict[str, Any], settings: FinetuneSettings) -> str:
    """Return a phrase if a run stopped early, and nothing otherwise."""
    reason = f", stopped after {settings.early_stopping} validations without a lower loss"
    return reason if summary["stopped_early"] else ""


def print_summary(summary: dict[str, Any], settings: FinetuneSettings) -> None:
    """Print the result of a finetuning run to stdout, and the command that generates with it."""
    print(
        f"\ntrained      {summary['trainable_parameters']:,} parameters, {summary['steps']} steps in "
        f"{duration(summary['seconds'])}{early_end(summary, settings)}\n"
        f"validation   loss {summary['val_loss_before']:.4f} before, {summary['best_val_loss']:.4f} at best "
        f"(step {summary['best_step']}), {summary['last_val_loss']:.4f} at the end\n"
        f"in {settings.out_dir}{os.sep}: best.safetensors, last.safetensors, loss.png, metrics.csv, samples.jsonl\n"
        f"generate     {generate_command(settings)}"
    )
    note_untrained(summary)


def note_untrained(summary: dict[str, Any]) -> None:
    """Print a note if best.safetensors, which generation loads, is the adapter before training."""
    if summary["best_step"] == 0 < summary["steps"]:
        log("note: no validation was better than before training, so best.safetensors is the initial adapter; try "
            "another --learning_rate or more steps, or generate with last.safetensors.")  # fmt: skip


def plot_metrics(metrics: Path, image: Path, panels: dict[str, list[str]], title: str) -> None:
    """Plot metrics over steps, from a metrics.csv.

    Args:
        panels: Maps the y-axis label of each panel to its metrics. Those that were logged are drawn as a thin line for
            training and with dots for validation.
        title: The title of the figure.
    """
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(metrics)
    known = {name.rpartition("/")[2] for row in rows.values() for name in row}
    panels = {label: names for label, names in panels.items() if known & set(names)}
    figure, grid = make_panels(len(panels), 5, 3.4)
    figure.suptitle(plain_label(title), wrap=True)
    for axes, (label, names) in zip(grid, panels.items(), strict=True):
        for i, name in enumerate(names):
            several = {"label": name.replace("_", " "), "color": f"C{i}"} if len(names) > 1 else {}
            curves = {
                f"train/{name}": {"label": "training, each step", "color": "C0", "lw": 1, "alpha": 0.5, **several},
                f"val/{name}": {"label": "validation", "color": "C1", "marker": "o", "ms": 4, **several},
                name: {"label": "each step", "color": "C0", "lw": 1, **several},
            }
            for column, style in curves.items():
                points = [(step, row[column]) for step, row in rows.items() if column in row]
                if points:
                    axes.plot(*zip(*points, strict=True), **style)
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        legend_above(axes)
    save_figure(figure, image)


def legend_above(axes: "Axes") -> None:
    """Add a legend above a panel, where it hides no curve. Curves with the same label share the entry of the last."""
    handles = {line.get_label(): line for line in axes.get_legend_handles_labels()[0]}
    axes.legend(handles.values(), handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False,
                fontsize="small", borderaxespad=0.2)  # fmt: skip


def plain_label(text: str) -> str:
    """Escape `$` in a name or path: matplotlib would draw the text between two of them as a formula."""
    return text.replace("$", r"\$")


def make_figure(width: float, height: float) -> "Figure":
    """Return an empty figure that needs neither a display nor pyplot; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def make_panels(count: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    """Return a figure with two panels per row, and the panels; sizes are those of one panel, in inches."""
    columns = max(1, min(count, 2))
    rows = max(1, -(-count // columns))
    figure = make_figure(width * columns, height * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def save_figure(figure: "Figure", path: Path, overwrite: bool = True) -> None:
    """Write a figure in the format of the path's suffix.

    Raises:
        UserError: The suffix is not .png, .svg or .pdf.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path} is not a .png, .svg or .pdf.")
    with atomic_write(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=130)
