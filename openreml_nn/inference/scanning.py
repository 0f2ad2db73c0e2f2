"""Tests of many covariates, one at a time, at the variances of one fit."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isfinite

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.refit import Refit, family_of
from openreml_nn.likelihood.problem import cholesky
from openreml_nn.support.checks import check_tensor, found
from openreml_nn.support.errors import InputError

__all__ = ["scan"]

#: Rows up to which V is formed and factored once.
_DENSE_ROWS = 5_000
#: Markers that are held at a time.
_MARKERS = 2_048
#: A marker of which this little is left beside the fixed effects is a combination of them.
_ALIASED = 1e-8


def scan(result: Result, markers: Tensor | np.ndarray | pd.DataFrame) -> pd.DataFrame:
    r"""A test of each of many covariates as a fixed effect more, at the variance ratios of a fit.

    With P of the fit, a marker m has :math:`\hat\beta = m^\top P y / m^\top P m`, and

    .. math:: t = \hat\beta \sqrt{m^\top P m} / s, \qquad
        s^2 = \frac{y^\top P y - (m^\top P y)^2 / m^\top P m}{n - p - 1}

    n - p - 1 degrees of freedom: the ratios of the variances are held, their common scale is
    estimated with each marker anew, as in EMMAX.

    Of a response that is not Gaussian it is the score test, as in GMMAT: with U the derivative of the
    log-likelihood by the coefficient of m, at zero, and P of the working linear model at the mode,
    :math:`z = U / \sqrt{m^\top P m}` is compared with the normal distribution, and the estimate is that
    of one step, :math:`U / m^\top P m`.

    Args:
        result: a fit without the markers.
        markers: (n, m) numbers, a row for each row of the fit; names are those of a data frame.

    Returns:
        A data frame with the columns name, estimate, std_error, df, statistic (t, or z with infinite
        df) and p, and a row for each marker; NaN for one that is a combination of the fixed effects,
        such as a constant.

    Raises:
        InputError: if the markers are not numbers of that shape or one is missing, or the fit's
            rows were streamed.
        TypeError: if an argument is of another kind.

    Reference:
        Kang, Sul, Service et al., Nature Genetics 42 (2010) 348; Chen, Wang, Conomos et al., American
        Journal of Human Genetics 98 (2016) 653.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> table = sleepstudy()
    >>> result = lmm("Reaction ~ 1 + (1 | Subject)", table)
    >>> scan(result, table[["Days"]]).round(3)
       name  estimate  std_error   df  statistic    p
    0  Days    10.467      0.843  178     12.414  0.0
    """
    if family_of(result) is not None:
        return _of_family(LaplaceRefit(result), markers)
    refit = Refit(result)
    n, p = refit.X.shape
    M, names = _numbers(markers, n)
    if n - p - 1 < 1:
        raise InputError(f"`result` has {n} rows for {p} fixed effects: none is left for a test")
    with torch.no_grad():
        moments = list(_dense(refit, M) if n <= _DENSE_ROWS else _solved(refit, M))
    y_p_y = moments[0][3] if moments else torch.ones(())
    m_p_m, m_p_y, whole = (
        torch.cat([part[i] for part in moments]) if moments else torch.zeros(0) for i in range(3)
    )
    m_p_m = torch.where(m_p_m > _ALIASED * whole, m_p_m, torch.nan)
    scale = (y_p_y - m_p_y**2 / m_p_m).clamp(min=0) / (n - p - 1)
    estimate, error = m_p_y / m_p_m, (scale / m_p_m).sqrt()
    return _table(names, estimate, error, float(n - p - 1))


def _table(names: list[str], estimate: Tensor, error: Tensor, df: float) -> pd.DataFrame:
    """Tests by name."""
    from scipy import stats

    columns = {"estimate": estimate, "std_error": error, "df": None, "statistic": estimate / error}
    shown = int(df) if isfinite(df) else df
    table = pd.DataFrame(
        {k: shown if v is None else v.numpy(force=True) for k, v in columns.items()},
        index=range(len(names)),
    )
    table.insert(0, "name", names)
    table["p"] = 2 * stats.t.sf(table["statistic"].abs(), df)
    return table


def _of_family(refit: LaplaceRefit, markers: object) -> pd.DataFrame:
    """Score tests in the likelihood of a family."""
    M, names = _numbers(markers, len(refit.X))
    parts = [
        refit.loss.scores(
            refit.y,
            refit.offset,
            refit.X,
            torch.as_tensor(M[:, start : start + _MARKERS]).to(refit.X),
            refit.weights,
        )
        for start in range(0, M.shape[1], _MARKERS)
    ]
    none = refit.X.new_zeros(0)
    slope, information, whole = (torch.cat([none, *own]) for own in zip(*parts, strict=True))
    information = torch.where(information > _ALIASED * whole, information, torch.nan)
    return _table(names, slope / information, information.rsqrt(), inf)


def _numbers(markers: object, n: int) -> tuple[Tensor | np.ndarray, list[str]]:
    """Markers as numbers (n, m), with their names."""
    if isinstance(markers, pd.DataFrame):
        names = [str(name) for name in markers.columns]
        for name, kind in zip(names, markers.dtypes, strict=True):
            if not pd.api.types.is_numeric_dtype(kind):
                raise InputError(f"`markers` has the column {name!r} of {kind}: expected numbers")
        values: object = markers.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        values, names = markers, []
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "iufb":
            raise TypeError(f"`markers` is {found(markers)} of {values.dtype}: expected numbers")
        values = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if not isinstance(values, Tensor):
        raise TypeError(
            f"`markers` is {found(markers)}: expected a tensor, an array or a data frame"
        )
    values = values.to(torch.uint8) if values.dtype == torch.bool else values
    check_tensor("markers", values, (n, "m"), finite=False)
    names = names or [str(j) for j in range(values.shape[1])]
    if values.is_floating_point():
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise InputError(
                f"`markers` has no number for {names[column]!r} in row {row + 1}: expected one in each "
                "row, such as the marker's mean"
            )
    return values, names


Moments = tuple[Tensor, Tensor, Tensor, Tensor]


def _dense(refit: Refit, markers: Tensor | np.ndarray) -> Iterator[Moments]:
    """m'Pm, m'Py and m'V^-1 m of some markers at a time, and y'Py, by a factor of V."""
    y = refit.y
    V = sum((term.dense() for term in refit.objective().terms()), y.new_zeros(len(y), len(y)))
    L = cholesky(V, "V")
    white = torch.linalg.solve_triangular(L, torch.cat([refit.X, y[:, None]], 1), upper=False)
    Q = torch.linalg.qr(white[:, :-1]).Q
    rest = white[:, -1] - Q @ (Q.mT @ white[:, -1])
    for start in range(0, markers.shape[1], _MARKERS):
        part = torch.as_tensor(markers[:, start : start + _MARKERS]).to(y)
        M = torch.linalg.solve_triangular(L, part, upper=False)
        whole = M.square().sum(0)
        M -= Q @ (Q.mT @ M)
        yield M.square().sum(0), M.mT @ rest, whole, rest @ rest


def _solved(refit: Refit, markers: Tensor | np.ndarray) -> Iterator[Moments]:
    """The moments of the columns by solves with V, by the solver of the fit."""
    y = refit.y
    p_y = refit.project(y[:, None])[:, 0]
    for start in range(0, markers.shape[1], _MARKERS):
        M = torch.as_tensor(markers[:, start : start + _MARKERS]).to(y)
        whole = (M * refit.solve(M)).sum(0)
        yield (M * refit.project(M)).sum(0), M.mT @ p_y, whole, y @ p_y
