"""What a fault is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Fault"]

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """A fault that could be made.

    Attributes:
        name: what is wrong, in a few words.
        file: path from the root of the project.
        old, new: the text that stands there, once, and what takes its place.
        tests: arguments of pytest, separated as in a shell.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    def planted(self, root: Path) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: if the old text does not stand there exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the old text stands {count} times in {self.file}")
        return text.replace(self.old, self.new)
