"""Read structured files from untrusted sources: check size, encoding and nesting, then the type and range of a field.

    about = read_json(folder / "config.json")
    layers = field(about, "num_hidden_layers", int, folder / "config.json", least=1, most=1024)

Each failure is a `UserError` of one sentence that names the file, the value and what was expected.
"""

import json
import math
import os
import re
import stat
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from lit_llama.utils import UserError, printable

LARGEST = 2**26  # bytes of a JSON file; the largest known, indexes of weights and vocabularies, have some megabytes
DEEPEST = 64  # levels of lists and objects
LFS_POINTER = b"version https://git-lfs"  # how a file begins that `git clone` did not fetch from Git LFS
REQUIRED: Any = object()  # default of a field that must be there
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list",
         dict: "an object", type(None): "null"}  # fmt: skip


def unreadable(path: Path, error: OSError, what: str = "file") -> UserError:
    """Return a one-sentence error for an operating-system error while a file is read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UserError(f"There is no {what} at {path}.")
    if isinstance(error, PermissionError):
        return UserError(f"You have no permission to read {path}; change its owner or mode, or copy it.")
    return UserError(f"{path} cannot be read ({os.strerror(error.errno) if error.errno else error}).")


def check_readable(path: Path, what: str = "file") -> int:
    """Check that a regular file can be read, and return its size; `what` describes it in the error message.

    Raises:
        UserError: It is missing, is a folder, a device or a pipe, or there is no permission to read it.
    """
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a device or a pipe"
            raise UserError(f"{path} is {kind}, not a {what}.")
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise unreadable(path, error, what) from None
    return about.st_size


def read_bytes(path: Path, limit: int = LARGEST, what: str = "file") -> bytes:
    """Return the content of a file.

    Raises:
        UserError: As `check_readable`, or the file is larger than `limit` bytes or a Git LFS pointer.
    """
    if (size := check_readable(path, what)) > limit:
        raise UserError(f"{path} has {size:,} bytes; expected a file of at most {limit:,}.")
    content = Path(path).read_bytes()
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path} is a Git LFS pointer, so fetch the file itself with `git lfs pull`.")
    return content


def read_json(path: Path, kind: type = dict, what: str = "file") -> Any:
    """Return the content of a JSON file; see `read_bytes` and `parse_json`.

    Raises:
        UserError: As `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, what=what), path, kind)


def parse_json(content: bytes | str, source: Path | str, kind: type = dict, halves: bool = False) -> Any:
    """Return the value of a JSON text. A byte order mark is ignored; if a name occurs twice, the last value is used.

    Args:
        content: The text, or its bytes in UTF-8.
        source: Where it comes from, for the error message.
        kind: Type of the value.
        halves: Accept lone surrogates; `lit_llama.storage.rows.text_field` rejects them, naming row and field.

    Raises:
        UserError: The content is not UTF-8 or not JSON, holds halves of surrogate pairs, is nested too deeply, or is of
            another type.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
        if not halves and re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", text):
            json.dumps(value, ensure_ascii=False).encode()
        if depth(value) > DEEPEST:
            raise RecursionError
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not text in UTF-8 (byte {error.start + 1}).") from None
    except UnicodeEncodeError:
        raise UserError(f"{source} holds one half of a surrogate pair, which is not a character.") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply: more than {DEEPEST} levels of lists and objects.") from None
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if "\n" in error.doc else ""
        raise UserError(f"{source} is not JSON: {error.msg}{line}.") from None
    except ValueError:  # Python reads at most 4,300 digits
        raise UserError(f"{source} is not usable JSON: it holds a number with thousands of digits.") from None
    if not isinstance(value, kind):
        raise UserError(f"{source} holds {shown(value)}; expected {NAMES[kind]}.")
    return value


def read_yaml(path: Path) -> dict[Any, Any]:
    """Return the content of a settings file, which must be a YAML mapping without aliases.

    Raises:
        UserError: As `read_bytes`, or the file is not such a mapping.
    """
    content, level = read_bytes(path, what="settings file"), 0
    try:
        for event in yaml.parse(content.decode("utf-8-sig"), yaml.SafeLoader):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > DEEPEST or isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError(f"it holds an alias, or is nested more than {DEEPEST} levels deep")
        value = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a byte that is no text, or an impossible number
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    except (LookupError, AttributeError):  # of the library, for `!!int ""` or `!!timestamp x`
        raise UserError(f"{path} is not YAML: a value does not fit the tag (such as !!int) before it.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {shown(value)}; expected lines such as seed: 1.")
    return value


def depth(value: Any) -> int:
    """Return how deeply lists and objects are nested: 0 for a number or text."""
    levels, level = 0, [value]
    while level := [v for v in level if isinstance(v, list | dict) and v]:
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
        levels += 1
    return levels


def field(
    mapping: dict[str, Any],
    name: str,
    kind: Any,
    source: Path | str,
    default: Any = REQUIRED,
    *,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Return a field of an object that was read from a file.

    Args:
        mapping: The object.
        name: Name of the field.
        kind: Type such as `int` or `str | None`. An integer is a float too; true and false are not integers.
        source: File, for the error message.
        default: Value of a field that is missing or null. Without a default the field must be there.
        least, most: Range of a number.

    Raises:
        UserError: The field is missing, or its value is of another type or out of range.
    """
    value = mapping.get(name)
    if default is not REQUIRED and value is None:
        return default
    if name not in mapping:
        raise UserError(f"{source} has no {name}.")
    return check(value, kind, f"{source}: {name}", least=least, most=most)


def check(value: Any, kind: Any, label: str, *, least: float | None = None, most: float | None = None) -> Any:
    """Return a value after checking its type and range; see `field`. Numbers must be finite, integers fit in 64 bits.

    Raises:
        UserError: The type or the range is wrong. The message begins with `label`.
    """
    kinds = [get_origin(k) or k for k in (get_args(kind) if isinstance(kind, UnionType) else (kind,))]
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if fits and type(value) in (int, float):
        finite = abs(value) < 2**63 if type(value) is int else math.isfinite(value)
        fits = finite and (least is None or value >= least) and (most is None or value <= most)
    if fits:
        return value
    expected = " or ".join(NAMES[k] for k in kinds)
    if int in kinds or float in kinds:
        expected += "" if least is None else f" from {least:,}"
        expected += "" if most is None else f" up to {most:,}"
    raise UserError(f"{label} is {shown(value)}; expected {expected}.")


def shown(value: Any) -> str:
    """Return a short description of a JSON value."""
    if isinstance(value, list | dict):
        return NAMES[type(value)]
    try:
        text = printable(json.dumps(value, ensure_ascii=False, default=lambda value: f"a {type(value).__name__}"))
    except ValueError:  # an integer with thousands of digits
        return "a number with thousands of digits"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text):,} characters)"
