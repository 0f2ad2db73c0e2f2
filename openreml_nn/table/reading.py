"""Tables in files: whole or in chunks, one file or a folder of them, here or at a URI."""

from __future__ import annotations

import io
import lzma
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pandas as pd

from openreml_nn.support.checks import check_table
from openreml_nn.support.errors import InputError
from openreml_nn.table.columns import no_column
from openreml_nn.table.frames import frame_of, regrouped
from openreml_nn.table.parsing import TextTable
from openreml_nn.table.text import Dialect

__all__ = ["GivenTable", "TableFile", "given_table", "read_table"]

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": None}
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".xz", ".zip")


def read_table(
    path: str | os.PathLike[str],
    *,
    separator: str | None = None,
    decimal: str = ".",
    encoding: str = "utf-8",
    missing: Sequence[str] = (),
    comment: str | None = None,
) -> pd.DataFrame:
    """Read a table by the suffix of its name.

    Files are CSV, tab-separated (``.tsv``) or text with tabs or blanks (``.txt``), also compressed,
    or Parquet; a folder of Parquet files is one table, and a URI may stand for any of them. Empty
    fields and ``NA`` are missing values. In text, digits with a leading zero are kept as they are,
    and whole numbers are exact to 64 bits.

    Args:
        path: of a file or folder, or a URI that pyarrow's file systems know.
        separator: between the fields of text.
        decimal: mark of decimals in text.
        encoding: of text.
        missing: what else stands for a missing value in text.
        comment: what begins a comment in text.

    Raises:
        InputError: if the file is missing, of another kind, empty or broken, or an option is wrong.
    """
    options = {"separator": separator, "decimal": decimal, "encoding": encoding}
    return TableFile(path, **options, missing=missing, comment=comment).read()  # type: ignore[arg-type]


class GivenTable(NamedTuple):
    """A table in memory.

    Attributes:
        frame: its rows.
        source: what messages call it.
        dialect: how the text of its file is written; None for what was in memory.
    """

    frame: pd.DataFrame
    source: str
    dialect: Dialect | None


def given_table(
    table: pd.DataFrame | str | os.PathLike[str] | TableFile, dialect: Dialect | None = None
) -> GivenTable:
    """A table that was given, in memory.

    Args:
        table: a data frame, the path or URI of a file, or a :class:`TableFile`.
        dialect: how the text of a file is written of which no more than the path is given.

    Raises:
        TypeError: if it is something else.
        InputError: as :func:`read_table`.
    """
    check_table("table", table)
    if isinstance(table, pd.DataFrame):
        return GivenTable(table, "the table", None)
    file = table if isinstance(table, TableFile) else TableFile(table)
    if file is not table and dialect is not None and file.is_text:
        file = TableFile(table, **vars(dialect))
    return GivenTable(file.read(), f"file {str(file)!r}", file.dialect)


