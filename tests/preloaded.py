"""A Python interpreter with the heavy modules already imported, for tests that start many processes.

    with Preloaded() as server:
        subprocess.run([server.python, "finetune/aligner.py", "--help"])  # or server.python -c CODE, or -m MODULE

Importing PyTorch and Lightning takes up to ten seconds. A server imports them once, and each process is a fork of it.
`python` is a small program that hands its arguments, environment, folder and open files to the server, forwards
signals to the fork, and exits as the fork does. Lightning starts further processes of a run with it as well, and
multiprocessing does so within `worker_processes(python)`.

It does not suit tests of imports, of closed standard streams, or of what a process does when its parent is killed: the
parent of each fork is the server. All forks have the same hash seed, so the order of sets of strings is the same.
"""

import fcntl
import gc
import importlib
import json
import multiprocessing.spawn
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "lightning.fabric", "datasets", "tokenizers", "sentencepiece", "jsonargparse", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "multiprocessing.synchronize", "encodings.utf_8_sig",
    "tensorboard.summary.writer.record_writer", "tensorboard.compat.proto.event_pb2", "torch._dynamo",
    "torch.optim.adamw", "torch.utils.serialization", "lit_llama.answering", "lit_llama.cli", "lit_llama.compose",
    "lit_llama.dpo", "lit_llama.huggingface.weights", "lit_llama.prepare", "lit_llama.prepare_prompts",
    "lit_llama.reference", "lit_llama.rewards", "lit_llama.rl", "lit_llama.rollouts", "lit_llama.run.samples",
    "lit_llama.run.setup", "lit_llama.train", "microworld.scorer", "evaluate.answers", "evaluate.common",
    "evaluate.pairs",
)  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
KILL = signal.SIGUSR1  # kills the fork and waits for its end; SIGKILL would not wait
INTERPRETER = f"{sys.prefix}/bin/python3"  # in a fork, sys.executable is a client
CLIENT = f"""#!{INTERPRETER} -IS
import json, os, signal, socket, sys
def forward(number, frame):
    try:
        os.kill(pid, signal.SIGKILL if number == {KILL:d} else number)
    except ProcessLookupError:
        pass  # it has ended
signals = {{signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGABRT, {KILL:d}}}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there is a fork to forward them to
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
files = [0, 1, 2, *filter(is_open, range(3, 64))]  # the last ones are inherited from multiprocessing
with socket.socket(socket.AF_UNIX) as server:
    server.connect(ADDRESS)
    request = json.dumps({{"args": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ), "files": files}}).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], files)
    server.sendall(request)
    replies = server.makefile()
    pid = int(replies.readline())
    for number in signals:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = os.waitstatus_to_exitcode(int(replies.readline()))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Preloaded:
    """A server process that imports modules once and forks for each start of `python`.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: tuple[str, ...] = MODULES) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="python-"))
        self.python = str(self.folder / "python")
        address = self.folder / "socket"
        Path(self.python).write_text(CLIENT.replace("ADDRESS", repr(str(address))), encoding="utf-8")
        os.chmod(self.python, 0o700)
        command = [INTERPRETER, __file__, str(address), *modules]
        # in a session of its own, so that Ctrl-C does not reach it; it ends when its standard input is closed
        self.server = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.server.stdout.readline() == b"ready\n"

    def __enter__(self) -> "Preloaded":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        self.server.communicate()
        shutil.rmtree(self.folder)


@contextmanager
def worker_processes(python: str) -> Iterator[None]:
    """Start the processes of multiprocessing that are spawned with `Preloaded.python`."""
    former = multiprocessing.spawn.get_executable()
    multiprocessing.spawn.set_executable(python)
    yield
    multiprocessing.spawn.set_executable(former)


# == in the server ==


def serve(address: str, modules: list[str]) -> None:
    """Answer requests until standard input is closed. Returns in each fork as well, after it has run its program."""
    sys.path[0] = str(ROOT)
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # forks exit five times as fast
    listener, forks = socket.socket(socket.AF_UNIX), {}
    listener.bind(address)
    listener.listen()
    os.write(1, b"ready\n")
    while True:
        # a client's end is noticed at once, a fork's end within 5 ms
        ready = select.select([0, listener, *forks.values()], [], [], 0.005 if forks else None)[0]
        if 0 in ready:
            break
        for pid, client in [*forks.items()]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                answer(client, status)
                client.close()
                del forks[pid]
            elif client in ready:  # it was killed
                os.kill(pid, signal.SIGKILL)
        if listener not in ready:
            continue
        client = listener.accept()[0]
        size, streams, *_ = socket.recv_fds(client, 8, 64)
        with client.makefile("rb") as file:
            request = file.read(int.from_bytes(size, "big"))
        is_complete = len(size) == 8 and len(request) == int.from_bytes(size, "big")
        pid = os.fork() if is_complete else None  # else the client was killed
        if pid == 0:
            for each in (listener, client, *forks.values()):
                each.close()
            run(json.loads(request), streams)
            return
        for stream in streams:
            os.close(stream)
        if pid is None:
            client.close()
            continue
        forks[pid] = client
        answer(client, pid)
    for pid in forks:
        os.kill(pid, signal.SIGKILL)


def answer(client: socket.socket, number: int) -> None:
    try:
        client.sendall(f"{number}\n".encode())
    except ConnectionError:
        pass  # it was killed


def run(request: dict[str, Any], streams: list[int]) -> None:
    """Run a program as `__main__`, as if a new interpreter had started with these arguments and streams."""
    os.setsid()
    highest = max(request["files"])
    moved = [fcntl.fcntl(stream, fcntl.F_DUPFD, highest + 1) for stream in streams]
    for stream in streams:
        os.close(stream)
    for stream, number in zip(moved, request["files"], strict=True):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.executable, *args = request["args"]
    while args[0] in ("-u", "-B"):  # from torchrun and multiprocessing
        if args.pop(0) == "-u":
            sys.stdout.reconfigure(write_through=True)
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        exec(compile(args[1], "<string>", "exec"), {"__name__": "__main__"})
    elif args[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(args[0])), args
        runpy.run_path(args[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
