"""The folder of a training run: its files, and how a later process continues from them.

    config.yaml          all settings; --config reads it
    environment.json     versions, device, processes and command of the last process, fingerprint of the base
    metrics.csv          one row of metrics per step; tensorboard/ holds the same
    samples.jsonl        answers to validation prompts at each validation
    best.safetensors     the adapter with the lowest validation loss
    last.safetensors     the adapter of the last saved state
    state.pt             everything that --resume needs
    loss.png, summary.json        written after the last step

The first process of a run writes the files; in the others the methods that write do nothing. --overwrite deletes
state.pt first, so that files of two runs are never mixed.
"""

import json
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric

from lit_llama.checkpoint import save_adapter, versions
from lit_llama.files import atomic_write, unwritable, write_text
from lit_llama.report import MetricsLog, plot_losses
from lit_llama.train_settings import TrainSettings
from lit_llama.utils import UserError, log

FILES = ("state.pt", "best.safetensors", "last.safetensors", "metrics.csv", "samples.jsonl", "loss.png", "metrics.png",
         "summary.json")  # fmt: skip


class RunFolder:
    """The files of one training run.

    Args:
        settings: All settings of the script.

    Raises:
        UserError: The folder holds a run that is neither resumed nor overwritten, or one that cannot be resumed.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings, self.path = settings, settings.out_dir
        self.state_path = self.path / "state.pt"
        has_adapter, has_state = (self.path / "last.safetensors").is_file(), self.state_path.is_file()
        if (has_adapter or has_state) and not settings.resume and not settings.overwrite:
            raise UserError(
                f"{self.path} already holds a run: continue it with --resume, replace it with --overwrite, or choose "
                "another --out_dir."
            )
        if has_adapter and not has_state and settings.resume:
            raise UserError(f"{self.path} holds a run without its state.pt and cannot be resumed.")

    # == opening ==

    def open(self, fabric: Fabric, adapter_meta: dict[str, Any], rows_sha256: str) -> dict[str, Any] | None:
        """Create the folder, or prepare it for continuing the run in it.

        Args:
            fabric: Launched. All processes call this together.
            adapter_meta: Metadata of the adapter files; a resumed run must have the same.
            rows_sha256: Hash of the training and validation rows; a resumed run must have the same.

        Returns:
            The saved state of the run to continue, None for a new run.

        Raises:
            UserError: The saved run had other settings, another base or other data, or its state is damaged.
        """
        self.is_first = fabric.global_rank == 0
        self.adapter_meta = adapter_meta
        precision = fabric.strategy.precision.precision
        self.identity = {**adapter_meta, "rows": rows_sha256, "precision": precision}
        state = self.read_state() if self.settings.resume and self.state_path.is_file() else None
        self.saved_step = 0 if state is None else state["step"]
        fabric.barrier()  # every process has read the state before the first one changes the folder
        if self.is_first:
            if self.settings.resume:
                found = "has no state.pt: starting" if state is None else f"continues from step {self.saved_step}"
                log(f"{self.path} {found}.")
            with _explained_errors(self.path):
                self.remove_files(keep_run=state is not None)
                self.write_description(fabric)
                self.open_logs(continued=state is not None)
        return state

    def read_state(self) -> dict[str, Any]:
        """Return the saved state after checking that it belongs to this run."""
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        except Exception:  # unpickling raises many types
            raise UserError(f"{self.state_path} is damaged; start again with --overwrite.") from None
        then, now = json.loads(state["settings"]), self.json_settings()
        fixed = [name for name in now if name in then and name not in self.settings.may_change]
        differing = [f"{name} ({then[name]} then, {now[name]} now)" for name in fixed if then[name] != now[name]]
        if not differing:
            then, now = json.loads(state["identity"]), _as_json(self.identity)
            differing = [f"another {name}" for name in now if then.get(name) != now[name]]
        if differing:
            raise UserError(
                f"The run in {self.path} had other settings: {', '.join(differing)}; resume it with the same ones, or "
                "start a new run in another --out_dir."
            )
        return state

    def remove_files(self, keep_run: bool) -> None:
        """Delete what a killed process left unfinished and, unless `keep_run`, the files of an earlier run."""
        for unfinished in self.path.glob(".*.tmp"):
            unfinished.unlink()
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        for name in () if keep_run else FILES:
            (self.path / name).unlink(missing_ok=True)

    def write_description(self, fabric: Fabric) -> None:
        """Write config.yaml and environment.json."""
        settings = {**self.json_settings(), "resume": False, "overwrite": False}
        write_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else fabric.device.type
        environment = {
            **versions(),
            "platform": platform.platform(),
            "device": device,
            "processes": fabric.world_size,
            "threads": torch.get_num_threads(),
            "strategy": type(fabric.strategy).__name__,
            "precision": self.identity["precision"],
            "command": shlex.join(sys.argv),
            "base": self.adapter_meta["base"],
        }
        write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def open_logs(self, continued: bool) -> None:
        """Open metrics.csv and the TensorBoard log; when continued, drop what was logged after the saved step."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.metrics = MetricsLog(self.path / "metrics.csv")
        self.tensorboard = SummaryWriter(self.path / "tensorboard")
        if continued:
            samples = self.path / "samples.jsonl"
            write_text(samples, "".join(_lines_until(samples, self.saved_step)))
            self.metrics.resume(self.saved_step)
            self.metrics.save()
            for step, values in self.metrics.rows.items():
                self.log_to_tensorboard(step, values)

    def json_settings(self) -> dict[str, Any]:
        return _as_json(asdict(self.settings))

    # == writing ==

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Close the logs at the end. Explain Ctrl-C and a full disk in one sentence.

        Raises:
            UserError: The folder cannot be written to.
            SystemExit: Ctrl-C was pressed.
        """
        try:
            with _explained_errors(self.path):
                yield
        except KeyboardInterrupt:
            if self.is_first:
                config = shlex.quote(str(self.path / "config.yaml"))
                log(
                    f"Interrupted. To continue from step {self.saved_step}: "
                    f"python {shlex.quote(sys.argv[0])} --config {config} --resume"
                )
            raise SystemExit(130) from None
        finally:
            if self.is_first:
                self.metrics.save()
                self.tensorboard.close()

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Add metrics to the row of a step."""
        if self.is_first:
            self.metrics.log(step, values)
            self.log_to_tensorboard(step, values)

    def log_to_tensorboard(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def add_samples(self, step: int, records: list[dict[str, str]]) -> None:
        """Append the answers of a validation to samples.jsonl."""
        if self.is_first:
            with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **r}, ensure_ascii=False) + "\n" for r in records)

    def save_adapter(self, name: str, state: dict[str, torch.Tensor], step: int, val_loss: float) -> None:
        """Write an adapter file, `name` is "best" or "last"."""
        if self.is_first:
            training = {"step": step, "settings": asdict(self.settings), "val_loss": val_loss}
            meta = {**self.adapter_meta, "training": training, "versions": versions()}
            save_adapter(self.path / f"{name}.safetensors", state, meta)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write everything that a resumed run needs, after the metrics up to that step.

        Args:
            state: `step` and whatever else the loop needs, of types that `torch.load(weights_only=True)` reads.
        """
        if self.is_first:
            self.metrics.save()
            self.tensorboard.flush()
            record = {"settings": json.dumps(self.json_settings()), "identity": json.dumps(_as_json(self.identity))}
            with atomic_write(self.state_path) as path:
                torch.save({**state, **record}, path)
            self.saved_step = state["step"]

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the files that describe a completed run."""
        if self.is_first:
            plot_losses(self.path / "metrics.csv", self.path / "loss.png")
            write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


@contextmanager
def _explained_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder without access into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) or error from None


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with what JSON cannot hold, such as paths, as text."""
    return json.loads(json.dumps(value, default=str))


def _lines_until(samples: Path, step: int) -> list[str]:
    """Return the lines of samples.jsonl up to a step; a kill can have cut off the last line."""
    lines = samples.read_text(encoding="utf-8").splitlines(keepends=True) if samples.is_file() else []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