class TableFile(os.PathLike[str]):
    """The path of a table together with how it is to be read; see :func:`read_table`.

    Attributes:
        dialect: how its text is written, as it was given.
        is_text: whether it is text.

    Raises:
        InputError: if there is no such file, or an option is wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        separator: str | None = None,
        decimal: str = ".",
        encoding: str = "utf-8",
        missing: Sequence[str] = (),
        comment: str | None = None,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"`path` is a {type(path).__name__}: expected a path or URI")
        self._path = os.fspath(path)
        self._remote = "://" in self._path
        self._folder = False
        self._check_place()
        suffixes = [s.lower() for s in Path(self._path).suffixes]
        compressed = suffixes[-1:] and suffixes[-1] in _COMPRESSED
        self._suffix = (suffixes[:-1] if compressed else suffixes)[-1:] or [""]
        kinds = (".parquet", *_SEPARATORS)
        self.is_text = self._suffix[0] in _SEPARATORS and not self._folder
        if self._suffix[0] not in kinds and not (self._folder or self._remote):
            raise InputError(
                f"file {self._path!r}: expected a name ending in .csv, .csv.gz or .parquet"
            )
        missing = (missing,) if isinstance(missing, str) else tuple(map(str, missing or ()))
        self.dialect = Dialect(separator, decimal, encoding, missing, comment)
        dialect = self._checked(self.dialect)
        self._text = TextTable(self._open, dialect, self._suffix[0] != ".csv")

    def __str__(self) -> str:
        return self._path

    def __fspath__(self) -> str:
        return self._path

    def _check_place(self) -> None:
        if self._remote:
            return
        place = Path(self._path)
        self._folder = place.is_dir()
        if self._folder and not any(place.rglob("*.parquet")):
            raise InputError(f"file {self._path!r} is a directory: expected Parquet files in it")
        if not place.exists():
            raise InputError(f"file {self._path!r} does not exist: expected a CSV or Parquet file")

    def _checked(self, given: Dialect) -> Dialect:
        if not self.is_text and given != Dialect():
            raise InputError(f"file {self._path!r} is no text: it takes no options of CSV")
        if given.separator is not None and len(given.separator) != 1:
            raise InputError(f"`separator` is {given.separator!r}: expected one character")
        if given.decimal not in (".", ","):
            raise InputError(f"`decimal` is {given.decimal!r}: expected '.' or ','")
        if given.comment is not None and not given.comment:
            raise InputError("`comment` is empty: expected a mark such as '#'")
        try:
            "".encode(given.encoding)
        except (LookupError, TypeError):
            raise InputError(
                f"`encoding` is {given.encoding!r}: expected 'utf-8' or 'latin-1'"
            ) from None
        separator = given.separator or _SEPARATORS.get(self._suffix[0])
        return Dialect(separator, given.decimal, given.encoding, given.missing, given.comment)

    # ------------------------------------------------------------------ reading

    def columns(self) -> list[str]:
        """The names of the columns.

        Raises:
            InputError: if the file is broken.
        """
        with self._told():
            return self._text.names() if self.is_text else list(self._dataset().schema.names)

    def read(self) -> pd.DataFrame:
        """The whole table.

        Raises:
            InputError: if the file is broken or has no rows.
        """
        with self._told():
            found = self._text.read() if self.is_text else frame_of(self._dataset().to_table())
        if not len(found) or not len(found.columns):
            raise InputError(f"file {self._path!r} has no rows")
        return found

    def chunks(self, rows: int, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        """Some columns, so many rows at a time, whose index counts the rows of the whole file; in text
        the types of all chunks are the same.

        Raises:
            InputError: if the file is broken or lacks a column.
        """
        names = self.columns()
        if not names:
            raise InputError(f"file {self._path!r} has no rows")
        for column in columns:
            if column not in names:
                raise no_column(f"file {self._path!r}", column, names)
            if names.count(column) > 1:
                raise InputError(
                    f"file {self._path!r} has {names.count(column)} columns {column!r}: expected "
                    "one of each name"
                )
        start = 0
        with self._told():
            for chunk in self._chunks(rows, columns, names):
                if isinstance(chunk.index, pd.RangeIndex):
                    chunk.index = pd.RangeIndex(start, start + len(chunk))
                start += len(chunk)
                yield chunk

    def _chunks(
        self, rows: int, columns: Sequence[str], names: Sequence[str]
    ) -> Iterator[pd.DataFrame]:
        if self.is_text:
            return self._text.chunks(rows, [names.index(c) for c in columns], columns)
        batches = self._dataset().to_batches(columns=list(columns), batch_size=rows)
        return map(frame_of, regrouped(batches, rows))

    def count(self) -> int | None:
        """The number of rows, where the file says it."""
        with self._told():
            return None if self.is_text else int(self._dataset().count_rows())

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an error of reading into one that names the file."""
        import pyarrow as pa

        try:
            yield
        except InputError:
            raise
        except UnicodeDecodeError as error:
            raise self._broken(
                f"{error.reason}; is it of another `encoding` (data.encoding), such as latin-1?"
            ) from None
        except (OSError, ValueError, KeyError, EOFError, pa.ArrowException) as error:
            raise self._broken(str(error)) from None
        except (zipfile.BadZipFile, lzma.LZMAError) as error:
            raise self._broken(str(error)) from None

    def _broken(self, reason: str) -> InputError:
        first = (reason.splitlines() or ["it is broken"])[0]
        if "Expected 1 columns" in first:
            first += (
                "; does it have another `separator` (data.separator), or a `comment` "
                "(data.comment) before the header?"
            )
        if "invalid UTF8" in first:
            first += "; is it of another `encoding` (data.encoding), such as latin-1?"
        return InputError(f"file {self._path!r} cannot be read: {first}")

    # ------------------------------------------------------------------ Parquet

    def _dataset(self) -> Any:
        import pyarrow.dataset

        options = {"partitioning": "hive"} if self._folder or self._remote else {}
        return pyarrow.dataset.dataset(self._path, format="parquet", **options)

    def _open(self) -> BinaryIO:
        import pyarrow as pa
        from pyarrow import fs

        if self._path.lower().endswith(".xz"):
            return lzma.open(self._path)  # type: ignore[return-value]
        if self._path.lower().endswith(".zip"):
            archive = zipfile.ZipFile(self._path)
            return io.BytesIO(archive.read(archive.namelist()[0]))
        if self._remote:
            system, place = fs.FileSystem.from_uri(self._path)
            return system.open_input_stream(place)
        return pa.input_stream(self._path, compression="detect")
