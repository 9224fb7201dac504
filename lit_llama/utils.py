"""Errors for users, messages, checks of text from untrusted sources, and the limit of open files."""

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """An error that the user can fix. The message is a sentence or two: what is wrong, where, and what to do.

    Scripts print it without a traceback and exit with status 1 (see `lit_llama.cli.run`).
    """


# C0 (without tab and newline) and C1 controls, marks that reorder text, halves of surrogate pairs
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text that cannot control a terminal, with control characters as escape sequences such as "\\x1b"."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, for a `UserError`; the name of the error if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def log(text: str = "") -> None:
    """Print a message to stderr; stdout is for results."""
    print(printable(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def check_text(text: str, source: str) -> str:
    """Return a text after checking that it can be encoded: no invalid UTF-8 (command line), no "\\ud800" (JSON).

    Raises:
        UserError: It cannot be encoded.
    """
    if halves := re.search("[\ud800-\udfff]", text):
        is_byte = "\udc80" <= halves[0] <= "\udcff"  # how Python represents a byte that it cannot decode
        if is_byte and sys.getfilesystemencoding() != "utf-8":
            raise UserError(f"{source} holds a character outside this locale, which is ASCII; set PYTHONUTF8=1.")
        wrong = "a byte that is not UTF-8" if is_byte else "one half of a surrogate pair, which is not a character"
        raise UserError(f"{source} holds {wrong}.")
    return text


def plain_name(name: Any, source: Path) -> str:
    """Return a name that was read from a file, after checking that it names a file in the same folder.

    Raises:
        UserError: It is not text, or is a path to another folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise UserError(f"{source} names {name!r}; expected the name of a file in its folder.")
    return name


def allow_open_files(count: int) -> None:
    """Raise the limit of open files to `count`, or as far as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        with suppress(ValueError, OSError):  # macOS has a lower limit than it states
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
