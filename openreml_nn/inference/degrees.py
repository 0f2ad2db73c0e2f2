r"""Tests of fixed effects in small samples.

With :math:`\Phi(\theta) = (X^\top V^{-1} X)^{-1}` the covariance of the BLUEs, Satterthwaite's
degrees of freedom of a contrast l are

.. math:: \nu = \frac{2\,(l^\top\Phi l)^2}{g^\top A g},\qquad
    g = \frac{\partial\, l^\top\Phi l}{\partial\theta},

with A the inverse of the observed information of θ. Kenward and Roger replace Φ by an estimate that
is corrected for the estimation of θ, and scale the F statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from openreml_nn.covariance.terms import RepeatedCovariance, Term
from openreml_nn.estimation import Result
from openreml_nn.estimation.aireml import Coordinates, Curvature
from openreml_nn.inference.refit import Refit
from openreml_nn.likelihood.loss import Objective

__all__ = ["FTest", "coefficients", "wald_test"]

#: Rows beyond which Kenward and Roger's dense matrices are refused.
_MOST_ROWS = 5000


class FTest(NamedTuple):
    """An F test of some contrasts.

    Attributes:
        statistic: F.
        num_df, den_df: degrees of freedom.
        p: probability of a larger F under the null hypothesis.
    """

    statistic: float
    num_df: int
    den_df: float
    p: float


@dataclass(frozen=True)
class Inference:
    """The covariance of the BLUEs with degrees of freedom of contrasts."""

    covariance: Tensor

    def df(self, contrast: Tensor) -> float:
        """Degrees of freedom of one contrast (p,)."""
        raise NotImplementedError

    def f_test(self, L: Tensor, beta: Tensor) -> FTest:
        """Test of L beta = 0, L of full row rank."""
        raise NotImplementedError

    def _f(self, L: Tensor, beta: Tensor) -> float:
        value = L @ beta
        return float(value @ torch.linalg.solve(L @ self.covariance @ L.mT, value)) / len(L)


class Asymptotic(Inference):
    """Normal and chi-squared limits."""

    def df(self, contrast: Tensor) -> float:
        return float("inf")

    def f_test(self, L: Tensor, beta: Tensor) -> FTest:
        F = self._f(L, beta)
        return FTest(F, len(L), float("inf"), float(stats.chi2.sf(F * len(L), len(L))))


@dataclass(frozen=True)
class Satterthwaite(Inference):
    """Satterthwaite's degrees of freedom.

    Attributes:
        slopes: derivatives of the covariance by the parameters, (m, p, p).
        spread: covariance of the parameters, (m, m).

    Reference:
        Giesbrecht and Burns, Biometrics 41 (1985) 477; Fai and Cornelius, Journal of Statistical
        Computation and Simulation 54 (1996) 363, for several contrasts.
    """

    slopes: Tensor
    spread: Tensor

    def df(self, contrast: Tensor) -> float:
        variance = contrast @ self.covariance @ contrast
        g = torch.einsum("i,mij,j->m", contrast, self.slopes, contrast)
        return float(2 * variance**2 / (g @ self.spread @ g)) if len(g) else float("inf")

    def f_test(self, L: Tensor, beta: Tensor) -> FTest:
        values, vectors = torch.linalg.eigh(L @ self.covariance @ L.mT)
        rotated = vectors.mT @ L
        F = float(((rotated @ beta) ** 2 / values).mean())
        each = [self.df(row) for row in rotated]
        if max(each) - min(each) < 1e-8 * max(each):
            den = sum(each) / len(each)
        elif min(each) <= 2:
            den = 2.0
        else:
            expected = sum(df / (df - 2) for df in each)
            den = 2 * expected / (expected - len(each))
        return FTest(F, len(L), den, float(stats.f.sf(F, len(L), den)))

    @classmethod
    def of(cls, result: Result) -> Satterthwaite:
        """From the likelihood around the estimates."""
        objective = Refit(result).objective()
        local = Local(objective)
        return cls(_phi(objective), local.derivative(_phi), local.spread)


class Local:
    """The likelihood around the estimates, in the coordinates of estimation.

    Variances of zero are left out: they are on the boundary.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        curvature = Curvature([objective])
        self.at: Coordinates = curvature.at
        self.u = curvature.u
        self.inner = [
            j for j, vanishes in enumerate(self.at.vanishing) if not (vanishes and self.u[j] == 0)
        ]
        errors = torch.linalg.pinv(curvature.information, hermitian=True).diagonal().sqrt()
        self._steps = 5e-3 * errors

    def derivative(self, function: object) -> Tensor:
        """Derivatives of a function of the objective by the inner coordinates, by differences.

        Of the fourth order: with steps of 1/200 standard error they are right to 1e-9.
        """
        parts = []
        with torch.no_grad():
            for j in self.inner:
                h = self._steps[j]
                near, far = (self._difference(function, j, step) for step in (h, 2 * h))
                parts.append((8 * near - far) / (12 * h))
            self.at.write(self.u)
        empty = function(self.objective)  # type: ignore[operator]
        return torch.stack(parts) if parts else empty.new_zeros(0, *empty.shape)

    def _difference(self, function: object, j: int, step: Tensor) -> Tensor:
        found = []
        for sign in (1, -1):
            u = self.u.clone()
            u[j] += sign * step
            self.at.write(u)
            found.append(function(self.objective))  # type: ignore[operator]
        return found[0] - found[1]

    @cached_property
    def spread(self) -> Tensor:
        """Inverse of the observed information of the inner coordinates."""
        hessian = -self.derivative(lambda objective: Curvature([objective]).score)[:, self.inner]
        return torch.linalg.pinv((hessian + hessian.mT) / 2, hermitian=True)


