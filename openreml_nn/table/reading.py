"""Tables in files: whole or in chunks, one file or a folder of them, here or at a URI."""

from __future__ import annotations

import io
import lzma
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from openreml_nn.support.errors import InputError
from openreml_nn.table.frames import frame_of, regrouped
from openreml_nn.table.text import (
    Dialect,
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

__all__ = ["TableFile", "read_table"]

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": None}
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".xz", ".zip")
#: Bytes that are parsed at a time.
_BLOCK = 1 << 20
#: Bytes of the first rows, by which the types of columns are guessed.
_HEAD = 1 << 17


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


class TableFile(os.PathLike[str]):
    """The path of a table together with how it is to be read; see :func:`read_table`.

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
        self._is_text = self._suffix[0] in _SEPARATORS and not self._folder
        if self._suffix[0] not in kinds and not (self._folder or self._remote):
            raise InputError(
                f"file {self._path!r}: expected a name ending in .csv, .csv.gz or .parquet"
            )
        missing = (missing,) if isinstance(missing, str) else tuple(map(str, missing or ()))
        self._dialect = self._checked(Dialect(separator, decimal, encoding, missing, comment))

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
        if not self._is_text and given != Dialect():
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
            return self._text_names() if self._is_text else list(self._dataset().schema.names)

    def read(self) -> pd.DataFrame:
        """The whole table.

        Raises:
            InputError: if the file is broken or has no rows.
        """
        with self._told():
            if self._is_text:
                table = self._parsed()
                kinds = [joint_kind([kind_of_text(c, self._dialect)]) for c in table.columns]
                found = self._framed(table, kinds, self._text_names())
            else:
                found = frame_of(self._dataset().to_table())
        if not len(found) or not len(found.columns):
            raise InputError(f"file {self._path!r} has no rows")
        return found

    def chunks(self, rows: int, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        """Some columns, so many rows at a time; in text the types of all chunks are the same.

        Raises:
            InputError: if the file is broken or lacks a column.
        """
        names = self.columns()
        for column in columns:
            if column not in names:
                near = ", ".join(names[:20])
                raise InputError(
                    f"file {self._path!r} has no column {column!r}: its columns are {near}"
                )
            if names.count(column) > 1:
                raise InputError(
                    f"file {self._path!r} has {names.count(column)} columns {column!r}: expected "
                    "one of each name"
                )
        with self._told():
            if self._is_text:
                yield from self._text_chunks(rows, [names.index(c) for c in columns], columns)
                return
            dataset = self._dataset()
            for batch in regrouped(
                dataset.to_batches(columns=list(columns), batch_size=rows), rows
            ):
                yield frame_of(batch)

    def count(self) -> int | None:
        """The number of rows, where the file says it."""
        with self._told():
            return None if self._is_text else int(self._dataset().count_rows())

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
                f"{error.reason}; is it of another `encoding`, such as latin-1?"
            ) from None
        except (OSError, ValueError, KeyError, EOFError, pa.ArrowException) as error:
            raise self._broken(str(error)) from None
        except (zipfile.BadZipFile, lzma.LZMAError) as error:
            raise self._broken(str(error)) from None

    def _broken(self, reason: str) -> InputError:
        first = (reason.splitlines() or ["it is broken"])[0]
        if "Expected 1 columns" in first:
            first += "; has it another `separator`, or a `comment` before the header?"
        if "invalid UTF8" in first:
            first += "; is it of another `encoding`, such as latin-1?"
        return InputError(f"file {self._path!r} cannot be read: {first}")

    # ------------------------------------------------------------------ Parquet

    def _dataset(self) -> Any:
        import pyarrow.dataset

        options = {"partitioning": "hive"} if self._folder or self._remote else {}
        return pyarrow.dataset.dataset(self._path, format="parquet", **options)

    # ------------------------------------------------------------------ text

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

    def _header(self) -> tuple[str, list[str], int, int]:
        with self._open() as stream:
            return header_of(stream, self._dialect)

    def _text_names(self) -> list[str]:
        names = [name.strip() for name in self._header()[1]]
        unescape = [
            n[1:] if n.startswith("'") and n.lstrip("'")[:1] in [*"=+-@\t"] else n for n in names
        ]
        return [name or f"Unnamed: {i}" for i, name in enumerate(unescape)]

    def _source(self) -> tuple[BinaryIO, Any, Any]:
        """The rows, with how they are to be read and parsed."""
        from pyarrow import csv

        separator, names, fields, height = self._header()
        keys = [str(i) for i in range(len(names))]
        stream = self._open()
        # R's write.table gives rows names for which the header has no field.
        named = self._suffix[0] != ".csv" and fields == len(names) + 1
        if separator == " " or self._dialect.comment is not None or named:
            stream = cleaned(stream, self._dialect, separator, named)
            separator, height, encoding = ",", 0, "utf-8"
        else:
            encoding = self._dialect.encoding
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
        from pyarrow import csv

        stream, read, parse = self._source()
        with stream:
            data = stream.read()
        texts = {key: pa.string() for key in read.column_names}
        if b'"' not in data:
            parse.newlines_in_values = False  # blocks can then be parsed at once
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

    def _text_chunks(
        self, rows: int, positions: Sequence[int], columns: Sequence[str]
    ) -> Iterator[pd.DataFrame]:
        kinds = self._kinds(positions)
        for table in self._batches(rows, positions):
            yield self._framed(table, kinds, columns)

    def _batches(self, rows: int, positions: Sequence[int]) -> Iterator[Any]:
        import pyarrow as pa
        from pyarrow import csv

        stream, read, parse = self._source()
        with stream:
            include = [str(i) for i in positions]
            conversion = self._conversion(dict.fromkeys(include, pa.string()), include)
            yield from regrouped(csv.open_csv(stream, read, parse, conversion), rows)

    def _kinds(self, positions: Sequence[int]) -> list[str]:
        """The kind of each column, from all rows; remembered, as the file is read twice."""
        known: dict[int, str] = self.__dict__.setdefault("_known", {})
        missing = [position for position in positions if position not in known]
        if missing:
            found: list[set[str]] = [set() for _ in missing]
            for table in self._batches(200_000, missing):
                for kinds, column in zip(found, table.columns, strict=True):
                    kinds.add(kind_of_text(column, self._dialect))
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
