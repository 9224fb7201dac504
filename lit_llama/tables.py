"""Tables in Markdown and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table without a final line break. The first column is text, the others are numbers.

    Cells are written with `str`; their vertical bars are escaped.
    """
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    cells.insert(1, ["---", *["---:"] * (len(header) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the content of a CSV file with a column for each name in any row."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
