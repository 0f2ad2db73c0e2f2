r"""Degrees of freedom by Satterthwaite's method.

With :math:`\Phi(\theta) = (X^\top V^{-1} X)^{-1}` the covariance of the BLUEs, those of a contrast l
are

.. math:: \nu = \frac{2\,(l^\top\Phi l)^2}{g^\top A g},\qquad
    g = \frac{\partial\, l^\top\Phi l}{\partial\theta},

with A the inverse of the observed information of θ, in coordinates in which a variance of zero is
an ordinary point (the standard deviation, the Cholesky factor). There Φ and the likelihood are even
in a parameter that is zero: its g and its information with the others are zero, so that it is held
at the boundary and the others' information is used, as lmerTest does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from openreml_nn.covariance.transform import TransformIdentity
from openreml_nn.estimation import Result
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.inference.contrasts import FTest, Inference
from openreml_nn.inference.refit import Refit
from openreml_nn.likelihood.loss import Objective
from openreml_nn.support.errors import InputError, NotPositiveDefiniteError
from openreml_nn.support.spectrum import decomposed
from openreml_nn.support.warning import warn

__all__ = ["Satterthwaite", "covariance_slopes", "observed_spread"]

#: Differences are taken over this part of a standard error, and over so much of a parameter whose
#: coordinate has no unit, such as the logit of a correlation.
_STEP, _LONGEST = 5e-3, 5e-2
#: A direction of the information is flat when it has this little of the steepest's.
_FLAT = 1e-8


@dataclass(frozen=True)
class Satterthwaite(Inference):
    """Satterthwaite's degrees of freedom.

    Attributes:
        slopes: derivatives of the covariance by the parameters, (m, p, p).
        spread: covariance of the parameters, (m, m).

    Reference:
        Giesbrecht and Burns, Biometrics 41 (1985) 477; Fai and Cornelius, Journal of Statistical
        Computation and Simulation 54 (1996) 363, for several contrasts; Kuznetsova, Brockhoff and
        Christensen, Journal of Statistical Software 82(13) (2017), for parameters at zero.
    """

    slopes: Tensor
    spread: Tensor

    def df(self, contrast: Tensor) -> float:
        variance = contrast @ self.covariance @ contrast
        g = torch.einsum("i,mij,j->m", contrast, self.slopes, contrast)
        noise = float(g @ self.spread @ g)
        return 2 * float(variance) ** 2 / noise if noise > 0 else float("inf")

    def f_test(self, L: Tensor, beta: Tensor) -> FTest:
        from scipy import stats

        values, vectors = decomposed(L @ self.covariance @ L.mT, "the covariance of the hypotheses")
        rotated = vectors.mT @ L
        F = float(((rotated @ beta) ** 2 / values).mean())
        den = joint_df([self.df(row) for row in rotated])
        # SciPy has no F of infinitely many degrees of freedom, as where all variances are known.
        known = stats.chi2.sf(len(L) * F, len(L)) if den == inf else stats.f.sf(F, len(L), den)
        return FTest(F, len(L), den, float(known))

    @classmethod
    def of(cls, result: Result) -> Satterthwaite:
        """From the likelihood around the estimates.

        Raises:
            InputError: if a design, or a network in the covariance, is estimated.
        """
        objective = Refit(result).objective()
        if objective.moves:
            raise InputError(
                "`ddf` is 'satterthwaite', but a design of the model is estimated: use "
                "ddf='asymptotic'"
            )
        curvature = Curvature([objective])
        fixed, factor = objective.problem.fixed, objective.evaluate().gamma_factor
        phi = fixed.T @ torch.cholesky_inverse(factor) @ fixed.T.mT
        return cls(phi, covariance_slopes(objective, curvature), observed_spread(curvature))


def joint_df(each: list[float]) -> float:
    r"""Denominator of an F test from the degrees of freedom of its independent contrasts.

    That of an F statistic with the expectation of theirs, :math:`\frac1q\sum_j\nu_j/(\nu_j-2)`; 2
    where one of them has none.

    Reference:
        Fai and Cornelius, Journal of Statistical Computation and Simulation 54 (1996) 363.
    """
    if max(each) - min(each) < 1e-8 * max(each) or min(each) == float("inf"):
        return sum(each) / len(each)
    if min(each) <= 2:
        return 2.0
    expected = sum(df / (df - 2) if df < float("inf") else 1.0 for df in each)
    return 2 * expected / (expected - len(each))


def covariance_slopes(objective: Objective, curvature: Curvature) -> Tensor:
    r"""Derivatives :math:`\Phi X^\top V^{-1} \dot V_j V^{-1} X \Phi` of Φ by the coordinates,
    (m, p, p)."""
    evaluation, fixed = objective.evaluate(), objective.problem.fixed
    rows = evaluation.inverse_times_data()[:, :-1]  # V^-1 Q, (n, p)

    def sandwich(u: Tensor) -> tuple[Tensor]:
        """The Q' V^-1 V(u) V^-1 Q of all terms."""
        total = rows.new_zeros(rows.shape[1], rows.shape[1])
        for term in objective.terms(curvature.at.natural(0, u)):
            along = term.design.t_matmul(rows)
            total = total + along.mT @ term.covariance.multiply(along)
        return (total,)

    outer = fixed.T @ torch.cholesky_inverse(evaluation.gamma_factor)  # Phi in X's columns
    return outer @ jacobian(sandwich, curvature.u)[0] @ outer.mT


