"""Memory of factors that serves again: to be given new memory takes as long as a part of a
factorisation."""

from __future__ import annotations

import numpy as np

__all__ = ["Pool"]


class Pool:
    """Memory for arrays of one size, each of which goes back when nobody holds it any more.

    Args:
        size: of an array.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """(size,) numbers, whatever they are."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._size)
        return np.asarray(_Lease(memory, self._free))

    def __reduce__(self) -> tuple[type[Pool], tuple[int]]:
        # A copy has nothing to give yet.
        return Pool, (self._size,)


class _Lease:
    """Memory that goes back when the last array over it is gone.

    Args:
        memory: an array.
        back: where it goes.
    """

    def __init__(self, memory: np.ndarray, back: list[np.ndarray]) -> None:
        self._memory, self._back = memory, back
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._back.append(self._memory)
