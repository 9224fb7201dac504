"""Read rows of text from files and from the Hugging Face Hub."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_llama.storage.schema import check_readable, parse_json
from lit_llama.utils import UserError, check_text, first_line


@contextmanager
def naming(source: Path | str) -> Iterator[None]:
    """Put the source of rows before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def read_rows(path: Path) -> list[Any]:
    """Return the rows of a JSON list, JSON Lines or Parquet file; JSON may be gzipped.

    Raises:
        UserError: The file is missing or damaged, or a line is not JSON.
    """
    path = Path(path)
    check_readable(path, "data file")
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa  # generation from a prompt in a flag starts without it
        import pyarrow.parquet

        try:
            return pa.parquet.read_table(path).to_pylist()
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            raise UserError(f"{path} is not a parquet file ({error}).") from None
    text = read_text(path)
    if text.lstrip().startswith("["):
        return parse_json(text, path, list, halves=True)
    lines = enumerate(text.split("\n"), 1)  # JSON strings may contain U+2028, at which `str.splitlines` splits
    try:
        return [parse_json(line, f"{path}, line {n}", object, halves=True) for n, line in lines if line.strip()]
    except UserError as error:
        raise UserError(f"{error} The file should hold one JSON list, or one object per line.") from None


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark; the file may be gzipped.

    Raises:
        UserError: The file cannot be read, or is not UTF-8.
    """
    opener = gzip.open if Path(path).suffix.lower() == ".gz" else open
    check_readable(path)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from None


def download_rows(
    repo_id: str, split: str = "train", revision: str | None = None, config_name: str | None = None
) -> Iterable[dict[str, Any]]:
    """Return the rows of a dataset on the Hugging Face Hub; `datasets` caches the download.

    Args:
        repo_id: The dataset, or a local folder in the layout of one.
        split: The split.
        revision: A branch, tag or commit.
        config_name: The configuration, for a dataset with several.

    Raises:
        UserError: The dataset cannot be downloaded, or has no such configuration or split.
    """
    from datasets import enable_progress_bars, load_dataset  # takes a second to import

    enable_progress_bars()
    try:
        return load_dataset(repo_id, config_name, split=split, revision=revision)
    except ValueError as error:  # the message lists the configurations or splits, before an example of code
        reason = " ".join(str(error).partition("Example of usage")[0].split()).rstrip(".")
        raise UserError(f"Cannot read {repo_id}: {reason}.") from None
    except Exception as error:
        raise UserError(
            f"Cannot download {repo_id} ({first_line(error)}); check the network, or give the rows with --data_file."
        ) from None


def origin(data_file: Path | None, repo_id: str, **chosen: str) -> dict[str, str]:
    """Return the entries of `meta.json` that say where rows come from.

    They are `source`, and for rows of a dataset on the Hub also `repo_id` and what was chosen of `config_name`, `split`
    and `revision`.
    """
    if data_file is not None:
        return {"source": str(data_file)}
    source = ", ".join([repo_id, *(f"{name.removesuffix('_name')} {value}" for name, value in chosen.items())])
    is_local = Path(repo_id).exists()  # a folder, which `datasets` reads like a dataset on the Hub
    return {"source": source, **({} if is_local else {"repo_id": repo_id, **chosen})}


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
