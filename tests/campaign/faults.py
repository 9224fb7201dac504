"""Kill a process or fill its disk at the n-th call that changes a folder; installed only in the process under test."""

import builtins
import errno
import functools
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink", "truncate", "chmod")
FREE = ("unlink", "remove", "rmdir", "truncate", "chmod")  # these work on a full disk
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Faults:
    """Count the calls that change something below a folder, and inject a fault at one of them.

    Args:
        root: Folder in which changes are counted.
        kill_at: Number of the call, from 1; with None, calls are only counted.
        how: "before" or "after" kills the process before or after the call; "full" makes it and every later one
            that needs space fail as on a full disk; "record" copies the folder before each call, as a kill would leave
            it, to `record/NUMBER` next to `count_file`.
        count_file: File that receives the names of the calls, one per line.
    """

    def __init__(self, root: Path, kill_at: int | None, how: str, count_file: Path) -> None:
        self.root, self.kill_at, self.how = os.path.realpath(root), kill_at, how
        self.count, self.source, self.records = 0, self.root, Path(count_file).with_name("record")
        self.log = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)

    def install(self) -> None:
        """Patch the functions that change folders. Only this process is affected, not those that it starts."""
        for name in CHANGES:
            setattr(os, name, self._counted(getattr(os, name), name))
        os.open = self._counted(os.open, "open", lambda path, flags=0, *a, **k: flags & WRITES)
        opened = self._counted(io.open, "open", lambda path, mode="r", *a, **k: set(mode) & set("wax+"))
        io.open = builtins.open = opened
        import safetensors.torch
        import torch

        torch.save = self._counted(torch.save, "torch.save", path_index=1)
        safetensors.torch.serialize_file = self._counted(safetensors.torch.serialize_file, "serialize_file", None, 1)

    def _counted(
        self, call: Callable, name: str, changes: Callable[..., Any] | None = None, path_index: int = 0
    ) -> Callable:
        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            relevant = len(args) > path_index and self._is_below_root(args[path_index], kwargs.get("dir_fd"))
            if not relevant or (changes is not None and not changes(*args, **kwargs)):
                return call(*args, **kwargs)
            self.count += 1
            os.write(self.log, f"{name} {args[path_index]}\n".encode(errors="replace"))
            if self.how == "record":
                self._record()
            fatal = self.count == self.kill_at
            if self.how == "full" and self.kill_at and self.count >= self.kill_at and name not in FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[path_index])
            if fatal and self.how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **kwargs)
            finally:  # also if the call fails, as mkdir does for an existing folder
                if fatal and self.how == "after":
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted

    def _record(self) -> None:
        pid = os.fork()  # in a child, so that the copying is not counted
        if pid == 0:
            self.root = "/nowhere"
            shutil.copytree(self.source, self.records / str(self.count), symlinks=True)
            os._exit(0)
        os.waitpid(pid, 0)

    def _is_below_root(self, path: Any, dir_fd: int | None) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        path = os.path.join(folder, os.fsdecode(path))
        return os.path.join(os.path.realpath(os.path.dirname(path)), "").startswith(os.path.join(self.root, ""))
