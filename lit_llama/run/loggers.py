"""Loggers besides metrics.csv: a TensorBoard log, and Weights & Biases with `--logger wandb`."""

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_llama.console import is_first_process
from lit_llama.utils import UserError


def check_logger(name: str) -> None:
    """Check that the package that a logger needs is installed, and log in, before a model is loaded.

    Raises:
        UserError: It is not installed, or there is no API key.
    """
    if name != "wandb":
        return
    if find_spec("wandb") is None:
        raise UserError("--logger wandb needs wandb, which is not installed: pip install wandb.")
    if is_first_process() and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):  # it may ask for the key
        import wandb

        with wandb_explained():
            wandb.login()


@contextmanager
def wandb_explained() -> Iterator[None]:
    """Turn an error of Weights & Biases into a `UserError`."""
    import wandb

    try:
        yield
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"Weights & Biases refuses the run ({reason}); run wandb login, or set WANDB_MODE=offline."
        ) from None


class EventFile:
    """A TensorBoard log, written immediately in this thread: torch's SummaryWriter loses errors of its own thread.

    Args:
        path: File to create.
        rows: Metrics that earlier processes of the run logged, by step.
    """

    def __init__(self, path: Path, rows: dict[int, dict[str, float]]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # takes a third of a second to import

        path.parent.mkdir(exist_ok=True)
        self.file = path.open("xb", buffering=0)
        self.records = RecordWriter(self.file)
        for step, values in rows.items():
            self.add(step, values)

    def add(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self.records.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def close(self) -> None:
        self.file.close()


class WandbRun:
    """A run on Weights & Biases, through Lightning's logger.

    The environment variables WANDB_PROJECT (default: aligner), WANDB_ENTITY and WANDB_MODE set its destination; with
    WANDB_MODE=offline it stays in the folder.

    Args:
        folder: Folder for wandb's files.
        name: Name of the run on Weights & Biases.
        settings: Configuration of the run.
        state: Saved state, whose run on Weights & Biases is continued if it has one.

    Raises:
        UserError: Weights & Biases refuses the run, or cannot be reached.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], state: dict[str, Any]) -> None:
        import wandb
        from lightning.pytorch.loggers import WandbLogger  # takes seconds to import

        known = str(state.get("wandb"))
        self.id = known if re.fullmatch("[0-9a-f]{8}", known) else secrets.token_hex(4)
        with wandb_explained():
            self.logger = WandbLogger(
                name=name,
                save_dir=folder,
                version=self.id,
                project=os.environ.get("WANDB_PROJECT", "aligner"),
                config=settings,
                settings=wandb.Settings(console="off", silent=True),
            )
            self.logger.experiment  # noqa: B018  (the first access begins the run)

    def add(self, step: int, values: dict[str, float]) -> None:
        self.logger.log_metrics(values, step)

    def close(self) -> None:
        self.logger.experiment.finish()
