"""Read and hash the Arrow files of prepared datasets.

They are checked before they are read, because damaged offsets can crash the process.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, load_from_disk

from lit_llama.storage.manifest import DATASET, changed_names
from lit_llama.storage.schema import check_readable, read_json
from lit_llama.utils import UserError, plain_name

POSITIONS = ("prompt_length", "gaps")  # columns with numbers of tokens, which may exceed the vocabulary


def load_split(data_dir: Path, split: str, columns: Sequence[str], vocab_size: int) -> Dataset:
    """Return the mapped rows of a split of a dataset folder.

    Args:
        columns: Names of the columns with tokens or numbers of tokens.
        vocab_size: Size of the vocabulary.

    Raises:
        UserError: A file is missing or damaged, or has changed since it was written.
    """
    folder = data_dir / split
    try:
        for file in read_json(folder / "state.json")["_data_files"]:
            path = folder / plain_name(file["filename"], folder / "state.json")
            if (largest := check_arrow(path, columns)) >= vocab_size:
                raise UserError(f"{path} holds the token id {largest}; the tokenizer has only {vocab_size} tokens")
        if changed := [name for name in changed_names(data_dir, DATASET) if name.startswith(f"{split}/")]:
            raise UserError(f"{data_dir / changed[0]} has changed since it was written")
        return load_from_disk(str(folder))
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; prepare the dataset again.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"The {split} rows of {data_dir} are missing or damaged ({error}).") from None


def check_arrow(path: Path, columns: Sequence[str]) -> int:
    """Check an Arrow file with non-negative integers and lists of them, and return the largest token.

    Args:
        path: The file.
        columns: Names of columns with numbers; the file may have others.

    Raises:
        UserError: The file is damaged or truncated, or a column is missing or contains anything else.
    """
    check_readable(path)
    try:
        largest = 0
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                batch.validate(full=True)
                for name in columns:
                    column = batch[name]
                    numbers = column.flatten() if hasattr(column, "flatten") else column
                    if column.null_count + numbers.null_count or not pa.types.is_integer(numbers.type):
                        raise ValueError(f"{name} does not hold whole numbers")
                    extremes = pa.compute.min_max(numbers).as_py()
                    if (extremes["min"] or 0) < 0:
                        raise ValueError(f"{name} holds {extremes['min']}")
                    largest = max(largest, extremes["max"] or 0) if name not in POSITIONS else largest
        return largest
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())})") from None


def row_lengths(rows: Dataset, column: str) -> np.ndarray:
    """Return the number of elements in each row of a column of lists, (rows,) int64.

    Iterating over the column of a formatted dataset would convert one row at a time.
    """
    return pa.compute.list_value_length(rows.with_format("arrow")[column]).to_numpy().astype(np.int64)


def read_lists(rows: Dataset, column: str) -> list[np.ndarray]:
    """Return the rows of a column of lists as arrays."""
    lengths, numbers = row_lengths(rows, column), rows.with_format("arrow")[column].combine_chunks().flatten()
    numbers = numbers.to_numpy(zero_copy_only=False)
    return [numbers[end - n : end] for n, end in zip(lengths, np.cumsum(lengths), strict=True)]


def hash_tokens(rows: Dataset, columns: tuple[str, ...]) -> Any:
    """Return the sha256 object of [length, token ids] as int32, of each column, row by row."""
    tables = [rows.with_format("arrow")[name].combine_chunks() for name in columns]
    lengths = np.stack([table.value_lengths().to_numpy(zero_copy_only=False) for table in tables], 1)
    starts = (np.cumsum(lengths + 1) - (lengths + 1).flatten()).reshape(lengths.shape)
    numbers = np.empty(lengths.sum() + lengths.size, np.int32)
    numbers[starts] = lengths
    for column, table in enumerate(tables):
        n = lengths[:, column]
        offsets = np.repeat(starts[:, column] + 1 - (np.cumsum(n) - n), n)  # to add to a token's index in its column
        numbers[offsets + np.arange(n.sum())] = table.flatten().to_numpy(zero_copy_only=False)
    return hashlib.sha256(numbers)


def hash_json(rows: Dataset, columns: Sequence[str]) -> Any:
    """Return the sha256 object of the values of each row as a JSON list, row by row."""
    digest = hashlib.sha256()
    for batch in rows.with_format(None).iter(1000):
        for row in zip(*(batch[name] for name in columns), strict=True):
            digest.update(json.dumps(row).encode())
    return digest
