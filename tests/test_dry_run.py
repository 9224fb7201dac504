"""--dry_run of the finetuning scripts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lit_llama.checkpoint import TOKENIZER_NAME, save_base
from lit_llama.data import PreferenceData, SFTData
from lit_llama.model import LLaMA, LLaMAConfig

ROOT = Path(__file__).parents[1]

TRAIN = ("--epochs", "2", "--batch_size", "8", "--micro_batch_size", "4", "--adapter_start_layer", "1")


def files(folder):
    return sorted(path for path in folder.rglob("*"))


@pytest.mark.parametrize(("script", "more"), [
    ("aligner", ()), ("aligner", ("--quantize", "int8", "--gradient_checkpointing")), ("lora", ()),
    ("adapter_v2", ("--precision", "bf16-true")),
])  # fmt: skip
def test_sft_prints_the_plan_and_writes_nothing(script, more, base_dir, data_dir, tmp_path, run_script):
    if "--quantize" in more:
        pytest.importorskip("bitsandbytes")
    flags = TRAIN if script in ("aligner", "adapter_v2") else TRAIN[:-2]
    paths = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "out")
    code, out, err = run_script(f"finetune/{script}.py", *paths, *flags, "--accelerator", "cpu", "--dry_run", *more)
    assert code == 0, err
    assert files(tmp_path) == []
    data = SFTData(data_dir, "train")
    assert re.search(rf"^parameters   [\d,]+ frozen in \w+.*, [\d,]+ trained \({script}\)$", out, re.MULTILINE)
    assert f"data         {len(data)} rows, up to {data.lengths.max()} tokens\n" in out
    assert "steps        12 of 8 rows in 1 process on cpu, 6 an epoch\n" in out
    assert f"| a step, 4 × {data.lengths.max()} tokens | " in out
    assert re.search(r"^time         \S+ s for a step, measured; about \d:\d\d:\d\d for 12 steps", out, re.MULTILINE)
    assert out.endswith(f"nothing was written to {tmp_path / 'out'}\n")


def test_dpo_computes_no_reference(base_dir, preference_dir, tmp_path, run_script):
    before = files(preference_dir.parent)
    paths = ("--checkpoint_dir", base_dir, "--data_dir", preference_dir, "--out_dir", tmp_path / "out")
    code, out, err = run_script("finetune/alignerDPO.py", *paths, *TRAIN, "--accelerator", "cpu", "--dry_run")
    assert code == 0, err
    assert files(tmp_path) == [] and files(preference_dir.parent) == before
    longest = PreferenceData(preference_dir, "train").lengths.max()
    assert f"| a step, 8 × {longest} tokens | " in out  # two sequences per pair
    assert "about 0:00:0" in out


def test_pairs_that_share_a_row(base_dir, preference_dir, tmp_path, run_script, monkeypatch):
    paths = ("--checkpoint_dir", base_dir, "--data_dir", preference_dir, "--out_dir", tmp_path / "out")
    monkeypatch.setattr("lit_llama.packing.answers_per_row", lambda *args: 2)
    code, out, err = run_script("finetune/alignerDPO.py", *paths, *TRAIN, "--accelerator", "cpu", "--dry_run")
    assert code == 0, err
    rows = PreferenceData(preference_dir, "train").rows
    longest = max(len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 1 for row in rows)
    assert f"| a step, 4 × {longest} tokens | " in out


def test_a_folder_with_a_run_is_unchanged(base_dir, data_dir, tmp_path, run_script):
    flags = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "out", *TRAIN)
    assert run_script("finetune/aligner.py", *flags, "--max_steps", "2", "--accelerator", "cpu")[0] == 0
    before = {path: path.read_bytes() for path in files(tmp_path) if path.is_file()}
    assert run_script("finetune/aligner.py", *flags, "--accelerator", "cpu", "--dry_run")[0] == 0
    assert {path: path.read_bytes() for path in files(tmp_path) if path.is_file()} == before


@pytest.fixture
def deep_dir(base_dir, tmp_path) -> Path:
    """Save a base whose blocks are small parts of it, and return its folder."""
    config = LLaMAConfig(block_size=64, vocab_size=300, n_layer=24, n_head=4, n_embd=128, intermediate_size=352)
    torch.manual_seed(0)
    save_base(tmp_path / "deep", config, LLaMA(config).state_dict())
    shutil.copy(base_dir / TOKENIZER_NAME, tmp_path / "deep")
    return tmp_path / "deep"


def two_processes(python: str, script: str | Path, *flags: object) -> subprocess.CompletedProcess:
    command = [python, script, "--accelerator", "cpu", "--devices", "2", "--dry_run", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("strategy", "share"), [("ddp", 1), ("fsdp", 1 / 2)])
def test_the_memory_is_that_of_each_process(strategy, share, deep_dir, data_dir, tmp_path, python):
    paths = ("--checkpoint_dir", deep_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "out")
    done = two_processes(python, "finetune/aligner.py", *paths, *TRAIN, "--strategy", strategy)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("measuring a step") == 1
    block = 4 * (4 * 128**2 + 3 * 128 * 352)
    base = float(re.search(r"^\| a step, .*? \| ([\d.]+) MB \|", done.stdout, re.MULTILINE)[1]) * 1e6
    expected = share * (24 * block + 2 * 4 * 320 * 128) + (0 if share == 1 else 3 * block)
    assert base == pytest.approx(expected, rel=0.02)  # norms and rotary tables are less


NO_ROOM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import finetune.aligner as script
from lit_llama import cli
from lit_llama.train import Trainer

train_step = Trainer.train_step

def without_room(trainer, micro_batches):
    if trainer.fabric.global_rank == int(sys.argv[-1]):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return train_step(trainer, micro_batches)

Trainer.train_step = without_room
cli.run(script.main, cli.parse(script.Settings, sys.argv[1:-1]))
"""


@pytest.mark.parametrize(("rank", "dry_run"), [(0, "true"), (1, "true"), (1, "false")])
def test_a_step_without_room_in_one_process_gives_advice(rank, dry_run, base_dir, data_dir, tmp_path, python):
    (tmp_path / "script.py").write_text(NO_ROOM)
    paths = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "out")
    done = two_processes(
        python, tmp_path / "script.py", *paths, *TRAIN, "--strategy", "ddp", "--dry_run", dry_run, rank
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.count("error: Training does not fit into the memory of the GPU: set --gradient_checkpointing") == 1
    )
