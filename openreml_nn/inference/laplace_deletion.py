r"""What a fit of a family owes to rows, by leaving them out.

With the covariance and the family's parameters held, the coefficients without rows I are those of the
maximum of the marginal likelihood :math:`\ell_{(I)}` of the others, by quasi-Newton steps from the fit,
the last of which is Newton's,

.. math:: \hat\beta \leftarrow \hat\beta + \Phi_{(I)} \nabla\ell_{(I)}(\hat\beta), \qquad
    \Phi_{(I)} = -[\nabla^2\ell_{(I)}(\hat\beta)]^{-1}.

By REML they are those of the joint mode of the others.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.inference.laplace_refit import LaplaceRefit, bfgs
from openreml_nn.support.errors import InputError, NumericalError
from openreml_nn.support.spectrum import eigenvalues

__all__ = ["LaplaceDeletion"]

#: Step of the differences of gradients, in standard errors, of exact and of approximate ones.
_STEPS = 1e-4, 1e-3
#: Steps end with one this short, in standard errors, and there are at most so many.
_AIM, _MOST = 1e-4, 50
#: Columns of X depend on each other where the squares of their lengths are as small as this.
_SINGULAR = 1e-10


class LaplaceDeletion:
    """The deletion of cases of a fit of a family.

    Args:
        refit: the fit.
        codes: the case of each row (n,).
        cases: how many there are.

    Attributes:
        leverage: of each case; NaN, as the model has no residual.
    """

    def __init__(self, refit: LaplaceRefit, codes: Tensor, cases: int) -> None:
        self.refit, self._codes = refit, codes
        self._fit = refit.fit()
        self.leverage = refit.X.new_full((cases,), torch.nan)

    @cached_property
    def _whole(self) -> Tensor:
        """The information on the coefficients from all rows, where the steps without a case begin."""
        return self._information(self._fit, self._fit.x, self._fit.slope[: self._fit.p])

    def phi(self, is_refitted: bool) -> Tensor:
        """The covariance of the coefficients of all rows, with all else held unless it is estimated."""
        own = self.refit.result.fixed.covariance
        if is_refitted:
            return own
        found = self._held(torch.arange(len(self._codes), device=self._codes.device))
        if found is None:
            raise NumericalError(
                "the information on the fixed effects is not positive definite at the fit: expected one "
                "at a maximum of the likelihood"
            )
        return found[1]

    def without(self, case: int) -> tuple[Tensor, Tensor] | None:
        """How coefficients change without a case, and their covariance, all else held; None where the
        other rows do not determine them."""
        keep = self._others(case)
        try:
            return self._held(keep) if self._determines(keep) else None
        except (InputError, NumericalError):
            return None

    def refitted(self, case: int) -> tuple[Tensor, Tensor] | None:
        """How coefficients change without a case, and their covariance, all parameters refitted."""
        keep = self._others(case)
        if not self._determines(keep):
            return None
        try:
            fit = self.refit.without(keep)
            found = self.refit.result_of(fit).fixed
        except (InputError, NumericalError):
            return None
        return self.refit.result.fixed.estimate - found.estimate, found.covariance

    def _others(self, case: int) -> Tensor:
        return (self._codes != case).nonzero()[:, 0]

    def _determines(self, keep: Tensor) -> bool:
        """Whether the columns of X are independent in some rows."""
        Q = self._fit.Q[keep]
        values = eigenvalues(Q.mT @ Q, "Q' Q of the rows that are left")
        return bool(values[0] > _SINGULAR * values[-1])

    def _held(self, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        fit, p = self._fit, self._fit.p
        others = fit.part(keep, fit.aim)
        if not p:
            here, there = fit.found(fit.x), others.found(fit.x)
            change = here.coefficients - there.coefficients
            return fit.T @ change, fit.T @ there.coefficient_covariance @ fit.T.mT
        x, change = fit.x.clone(), fit.x.new_zeros(p)
        slope, H, is_exact = others.evaluate(x)[1][:p], self._whole, False
        for _ in range(_MOST):
            L, failed = torch.linalg.cholesky_ex(H)
            if int(failed):
                return None
            step = torch.cholesky_solve(slope[:, None], L)[:, 0]
            if float((L.mT @ step).norm()) < _AIM:
                if is_exact:
                    change = change + step
                    return fit.T @ change, fit.T @ torch.cholesky_inverse(L) @ fit.T.mT
                # Differences take p gradients: they wait until the updated information leads nowhere.
                H, is_exact = self._information(others, x, slope), True
                continue
            x[:p] -= step
            change += step
            new = others.evaluate(x)[1][:p]
            H, is_exact = bfgs(H, -step, new - slope), False
            slope = new
        return None

    def _information(self, others: MarginalFit, x: Tensor, slope: Tensor) -> Tensor:
        """The observed information on the coefficients at x, by differences of gradients, of which the one
        there is known, (p, p)."""
        rows, p = [], others.p
        part = _STEPS[not self.refit.result.plan.exact]
        for j in range(p):
            moved = x.clone()
            moved[j] += part * self._fit.hessian[j, j].abs().clamp(min=1e-6).rsqrt()
            rows.append((others.evaluate(moved)[1][:p] - slope) / (moved[j] - x[j]))
        found = torch.stack(rows)
        return (found + found.mT) / 2
