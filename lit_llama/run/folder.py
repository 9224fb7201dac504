"""The folder of a training run: its files, and how a run is resumed from them.

    config.yaml          all settings; --config reads it
    environment.json     versions, device, processes and command of the last process, fingerprint of the base
    metrics.csv          one row of metrics per step; tensorboard/ has the same
    samples.jsonl        answers to validation prompts at each validation
    best.safetensors     the adapter with the lowest validation loss
    last.safetensors     the adapter of the last saved state
    state.pt             everything that --resume needs
    loss.png, metrics.png, summary.json    written after the last step; SFT has no metrics.png, RL no loss.png

state.pt is authoritative: logs are written before it, and --resume truncates them after its step and rewrites the
adapter files from it. So whenever a run is killed, it continues from its last saved state, or starts again if there is
none. Only the first process of a run writes files.
"""

import gc
import inspect
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import torch
import yaml
from lightning.fabric import Fabric

from lit_llama.checkpoint import is_ours, save_adapter, versions
from lit_llama.console import ends_at_once
from lit_llama.device import device_name
from lit_llama.run.loggers import EventFile, WandbRun, check_logger
from lit_llama.run.processes import completing, full_gpu_explained, together
from lit_llama.run.report import LOSS_FIGURE, MetricsLog, plot_metrics
from lit_llama.run.samples import read_samples
from lit_llama.run.saved_state import agrees, as_json, best_of, damaged, read_saved_state
from lit_llama.run.train_settings import TrainSettings
from lit_llama.storage.files import LOCK, atomic_write, check_claim, claim, explained, locked, write_text
from lit_llama.storage.manifest import OUTPUTS, read_manifest
from lit_llama.storage.schema import parse_json
from lit_llama.utils import UserError, log

# in the order in which --overwrite deletes them: until state.pt is deleted, --resume restores those before it
FILES = ("loss.png", "metrics.png", "summary.json", "best.safetensors", "last.safetensors", "state.pt", "metrics.csv",
         "samples.jsonl")  # fmt: skip
NAMES = (*FILES, "config.yaml", "environment.json", LOCK)