def observed_spread(curvature: Curvature) -> Tensor:
    """Covariance of the coordinates (m, m), the inverse of their observed information.

    Zero for those of which the data say nothing, and along directions that are flat.
    """
    u, size = curvature.u, len(curvature.u)
    held = [j for j in range(size) if not _is_told(curvature, j)]
    information = torch.zeros(size, size, dtype=u.dtype, device=u.device)
    for j in range(size):
        row = None if j in held else _information_along(curvature, j)
        if row is None:
            held.append(j)
        else:
            information[j] = row
    information[held] = 0
    information[:, held] = 0
    information = (information + information.mT) / 2
    scale = information.diagonal().abs().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    values, vectors = decomposed(
        information / (scale[:, None] * scale), "the information of the covariance parameters"
    )
    least = _FLAT * float(values.abs().max()) if size else 0.0
    if size and float(values[0]) < -1e-4:
        warn(
            "the likelihood rises from the estimates in some direction: they are not its maximum, "
            "and degrees of freedom are without that direction"
        )
    kept = values > least
    half = vectors[:, kept] / scale[:, None]
    return half / values[kept] @ half.mT


def _is_told(curvature: Curvature, j: int) -> bool:
    """Whether the data say anything of a coordinate."""
    trans = curvature.at.entries[j].trans
    bend, u = float(curvature.hessian[j, j].abs()), float(curvature.u[j])
    if trans.vanishes:
        return bend * u * u > 1e-10
    # One without a unit runs to infinity where what it stands for is at its bound.
    return bend > (0.0 if isinstance(trans, TransformIdentity) else 1e-6)


def _information_along(curvature: Curvature, j: int) -> Tensor | None:
    """A row of the observed information, by differences of the score of the fourth order.

    None where the likelihood does not exist on both sides.
    """
    trans = curvature.at.entries[j].trans
    h = _STEP / float(curvature.hessian[j, j].abs()) ** 0.5
    if not (trans.vanishes or isinstance(trans, TransformIdentity)):
        h = min(h, _LONGEST)
    slopes = []
    for step in (h, 2 * h):
        found = []
        for sign in (1, -1):
            moved = curvature.u.clone()
            moved[j] += sign * step
            try:
                found.append(_score(curvature, moved))
            except NotPositiveDefiniteError:
                return None
        slopes.append((found[0] - found[1]) / (2 * step))
    row = (slopes[1] - 4 * slopes[0]) / 3
    return row if bool(torch.isfinite(row).all()) else None


def _score(curvature: Curvature, u: Tensor) -> Tensor:
    """Derivative of the log-likelihood at coordinates u, also where one of them is negative."""
    (objective,) = curvature.objectives
    with torch.no_grad():
        weights = objective.problem.evaluate(objective.terms(curvature.at.natural(0, u))).scores()
    with torch.enable_grad():
        x = u.detach().requires_grad_()
        matrices = curvature.matrices(0, x)
        parts = [(w * m).sum() for w, m in zip(weights, matrices, strict=True)]
        total = torch.stack(parts).sum()
        (slope,) = torch.autograd.grad(total, x, materialize_grads=True)
    return slope
