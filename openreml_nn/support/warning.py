"""Warnings that point to the user's line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn"]

#: Packages through which a call goes on its way from the user to the place that warns.
_PASSED = frozenset(
    {__name__.partition(".")[0], "torch", "lightning", "sklearn", "contextlib", "functools"}
)


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn, with the line that called the package as the place: the nearest frame that is neither of
    this package nor of one that calls it back."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
