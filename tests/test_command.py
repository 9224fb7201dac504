"""The aligner command and the overview of scripts: they list what exists and start fast."""

import ast
import errno
import fcntl
import os
import re
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_llama import command

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_overview_lists_each_command_with_a_description():
    lines = command.overview().splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(command.available())
    assert all(len(line.split()) > 4 for line in lines)
    assert len(lines) >= len(command.COMMANDS) - 1


def test_the_overview_does_not_import_torch():
    program = "import sys; sys.argv = ['aligner', '--help']; from lit_llama.command import main; main()"
    result = run("-c", f"{program}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    assert result.returncode == 0 and "finetune" in result.stdout, result.stderr


def test_a_command_passes_its_arguments_on(tmp_path):
    result = run("-m", "lit_llama.command", "inspect", str(tmp_path / "none.safetensors"))
    assert result.returncode == 1 and result.stderr.startswith("error: ") and "none.safetensors" in result.stderr


def test_an_unknown_command_suggests_a_similar_one_or_lists_all():
    result = run("-m", "lit_llama.command", "fintune")
    assert (result.returncode, result.stderr) == (1, "error: There is no command fintune; did you mean finetune?\n")
    result = run("-m", "lit_llama.command", "xyz")
    assert result.returncode == 1 and "choose one of demo, finetune, dpo" in result.stderr


def test_outside_the_clone_a_command_that_needs_the_default_base_stops(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(command.os, "execv", lambda program, words: started.append(words[2:]))
    for words in (["generate", "--checkpoint_dir=x"], ["generate", "--help"], ["generate", "-h"], ["inspect", "x"]):
        monkeypatch.setattr(sys, "argv", ["aligner", *words])
        command.main()
    assert started == [["--checkpoint_dir=x"], ["--help"], ["-h"], ["x"]]
    monkeypatch.setattr(sys, "argv", ["aligner", "generate", "--prompt", "Hi"])
    with pytest.raises(
        SystemExit, match=re.escape(f"run aligner generate in {ROOT}, or pass --checkpoint_dir and the")
    ):
        command.main()


def test_run_py_stops_on_windows(monkeypatch, capsys):
    from scripts import run as script

    monkeypatch.setattr(script, "os", SimpleNamespace(name="nt"))
    with pytest.raises(SystemExit):
        script.main()
    assert capsys.readouterr().err == "error: Windows is not supported; use the Windows Subsystem for Linux (WSL).\n"


def test_run_py_replaces_no_environment_that_it_did_not_make(monkeypatch, capsys, tmp_path):
    from scripts import run as script

    for name, path in (("ENV", ""), ("PYTHON", "bin/python"), ("MARKER", "made-by-run")):
        monkeypatch.setattr(script, name, tmp_path / ".venv" / path)
    made = []
    monkeypatch.setattr(script.venv, "create", lambda path, **options: made.append([p.name for p in path.iterdir()]))
    (tmp_path / ".venv").mkdir()  # empty
    script.make_environment()
    (tmp_path / ".venv/made-by-run").unlink()
    windows = tmp_path / ".venv/Scripts/python.exe"
    windows.parent.mkdir()
    windows.touch()
    with pytest.raises(SystemExit):
        script.make_environment()
    assert "was not made by this script; move it away and run again." in capsys.readouterr().err and windows.exists()
    (tmp_path / ".venv/installed-requirements.txt").touch()
    script.make_environment()
    script.make_environment()  # after an interruption of the first
    assert made == [["made-by-run"]] * 3


def test_run_py_waits_for_another_one_that_makes_the_environment(monkeypatch, capsys, tmp_path):
    from scripts import run as script

    for name, path in (("ENV", ".venv"), ("PYTHON", ".venv/bin/python"), ("LOCK", ".venv.lock")):
        monkeypatch.setattr(script, name, tmp_path / path, raising=False)
    made, waiting = [], threading.Event()

    def make_environment() -> None:
        made.append(waiting.wait(10))
        script.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        script.PYTHON.touch()

    monkeypatch.setattr(script, "make_environment", make_environment)
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=0))
    both = [threading.Thread(target=script.install, args=(["requirements.txt"],)) for _ in range(2)]
    for thread in both:
        thread.start()
    output, end = "", time.monotonic() + 5
    while "waiting for another process that changes" not in output and time.monotonic() < end:
        output += capsys.readouterr().err
    waiting.set()
    for thread in both:
        thread.join()
    assert made == [True]
    assert (output + capsys.readouterr().err).count("installing torch") == 1


