"""Output to a terminal, a pipe, a full disk and closed streams."""

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_llama.console import explain
from lit_llama.utils import UserError, check_text, printable

ROOT = Path(__file__).parents[1]
FOREIGN = "\x1b]0;title\x07 \x9b31m \u202egnp.exe \r over\ttab\nline \x7f ü 🙂 \ud800"
ESCAPED = "\\x1b]0;title\\x07 \\x9b31m \\u202egnp.exe \\r over\ttab\nline \\x7f ü 🙂 \\ud800"
PROGRAM = f"""
import sys
from lit_llama.console import exit_on_user_error
from lit_llama.utils import UserError, log
with exit_on_user_error():
    print({FOREIGN!a})
    log({FOREIGN!a})
    if "many" in sys.argv:
        for i in range(100_000):
            print(i)
    if "fail" in sys.argv:
        raise UserError({FOREIGN!a} + ".")
"""


def start(*args: str, **streams) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "", "LC_ALL": "C.UTF-8"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *args], env=environment | streams.pop("env", {}), **streams)


def read_terminal(*args: str) -> str:
    """Return what a program shows on a terminal that is both its stdout and its stderr."""
    master, slave = pty.openpty()
    process = start(*args, stdout=slave, stderr=slave)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # the program has ended
            break
        output += chunk
    process.wait(60)
    os.close(master)
    return output.decode().replace("\r\n", "\n")


def test_control_characters_are_escaped():
    assert printable(FOREIGN) == ESCAPED
    assert printable("plain, Ünïcode, 日本語, ⁇, █") == "plain, Ünïcode, 日本語, ⁇, █"


def test_output_to_a_terminal_is_escaped():
    assert read_terminal("fail") == f"{ESCAPED}\n{ESCAPED}\nerror: {ESCAPED}.\n"


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
def test_output_to_a_pipe_is_not_escaped(locale):
    process = start(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0"})
    out, err = process.communicate(timeout=60)
    expected = FOREIGN.replace("\ud800", "\\ud800").encode()
    assert (process.returncode, out, err) == (0, expected + b"\n", expected + b"\n")


def test_a_closed_pipe_ends_the_program_quietly():
    for streams in ({"stderr": subprocess.PIPE}, {"stderr": subprocess.STDOUT}):
        process = start("many", stdout=subprocess.PIPE, **streams)
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read() if process.stderr else b""
        assert process.wait(60) == 141 and b"Traceback" not in err and b"Broken" not in err
        if process.stderr:
            process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, as on macOS")
def test_a_full_disk_is_an_error_for_stdout_but_not_for_stderr():
    with open("/dev/full", "w") as full:
        process = start(stdout=full, stderr=subprocess.PIPE)
        err = process.communicate(timeout=60)[1].decode(errors="backslashreplace")
        assert process.returncode == 1
        assert err.endswith("error: Cannot write to standard output (No space left on device).\n")
        process = start(stdout=subprocess.PIPE, stderr=full)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 0 and out


def test_closed_streams_cause_no_traceback():
    for number in (1, 2):
        script = f'"$0" -c "$1" fail {number}>&-'
        command = ["sh", "-c", script, sys.executable, PROGRAM]
        result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
        assert result.returncode == 1 and b"Traceback" not in result.stderr


def test_lone_surrogates_and_invalid_utf8_are_refused(refused):
    assert check_text("ü 🙂", "x") == "ü 🙂"
    with pytest.raises(UserError, match="Row 3: 'prompt' holds one half of a surrogate pair"):
        check_text("a\ud800b", "Row 3: 'prompt'")
    message = refused("generate/base.py", "--prompt", os.fsdecode(b"caf\xe9"))
    assert message == "The command line holds a byte that is not UTF-8."


def test_an_error_names_a_locale_without_utf8(tmp_path):
    (tmp_path / "c.yaml").write_text("prompt: [ü]", encoding="utf-8")
    program = """
import sys
from pathlib import Path
from lit_llama.console import exit_on_user_error
from lit_llama.utils import check_text
with exit_on_user_error():
    check_text(sys.argv[1], "x")
    Path("\\xfc").stat() if sys.argv[1] == "name" else open("c.yaml").read()
"""
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    for word in ("ü", "name", "content"):
        command, environment = [sys.executable, "-c", program, word], {**os.environ, **ascii}
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
        assert result.returncode == 1 and result.stderr.endswith(
            "outside this locale, which is ASCII; set PYTHONUTF8=1.\n"
        )
        assert "Traceback" not in result.stderr


def test_an_error_starts_a_new_line_after_a_progress_bar(tmp_path):
    program = "from tqdm import tqdm; from lit_llama.console import exit_on_user_error as e\n"
    program += "from lit_llama.utils import UserError\nwith e():\n for i in tqdm(range(9)): raise UserError('No.')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
    )
    assert result.returncode == 1 and result.stderr.endswith("\nerror: No.\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_called_command_ends_in_its_way_after_a_signal(tmp_path, number):
    command = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(*_):
    time.sleep(0.6)
    (folder / "ended").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
(folder / "ready").touch()
time.sleep(60)
"""
    words = f"[sys.executable, '-c', {command!r}, {str(tmp_path)!r}]"
    program = f"""
import signal, sys
from lit_llama.console import call
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
sys.exit(call({words}))
"""
    words = [sys.executable, "-c", program]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert (tmp_path / "ended").exists()


def test_a_second_sigterm_ends_the_process_only_after_a_second():
    program = """
import os, signal, time
from lit_llama.console import ends_at_once
signal.signal(signal.SIGTERM, ends_at_once())
os.kill(os.getpid(), signal.SIGTERM)
print("still here", flush=True)
time.sleep(1.1)
os.kill(os.getpid(), signal.SIGTERM)
print("not reached")
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "still here\n")


def test_system_errors_are_explained():
    assert explain(MemoryError()).startswith("The memory is full")
    assert "no permission to read /x" in explain(PermissionError(errno.EACCES, "", "/x"))
    assert explain(ValueError()) == explain(OSError(errno.EIO, "", "/x")) == ""


DISTRIBUTED = """
import os, sys, torch
from torch import distributed
from lit_llama.console import exit_on_user_error
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1], RANK=sys.argv[2], WORLD_SIZE="2")
with exit_on_user_error():
    distributed.init_process_group("gloo")
    distributed.barrier()
    if sys.argv[2] == "1":
        os._exit(3)
    for _ in range(3):
        distributed.all_reduce(torch.ones(2))
"""


def test_a_process_reports_that_another_one_ended(free_port, python):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, "-c", DISTRIBUTED, str(free_port)]
    first, second = (subprocess.Popen([*command, rank], env=environment, stderr=subprocess.PIPE) for rank in "01")
    _, stderr = first.communicate(timeout=100)
    second.communicate(timeout=100)
    assert (first.returncode, second.returncode) == (1, 3)
    assert stderr.decode() == "error: Another process of this run ended; it printed the reason, or it was killed.\n"
