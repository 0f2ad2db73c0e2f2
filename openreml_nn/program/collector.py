"""The garbage collector, which rests during the start of the program.

Importing leaves no garbage, and what is imported stays until the end. The collector would go
through all of it again and again: a quarter of the time of a small fit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

__all__ = ["resting"]


def resting() -> Callable[[], None]:
    """Let the garbage collector rest.

    Returns:
        What ends the rest and has the collector leave aside what is there by then; it leaves a collector
        alone that rested before.
    """
    if not gc.isenabled():
        return lambda: None
    gc.disable()

    def wake() -> None:
        if not gc.isenabled():
            gc.freeze()
            gc.enable()

    return wake
