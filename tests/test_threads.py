"""How OpenMP threads wait, which is set before PyTorch is imported, and the note about a busy machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_llama import threads

ROOT = Path(__file__).parents[1]
PRINT = """
import os, sys
from lit_llama import cli
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "given, expected",
    [({}, "PASSIVE 1000 False"), ({"OMP_WAIT_POLICY": "active"}, "active None False"),
     ({"GOMP_SPINCOUNT": "9"}, "None 9 False")],
)  # fmt: skip
def test_threads_spin_briefly_unless_the_environment_says_otherwise(given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in threads.WAITING} | given
    result = subprocess.run([sys.executable, "-c", PRINT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == expected + "\n", result.stderr


@pytest.mark.parametrize("n_threads, busy, noted", [(1, 9.0, False), (4, 0.2, False), (4, 2.1, True), (2, 2.0, False),
                                                     (4, None, False)])  # fmt: skip
def test_a_note_is_logged_if_the_machine_is_busy(n_threads, busy, noted, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    threads.note_if_busy(n_threads)
    assert ("4 threads for 4 cores, of which other programs use 2.1" in capsys.readouterr().err) == noted


def test_programs_on_the_cores_of_others_are_not_noted(monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(threads, "busy_cores", lambda: 100.0)
    threads.note_if_busy(8)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text, busy", [("9.81 9.60 9.20 3/420 77\n", 2.0), ("0.00 0.00 0.00 1/9 77\n", 0.0),
                                        ("0.00 0.00\n", None), ("a b c d\n", None), (None, None)])  # fmt: skip
def test_busy_cores_are_read_from_the_fourth_field_of_loadavg(text, busy, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "LOAD_AVERAGES", tmp_path / "loadavg")
    if text is not None:
        threads.LOAD_AVERAGES.write_text(text)
    assert threads.busy_cores() == busy


@pytest.mark.skipif(not threads.LOAD_AVERAGES.exists(), reason="needs Linux")
def test_a_running_program_is_counted():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as program:
        try:
            time.sleep(0.3)
            assert threads.busy_cores() >= 0.2  # it may share a core with this process
        finally:
            program.kill()
