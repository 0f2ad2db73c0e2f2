"""Text of users on a screen: shown as it is written, and never obeyed."""

from __future__ import annotations

import re
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console

__all__ = ["plain_console", "show_share", "status", "visible"]

#: What a terminal obeys (escapes, line ends) or turns around (directions of writing).
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    r"""Text whose control characters are spelled out, such as ``\x1b`` for an escape.

    >>> visible("a\x1b[31m b\n")
    'a\\x1b[31m b\\n'
    """
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], str(text))


def plain_console(**options: Any) -> Console:
    """A rich console for which brackets and colons are characters, not markup or pictures.

    In Jupyter, too, it writes to its stream: rich would display the text in the notebook instead.
    """
    return Console(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)


def status(text: str, is_shown: bool = True) -> AbstractContextManager[object]:
    """A line on the terminal for as long as a block runs; nothing where there is no terminal."""
    if is_shown and sys.stderr.isatty():
        return plain_console(stderr=True).status(text)
    return nullcontext()


def show_share(what: str, share: float) -> None:
    """A line on stderr that says how much of something is done; on a terminal each is written over the
    one before."""
    is_over = not sys.stderr.isatty()
    start, end = ("", "\n") if is_over else ("\r", "\n" if share >= 1 else "")
    print(f"{start}{what}: {share:.0%} done", end=end, file=sys.stderr, flush=True)
