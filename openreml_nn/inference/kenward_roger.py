"""Kenward and Roger's correction.

It replaces the covariance of the BLUEs by an estimate that is corrected for the estimation of the
variances, and scales the F statistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.inference.contrasts import FTest, Inference
from openreml_nn.inference.linear_slopes import LinearSlopes
from openreml_nn.inference.refit import Refit
from openreml_nn.support.errors import InputError
from openreml_nn.support.solving import invert_named, solve_named

__all__ = ["KenwardRoger"]

#: Rows beyond which Kenward and Roger's dense matrices are refused.
_MOST_ROWS = 5000
#: A direction of the scaled information this small is rounding.
_LEAST = 1e-6


@dataclass(frozen=True)
class KenwardRoger(Inference):
    """Kenward and Roger's corrected covariance and degrees of freedom.

    Attributes:
        plain: the covariance without the correction.
        P: :math:`-X^T V^{-1} V_i V^{-1} X` for each variance parameter, (m, p, p).
        W: inverse of the expected information of the variance parameters, (m, m).

    Reference:
        Kenward and Roger, Biometrics 53 (1997) 983; Halekoh and Hojsgaard, Journal of
        Statistical Software 59(9) (2014).
    """

    plain: Tensor
    P: Tensor
    W: Tensor

    def df(self, contrast: Tensor) -> float:
        return self._moments(contrast[None])[0]

    def f_test(self, L: Tensor, beta: Tensor) -> FTest:
        from scipy import stats

        den, scale = self._moments(L)
        F = scale * self._f(L, beta)
        return FTest(F, len(L), den, float(stats.f.sf(F, len(L), den)))

    def _moments(self, L: Tensor) -> tuple[float, float]:
        """Denominator degrees of freedom and scale of F, by its first two moments."""
        q = len(L)
        theta = L.mT @ solve_named(L @ self.plain @ L.mT, L, "the covariance of the contrasts")
        inner = theta @ (self.plain @ self.P @ self.plain)  # (m, p, p)
        traces = inner.diagonal(dim1=1, dim2=2).sum(-1)
        A1 = float(traces @ self.W @ traces)
        A2 = float((self.W * torch.einsum("iab,jba->ij", inner, inner)).sum())
        B = (A1 + 6 * A2) / (2 * q)
        g = ((q + 1) * A1 - (q + 4) * A2) / ((q + 2) * A2)
        divisor = 3 * q + 2 * (1 - g)
        c1, c2, c3 = g / divisor, (q - g) / divisor, (q + 2 - g) / divisor
        V0, V1, V2 = 1 + c1 * B, 1 - c2 * B, 1 - c3 * B
        E = 1 - A2 / q
        rho = (E / V1) ** 2 * V0 / V2 / q if abs(V1) > 1e-10 else V0 / V2 / q
        den = 4 + (q + 2) / (q * rho - 1)
        return den, den * E / (den - 2) if abs(den - 2) > 1e-2 else 1.0

    @classmethod
    def of(cls, result: Result) -> KenwardRoger:
        """From dense matrices.

        Raises:
            InputError: if there are too many rows, parameters are bounded or tied, or a covariance
                is not linear in variances and covariances.
        """
        if result.rows > _MOST_ROWS:
            raise InputError(
                f"`ddf` is 'kenward-roger': the correction takes dense matrices of {result.rows} rows, "
                f"expected at most {_MOST_ROWS}: use ddf='satterthwaite'"
            )
        for name, limit in result.constraints.items():
            if not isinstance(limit, Real):
                raise InputError(
                    f"`ddf` is 'kenward-roger', but {name!r} has the constraint {limit!r}: the "
                    "correction is for variances that are free or held: use ddf='satterthwaite'"
                )
        refit = Refit(result)
        slopes = LinearSlopes(refit.objective(), "`ddf` is 'kenward-roger'")
        if not slopes.count:
            raise InputError(
                "`ddf` is 'kenward-roger', but no variance of the model is estimated: the correction is "
                "for that, expected one or more that are"
            )
        inverse = invert_named(slopes.V, "the covariance V of the rows")
        VX = inverse @ refit.X
        phi = invert_named(refit.X.mT @ VX, "the information of the fixed effects")
        moved = slopes.times(VX)  # (m, n, p)
        P = -VX.mT @ moved
        information = slopes.traces(inverse - VX @ phi @ VX.mT) / 2
        unit = information.diagonal().sqrt()
        factor, info = torch.linalg.cholesky_ex(information / (unit[:, None] * unit))
        if int(info) or float(factor.diagonal().min()) < _LEAST:
            raise InputError(
                "`ddf` is 'kenward-roger', but the data cannot tell the variances of the model "
                "apart: leave a term out, or use ddf='satterthwaite'"
            )
        W = torch.cholesky_inverse(factor) / (unit[:, None] * unit)
        m, n, p = moved.shape
        columns = moved.transpose(0, 1).reshape(n, m * p)
        Q = (columns.mT @ (inverse @ columns)).reshape(m, p, m, p).transpose(1, 2)
        gain = torch.einsum("ij,ijab->ab", W, Q - torch.einsum("iab,bc,jcd->ijad", P, phi, P))
        corrected = phi + 2 * phi @ gain @ phi
        return cls(corrected, phi, P, W)
