"""Two processes over gloo: if one fails or is killed, both end with one error message."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = f"""
import math, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import torch
from lightning.fabric import Fabric
from lit_llama.run import processes
from lit_llama.run.steps import Step
from lit_llama.console import exit_on_user_error
from lit_llama.utils import UserError

case, where = sys.argv[1], int(sys.argv[2])
with exit_on_user_error():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    processes.launch(fabric, 1)
    processes.watch_processes(fabric)
    here = fabric.global_rank == where
    if case == "error":
        with processes.together(fabric):
            if here:
                raise UserError("The disk is full.")
    if case == "upload":
        with processes.completing:
            time.sleep(0 if here else 12)
        raise UserError("The disk is full.")
    if case == "bad rows":  # five micro-batches, so the second process repeats the first one
        rows = [np.array([10 * i, 10 * i + 1]) for i in range(5)]
        bad = [torch.tensor(here and i == 1) for i in range(3)]
        step = Step(7, {{}}, 1.0, torch.ones(()), 0.1, 0, rows, bad, 0.0, {{}})
        raise UserError(step.problem(fabric, {{"train/loss": math.nan, "grad_norm": 1.0}}) + ".")
    if case == "mistake":
        with processes.together(fabric):
            if here:
                raise KeyError("a mistake")
    if case.startswith("killed"):
        fabric.barrier()  # else the other one may still be connecting
    if case.startswith("killed") and here:
        time.sleep(1)
        open(sys.argv[3], "w").write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "killed, the other waits":
        time.sleep(100)  # like a process under NCCL
    if case == "killed, gloo notices":
        fabric.barrier()
    print("not reached")
"""


def run(path: Path, python: str, *args: object) -> tuple[int, str, float]:
    """Return the exit code of the first process, the output of both, and the seconds from a kill to the end of both.

    Args:
        path: An empty folder.
        python: The interpreter.
        args: The arguments of the script.
    """
    (path / "script.py").write_text(SCRIPT)
    command = [python, path / "script.py", *map(str, args), path / "died"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=300)  # returns when both processes have closed the pipe
    finally:
        process.kill()
        process.wait()
    died = float((path / "died").read_text()) if (path / "died").exists() else time.time()
    return process.returncode, output, time.time() - died


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_printed_once(tmp_path, python, rank):
    code, output, _ = run(tmp_path, python, "error", rank)
    assert (code, output) == (1, "error: The disk is full.\n")


def test_an_error_is_printed_although_it_follows_an_upload(tmp_path, python):
    """Lightning's thread notices after at most 5 seconds that the other process has ended."""
    code, output, _ = run(tmp_path, python, "upload", 1)
    assert (code, output) == (1, "error: The disk is full.\n")


def test_an_error_under_slurm_is_printed_once(tmp_path, python, free_port):
    (tmp_path / "script.py").write_text(SCRIPT)
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
           "SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}  # fmt: skip
    tasks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        command = [python, tmp_path / "script.py", "error", "1"]
        tasks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [task.communicate(timeout=300)[1] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert ([task.returncode for task in tasks], errors) == ([1, 1], ["error: The disk is full.\n", ""])


@pytest.mark.parametrize(("rank", "rows"), [(0, "20, 21"), (1, "30, 31")])
def test_rows_with_a_bad_loss_are_named_whichever_process_had_them(tmp_path, python, rank, rows):
    code, output, _ = run(tmp_path, python, "bad rows", rank)
    assert (code, output) == (1, f"error: The loss is nan in step 7, rows {rows}, at lr 1.0e-01.\n")


def test_a_bug_keeps_its_traceback(tmp_path, python):
    code, output, _ = run(tmp_path, python, "mistake", 1)
    assert code == 1
    assert output.count("Traceback") == 1 and "KeyError: 'a mistake'" in output
    assert output.count("error: Process 1 failed (KeyError).") == 1


@pytest.mark.parametrize("case", ["killed, the other waits", "killed, gloo notices"])
@pytest.mark.parametrize("rank", [0, 1])
def test_killing_one_process_ends_the_other_within_a_minute(tmp_path, python, case, rank):
    if (rank, case) == (0, "killed, the other waits"):
        python = sys.executable  # the second process notices the end of its parent
    code, output, seconds = run(tmp_path, python, case, rank)
    assert code == (-9 if rank == 0 else 1)
    assert re.fullmatch(r"error: Another process of this run ended[,;] [^\n]*\.\n", output), output
    assert seconds < 60


def test_waiting_for_machines_is_reported_and_times_out(python):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from datetime import timedelta
from lightning.fabric import Fabric
from lit_llama.run import processes
from lit_llama.console import exit_on_user_error
processes.PATIENCE = timedelta(seconds=3)
with exit_on_user_error():
    strategy = processes.fabric_strategy("auto", 1000)
    processes.launch(Fabric(accelerator="cpu", num_nodes=1000, strategy=strategy), 1000)
"""
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    waiting, error = result.stderr.strip().splitlines()
    pattern = r"Waiting for 1000 machines at 127\.0\.0\.1:\d+, at most 0:00:03\. Start this command on each, with"
    assert re.match(pattern, waiting)
    assert error.startswith("error: The processes of the run did not find each other within 0:00:03 (")