@pytest.mark.parametrize(
    ("installed", "cpu", "without_cuda"),
    [(None, True, True), (None, False, False), ("2.13.0", True, False), ("2.12.0+cpu", True, True)],
)
def test_run_py_with_cpu_does_not_replace_pytorch_with_cuda(installed, cpu, without_cuda, monkeypatch, tmp_path):
    from scripts import run as script

    asked = []
    for name, path in (("ENV", ""), ("PYTHON", "bin/python")):
        monkeypatch.setattr(script, name, tmp_path / ".venv" / path)
    monkeypatch.setattr(script.sys, "platform", "linux")
    script.PYTHON.parent.mkdir(parents=True)
    script.PYTHON.touch()
    if installed:
        (script.ENV / f"lib/python3.11/site-packages/torch-{installed}.dist-info").mkdir(parents=True)
    monkeypatch.setattr(
        script.subprocess, "run", lambda words, **options: asked.append(words) or SimpleNamespace(returncode=0)
    )
    script.change_environment(["requirements.txt"], cpu)
    assert asked[1][-1] == (script.cpu_build() if without_cuda else "torch")


def test_run_py_continues_on_a_file_system_without_locks(monkeypatch, tmp_path):
    from scripts import run as script

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(script, "LOCK", tmp_path / ".venv.lock")
    monkeypatch.setattr(fcntl, "flock", flock)
    with script.locked():
        assert script.LOCK.exists()


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (subprocess.CalledProcessError(1, ["apt-get", "update"]), 1, "error: This command failed: apt-get update\n"),
        (PermissionError(13, "Permission denied", "x/.venv"), 1,
         "error: x/.venv cannot be read or written (Permission denied).\n"),
    ],
)  # fmt: skip
def test_run_py_reports_failures_in_one_line(monkeypatch, capsys, error, code, sentence):
    from scripts import run as script

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(script, "install", fail)
    monkeypatch.setattr(sys, "argv", ["run.py", "demo"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert (stopped.value.code, capsys.readouterr().err) == (code, sentence)


def test_run_py_stops_an_older_python_before_it_evaluates_annotations(monkeypatch):
    """Python 3.8 cannot evaluate `list[str]`."""
    path = ROOT / "scripts/run.py"
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 7))
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    monkeypatch.setattr(sys, "version", "3.8.18 (default)")
    with pytest.raises(SystemExit, match=re.escape("error: Python 3.10 or newer is needed; this is 3.8.18.")):
        runpy.run_path(str(path))


@pytest.mark.parametrize(
    ("words", "cpu", "passed"),
    [
        (["--cpu", "demo"], True, ["scripts/demo.py"]),
        (["demo", "--steps", "9", "--cpu"], True, ["scripts/demo.py", "--steps", "9"]),
        (["demo"], False, ["scripts/demo.py"]),
        (["generate/aligner.py", "--prompt", "--cpu"], False, ["generate/aligner.py", "--prompt", "--cpu"]),
    ],
)
def test_run_py_takes_cpu_before_and_after_demo_or_test(monkeypatch, words, cpu, passed):
    from scripts import run as script

    received = []
    monkeypatch.setattr(script, "install", lambda requirements, cpu: received.append(cpu))
    monkeypatch.setattr(script.os, "chdir", lambda path: None)
    monkeypatch.setattr(script.os, "execv", lambda program, command: received.append(command[1:]))
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    script.main()
    assert received == [cpu, passed]


def test_run_py_suggests_a_similar_script():
    result = run("scripts/run.py", "generate/alinger.py")
    message = "error: There is no script generate/alinger.py; did you mean generate/aligner.py?\n"
    assert (result.returncode, result.stderr) == (1, message)


def test_run_py_becomes_the_script(monkeypatch, tmp_path):
    """Signals then reach the script."""
    from scripts import run as script

    started = []
    monkeypatch.setattr(script, "install", lambda *args: None)
    monkeypatch.setattr(script.os, "chdir", started.append)
    monkeypatch.setattr(script.os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr(sys, "argv", ["run.py", "generate/aligner.py", "--prompt", "Hi"])
    script.main()
    assert started == [ROOT, [str(script.PYTHON), "generate/aligner.py", "--prompt", "Hi"]]


def test_run_py_lists_every_script_with_its_first_sentence():
    text = run("scripts/run.py", "--help").stdout
    for script in ("finetune/aligner.py", "evaluate/gsm8k.py", "studies/paper_7b.py", "benchmarks/training.py"):
        assert f"    {script}\n        " in text
    assert "Moved to" not in text and "Replaced by" not in text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is part of Python 3.11 and later")
def test_the_entry_point_and_the_version_are_stated_once():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"aligner": "lit_llama.command:main"}
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
