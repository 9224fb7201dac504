"""Run scripts of this repository by the thousand, each in a separate process, and check how they end.

    with Harness() as harness:
        ended = harness.run("generate/base.py", "--prompt", "x", cwd=folder)
        assert not ended.problem

Each run is a fork of a server that has imported the heavy modules (tests/preloaded.py). A script may exit with 0, or
with 1 or 2 and one line `error: ...` on stderr.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from preloaded import ENVIRONMENT, KILL, MODULES, Preloaded

TRACES = (b"Traceback (most recent call last)", b"Exception ignored", b"Fatal Python error", b"Segmentation fault")


@dataclass
class Ended:
    """The result of a run.

    Attributes:
        code: Exit code, negative for a signal, None if the time limit was reached.
        out, err: Standard output and standard error.
        killed: Whether it was killed at the requested change or time.
        streams: The states of its standard streams, if they were not files.
        calls: Calls that changed the watched folder, if there was one.
    """

    command: list[str]
    code: int | None
    out: bytes
    err: bytes
    seconds: float
    killed: bool = False
    calls: list[str] = field(default_factory=list)
    streams: dict[str, str] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """A description of what went wrong, or an empty string."""
        if self.code is None:
            return "hang"
        if self.killed:
            return ""
        if self.code < 0:
            return f"abort by signal {-self.code}"
        if self.code == 141 and "broken" in self.streams.values():
            return ""
        if any(trace in self.err for trace in TRACES):
            return "traceback"
        errors = [line for line in self.err.split(b"\n") if line.startswith(b"error: ")]
        if self.code in (1, 2) and len(errors) != 1 and "stderr" not in self.streams:
            return f"{len(errors)} sentences for exit code {self.code}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        return ""

    def describe(self) -> str:
        lines = self.err.decode(errors="backslashreplace").strip().splitlines()
        return f"{' '.join(self.command)}\n    exit code {self.code} after {self.seconds:.1f} s\n    " + "\n    ".join(
            line[:300] for line in lines[-12:]
        )


class Harness:
    """Runs scripts, and has a folder for inputs that several runs share.

    If the variable CAMPAIGN_FOLDER names a folder, it is used and kept, so that campaigns share their inputs as well.

    Args:
        modules: Further modules to import once for all runs.
    """

    def __init__(self, modules: tuple[str, ...] = ()) -> None:
        self.kept = "CAMPAIGN_FOLDER" in os.environ
        self.folder = Path(os.environ["CAMPAIGN_FOLDER"] if self.kept else tempfile.mkdtemp(prefix="campaign-"))
        self.environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        shared = os.environ.get("PRELOADED_PYTHON") if not modules else None  # of the test that started the campaign
        self.server = None if shared else Preloaded(MODULES + modules)
        self.python = shared or self.server.python

    def __enter__(self) -> "Harness":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.server:
            self.server.close()
        if not self.kept:
            shutil.rmtree(self.folder)

    def run(
        self,
        script: str,
        *args: object,
        cwd: Path,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
        limit: float = 120,
        kill_after: float | None = None,
        watch: Path | None = None,
        kill_at: int | None = None,
        after: bool = False,
        full: bool = False,
        record: bool = False,
        file_limit: int | None = None,
        user: int | None = None,
        streams: dict[str, str] | None = None,
        memory: int | None = None,
        quick: bool = False,
    ) -> Ended:
        """Run a script to its end.

        Args:
            script: Path in the repository.
            args: Arguments; str, bytes or anything that `str` accepts.
            cwd: Working directory.
            limit: Seconds after which the run is killed and counts as a hang; more on a loaded machine.
            kill_after: Seconds after which the process is killed with SIGKILL.
            watch: Folder in which changes are counted.
            kill_at: Number of the change, from 1, at which the process kills itself.
            after: Kill after the change instead of before it.
            full: Instead of a kill, fail as on a full disk from the change `kill_at` on.
            record: Copy the folder before each change, to `record/NUMBER` in the harness's folder.
            file_limit: Maximum size of a file in bytes; a write beyond it fails midway.
            user: Run with this user id (only as root).
            streams: States of "stdin", "stdout" and "stderr" if they are not files: "closed", "broken" (a pipe without
                a reader) or "full" (/dev/full).
            memory: Limit of the address space in bytes.
            quick: Skip the interpreter's cleanup at exit, which takes most of the time of a short run.
        """
        (self.folder / "in").write_bytes(stdin)
        (self.folder / "calls").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "record", ignore_errors=True)
        words = [os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in args]
        request = {"script": script, "args": words, "cwd": str(cwd), "env": env or {}, "limit": limit, "user": user,
                   "kill_after": kill_after, "full": full, "record": record, "file_limit": file_limit,
                   "watch": watch and str(watch), "kill_at": kill_at, "after": after, "memory": memory, "quick": quick,
                   "folder": str(self.folder), "streams": streams or {}}  # fmt: skip
        began = time.perf_counter()
        (self.folder / "request").write_text(json.dumps(request))
        command = [self.python, __file__, str(self.folder / "request")]
        code = wait(subprocess.Popen(command, env=self.environment), limit, kill_after)
        calls = self.folder / "calls"
        return Ended(
            [script, *words],
            code,
            (self.folder / "out").read_bytes(),
            (self.folder / "err").read_bytes(),
            time.perf_counter() - began,
            (kill_at, kill_after) != (None, None) and code == -signal.SIGKILL,
            calls.read_text().splitlines() if calls.exists() else [],
            streams or {},
        )


def wait(process: subprocess.Popen, limit: float, kill_after: float | None = None) -> int | None:
    """Return the exit code of a run; one that exceeds the limit prints its stack and is killed.

    The limit, in seconds on an idle machine, grows with the load, so that a slow run does not count as a hang.
    """
    began = time.monotonic()
    deadline, aborted = began + limit * (1 + os.getloadavg()[0]), False
    while True:
        if (code := process.poll()) is not None:
            if code == -KILL:  # the run had not begun
                code = -signal.SIGKILL
            return None if aborted else code
        if kill_after is not None and time.monotonic() - began > kill_after:
            process.send_signal(KILL)
        if time.monotonic() > deadline:
            process.send_signal(KILL if aborted else signal.SIGABRT)  # faulthandler prints the stack
            deadline, aborted = deadline + 5, True
        time.sleep(0.005)


# == in the process of a run ==


def execute(request: dict[str, Any]) -> None:
    """Redirect the streams, set the limits and run a script as `__main__`; the interpreter then exits as usual."""
    folder = Path(request["folder"])
    for number, name in enumerate(("in", "out", "err")):
        redirect(number, folder / name, request["streams"].get(f"std{name}"))
    if sys.stderr is not None:
        faulthandler.enable()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = [str(ROOT / request["script"]), *request["args"]]
    sys.path[0] = str(ROOT / Path(request["script"]).parent)
    if request["watch"]:
        sys.path.append(str(ROOT / "tests" / "campaign"))
        from faults import Faults

        how = next((how for how in ("full", "record", "after") if request[how]), "before")
        Faults(request["watch"], request["kill_at"], how, folder / "calls").install()
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    if request["memory"] is not None and sys.platform == "linux":  # macOS refuses such a limit
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    if request["user"] is not None:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    if not request["quick"]:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def redirect(number: int, path: Path, what: str | None) -> None:
    """Replace a standard stream with a file or a state of `Harness.run`, as if Python had started with it."""
    stream = ("stdin", "stdout", "stderr")[number]
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    opened = os.open(path, write if number else os.O_RDONLY)
    if what == "broken":
        reader, opened = os.pipe()
        os.close(reader)
    elif what == "full":
        opened = os.open("/dev/full", os.O_RDWR)
    os.dup2(opened, number)
    os.close(opened)
    if what == "closed":
        os.close(number)
        setattr(sys, stream, None)
    else:
        errors = "backslashreplace" if number == 2 else "strict"
        opened = open(number, "w" if number else "r", encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, stream, opened)


# == for campaigns ==


def snapshot(root: Path) -> dict[str, tuple]:
    """Return kind, permissions and content (or target) of everything below a folder, by relative name."""
    states = {}
    for folder, folders, names in os.walk(root):
        for path in (Path(folder, name) for name in folders + names):
            status = path.lstat()
            content: Any = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
            states[path.relative_to(root).as_posix()] = (status.st_mode, content)
    return states


def changes(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    """Return a description of each file that is gone or changed."""
    return [f"{name} {'is gone' if name not in after else 'changed'}"
            for name in before if after.get(name) != before[name]]  # fmt: skip


def run_campaign(
    check: Callable[..., str], description: str, modules: tuple[str, ...] = (), kinds: tuple[str, ...] = ()
) -> None:
    """Run a campaign's cases from the command line, and exit with 1 if one of them fails.

    Args:
        check: Function of the harness, a random generator and an empty folder. It returns the problem found, or "".
        description: Help text.
        modules: Further modules to import once for all runs.
        kinds: Kinds of cases; `check` gets those selected with --only, or None, as an additional argument.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=20, help="how many cases to run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; case i has seed + i")
    if kinds:
        parser.add_argument("--only", choices=kinds, nargs="+", help="only cases of these kinds")
        parser.add_argument("--each", action="store_true", help="instead of --cases: one case of each kind")
    args = parser.parse_args()
    cases: list[tuple] = [(args.only,) if kinds else ()] * args.cases
    if kinds and args.each:
        cases = [([kind],) for kind in args.only or kinds]
    failed, began = 0, time.perf_counter()
    with Harness(modules) as harness:
        for i, extra in enumerate(cases):
            seed, folder = args.seed + i, Path(tempfile.mkdtemp(prefix="campaign-case-"))
            try:
                if problem := check(harness, random.Random(seed), folder, *extra):
                    failed += 1
                    print(f"seed {seed}{f', --only {extra[0]}' if any(extra) else ''}: {problem}\n", flush=True)
                if (i + 1) % 100 == 0:
                    print(f"{i + 1} cases, {failed} failed", file=sys.stderr, flush=True)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(cases)} cases, {failed} failed, {time.perf_counter() - began:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    execute(json.loads(Path(sys.argv[1]).read_text()))
