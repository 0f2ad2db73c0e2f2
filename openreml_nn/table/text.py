"""Delimited text as it comes: its dialect, its records, and what kind of values a column holds.

The kind of a column is settled by all its values, so that a chunk of a file has the types of the
whole. Numbers are rounded correctly, whole numbers are exact to 64 bits, and digits with a leading
zero stay text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = [
    "Dialect",
    "Marked",
    "Marks",
    "check_quotes",
    "cleaned",
    "has_leading_zeros",
    "header_of",
    "joint_kind",
    "kind_of_text",
    "typed",
]

#: What is always a missing value, as in R; more by the option ``missing``.
MISSING = ("", "NA")
#: What is one where all other values of the column are numbers; among text these are labels.
AMONG_NUMBERS = ("N/A", "n/a", "#N/A", "null", "NULL", "None", "none", "NaN", "nan", "<NA>")
_TRUE, _FALSE = ("True", "TRUE", "true"), ("False", "FALSE", "false")
#: So many values are looked at before all are.
_FIRST = 1000
_ESCAPED = r"^'('*[=+\-@\t])"


@dataclass(frozen=True)
class Dialect:
    """How a file of delimited text is written.

    Attributes:
        separator: between fields; None goes by the name of the file, and blanks are any number.
        decimal: mark of decimals, ``.`` or ``,``.
        encoding: such as ``utf-8`` or ``latin-1``.
        missing: what stands for a missing value besides an empty field and ``NA``.
        comment: what begins a comment, up to the end of the line; None for none.
    """

    separator: str | None = None
    decimal: str = "."
    encoding: str = "utf-8"
    missing: tuple[str, ...] = ()
    comment: str | None = None


def header_of(stream: BinaryIO, dialect: Dialect) -> tuple[str, list[str], int, int]:
    """Look at the first records.

    Returns:
        The separator, the names in the header, the fields of the first row, and the lines of the
        header.
    """
    lines = _uncommented(_decoded(stream, dialect), dialect.comment)
    first = next((line for line in lines if line.strip()), "")
    separator = dialect.separator
    if separator is None:
        separator = "\t" if "\t" in first else " "
    records = csv.reader(_chain(first, lines), **_style(separator))
    names = next(records, [])
    height = records.line_num
    row = next((record for record in records if record), [])
    return separator, _trimmed(names, separator), len(_trimmed(row, separator)), height


def cleaned(stream: BinaryIO, dialect: Dialect, separator: str, named: bool) -> BinaryIO:
    """The rows as plain CSV in UTF-8, without header, comments and names of rows.

    Args:
        stream: the file.
        dialect: how it is written.
        separator: between fields.
        named: whether each row begins with its name, which the header lacks.
    """

    def records() -> Iterator[bytes]:
        lines = _uncommented(_decoded(stream, dialect), dialect.comment)
        found = _records((line for line in lines if line.strip()), separator)
        next(found, None)
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        for record in found:
            record = _trimmed(record, separator)
            writer.writerow(record[1:] if named else record)
            if buffer.tell() > 1 << 16:
                yield buffer.getvalue().encode()
                buffer.seek(0)
                buffer.truncate()
        yield buffer.getvalue().encode()

    return io.BufferedReader(_Pieces(records()), 1 << 16)


def check_quotes(stream: BinaryIO, dialect: Dialect, separator: str) -> None:
    """Refuse text of which a stray quote has joined rows.

    Args:
        stream: the file, from its beginning.
        dialect: how it is written.
        separator: between fields.

    Raises:
        ValueError: if a quote is not closed, or something else than a separator follows it.
    """
    for _ in _records(_decoded(stream, dialect), separator):
        pass


def _records(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    found, row = csv.reader(lines, strict=True, **_style(separator)), 0
    while True:
        try:
            record = next(found, None)
        except csv.Error as error:
            raise ValueError(f"the quotes of row {row} do not enclose a field: {error}") from None
        if record is None:
            return
        row += bool(record)
        yield record


@dataclass
class Marks:
    """Numbers of marks in the bytes of a text, which tell whether a quote joins rows.

    Attributes:
        quotes: number of double quotes.
        ends: number of ends of lines.
        last: the last byte, empty before any is read.
    """

    quotes: int = 0
    ends: int = 0
    last: bytes = b""

    @property
    def lines(self) -> int:
        """Number of lines; the last one needs no end."""
        return self.ends + (self.last not in (b"", b"\n", b"\r"))


class Marked(io.RawIOBase):
    """A stream of bytes whose marks are counted as it is read.

    Args:
        stream: stands at its beginning.
        marks: numbers to which those of each block are added.
    """

    def __init__(self, stream: BinaryIO, marks: Marks) -> None:
        self._stream, self._marks = stream, marks

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read() if size < 0 else self._stream.read(size)
        self._marks.quotes += block.count(b'"')
        self._marks.ends += max(block.count(b"\n"), block.count(b"\r"))
        self._marks.last = block[-1:] or self._marks.last
        return block

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


def _decoded(stream: BinaryIO, dialect: Dialect) -> Iterable[str]:
    encoding = "utf-8-sig" if dialect.encoding.lower() in ("utf-8", "utf8") else dialect.encoding
    return io.TextIOWrapper(stream, encoding=encoding, newline="")


def _uncommented(lines: Iterable[str], comment: str | None) -> Iterator[str]:
    """Lines without what follows a mark of comment that stands outside of quotes."""
    for line in lines:
        if comment is not None and comment in line:
            at = line.find(comment)
            while at >= 0 and line.count('"', 0, at) % 2:
                at = line.find(comment, at + 1)
            if at >= 0:
                line = line[:at].rstrip() + "\n"
                if not line.strip():
                    continue
        yield line


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _style(separator: str) -> dict[str, Any]:
    return {"delimiter": separator, "skipinitialspace": separator == " "}


def _trimmed(record: list[str], separator: str) -> list[str]:
    """Fields without the empty ones that blanks at the ends of a line make."""
    if separator == " ":
        return [field.rstrip() for field in record if field.strip()]
    return record


# ---------------------------------------------------------------------- kinds


def kind_of_text(column: pa.ChunkedArray, dialect: Dialect) -> str:
    """What a column of text holds: ``none``, ``int``, ``big`` (whole numbers beyond 64 bits),
    ``float``, ``bool`` or ``text``."""
    if column.type != pa.string():
        return {"int64": "int", "double": "float", "bool": "bool"}[str(column.type)]
    if len(column) > _FIRST and kind_of_text(column.slice(0, _FIRST), dialect) == "text":
        return "text"  # whatever comes later
    values = _without(column, (*MISSING, *dialect.missing))
    if values.null_count == len(values):
        return "none"
    if _cast(values, pa.int64()) is not None:
        return "text" if _has_leading_zero(values) else "int"
    if _is_number(values, dialect) or _is_number(values := _number_like(values), dialect):
        if values.null_count == len(values):
            return "none"
        if _has_leading_zero(values):
            return "text"
        mark = r"[^\d\s+-]"
        if _any(values.slice(0, _FIRST), mark) or _any(values, mark):
            return "float"
        return "big" if _cast(_number_like(values), pa.int64()) is None else "int"
    distinct = set(pc.unique(values).drop_null().to_pylist())
    return "bool" if distinct <= {*_TRUE, *_FALSE} else "text"


def joint_kind(kinds: Iterable[str]) -> str:
    """The kind of a column from those of its chunks."""
    found = set(kinds) - {"none"}
    if len(found) <= 1:
        return next(iter(found), "none").replace("big", "text")
    if found <= {"int", "float", "big"}:
        return "float" if "float" in found else "text"
    return "text"


def typed(column: pa.ChunkedArray, kind: str, dialect: Dialect) -> pa.ChunkedArray:
    """The values of a column of text as a column of its kind."""
    if column.type != pa.string():
        return column  # read as its kind at once
    values = _without(column, (*MISSING, *dialect.missing))
    if kind in ("int", "float", "none"):
        target = pa.int64() if kind == "int" else pa.float64()
        found = _cast(_pointed(values, dialect), target)
        if found is None:
            found = _cast(_pointed(_number_like(values), dialect), target)
        assert found is not None  # the kind was settled by all values
        return found
    if kind == "bool":
        true = pc.is_in(values, value_set=pa.array(_TRUE))
        return pc.if_else(pc.is_null(values), pa.scalar(None, pa.bool_()), true)
    if pc.any(pc.starts_with(values, "'")).as_py():
        return pc.replace_substring_regex(values, _ESCAPED, r"\1")
    return values


def guessed(kind: str) -> pa.DataType:
    """The type that a column of this kind is read as at once, without its text."""
    return {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}.get(kind, pa.string())


def null_values(dialect: Dialect) -> list[str]:
    """What stands for a missing value in a column of numbers or booleans."""
    return [*MISSING, *AMONG_NUMBERS, *dialect.missing]


def truths() -> tuple[list[str], list[str]]:
    """How true and false are written."""
    return list(_TRUE), list(_FALSE)


def has_leading_zeros(data: Any, separator: str) -> bool:
    """Whether some field may be digits with a leading zero, which are no number."""
    block = 1 << 20
    for start in range(0, len(data), block):
        # One byte of the last block and one of the next belong to it.
        found = np.frombuffer(data, np.uint8)[max(start - 1, 0) : start + block + 1]
        # A separator, or what ends a line or opens a quote: all of these are below '#'.
        opens = (found[:-2] == ord(separator)) | (found[:-2] < ord("#"))
        if (opens & (found[1:-1] == ord("0")) & (found[2:] - ord("0") < 10)).any():
            return True
    return False


def _without(column: pa.ChunkedArray, missing: Sequence[str]) -> pa.ChunkedArray:
    found = pc.is_in(column, value_set=pa.array(missing, column.type))
    if not pc.any(found).as_py():
        return column
    return pc.if_else(found, pa.scalar(None, column.type), column)


def _number_like(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without blanks and plus signs, and without what is missing among numbers."""
    trimmed = pc.replace_substring_regex(pc.utf8_trim_whitespace(values), r"^\+([\d.])", r"\1")
    return _without(trimmed, (*MISSING, *AMONG_NUMBERS))


def _pointed(values: pa.ChunkedArray, dialect: Dialect) -> pa.ChunkedArray:
    return values if dialect.decimal == "." else pc.replace_substring(values, dialect.decimal, ".")


def _has_leading_zero(values: pa.ChunkedArray) -> bool:
    """Whether a value is digits with a leading zero."""
    may = pc.or_(
        pc.starts_with(values, "0"), pc.less_equal(values, "!")
    )  # a blank comes before '!'
    return bool(pc.any(may).as_py()) and _any(values.filter(may), r"^\s*0\d")


def _is_number(values: pa.ChunkedArray, dialect: Dialect) -> bool:
    """Whether all values are numbers; a point is none of thousands, nor a decimal comma."""
    if dialect.decimal != "." and pc.any(pc.match_substring(values, ".")).as_py():
        return False
    return _cast(_pointed(values, dialect), pa.float64()) is not None


def _cast(values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray | None:
    try:
        return pc.cast(values, target)
    except pa.ArrowInvalid:
        return None


def _any(values: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(values, pattern)).as_py())
