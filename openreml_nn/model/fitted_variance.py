"""Residual variances that are a function of the fitted values of the fit itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.result.parts import Record
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn
from openreml_nn.table import Encoded

__all__ = ["fit_by_fitted", "is_by_fitted"]

#: Fits until the fitted values stay, at most.
_MOST = 200
#: They stay where they move by this little of their size.
_SETTLED = 1e-10


def is_by_fitted(encoded: Encoded) -> bool:
    """Whether the residual variances of a table depend on the fitted values."""
    return encoded.residual is not None and encoded.residual.of_fitted


def fit_by_fitted(
    encoded: Encoded, fit: Callable[[dict[str, Any], bool], Result]
) -> tuple[Result, dict[str, Any]]:
    r"""A fit whose residual variances are a function of its own fitted values, with its batch.

    The variances of each fit are those at the fitted values :math:`X\hat\beta + Zb` of the fit before,
    the first of least squares, until these stay: the fixed point that is nlme's estimate. At its end
    the likelihood takes the fitted values as known numbers, as nlme's does.

    Args:
        encoded: the table.
        fit: of a batch with the fitted values in ``covariate``; its second argument is whether the
            parameters start from the data, and else from where they are.

    Raises:
        InputError: if a fitted value is not a number that the function takes, such as a zero.

    Reference:
        Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), section 5.2.2; Davidian and
        Giltinan, Nonlinear Models for Repeated Measurement Data (1995), section 2.3.
    """
    y, X = encoded.adjusted, encoded.X
    offset = 0.0 if encoded.offset is None else encoded.offset
    covariate: Tensor = (
        X @ torch.linalg.lstsq(X, y[:, None], driver="gelsd").solution[:, 0] + offset
    )
    assert encoded.residual is not None and encoded.residual.variance is not None
    history: tuple[Record, ...] = ()
    for i in range(_MOST):
        _check(encoded.residual.variance, covariate)
        batch = {**encoded.batch(), "covariate": covariate}
        result = fit(batch, i == 0)
        history += result.history
        fitted = result.fitted.detach() + offset
        moved = float((fitted - covariate).abs().max())
        if moved <= _SETTLED * float(fitted.abs().max()):
            return replace(result, history=history), batch
        covariate = fitted
    warn(
        f"the fitted values, on which the residual variances depend, moved by {moved:.3g} after "
        f"{_MOST} fits: they have not settled",
    )
    return replace(result, converged=False, history=history), batch


def _check(kind: str, fitted: Tensor) -> None:
    zero = (fitted == 0).nonzero()[:, 0]
    if kind != "exp" and len(zero):
        raise InputError(
            f"the fitted value of row {int(zero[0]) + 1} of the fit is 0, where a power has no variance: "
            "expected exp(fitted)"
        )
    if bool((fitted == fitted[0]).all()):
        raise InputError(
            f"{kind}(fitted) of the residuals: the fitted values are all {float(fitted[0]):.6g}: a "
            "variance that depends on them needs two"
        )
