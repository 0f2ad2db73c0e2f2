"""The garbage collector, which rests during the start of the program.

Importing leaves no garbage, and what is imported stays until the end. The collector would go
through all of it again and again: a quarter of the time of a small fit.
"""

from __future__ import annotations

import gc

__all__ = ["started", "starting"]


def starting() -> None:
    """Let the garbage collector rest until :func:`started`."""
    gc.disable()


def started() -> None:
    """Wake the garbage collector if it rests, and have it leave aside what is there by now."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
