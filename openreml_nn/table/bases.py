"""Bases of columns: contrasts of factors, orthogonal polynomials, splines, as R makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = [
    "CONTRASTS",
    "b_spline",
    "contrast_matrix",
    "even_breaks",
    "intervals",
    "legendre",
    "natural_spline",
    "penalised_spline",
    "polynomial",
]


# ---------------------------------------------------------------------- contrasts


def _treatment(levels: Sequence[str], base: Any = None) -> tuple[np.ndarray, list[str]]:
    at = 0
    if isinstance(base, str):
        if base not in levels:
            raise ValueError(f"base {base!r} is no level: expected one of {list(levels)[:10]}")
        at = list(levels).index(base)
    elif base is not None:
        at = int(base) - 1 if 1 <= base <= len(levels) else -1
        if at < 0:
            raise ValueError(f"base {base:g}: expected 1 to {len(levels)}")
    keep = [i for i in range(len(levels)) if i != at]
    return np.eye(len(levels))[:, keep], [levels[i] for i in keep]


def _sum(levels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    q = len(levels)
    return np.vstack([np.eye(q - 1), -np.ones((1, q - 1))]), _counted(q)


def _helmert(levels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    i, j = np.indices((len(levels), len(levels) - 1))
    return np.where(i <= j, -1.0, np.where(i == j + 1, j + 1.0, 0.0)), _counted(len(levels))


def _polynomial_contrasts(levels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    q = len(levels)
    names = [{1: ".L", 2: ".Q", 3: ".C"}.get(j, f"^{j}") for j in range(1, q)]
    return polynomial(np.arange(1.0, q + 1), {}, q - 1), names


def _successive(levels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    q = len(levels)
    i, j = np.indices((q, q - 1))
    names = [f"{b}-{a}" for a, b in pairwise(levels)]
    return np.where(i <= j, j + 1.0 - q, j + 1.0) / q, names


def _counted(q: int) -> list[str]:
    return [str(j) for j in range(1, q)]


#: Contrasts by R's name: a function from levels to the matrix (levels, k) and names of its columns.
CONTRASTS: dict[str, Callable[..., tuple[np.ndarray, list[str]]]] = {
    "contr.treatment": _treatment,
    "contr.sum": _sum,
    "contr.helmert": _helmert,
    "contr.poly": _polynomial_contrasts,
    "contr.sdif": _successive,
}


def contrast_matrix(
    levels: Sequence[str], contrasts: tuple[str, dict[str, Any]]
) -> tuple[np.ndarray, list[str]]:
    """The rows of levels, (levels, k), and what each column adds to the factor's name.

    Raises:
        ValueError: if the base of treatment contrasts is no level.
    """
    name, options = contrasts
    return CONTRASTS[name](levels, **options)


# ---------------------------------------------------------------------- intervals


def even_breaks(x: np.ndarray, number: int) -> list[float]:
    """Edges of intervals of equal width, the outer ones a thousandth of the range further out."""
    if number < 2:
        raise ValueError("`breaks` is 1: expected 2 or more intervals")
    low, high = float(x.min()), float(x.max())
    width = high - low
    if width == 0:
        width = abs(low) or 1.0
        edges = np.linspace(low - width / 1000, high + width / 1000, number + 1)
    else:
        edges = np.linspace(low, high, number + 1)
        edges[0], edges[-1] = low - width / 1000, high + width / 1000
    return [float(edge) for edge in edges]


def intervals(edges: np.ndarray, digits: int, right: bool, lowest: bool) -> list[str]:
    """Labels such as ``(0,1]``, with as many digits as keep the edges apart."""
    for count in range(digits, max(17, digits) + 1):
        shown = [f"{edge:.{count}g}" for edge in edges]
        if len(set(shown)) == len(shown):
            break
    opening, closing = ("(", "]") if right else ("[", ")")
    found = [f"{opening}{a},{b}{closing}" for a, b in pairwise(shown)]
    if lowest and right:
        found[0] = "[" + found[0][1:]
    elif lowest:
        found[-1] = found[-1][:-1] + "]"
    return found


# ---------------------------------------------------------------------- polynomials


def polynomial(x: np.ndarray, state: dict[str, Any], degree: int) -> np.ndarray:
    r"""Orthogonal polynomials (n, degree) by their three-term recurrence, of length 1 over the
    rows of the fit.

    Reference:
        Kennedy and Gentle, Statistical Computing (1980), p. 343.

    Raises:
        ValueError: if there are too few distinct values.
    """
    learning = not state
    if learning:
        if degree >= len(np.unique(x)):
            raise ValueError(f"`degree` is {degree}: expected less than the distinct values")
        state.update(alpha=[], norm=[float(len(x))])
    previous, present = np.zeros_like(x), np.ones_like(x)
    columns = []
    for k in range(degree):
        if learning:
            state["alpha"].append(float(x @ present**2 / state["norm"][k]))
        step = state["norm"][k] / state["norm"][k - 1] if k else 0.0
        previous, present = present, (x - state["alpha"][k]) * present - step * previous
        if learning:
            state["norm"].append(float(present @ present))
        columns.append(present / np.sqrt(state["norm"][k + 1]))
    return np.stack(columns, 1)


def legendre(
    x: np.ndarray, state: dict[str, Any], degree: int, low: float | None, high: float | None
) -> np.ndarray:
    r"""Normalised Legendre polynomials :math:`\sqrt{k + 1/2}\, P_k(t)`, k = 0, ..., ``degree``, in
    :math:`t = 2 (x - l) / (h - l) - 1`, (n, degree + 1).

    Their squares have the integral 1 over :math:`-1 \le t \le 1`. The ends l and h are those of the
    rows of the fit, where they are not given.

    Reference:
        Kirkpatrick, Lofsvold and Bulmer, Genetics 124 (1990) 979.

    Raises:
        ValueError: if there is nothing between the ends.
    """
    if not state:
        state["low"] = float(x.min()) if low is None else low
        state["high"] = float(x.max()) if high is None else high
        if not state["low"] < state["high"]:
            raise ValueError(
                f"`low` is {state['low']:g} and `high` {state['high']:g}: expected low < high"
            )
    t = 2 * (x - state["low"]) / (state["high"] - state["low"]) - 1
    columns = np.polynomial.legendre.legvander(t, degree)
    return np.asarray(columns * np.sqrt(np.arange(degree + 1) + 0.5))


# ---------------------------------------------------------------------- splines


def b_spline(
    x: np.ndarray,
    state: dict[str, Any],
    df: int | None,
    knots: list[float] | None,
    degree: int,
    intercept: bool,
    boundary: list[float] | None,
) -> np.ndarray:
    """B-splines (n, k); beyond the boundary knots their outer polynomials go on.

    Raises:
        ValueError: if the knots or their number do not fit.
    """
    if not state:
        inner = None if df is None else df - degree - int(intercept)
        _learn_knots(x, state, inner, knots, boundary, degree)
    basis = _spline(x, state["knots"], degree)
    return basis if intercept else basis[:, 1:]


def natural_spline(
    x: np.ndarray,
    state: dict[str, Any],
    df: int | None,
    knots: list[float] | None,
    degree: int,
    intercept: bool,
    boundary: list[float] | None,
) -> np.ndarray:
    """Natural cubic splines (n, k): linear beyond the boundary knots.

    Raises:
        ValueError: if the knots or their number do not fit.
    """
    if not state:
        _learn_knots(x, state, (df or 1) - 1 - int(intercept), knots, boundary, 3)
    known = state["knots"]
    low, high = known[0], known[-1]
    first = 0 if intercept else 1
    basis = _straight_beyond(x, known, low, high)
    curvature = _spline(np.array([low, high]), known, 3, 2)[:, first:]
    Q, _ = np.linalg.qr(curvature.T, mode="complete")
    return (basis[:, first:] @ Q)[:, 2:]


def penalised_spline(x: np.ndarray, low: float, high: float, segments: int) -> np.ndarray:
    r"""Columns (n, segments + 1) whose coefficients of one variance make a P-spline.

    :math:`Z = B D^\top (D D^\top)^{-1}` for cubic B-splines B over equal segments and second
    differences D, so that :math:`Z Z^\top = B (D^\top D)^+ B^\top`. Straight lines, which D does not
    see, are left to the fixed effects. Beyond ``low`` and ``high`` the columns are straight lines.

    Reference:
        Eilers and Marx, Statistical Science 11 (1996) 89; as a mixed model, Currie and Durban,
        Statistical Modelling 2 (2002) 333.
    """
    h = (high - low) / segments
    knots = low + h * np.arange(-3, segments + 4)
    B = _straight_beyond(x, knots.tolist(), low, high)
    D = np.diff(np.eye(segments + 3), 2, axis=0)
    return np.asarray(B @ np.linalg.solve(D @ D.T, D).T)


def _straight_beyond(x: np.ndarray, knots: Sequence[float], low: float, high: float) -> np.ndarray:
    """Cubic B-splines that go on as straight lines below ``low`` and above ``high``."""
    basis = _spline(np.clip(x, low, high), knots, 3)
    slope = _spline(np.array([low, high]), knots, 3, 1)
    basis += np.outer(np.minimum(x - low, 0), slope[0])
    basis += np.outer(np.maximum(x - high, 0), slope[1])
    return basis


def _learn_knots(
    x: np.ndarray,
    state: dict[str, Any],
    inner: int | None,
    knots: list[float] | None,
    boundary: list[float] | None,
    degree: int,
) -> None:
    low, high = (float(x.min()), float(x.max())) if boundary is None else map(float, boundary)
    if not low < high:
        raise ValueError("all values are equal: a spline needs a range")
    if knots is None:
        if inner is not None and inner < 0:
            raise ValueError("`df` is too small for this degree")
        probabilities = np.linspace(0, 1, (inner or 0) + 2)[1:-1]
        among = x[(x >= low) & (x <= high)]
        found = np.quantile(among, probabilities).tolist()
    else:
        found = sorted(float(knot) for knot in knots)
        if found and not (low < found[0] and found[-1] < high):
            raise ValueError(f"`knots` must be between {low:g} and {high:g}")
    state["knots"] = [low] * (degree + 1) + found + [high] * (degree + 1)


def _spline(x: np.ndarray, knots: Sequence[float], degree: int, derivative: int = 0) -> np.ndarray:
    # A slow import, for the few formulas that have splines.
    from scipy.interpolate import BSpline

    k = len(knots) - degree - 1
    found = BSpline(np.asarray(knots, dtype=np.float64), np.eye(k), degree)(x, nu=derivative)
    return np.asarray(found)
