"""Offline logging to Weights & Biases in addition to TensorBoard."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

import finetune.aligner as script
from lit_llama import cli
from lit_llama.run.loggers import check_logger

SHORT = ("--max_steps=4", "--batch_size=8", "--micro_batch_size=8", "--adapter_start_layer=1", "--eval_interval=2",
         "--save_interval=2", "--sample_prompts=0", "--accelerator=cpu")  # fmt: skip


def train(base_dir: Path, data_dir: Path, out_dir: Path, *flags: str) -> None:
    folders = (f"--checkpoint_dir={base_dir}", f"--data_dir={data_dir}", f"--out_dir={out_dir}")
    script.main(cli.parse(script.Settings, [*folders, *SHORT, *flags]))


def test_a_missing_wandb_is_a_one_line_error(base_dir, data_dir, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    folders = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "run")
    message = refused("finetune/aligner.py", *folders, *SHORT, "--logger", "wandb")
    assert message == "--logger wandb needs wandb, which is not installed: pip install wandb."
    assert not (tmp_path / "run").exists()


def test_a_missing_key_is_found_before_a_run_is_replaced(base_dir, data_dir, tmp_path, refused, monkeypatch, capsys):
    """With a stand-in for wandb, which may not be installed."""

    def login() -> None:
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    wandb = SimpleNamespace(__spec__=ModuleSpec("wandb", None), Error=RuntimeError, login=login)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    train(base_dir, data_dir, run)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    folders = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", run)
    message = refused("finetune/aligner.py", *folders, *SHORT, "--logger", "wandb", "--overwrite")
    assert message == (
        "Weights & Biases refuses the run (No API key configured. Use `wandb login` to log in); run wandb login, or "
        "set WANDB_MODE=offline."
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_only_the_first_process_logs_in(monkeypatch):
    """The others would ask for the key on the same terminal."""
    logins = []
    wandb = SimpleNamespace(__spec__=ModuleSpec("wandb", None), Error=RuntimeError, login=lambda: logins.append(1))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        check_logger("wandb")
    assert logins == [1]


def test_resuming_continues_the_wandb_run(base_dir, data_dir, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    train(base_dir, data_dir, run, "--logger=wandb")
    train(base_dir, data_dir, run, "--logger=wandb", "--resume")
    ids = {folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")}
    assert len(ids) == 1  # the resumed run keeps its id
    logged = b"".join(path.read_bytes() for path in (run / "wandb").rglob("*.wandb"))
    assert all(name in logged for name in (b"val/loss", b"train/loss", b"grad_norm", b"learning_rate"))
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