class RunFolder:
    """The files of one training run.

    Args:
        settings: All settings of the script.
        figures: Maps the name of each figure to its panels, see `plot_metrics`.

    Raises:
        UserError: The folder contains a run that is neither resumed nor overwritten, or that cannot be resumed, or the
            folder cannot be written to.
    """

    def __init__(self, settings: TrainSettings, figures: dict[str, dict[str, list[str]]] = LOSS_FIGURE) -> None:
        self.settings, self.path, self.figures = settings, settings.out_dir, figures
        self.state_path = self.path / "state.pt"
        self.stopping = False  # whether to stop after the current step
        if settings.dry_run:
            return
        check_logger(settings.logger)
        with explained(self.path, OSError):
            self.check()
            if (self.path / LOCK).exists():
                with locked(self.path / LOCK, shared=True):  # fail before the model is loaded if a run trains here
                    pass

    def check(self) -> bool:
        """Check the files in the folder. Return whether they are from an earlier version, which wrote no manifest."""
        has_adapter, has_state = (self.path / "last.safetensors").is_file(), self.state_path.is_file()
        unrecorded = "state.pt" not in (read_manifest(self.path, OUTPUTS) or {})
        adopt = unrecorded and (is_ours(self.path / "last.safetensors") or self.state_is_ours())
        check_claim(self.path, NAMES, adopt=adopt)
        logs = self.path / "tensorboard"
        if os.path.lexists(logs) and (logs.is_symlink() or not logs.is_dir()):
            raise UserError(f"{logs} is not a folder but a link or a file; move it away, or choose another --out_dir.")
        if has_adapter and not has_state and not self.settings.overwrite:
            raise UserError(
                f"{self.path} contains a run without its state.pt, which cannot be resumed; replace it with "
                "--overwrite, or choose another --out_dir."
            )
        if has_state and not self.settings.resume and not self.settings.overwrite:
            raise UserError(
                f"{self.path} already contains a run: continue it with --resume, replace it with --overwrite, or "
                "choose another --out_dir."
            )
        return adopt

    def state_is_ours(self) -> bool:
        try:
            return bool(read_saved_state(self.state_path))
        except UserError:
            return False

    # == opening ==

    @contextmanager
    def occupied(self, fabric: Fabric, adapter_meta: dict[str, Any], rows: dict[str, str]) -> Iterator[None]:
        """Lock the folder against other runs while a block runs. All processes of the run must call this together.

        Args:
            fabric: Fabric, already launched.
            adapter_meta: Metadata of the adapter files; a resumed run must have the same.
            rows: Hashes of the training and validation rows; a resumed run must have the same.

        Raises:
            UserError: Another run is training in the folder, or the checks of the constructor now fail.
        """
        self.fabric, self.is_first, self.adapter_meta = fabric, fabric.global_rank == 0, adapter_meta
        self.identity = {**adapter_meta, **rows, "precision": fabric.strategy.precision.precision}
        self.device = device_name(fabric.device)
        with ExitStack() as stack:
            with self.together():
                if self.is_first:
                    adopt = self.check()
                    earlier = [f"tensorboard/{path.name}" for path in self.path.glob("tensorboard/events.out.*")]
                    claim(self.path, [*NAMES, *(earlier if adopt else [])], adopt=adopt)
                    stack.enter_context(locked(self.path / LOCK))
                    self.check()  # the process that had the lock may have finished a run
            yield

    def read_state(self) -> dict[str, Any] | None:
        """Return the saved state of the run to continue, None for a new run.

        Raises:
            UserError: The saved run had other settings, another base or other data, or its state is damaged.
        """
        with self.together():  # of several machines, perhaps only the first has the folder
            resumes = self.is_first and self.settings.resume and self.state_path.is_file()
            state = read_saved_state(self.state_path) if resumes else None
        state = self.fabric.broadcast(state)
        if state is not None:
            with self.together():
                self.check_identity(state)
        self.saved_step = 0 if state is None else state["step"]
        return state

    def check_identity(self, state: dict[str, Any]) -> None:
        """Check that a saved state belongs to this run.

        Raises:
            UserError: It does not, or its record of settings is damaged.
        """
        try:
            then, identity = (parse_json(state[name], name) for name in ("settings", "identity"))
        except UserError as error:
            raise damaged(self.state_path, error) from None
        now = {**self.json_settings(), "precision": self.identity["precision"]}  # the one that "auto" chose
        then["precision"] = identity.get("precision", now["precision"])
        fixed = [name for name in now if name in then and name not in self.settings.may_change]
        differing = [f"{name} ({then[name]} then, {now[name]} now)" for name in fixed if then[name] != now[name]]
        if not differing:
            now = as_json(self.identity)
            # earlier versions recorded less
            differing = [f"another {n}" for n in now if n in identity and not agrees(identity[n], now[n])]
        if differing:
            raise UserError(
                f"The run in {self.path} had other settings: {', '.join(differing)}; resume it with the same ones, or "
                "start a new run in another --out_dir."
            )

    def open(self, state: dict[str, Any] | None) -> None:
        """Prepare the folder for a new run, or restore exactly the files of a saved state.

        Raises:
            UserError: A log is damaged, Weights & Biases refuses the run, or the folder cannot be written.
        """
        with self.together():
            if not self.is_first:
                return
            if self.settings.resume:
                status = "has no state.pt: starting" if state is None else f"continues from step {self.saved_step}"
                log(f"{self.path} {status}.")
            self.metrics = MetricsLog(self.path / "metrics.csv")
            self.samples: list[dict[str, Any]] = []
            if state is not None:  # read everything before changing anything
                self.metrics.resume(self.saved_step)
                self.samples = read_samples(self.path / "samples.jsonl", self.saved_step)
            self.loggers: list[EventFile | WandbRun] = []
            if self.settings.logger == "wandb":  # may fail, so before an earlier run is deleted
                self.loggers.append(WandbRun(self.path, self.title(), self.json_settings(), state or {}))
            self.remove_files(keep_run=state is not None)
            self.write_description()
            events = f"tensorboard/events.out.tfevents.{time.time_ns()}"
            claim(self.path, [events])
            self.loggers.append(EventFile(self.path / events, self.metrics.rows))
            self.metrics.save()
            if state is not None:
                self.add_samples(self.saved_step, [])
                self.save_adapters(state)

    def remove_files(self, keep_run: bool) -> None:
        """Delete the TensorBoard logs of earlier processes and, unless `keep_run`, all files of an earlier run."""
        recorded = () if (self.path / "tensorboard").is_symlink() else read_manifest(self.path, OUTPUTS) or ()
        events = [name for name in recorded if re.fullmatch(r"tensorboard/events\.out\.[^/]+", name)]
        for name in events if keep_run else (*events, *FILES):
            (self.path / name).unlink(missing_ok=True)

    def write_description(self) -> None:
        """Write config.yaml and environment.json."""
        fabric = self.fabric
        write_text(self.path / "config.yaml", yaml.safe_dump(self.json_settings(), sort_keys=False))
        environment = {
            **versions(),
            "platform": platform.platform(),
            "device": self.device,
            "processes": fabric.world_size,
            "threads": torch.get_num_threads(),
            "strategy": type(fabric.strategy).__name__,
            "precision": self.identity["precision"],
            "command": shlex.join(sys.argv),
            "base": self.adapter_meta["base"],
        }
        write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def title(self) -> str:
        """Return a title for plots, such as "alpaca-7b-n1: aligner on Llama-2-7B, data alpaca"."""
        paths = {"on": "checkpoint_dir", "data": "data_dir"}
        folders = {word: getattr(self.settings, name, None) for word, name in paths.items()}
        where = ", ".join(f"{word} {folder.resolve().name}" for word, folder in folders.items() if folder)
        return f"{self.path.resolve().name}: {self.adapter_meta['method']} {where}".strip()

    def json_settings(self) -> dict[str, Any]:
        """Return the settings as config.yaml, state.pt and adapter files record them."""
        return as_json({**asdict(self.settings), "resume": False, "overwrite": False})

    # == writing ==

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Close the logs at the end. Report Ctrl-C, a full disk and a full GPU, and let SIGTERM set `stopping`.

        Raises:
            UserError: The folder cannot be written to, or the memory of the GPU is full.
            SystemExit: Ctrl-C was pressed.
        """
        before = signal.signal(signal.SIGTERM, self.stop_after_step)
        try:
            with explained(self.path, OSError), full_gpu_explained(self.settings):
                yield
        except KeyboardInterrupt:
            self.leave(130)
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            if self.is_first:
                with completing, explained(self.path, OSError):
                    for logger in self.loggers:
                        logger.close()
                    self.metrics.save()

    def stop_after_step(self, *_: Any) -> None:
        """Request to save the state and stop after the current step; a later SIGTERM ends the process at once."""
        signal.signal(signal.SIGTERM, ends_at_once())
        self.stopping = True
        if self.is_first:  # not `print`, which this signal may have interrupted
            try:
                os.write(2, f"SIGTERM: saving after this step. To continue: {self.resume_command()}\n".encode())
            except OSError:  # such as a closed pipe, which would also end the process before the state is saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    @property
    def stops_alone(self) -> bool:
        """Whether to stop a run of one process. Several processes have to agree on the last step."""
        return self.stopping and self.fabric.world_size == 1

    def leave(self, code: int) -> NoReturn:
        """Print how to continue and end the process."""
        if self.is_first:
            log(f"Interrupted. To continue from step {self.saved_step}: {self.resume_command()}")
        gc.freeze()  # without a last garbage collection, Python exits several times faster
        raise SystemExit(code) from None

    def resume_command(self) -> str:
        if self.settings.num_nodes > 1:  # only the first machine has config.yaml
            return "run the same commands again with --resume"
        script = os.path.relpath(inspect.getfile(type(self.settings)))  # sys.argv[0] may be that of a study
        return shlex.join(["python", script, "--config", str(self.path / "config.yaml"), "--resume"])

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Add metrics to the row of a step."""
        if self.is_first:
            self.metrics.log(step, values)
            for logger in self.loggers:
                logger.add(step, values)

    def add_samples(self, step: int, records: list[dict[str, str]]) -> None:
        """Add the answers of a validation to samples.jsonl."""
        if self.is_first:
            self.samples += [{"step": step, **record} for record in records]
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.samples)
            write_text(self.path / "samples.jsonl", "".join(lines))

    def save_adapter(self, name: str, tensors: dict[str, torch.Tensor], step: int, val_loss: float) -> None:
        """Write an adapter file; `name` is "best" or "last"."""
        if self.is_first:
            training = {"step": step, "settings": self.json_settings(), "val_loss": val_loss}
            meta = {**self.adapter_meta, "training": training, "versions": versions()}
            save_adapter(self.path / f"{name}.safetensors", tensors, meta, overwrite=True)

    def save_adapters(self, state: dict[str, Any]) -> None:
        """Write the adapter files of a saved state."""
        self.save_adapter("last", state["adapter"], state["step"], state["val_losses"][-1][1])
        if state.get("best"):  # earlier versions saved none
            self.save_adapter("best", state["best"], *best_of(state["val_losses"]))

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the metrics up to this step, then state.pt, then last.safetensors.

        Args:
            state: Fields that `lit_llama.run.saved_state` checks, of types that `torch.load(weights_only=True)` reads.
        """
        if self.is_first:
            self.metrics.save()
            record = {"settings": json.dumps(self.json_settings()), "identity": json.dumps(as_json(self.identity))}
            for logger in self.loggers:
                if isinstance(logger, WandbRun):
                    record["wandb"] = logger.id  # to continue the same run
            with atomic_write(self.state_path) as path:
                torch.save({**state, **record}, path)
            self.saved_step = state["step"]
            self.save_adapter("last", state["adapter"], state["step"], state["val_losses"][-1][1])

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the files that describe a completed run."""
        if self.is_first:
            with explained(self.path, OSError):
                for name, panels in self.figures.items():
                    plot_metrics(self.path / "metrics.csv", self.path / name, panels, self.title())
                write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    # == errors ==

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in all processes; if it fails in one, it fails in all."""
        with together(self.fabric), explained(self.path, OSError):
            yield
