"""What every way of testing contrasts of fixed effects offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from openreml_nn.support.solving import solve_named

__all__ = ["Asymptotic", "FTest", "Inference"]


class FTest(NamedTuple):
    """An F test of some contrasts.

    Attributes:
        statistic: the F statistic.
        num_df: numerator degrees of freedom.
        den_df: denominator degrees of freedom.
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
        spread = solve_named(L @ self.covariance @ L.mT, value, "the covariance of the contrasts")
        return float(value @ spread) / len(L)


class Asymptotic(Inference):
    """Normal and chi-squared limits."""

    def df(self, contrast: Tensor) -> float:
        return float("inf")

    def f_test(self, L: Tensor, beta: Tensor) -> FTest:
        from scipy import stats

        F = self._f(L, beta)
        return FTest(F, len(L), float("inf"), float(stats.chi2.sf(F * len(L), len(L))))
