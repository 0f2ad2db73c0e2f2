r"""Relationships of individuals by their markers, and the effects of markers behind them.

With the codes :math:`W` (n, m) of n individuals at m markers, a relationship matrix is
:math:`K = W W^\top`. Values of individuals :math:`u \sim N(0, K\sigma^2)` (GBLUP) are those of
effects of markers :math:`u = W a`, :math:`a \sim N(0, I\sigma^2)` (RR-BLUP): one model, in n or in m
unknowns, whose predictions follow from each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from openreml_nn.support.checks import check_choice, check_flag, check_instance, check_number, found
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = [
    "check_square",
    "epistatic_relationship",
    "genomic_relationship",
    "marker_codes",
    "marker_effects",
]

#: Markers that are coded at a time, for relationships without the codes of all.
_MARKERS = 4096

_METHODS = ("vanraden1", "vanraden2", "vitezica", "su")


def genomic_relationship(
    markers: pd.DataFrame,
    method: str = "vanraden1",
    frequencies: Mapping[str, float] | pd.Series | None = None,
) -> pd.DataFrame:
    r"""The relationship matrix :math:`K = W W^\top` of individuals by their markers.

    It is a kernel of a formula, ``vm(geno, K)`` with ``kernels={"K": …}``, or of a
    :class:`KnownMatrix`. With frequencies of the markers' own it is singular, since columns of W sum
    to zero; a model takes it so.

    Args:
        markers, method, frequencies: see :func:`marker_codes`.

    Returns:
        K (n, n) with the names of the individuals.

    Raises:
        InputError: as :func:`marker_codes` does.

    >>> calls = pd.DataFrame({"m1": [0, 1, 2], "m2": [2, 0, 1]}, ["a", "b", "c"])
    >>> genomic_relationship(calls)
         a    b    c
    a  2.0 -1.0 -1.0
    b -1.0  1.0  0.0
    c -1.0  0.0  1.0
    """
    calls = _read(markers, method, frequencies)
    K = np.zeros((len(calls.names), len(calls.names)))
    for part in range(0, len(calls.p), _MARKERS):
        W = calls.coded(slice(part, part + _MARKERS), method)
        K += W @ W.T
    return pd.DataFrame(K / calls.scale(method), calls.names, calls.names)


def marker_codes(
    markers: pd.DataFrame,
    method: str = "vanraden1",
    frequencies: Mapping[str, float] | pd.Series | None = None,
) -> pd.DataFrame:
    r"""Codes W (n, m) of individuals at their markers, such that :math:`K = W W^\top`.

    With x copies of the counted allele, its frequency p and q = 1 - p:

    - ``"vanraden1"``: :math:`(x - 2p) / \sqrt{\sum 2pq}`, additive;
    - ``"vanraden2"``: :math:`(x - 2p) / \sqrt{2pq\,m}`, additive, each marker with one weight;
    - ``"vitezica"``: dominance, :math:`-2p^2`, :math:`2pq`, :math:`-2q^2` for x = 0, 1, 2, over
      :math:`\sqrt{\sum (2pq)^2}`, at right angles to breeding values;
    - ``"su"``: dominance, :math:`([x = 1] - 2pq) / \sqrt{\sum 2pq(1 - 2pq)}`.

    A missing call has the code 0, the mean of its marker. Markers of which all are alike (p of 0 or
    1) say nothing and are left out, with a warning.

    Args:
        markers: calls, a row an individual and a column a marker, by their names: copies 0, 1, 2 of
            one allele, or missing. Additive methods take imputed numbers between 0 and 2, too.
        method: which.
        frequencies: p of each marker in the base population, by its name; by default those of the
            calls.

    Raises:
        InputError: if a call is of another kind, an individual or a marker stands twice, or no
            marker varies.
        TypeError: if ``markers`` is no data frame.

    Warns:
        UserWarning: of markers that are left out.

    Reference:
        VanRaden, Journal of Dairy Science 91 (2008) 4414; dominance by Vitezica, Varona and
        Legarra, Genetics 195 (2013) 1223, and Su et al., PLoS ONE 7 (2012) e45293.

    >>> calls = pd.DataFrame({"m1": [0, 1, 2], "m2": [2, None, 1]}, ["a", "b", "c"])
    >>> marker_codes(calls).round(4)
          m1      m2
    a -1.069  0.5345
    b  0.000  0.0000
    c  1.069 -0.5345
    """
    calls = _read(markers, method, frequencies)
    W = calls.coded(slice(None), method) / np.sqrt(calls.scale(method))
    return pd.DataFrame(W, calls.names, calls.markers)


def marker_effects(codes: pd.DataFrame, values: pd.Series) -> pd.Series:
    r"""Effects of markers behind values of individuals, :math:`\hat a = W^\top K^+ \hat u`.

    With the BLUPs of a GBLUP model of :math:`K = W W^\top` these are the BLUPs of RR-BLUP; the other
    way is ``codes @ effects``, also of individuals without a record, whose codes are of the same
    ``frequencies``. The cost is that of an eigendecomposition of :math:`W W^\top` or :math:`W^\top W`,
    whichever is smaller, as of the model itself: fit GBLUP where markers are more than
    individuals, else RR-BLUP.

    Args:
        codes: W, see :func:`marker_codes`.
        values: of the individuals, by their names; those that have no codes are left out.

    Raises:
        InputError: if an individual with codes has no value, or one that is not finite.
        TypeError: if an argument is of another kind.

    Reference:
        Strandén and Garrick, Journal of Dairy Science 92 (2009) 2971.

    >>> codes = marker_codes(pd.DataFrame({"m1": [0, 1, 2], "m2": [2, 0, 1]}, ["a", "b", "c"]))
    >>> effects = marker_effects(codes, pd.Series({"a": 1.0, "b": -0.5, "c": -0.5}))
    >>> (codes @ effects).round(6).tolist()
    [1.0, -0.5, -0.5]
    """
    check_instance("codes", codes, pd.DataFrame, "a data frame of `marker_codes`")
    check_instance("values", values, pd.Series, "a series of values by names")
    own = values.set_axis(values.index.map(str))
    if own.index.has_duplicates:
        name = own.index[own.index.duplicated()][0]
        raise InputError(f"`values` has {name!r} twice: expected one value of each individual")
    u = pd.to_numeric(own.reindex(codes.index), errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(u)
    if bad.any():
        name = codes.index[int(bad.argmax())]
        raise InputError(
            f"`values` has no finite value of {name!r}, which `codes` has: expected one"
        )
    W = codes.to_numpy(dtype=np.float64)
    n, m = W.shape
    small = W @ W.T if n <= m else W.T @ W
    size, vectors = np.linalg.eigh(small)
    kept = size > size[-1] * max(n, m) * np.finfo(float).eps
    size, vectors = size[kept], vectors[:, kept]
    right = u if n <= m else W.T @ u
    solved = vectors @ ((vectors.T @ right) / size)
    return pd.Series(W.T @ solved if n <= m else solved, codes.columns)


def epistatic_relationship(
    one: pd.DataFrame, other: pd.DataFrame, scaled: bool = True
) -> pd.DataFrame:
    r"""Relationships of interaction effects, the entrywise product :math:`K_1 \circ K_2`.

    Of two additive matrices it is additive by additive, of an additive and one of dominance
    additive by dominance.

    Args:
        one, other: relationship matrices with the same names, in any order.
        scaled: whether the mean of the diagonal is made 1, as for genomic matrices; those of a
            pedigree are taken as they are.

    Raises:
        InputError: if a name is in one only.
        TypeError: if an argument is of another kind.

    Reference:
        Cockerham, Genetics 39 (1954) 859; scaled, Vitezica et al., Genetics 206 (2017) 1297.

    >>> K = pd.DataFrame([[2.0, 1.0], [1.0, 2.0]], ["a", "b"], ["a", "b"])
    >>> epistatic_relationship(K, K)
          a     b
    a  1.00  0.25
    b  0.25  1.00
    """
    for name, K in (("one", one), ("other", other)):
        check_square(name, K)
    odd = set(one.index) ^ set(other.index)
    if odd:
        raise InputError(
            f"`one` and `other` must have the same names: {min(odd)!r} stands in one only"
        )
    product = one * other.loc[one.index, one.columns]
    return product / np.diag(product).mean() if check_flag("scaled", scaled) else product


def check_square(name: str, K: object) -> None:
    """Refuse what is no symmetric data frame of finite numbers with the same names on both sides.

    Raises:
        InputError: if it is another one.
        TypeError: if it is no data frame.
    """
    check_instance(name, K, pd.DataFrame, "a data frame with the names of its levels")
    assert isinstance(K, pd.DataFrame)
    if not len(K) or list(K.index) != list(K.columns) or not K.index.is_unique:
        raise InputError(
            f"`{name}` is {found(K)}: expected a square one with names, each once, "
            "in the same order on both sides"
        )
    try:
        values = K.to_numpy(dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"`{name}` holds what is no number: expected numbers") from None
    if not np.isfinite(values).all():
        raise InputError(f"`{name}` holds NaN or infinity: expected finite numbers")
    if np.abs(values - values.T).max() > 1e3 * np.finfo(float).eps * np.abs(values).max():
        raise InputError(f"`{name}` is not symmetric: expected a matrix that is")


@dataclass(frozen=True)
class _Calls:
    """Calls of individuals at the markers that vary.

    Attributes:
        raw: calls (n, m) as they were given.
        kept: positions of the markers that vary.
        p: their frequencies.
        names: of individuals.
        markers: names of those kept.
    """

    raw: np.ndarray
    kept: np.ndarray
    p: np.ndarray
    names: list[str]
    markers: list[str]

    def coded(self, part: slice, method: str) -> np.ndarray:
        """Codes of some of the markers, but for their common scale."""
        p = self.p[part]
        x, q = _numbers(self.raw[:, self.kept[part]]), 1 - p
        if method == "vitezica":
            W = np.where(x == 0, -2 * p * p, np.where(x == 1, 2 * p * q, -2 * q * q))
        elif method == "su":
            W = (x == 1) - 2 * p * q
        else:
            W = x - 2 * p
            if method == "vanraden2":
                W /= np.sqrt(2 * p * q)
        W[np.isnan(x)] = 0.0
        return W

    def scale(self, method: str) -> float:
        """What K is divided by."""
        h = 2 * self.p * (1 - self.p)
        each = {"vanraden1": h, "vanraden2": np.ones(len(h)), "vitezica": h * h, "su": h * (1 - h)}
        return float(each[method].sum())


def _read(
    markers: pd.DataFrame, method: str, frequencies: Mapping[str, float] | pd.Series | None
) -> _Calls:
    check_instance("markers", markers, pd.DataFrame, "a data frame, individuals by markers")
    check_choice("method", method, _METHODS)
    names, columns = list(map(str, markers.index)), list(map(str, markers.columns))
    if not names or not columns:
        raise InputError(f"`markers` is {found(markers)}: expected individuals and markers")
    for what, labels in (("individual", names), ("marker", columns)):
        if len(set(labels)) < len(labels):
            twice = next(iter(pd.Index(labels)[pd.Index(labels).duplicated()]))
            raise InputError(f"`markers` has the {what} {twice!r} twice: expected each once")
    raw = markers.to_numpy()
    total, called = np.zeros(len(columns)), np.zeros(len(columns))
    of_each = np.zeros(len(names))
    for first in range(0, len(columns), _MARKERS):
        part = slice(first, first + _MARKERS)
        x = _numbers(raw[:, part])
        _check_calls(x, names, columns[part], whole=method in ("vitezica", "su"))
        seen = ~np.isnan(x)
        total[part], called[part] = np.where(seen, x, 0.0).sum(0), seen.sum(0)
        of_each += seen.sum(1)
    if (of_each == 0).any():
        name = names[int((of_each == 0).argmax())]
        raise InputError(f"`markers` has no call of {name!r}: leave it out")
    p = np.divide(total, 2 * called, out=np.zeros(len(columns)), where=called > 0)
    if frequencies is not None:
        p = _given(frequencies, columns, p, called)
    kept = np.flatnonzero((p > 0) & (p < 1))
    _tell(columns, kept)
    return _Calls(raw, kept, p[kept], names, [columns[i] for i in kept])


def _numbers(calls: np.ndarray) -> np.ndarray:
    """Calls as numbers, NaN where they are missing."""
    if calls.dtype != object:
        try:
            return calls.astype(np.float64)
        except (TypeError, ValueError):
            raise InputError("`markers` holds what is no number: expected 0, 1, 2 or NaN") from None
    try:
        return np.where(pd.isna(calls), np.nan, calls).astype(np.float64)
    except (TypeError, ValueError):
        raise InputError("`markers` holds what is no number: expected 0, 1, 2 or NaN") from None


def _check_calls(x: np.ndarray, names: Sequence[str], columns: Sequence[str], whole: bool) -> None:
    bad = (x < 0) | (x > 2)
    if whole:
        bad |= ~np.isnan(x) & (x != np.round(x))
    if bad.any():
        i, j = np.argwhere(bad)[0]
        expected = "0, 1, 2 or NaN" if whole else "0, 1, 2, a number between them, or NaN"
        raise InputError(
            f"`markers` is {x[i, j]:g} of {names[i]!r} at {columns[j]!r}: expected {expected}"
        )


def _given(
    frequencies: Any, columns: Sequence[str], observed: np.ndarray, called: np.ndarray
) -> np.ndarray:
    """Frequencies of a user's own, in the order of the markers."""
    if not isinstance(frequencies, Mapping | pd.Series):
        raise TypeError(f"`frequencies` is {found(frequencies)}: expected numbers by marker")
    by_name = {str(name): value for name, value in frequencies.items()}
    for name in columns:
        if name not in by_name:
            raise InputError(
                f"`frequencies` has no marker {name!r}: expected a number between 0 and 1"
            )
        check_number(f"frequencies[{name!r}]", by_name[name], least=0.0)
    p = np.array([float(by_name[name]) for name in columns])
    odd = (p > 1) | ((called > 0) & (((p == 0) & (observed > 0)) | ((p == 1) & (observed < 1))))
    if odd.any():
        j = int(odd.argmax())
        raise InputError(
            f"`frequencies` is {p[j]:g} at {columns[j]!r}, of which calls have {observed[j]:.4g}: "
            "expected a number between 0 and 1 that allows both alleles"
        )
    return p


def _tell(columns: Sequence[str], kept: np.ndarray) -> None:
    """Warn of markers that do not vary."""
    alike = sorted(set(range(len(columns))) - set(kept.tolist()))
    if not len(kept):
        raise InputError("`markers` has no marker that varies: expected one at least")
    if alike:
        shown = ", ".join(repr(columns[i]) for i in alike[:5]) + (", ..." if len(alike) > 5 else "")
        warn(
            f"{len(alike)} of {len(columns)} markers do not vary and are left out: {shown}",
            UserWarning,
        )
