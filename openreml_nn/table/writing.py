"""CSV files that a spreadsheet opens without running what a user wrote in a table."""

from __future__ import annotations

import os
import re
from typing import Any

import pandas as pd

from openreml_nn.support.files import replacing

__all__ = ["write_table"]

#: What a spreadsheet takes for a formula; apostrophes before it are ours.
_RUNS = re.compile(r"'*[=+\-@\t]")


def write_table(
    table: pd.DataFrame, path: str | os.PathLike[str], index_label: str | None = None
) -> None:
    """Write a CSV file whole or not at all.

    Text that begins with ``=``, ``+``, ``-``, ``@`` or a tab gets an apostrophe before it, which
    :func:`read_table` takes off; numbers never do, and text that spells a number is one.

    Args:
        table: what is written.
        path: of the file.
        index_label: heading of the row names; they are left out by default.

    Raises:
        OSError: if the file cannot be written.
    """
    safe = table.copy(deep=False)
    for position, dtype in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(dtype):
            safe.isetitem(position, table.iloc[:, position].map(_safe, na_action="ignore"))
    safe.columns = [_safe(name) for name in table.columns]
    if index_label is not None and not pd.api.types.is_numeric_dtype(table.index.dtype):
        safe.index = table.index.map(_safe)
    with replacing(path) as temporary:
        safe.to_csv(temporary, index=index_label is not None, index_label=index_label)


def _safe(value: Any) -> Any:
    if isinstance(value, str) and _RUNS.match(value) and not _is_number(value):
        return "'" + value
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
