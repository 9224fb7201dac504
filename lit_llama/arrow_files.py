"""Check Arrow files of strangers before they are mapped: damaged offsets can end the process."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute

from lit_llama.schema import check_readable
from lit_llama.utils import UserError


def check_arrow(path: Path, columns: Sequence[str]) -> int:
    """Check an Arrow file with numbers, 0 or more, and lists of them, and return the largest one.

    Args:
        path: The file.
        columns: Names of columns with numbers; the file may have others.

    Raises:
        UserError: The file is damaged or cut short, or a column is missing or holds anything else.
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
                    found = pa.compute.min_max(numbers).as_py()
                    if (found["min"] or 0) < 0:
                        raise ValueError(f"{name} holds {found['min']}")
                    largest = max(largest, found["max"] or 0)
        return largest
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())})") from None
