"""Read rows of text from files and from the Hugging Face hub."""

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import enable_progress_bars, load_dataset

from lit_llama.utils import UserError, check_text


def read_rows(path: Path) -> list[Any]:
    """Return the rows of a JSON list, JSON Lines or Parquet file; JSON may be gzipped.

    Raises:
        UserError: The file is missing or damaged, or a line is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no data file at {path}.")
    if path.suffix.lower() == ".parquet":
        try:
            return pa.parquet.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is not a parquet file ({error}).") from None
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return _parse_lines(path, text)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} in line {error.lineno}.") from None


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark; the file may be gzipped.

    Raises:
        UserError: The file cannot be read, or is not UTF-8.
    """
    opener = gzip.open if Path(path).suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from None


def _parse_lines(path: Path, text: str) -> list[Any]:
    """Return the value of each non-empty line. JSON strings may contain U+2028, at which `str.splitlines` splits."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not JSON: {error.msg}; the file should hold one JSON list, or one "
                "object per line."
            ) from None
    return rows


def download_rows(
    repo_id: str, split: str = "train", revision: str | None = None, name: str | None = None
) -> Iterable[dict[str, Any]]:
    """Return the rows of a dataset on the Hugging Face hub; `datasets` caches the download.

    Args:
        name: The configuration, for a dataset with several.

    Raises:
        UserError: The dataset cannot be downloaded.
    """
    enable_progress_bars()
    try:
        return load_dataset(repo_id, name, split=split, revision=revision)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"Cannot download {repo_id} ({reason}); check the network, or give the rows with --data_file."
        ) from None


def text_field(row: Any, number: int, name: str, default: str | None = None) -> str:
    """Return the text in field `name` of a row.

    Args:
        number: The row's number, counted from 1, for error messages.
        default: Returned if the field is missing or null.

    Raises:
        UserError: The row is not an object, the field is missing, or its value is not text.
    """
    if not isinstance(row, dict):
        raise UserError(f"Row {number} is not an object with named fields but {type(row).__name__}.")
    if name not in row and default is None:
        raise UserError(f"Row {number} has no field {name!r}; it has {', '.join(map(repr, row)) or 'none'}.")
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise UserError(f"Row {number}: {name!r} is not text but {'null' if value is None else type(value).__name__}.")
    return check_text(value, f"Row {number}: {name!r}")
