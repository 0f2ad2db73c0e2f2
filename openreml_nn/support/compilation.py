"""Functions over arrays that are compiled when they are first called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function, compiled by numba; what is compiled is kept on disk for the next process.

    Where no folder can be written to it is compiled in each process anew.
    """
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # there is no place to keep it
        return njit(function)
