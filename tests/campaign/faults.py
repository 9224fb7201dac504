"""Kill a process at the n-th call that changes a folder: for campaigns, installed in the process under test alone."""

import builtins
import functools
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink", "truncate", "chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Faults:
    """Count the calls that change something below a folder, and kill the process at one of them.

    Args:
        root: Folder whose changes count.
        kill_at: Number of the call, from 1; None counts only.
        after: Kill after the call instead of before it.
        count_file: File that receives the names of the calls, one per line.
    """

    def __init__(self, root: Path, kill_at: int | None, after: bool, count_file: Path) -> None:
        self.root, self.kill_at, self.after = os.path.realpath(root), kill_at, after
        self.count = 0
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
            concerns = len(args) > path_index and self._is_below_root(args[path_index], kwargs.get("dir_fd"))
            if not concerns or (changes is not None and not changes(*args, **kwargs)):
                return call(*args, **kwargs)
            self.count += 1
            os.write(self.log, f"{name} {args[path_index]}\n".encode(errors="replace"))
            fatal = self.count == self.kill_at
            if fatal and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    def _is_below_root(self, path: Any, dir_fd: int | None) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        path = os.path.join(folder, os.fsdecode(path))
        return os.path.join(os.path.realpath(os.path.dirname(path)), "").startswith(os.path.join(self.root, ""))
