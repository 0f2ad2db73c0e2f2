"""A table in text: its rows parsed by a dialect, whole or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, cast

import pandas as pd

from openreml_nn.table.frames import frame_of, regrouped
from openreml_nn.table.text import (
    Dialect,
    Marked,
    Marks,
    check_quotes,
    cleaned,
    guessed,
    has_leading_zeros,
    header_of,
    joint_kind,
    kind_of_text,
    null_values,
    truths,
    typed,
)

__all__ = ["TextTable"]

#: Bytes that are parsed at a time.
_BLOCK = 1 << 20
#: Bytes of the first rows, by which the types of columns are guessed.
_HEAD = 1 << 17


class TextTable:
    """A table in text.

    Args:
        opened: opens the text from its beginning, as bytes.
        dialect: how it is written.
        may_name_rows: whether rows may begin with a name for which the header has no field.
    """

    def __init__(
        self, opened: Callable[[], BinaryIO], dialect: Dialect, may_name_rows: bool
    ) -> None:
        self._opened, self._dialect, self._may_name_rows = opened, dialect, may_name_rows
        self._known: dict[int, str] = {}

    def _header(self) -> tuple[str, list[str], int, int]:
        with self._opened() as stream:
            return header_of(stream, self._dialect)

    def names(self) -> list[str]:
        """The names of the columns."""
        names = [name.strip() for name in self._header()[1]]
        unescape = [
            n[1:] if n.startswith("'") and n.lstrip("'")[:1] in [*"=+-@\t"] else n for n in names
        ]
        return [name or f"Unnamed: {i}" for i, name in enumerate(unescape)]

    def _source(self, marks: Marks | None = None) -> tuple[BinaryIO, Any, Any]:
        """The rows, with how they are to be read and parsed.

        Args:
            marks: count the lines and the quotes of text that is parsed as it is.
        """
        from pyarrow import csv

        separator, names, fields, height = self._header()
        keys = [str(i) for i in range(len(names))]
        stream = self._opened()
        # R's write.table gives rows names for which the header has no field.
        named = self._may_name_rows and fields == len(names) + 1
        # Bytes are counted and cut as those of ASCII, which UTF-16 has two of.
        wide = "\n".encode(self._dialect.encoding) != b"\n"
        if separator == " " or self._dialect.comment is not None or named or wide:
            stream = cleaned(stream, self._dialect, separator, named)
            separator, height, encoding = ",", 0, "utf-8"
        else:
            encoding = self._dialect.encoding
            if marks is not None:
                stream = cast(BinaryIO, Marked(stream, marks))
        read = csv.ReadOptions(
            column_names=keys, skip_rows=height, encoding=encoding, block_size=_BLOCK
        )
        return stream, read, csv.ParseOptions(delimiter=separator, newlines_in_values=True)

    def _conversion(self, types: dict[str, Any], include: Sequence[str] | None = None) -> Any:
        from pyarrow import csv

        true, false = truths()
        return csv.ConvertOptions(
            column_types=types,
            include_columns=include,
            null_values=null_values(self._dialect),
            true_values=true,
            false_values=false,
            decimal_point=self._dialect.decimal,
        )

    def _parsed(self) -> Any:
        """All columns: as text, or as what the first rows hold where that suits all rows."""
        import pyarrow as pa

        marks = Marks()
        stream, read, parse = self._source(marks)
        with stream:
            data = stream.read()
        texts = {key: pa.string() for key in read.column_names}
        if b'"' not in data:
            parse.newlines_in_values = False  # blocks can then be parsed at once
        found = self._typed(data, read, parse, texts)
        self._check_quotes(marks, len(found))
        return found

    def _check_quotes(self, marks: Marks, rows: int) -> None:
        """Look at the quotes of a file that has more lines than rows, or an odd number of quotes.

        Args:
            marks: its marks; none of a file that was cleaned, and looked at then.
            rows: how many were found in it.
        """
        if not marks.quotes:
            return
        separator, _, _, height = self._header()
        if marks.quotes % 2 or rows + height < marks.lines:
            with self._opened() as stream:
                check_quotes(stream, self._dialect, separator)

    def _typed(self, data: bytes, read: Any, parse: Any, texts: dict[str, Any]) -> Any:
        import pyarrow as pa
        from pyarrow import csv

        if not has_leading_zeros(data, parse.delimiter):
            end = bytes(data[:_HEAD]).rfind(b"\n") + 1 if len(data) > _HEAD else 0
            if end and data[:end].count(b'"') % 2 == 0:
                head = csv.read_csv(_buffer(data[:end]), read, parse, self._conversion(texts))
                kinds = [kind_of_text(c, self._dialect) for c in head.columns]
                types = dict(zip(texts, map(guessed, kinds), strict=True))
                try:
                    return csv.read_csv(_buffer(data), read, parse, self._conversion(types))
                except pa.ArrowInvalid:
                    pass  # a later row is of another kind, or broken, which the next line tells
        return csv.read_csv(_buffer(data), read, parse, self._conversion(texts))

    def read(self) -> pd.DataFrame:
        """The whole table."""
        table = self._parsed()
        kinds = [joint_kind([kind_of_text(c, self._dialect)]) for c in table.columns]
        return self._framed(table, kinds, self.names())

    def chunks(
        self, rows: int, positions: Sequence[int], columns: Sequence[str]
    ) -> Iterator[pd.DataFrame]:
        """Columns at some positions, under these names, so many rows at a time."""
        kinds = self._kinds(positions)
        for table in self._batches(rows, positions, None):
            yield self._framed(table, kinds, columns)

    def _batches(self, rows: int, positions: Sequence[int], marks: Marks | None) -> Iterator[Any]:
        import pyarrow as pa
        from pyarrow import csv

        stream, read, parse = self._source(marks)
        with stream:
            include = [str(i) for i in positions]
            conversion = self._conversion(dict.fromkeys(include, pa.string()), include)
            yield from regrouped(csv.open_csv(stream, read, parse, conversion), rows)

    def _kinds(self, positions: Sequence[int]) -> list[str]:
        """The kind of each column, from all rows; remembered, as the file is read twice."""
        known = self._known
        missing = [position for position in positions if position not in known]
        if missing:
            found: list[set[str]] = [set() for _ in missing]
            rows, marks = 0, None if known else Marks()
            for table in self._batches(200_000, missing, marks):
                rows += len(table)
                for kinds, column in zip(found, table.columns, strict=True):
                    kinds.add(kind_of_text(column, self._dialect))
            if marks is not None:
                self._check_quotes(marks, rows)
            known.update(zip(missing, map(joint_kind, found), strict=True))
        return [known[position] for position in positions]

    def _framed(self, table: Any, kinds: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
        import pyarrow as pa

        columns = [typed(c, k, self._dialect) for c, k in zip(table.columns, kinds, strict=True)]
        keys = [str(i) for i in range(len(columns))]
        found = frame_of(pa.table(dict(zip(keys, columns, strict=True))))
        found.columns = list(names)
        return found


def _buffer(data: Any) -> Any:
    import pyarrow as pa

    return pa.BufferReader(data)
