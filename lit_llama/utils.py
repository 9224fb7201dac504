"""Small things every part uses: errors for users, names of files, parameters that stay fp32."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn


class UserError(ValueError):
    """Something the user can mend. Its text is one sentence or two: what is wrong, where, and what to do.

    The command-line scripts print it without a traceback and exit with 1 (see `lit_llama.cli.run`).
    """


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of k that is not below n."""
    return -(-n // k) * k


# C0 (without tab and newline) and C1 controls, marks that reorder text, halves of surrogate pairs
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text that cannot control a terminal: control characters as escape sequences such as "\\x1b"."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def log(text: str = "") -> None:
    """To stderr: stdout carries only what was asked for."""
    print(printable(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def check_text(text: str, source: str) -> str:
    """Return a text that can be encoded: no invalid UTF-8 from a command line, no "\\ud800" from JSON.

    Raises:
        UserError: It cannot.
    """
    if halves := re.search("[\ud800-\udfff]", text):
        is_byte = "\udc80" <= halves[0] <= "\udcff"  # how Python represents a byte that it cannot decode
        wrong = "a byte that is not UTF-8" if is_byte else "one half of a surrogate pair, which is not a character"
        raise UserError(f"{source} holds {wrong}.")
    return text


def plain_name(name: Any, source: Path) -> str:
    """Return a name that was read from a file, which must be the name of a file in the same folder.

    Raises:
        UserError: It is not text, or a path to elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise UserError(f"{source} names {name!r} where the name of a file in its folder belongs.")
    return name


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
    while hasattr(model, "module"):
        model = model.module
    parameters = dict(model.named_parameters())
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
