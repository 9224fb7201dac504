"""Small things every part uses: errors for users, files that are whole or absent, parameters that stay fp32."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError


class UserError(ValueError):
    """Something the user can mend. Its text is one sentence or two: what is wrong, where, and what to do.

    The command-line scripts print it without a traceback and exit with 1 (see `lit_llama.cli.run`).
    """


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of k that is not below n."""
    return -(-n // k) * k


def log(text: str = "") -> None:
    """To stderr: stdout carries only what was asked for."""
    print(text, file=sys.stderr, flush=True)


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}

UMASK = os.umask(0)
os.umask(UMASK)


@contextmanager
def atomic_write(path: Path, marker: str = "") -> Iterator[Path]:
    """Yields a temporary name beside `path` to write a file or a folder to; renamed to `path` when all went well.

    It replaces what was there; a folder only if it is empty or holds a file named `marker`, so that a mistyped path
    deletes nothing. On any error the temporary is removed and `path` is as it was.

    Raises:
        UserError: the disk is full, or the folder cannot be written to or is no such folder.
    """
    path = Path(path).resolve()
    if path.is_dir() and any(path.iterdir()) and not (marker and (path / marker).is_file()):
        raise UserError(f"{path} is a folder with other files, which writing it would delete; choose another path.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            temporary.chmod(0o666 & ~UMASK)  # safetensors makes its files private
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unwritable(path, error) or error from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.exists():
            temporary.unlink()


def unwritable(path: Path, error: Exception) -> UserError | None:
    """A sentence for a full disk or a folder without access, as Python, torch or safetensors report it."""
    number, text = getattr(error, "errno", None), str(error)
    if number in NO_ROOM or any(s in text for s in ("No space left", "File too large", "PytorchStreamWriter",
                                                    "inline_container", "iostream error")):  # fmt: skip
        return UserError(f"There is no room left to write {path}: free some space and run again; nothing was changed.")
    if number in NO_ACCESS:
        return UserError(f"Cannot write {path} ({os.strerror(number)}); choose another output folder.")
    return None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, a model has no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def swapped_parameters(model: nn.Module, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, some parameters of a model, wrapped by Fabric or not, hold other values; not for use under autograd."""
    parameters = dict(getattr(model, "module", model).named_parameters())
    own = {name: parameters[name].data for name in state}
    for name, values in state.items():
        parameters[name].data = values
    try:
        yield
    finally:
        for name, values in own.items():
            parameters[name].data = values


class Fp32Parameters:
    """Mixin for a module whose own parameters stay fp32 when the model is cast.

    bf16 has 8 bits of precision: an AdamW step of 1e-4 on a value of 1 is rounded away. `model.to(torch.bfloat16)`
    and Fabric's `bf16-true` cast every parameter of a module; this puts the unrounded values back.
    """

    of_base: tuple[str, ...] = ()  # parameters of the module that belong to the base, and are cast

    def _apply(self: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
        masters = {name: p.data for name, p in self.named_parameters(recurse=False) if name not in self.of_base}
        super()._apply(fn, recurse)
        for name, master in masters.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = master.to(parameter.device)
        return self
