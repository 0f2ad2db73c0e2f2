"""Tables of pyarrow as data frames, and in pieces of so many rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

__all__ = ["frame_of", "regrouped"]


def regrouped(batches: Any, rows: int) -> Iterator[Any]:
    """Tables of so many rows each from batches of any number."""
    import pyarrow as pa

    kept: list[Any] = []
    count = 0
    for batch in batches:
        while count + batch.num_rows >= rows:
            take = rows - count
            yield pa.Table.from_batches([*kept, batch.slice(0, take)])
            batch, kept, count = batch.slice(take), [], 0
        if batch.num_rows:
            kept.append(batch)
            count += batch.num_rows
    if kept:
        yield pa.Table.from_batches(kept)


def frame_of(table: Any) -> pd.DataFrame:
    """A data frame that keeps whole numbers exact where values are missing, and decimals numbers."""
    import pyarrow as pa

    for i, column in enumerate(table.columns):
        kind = column.type
        if pa.types.is_decimal(kind) and (kind.scale > 0 or kind.precision <= 18):
            target = pa.float64() if kind.scale > 0 else pa.int64()
            field = table.schema.field(i).with_type(target)
            table = table.set_column(i, field, column.cast(target))
    exact = {
        column.type
        for column in table.columns
        if column.null_count
        and (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type))
    }
    frame = table.to_pandas(
        types_mapper=lambda kind: _NULLABLE[str(kind)] if kind in exact else None
    )
    frame.columns = [str(column) for column in frame.columns]
    return frame


_NULLABLE: dict[str, Any] = {
    "bool": pd.BooleanDtype(),
    **{f"int{b}": getattr(pd, f"Int{b}Dtype")() for b in (8, 16, 32, 64)},
    **{f"uint{b}": getattr(pd, f"UInt{b}Dtype")() for b in (8, 16, 32, 64)},
}
