"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openreml_nn.support.errors import InputError

__all__ = ["check_writable", "is_temporary", "replacing", "write_text"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block ends without an error."""
    target = Path(path)
    # The suffix stays last, because writers of images go by it.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path at which there can be no file, before anything is computed for it.

    Args:
        name: of the argument.
        path: of the file.

    Raises:
        InputError: if it is a folder, or its folder is missing or takes no files.
    """
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise InputError(f"`{name}` is {str(target)!r}, a folder: expected the name of a file")
    if not folder.is_dir():
        raise InputError(f"`{name}` is {str(target)!r}: the folder {str(folder)!r} does not exist")
    if not os.access(folder, os.W_OK):
        raise InputError(f"`{name}` is {str(target)!r}: no file can be written to its folder")


def is_temporary(path: Path) -> bool:
    """Whether a file has a name of :func:`replacing`, left by a process that was killed."""
    return bool(re.fullmatch(r"\..+\.\d+(\.\w+)?", path.name)) and path.is_file()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