def _phi(objective: Objective) -> Tensor:
    """Covariance of the BLUEs, all columns."""
    evaluation, fixed = objective.evaluate(), objective.problem.fixed
    return fixed.T @ torch.cholesky_inverse(evaluation.gamma_factor) @ fixed.T.mT


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
        den, scale = self._moments(L)
        F = scale * self._f(L, beta)
        return FTest(F, len(L), den, float(stats.f.sf(F, len(L), den)))

    def _moments(self, L: Tensor) -> tuple[float, float]:
        """Denominator degrees of freedom and scale of F, by its first two moments."""
        q = len(L)
        theta = L.mT @ torch.linalg.solve(L @ self.plain @ L.mT, L)
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
            ValueError: if there are too many rows, or a covariance is not linear in variances
                and covariances.
        """
        if result.rows > _MOST_ROWS:
            raise ValueError(
                f"Kenward and Roger's correction takes dense matrices of {result.rows} rows, "
                f"expected at most {_MOST_ROWS}: use ddf='satterthwaite'"
            )
        refit = Refit(result)
        objective = refit.objective()
        terms = [term.detach() for term in objective.terms()]
        V, slopes = _linear(terms, refit.covariance.free_param_names, refit.X)
        inverse = torch.linalg.inv(V)
        VX = inverse @ refit.X
        phi = torch.linalg.inv(refit.X.mT @ VX)
        P = torch.stack([-VX.mT @ G @ VX for G in slopes])
        projected = [(inverse - VX @ phi @ VX.mT) @ G for G in slopes]
        information = torch.stack([
            torch.stack([(a * b.mT).sum() / 2 for b in projected]) for a in projected
        ])  # fmt: skip
        W = torch.linalg.inv(information)
        Q = torch.stack([
            torch.stack([VX.mT @ a @ inverse @ b @ VX for b in slopes]) for a in slopes
        ])  # fmt: skip
        gain = torch.einsum("ij,ijab->ab", W, Q - torch.einsum("iab,bc,jcd->ijad", P, phi, P))
        corrected = phi + 2 * phi @ gain @ phi
        return cls(corrected, phi, P, W)


def _linear(
    terms: list[Term], parameters: Sequence[str], like: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """V and its derivatives by variances and covariances, of which it is a linear function."""
    n = like.shape[0]
    V = like.new_zeros(n, n)
    slopes: list[Tensor] = []
    for term in terms:
        k = len(term.covariance.matrix)
        free = sum(name.startswith(f"{term.name}/") for name in parameters)
        # As many parameters as entries: no entry is a function of others.
        if not isinstance(term.covariance, RepeatedCovariance) or free != k * (k + 1) // 2:
            raise ValueError(
                f"Kenward and Roger's correction is for variances and covariances of independent "
                f"levels, which term {term.name!r} is not: use ddf='satterthwaite'"
            )
        sigma = term.covariance.matrix
        Z = term.design.dense(like).unflatten(1, (-1, k))  # (n, q, k)
        for i in range(k):
            for j in range(i + 1):
                G = Z[:, :, i] @ Z[:, :, j].mT
                G = G if i == j else G + G.mT
                V += sigma[i, j] * G
                slopes.append(G)
    return V, slopes


METHODS = {
    "satterthwaite": Satterthwaite.of,
    "kenward-roger": KenwardRoger.of,
    "asymptotic": lambda result: Asymptotic(result.fixed.covariance),
}


def inference_of(result: Result, ddf: str) -> Inference:
    """The chosen way of testing."""
    if ddf not in METHODS:
        raise ValueError(f"`ddf` is {ddf!r}: expected one of {', '.join(METHODS)}")
    if ddf == "kenward-roger" and result.method != "reml":
        raise ValueError("Kenward and Roger's correction is for REML: fit with method='reml'")
    return METHODS[ddf](result)


def estimates(
    result: Result, L: Tensor, names: Sequence[str], ddf: str, level: float
) -> pd.DataFrame:
    """Estimates of contrasts with tests and intervals."""
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level}: expected a number between 0 and 1")
    how = inference_of(result, ddf)
    L = L.to(how.covariance)
    value = (L @ result.fixed.estimate).numpy(force=True)
    error = (L @ how.covariance @ L.mT).diagonal().sqrt().numpy(force=True)
    df = [how.df(row) for row in L]
    half = stats.t.ppf((1 + level) / 2, df) * error
    statistic = value / error
    return pd.DataFrame(
        {
            "name": list(names),
            "estimate": value,
            "std_error": error,
            "df": df,
            "statistic": statistic,
            "p": 2 * stats.t.sf(abs(statistic), df),
            "low": value - half,
            "high": value + half,
        }
    )


def coefficients(result: Result, ddf: str = "satterthwaite", level: float = 0.95) -> pd.DataFrame:
    """Fixed effects with t tests and confidence intervals.

    Args:
        result: a fit.
        ddf: degrees of freedom: ``"satterthwaite"``, ``"kenward-roger"`` or ``"asymptotic"``.
        level: of the intervals.

    Returns:
        name, estimate, std_error, df, statistic, p, low, high.

    Raises:
        ValueError: if an option is unknown or the correction does not fit the model.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> found = coefficients(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy()))
    >>> found[["name", "df"]].round(2)
              name    df
    0  (Intercept)  17.0
    1         Days  17.0
    """
    L = torch.eye(len(result.fixed.names), dtype=torch.float64)
    return estimates(result, L, result.fixed.names, ddf, level)


def wald_test(
    result: Result, contrasts: Tensor | Sequence[str], ddf: str = "satterthwaite"
) -> FTest:
    r"""F test of the hypothesis :math:`L\beta = 0`.

    Args:
        result: a fit.
        contrasts: L (q, p) of full row rank, or names of coefficients that are zero together.
        ddf: as in :func:`coefficients`.

    Raises:
        ValueError: if a name is unknown or L has another shape or rank.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import oats
    >>> result = lmm("yield ~ nitro + Variety + (1 | Block/Variety)", oats())
    >>> test = wald_test(result, ["VarietyMarvellous", "VarietyVictory"])
    >>> f"F({test.num_df}, {test.den_df:.1f}) = {test.statistic:.3f}, p = {test.p:.3f}"
    'F(2, 10.0) = 1.485, p = 0.272'
    """
    names = list(result.fixed.names)
    if isinstance(contrasts, Tensor):
        L = contrasts.to(result.fixed.covariance)
    else:
        unknown = [name for name in contrasts if name not in names]
        if unknown or not contrasts:
            raise ValueError(f"`contrasts` are {list(contrasts)}: expected some of {names}")
        L = torch.eye(len(names), dtype=torch.float64)[[names.index(c) for c in contrasts]]
        L = L.to(result.fixed.covariance)
    if L.dim() != 2 or L.shape[1] != len(names) or int(torch.linalg.matrix_rank(L)) < len(L):
        raise ValueError(
            f"`contrasts` has shape {tuple(L.shape)}: expected (q, {len(names)}) of full row rank"
        )
    return inference_of(result, ddf).f_test(L, result.fixed.estimate)
