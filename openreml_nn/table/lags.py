"""Times as whole numbers whose differences are lags."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from openreml_nn.support.errors import InputError

__all__ = ["LONGEST", "check_lags", "whole_lags"]

#: Whole times may span so many units; a correlation matrix has a row for each.
LONGEST = 5000


def whole_lags(
    times: np.ndarray,
    what: str,
    where: Callable[[int], str],
    longest: int = LONGEST,
) -> np.ndarray:
    """Whole times counted from the first, in the largest unit that all lags are multiples of.

    Lags are differences of times, not of ranks. In a smaller unit the sign of a correlation whose
    lags are all even could not be told.

    Args:
        times: (n,).
        what: the times in messages.
        where: names the place of a time in messages.
        longest: how many lags they may span.

    Raises:
        InputError: if a time is no whole number, or they span too many units.
    """
    bad = np.flatnonzero(times != np.round(times))
    if len(bad):
        raise InputError(
            f"{what} is {times[bad[0]]:g} in {where(int(bad[0]))}: expected whole numbers, the "
            "differences of which are the lags; car1() takes any times"
        )
    far = np.flatnonzero(np.abs(times) > 2.0**53)
    if len(far):
        raise InputError(
            f"{what} is {times[far[0]]:g} in {where(int(far[0]))}: expected times below 2^53"
        )
    whole = times.astype(np.int64)
    first, last = int(whole.min()), int(whole.max())
    unit = int(np.gcd.reduce(np.diff(np.unique(whole)), initial=0)) or 1
    if (last - first) // unit >= longest:
        raise InputError(
            f"{what} spans {(last - first) // unit} lags: expected at most {longest}, of longer "
            "units"
        )
    return (whole - first) // unit


def check_lags(places: np.ndarray, what: str) -> None:
    """Raise unless every lag up to the longest occurs, each of which has a parameter."""
    distinct = np.unique(places)
    apart = np.abs(distinct[:, None] - distinct)
    lacking = np.setdiff1d(np.arange(distinct[-1] + 1), apart)
    if len(lacking):
        raise InputError(
            f"{what} has gaps, so that no two are {lacking[0]} apart: toep() has a correlation for "
            "each lag, expected ar1() or us()"
        )
