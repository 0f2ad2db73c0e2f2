"""What every solver offers: a likelihood in some covariance matrices, with derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor

from openreml_nn.covariance.design import IndexedDesign
from openreml_nn.covariance.terms import RepeatedCovariance, ScaledCovariance, Term
from openreml_nn.errors import NumericalError
from openreml_nn.likelihood.fixed import FixedPart

__all__ = ["Evaluation", "NotPositiveDefiniteError", "Problem", "RandomEffects", "cholesky"]


class NotPositiveDefiniteError(NumericalError, ValueError):
    """A matrix that must be positive definite is not; the message says which."""


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """Cholesky factor; raises an error that names the matrix. Nothing is added to it."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if torch._C._functorch.is_functorch_wrapped_tensor(matrix):
        return factor
    # A NaN or an infinite entry anywhere ends on the diagonal.
    finite = torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all()
    if bool((info != 0).any()) or not bool(finite):
        raise NotPositiveDefiniteError(f"{what} is not positive definite")
    return factor


@dataclass(frozen=True)
class RandomEffects:
    r"""BLUPs of one term.

    Attributes:
        name: path of the term in the tree.
        values: (q, k) BLUPs :math:`G Z^\top P y`.
        variances: (q, k, k) prediction-error variances, the diagonal blocks
            of :math:`G - G Z^\top P Z G`.
    """

    name: str
    values: Tensor
    variances: Tensor

    @classmethod
    def of(cls, term: Term, values: Tensor, z_p_z: Tensor) -> RandomEffects:
        """From :math:`G Z^\\top P y` (q,) and :math:`Z^\\top P Z` (q, q)."""
        z, g = term.design, term.covariance
        k = z.effects if isinstance(z, IndexedDesign) else 1
        if isinstance(g, RepeatedCovariance | ScaledCovariance):
            k = max(k, g.matrix.shape[0])
        G, half = g.whole(len(values)), g.multiply(z_p_z)  # G, G Z' P Z
        levels = (len(values) // k, k)
        prior = G.unflatten(1, levels).unflatten(0, levels).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        lost = half.unflatten(0, levels) @ G.unflatten(0, levels).mT
        return cls(term.name, values.reshape(-1, k), prior - lost)

    @classmethod
    def of_levels(cls, name: str, values: Tensor, prior: Tensor, z_p_z: Tensor) -> RandomEffects:
        """From BLUPs (q, k), G and :math:`Z^\\top P Z` by levels, (q or 1, k, k) and (q, k, k)."""
        return cls(name, values, prior - prior @ z_p_z @ prior)


class Evaluation:
    """The likelihood at one point; what derives from it is computed when asked for.

    Attributes:
        log_likelihood: the (restricted) log-likelihood, a scalar tensor.
        y_p_y: the generalised residual sum of squares :math:`y^\\top P y`.
        gamma: (p,) generalised least-squares coefficients of Q.
        gamma_factor: (p, p) Cholesky factor of :math:`Q^\\top V^{-1} Q`.
        error: Monte Carlo standard error of the log-likelihood; 0 where it is exact.
    """

    log_likelihood: Tensor
    y_p_y: Tensor
    gamma: Tensor
    gamma_factor: Tensor
    error: float = 0.0
    _problem: Problem

    def scores(self) -> list[Tensor]:
        r""":math:`\partial\ell/\partial G_t` for each matrix of the problem, in its shape."""
        raise NotImplementedError

    def data_scores(self) -> tuple[Tensor, Tensor]:
        r"""Derivatives of the log-likelihood by the problem's y (n,) and Q (n, p).

        :math:`\partial\ell/\partial y = -Py`, and :math:`\partial\ell/\partial Q =
        Py\,\hat\gamma^\top`, less :math:`V^{-1}Q(Q^\top V^{-1}Q)^{-1}` with REML.
        """
        V_f = self._inverse_times_data()
        V_Q, V_y = V_f[:, :-1], V_f[:, -1]
        p_y = V_y - V_Q @ self.gamma
        by_Q = torch.outer(p_y, self.gamma)
        if self._problem.method == "reml":
            by_Q = by_Q - V_Q @ torch.cholesky_inverse(self.gamma_factor)
        return -p_y, by_Q

    def _inverse_times_data(self) -> Tensor:
        """:math:`V^{-1} [Q | y]`, (n, p + 1)."""
        raise NotImplementedError

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        r"""Average information :math:`\tfrac12 y^\top P\dot V_i P\dot V_j P y`.

        Args:
            derivatives: for each matrix of the problem, its derivatives by
                the m parameters, (m, *shape).

        Shape:
            Output: (m, m).

        Reference:
            Gilmour, Thompson and Cullis, Biometrics 51 (1995), eq. 7.
        """
        raise NotImplementedError

    def random_effects(self) -> list[RandomEffects]:
        """BLUPs with prediction-error variances, term by term."""
        raise NotImplementedError


class Problem:
    """A response, a model matrix and designs, prepared for one solver.

    Args:
        fixed: the prepared response and model matrix.
        terms: the lowered covariance; only its designs are kept.
        method: ``"reml"`` or ``"ml"``.
    """

    #: Whether evaluations have derivatives by the data, and the data can be exchanged.
    takes_data = False

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        self.fixed = fixed
        self.method = method
        self.n, self.p = fixed.Q.shape
        self._last: tuple[list[Tensor], Evaluation] | None = None

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        """The matrices on which the likelihood depends, from terms of the same designs."""
        raise NotImplementedError

    def with_fixed(self, fixed: FixedPart) -> Problem:
        """The same designs with other data: what depends on designs alone is kept."""
        found = copy(self)
        found.fixed = fixed
        found.p = fixed.Q.shape[1]
        found._last = None
        return found

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        """The log-likelihood by plain differentiable operations."""
        raise NotImplementedError

    def _evaluate(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        raise NotImplementedError

    def evaluate(self, terms: Sequence[Term]) -> Evaluation:
        """The likelihood at these terms, without recording.

        The last evaluation is kept, as plain numbers, and given again for
        equal matrices: a loss and the step that follows share one.
        """
        with torch.no_grad():
            matrices = [matrix.detach() for matrix in self.matrices(terms)]
            if self._last is not None and all(map(torch.equal, self._last[0], matrices)):
                return self._last[1]
            evaluation = self._evaluate([term.detach() for term in terms], matrices)
            self._last = ([matrix.clone() for matrix in matrices], evaluation)
            return evaluation

    def _profile(
        self, log_det_v: Tensor, xx: Tensor, xy: Tensor, yy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Profile the fixed effects out.

        Args:
            log_det_v: :math:`\log|V|`.
            xx: :math:`Q^\top V^{-1} Q` (p, p).
            xy: :math:`Q^\top V^{-1} y` (p,).
            yy: :math:`y^\top V^{-1} y`.

        Returns:
            The log-likelihood, the Cholesky factor C of ``xx`` and
            :math:`C^{-1} Q^\top V^{-1} y`.
        """
        factor = cholesky(xx, "X' V^-1 X")
        white = torch.linalg.solve_triangular(factor, xy[:, None], upper=False)[:, 0]
        log_det_x = 2 * factor.diagonal().log().sum()
        return self._log_likelihood(log_det_v, log_det_x, yy - white @ white), factor, white

    def _log_likelihood(self, log_det_v: Tensor, log_det_x: Tensor, y_p_y: Tensor) -> Tensor:
        """Assemble the log-likelihood of the original response and model matrix."""
        if self.method == "ml":
            return -(self.n * log(2 * pi) + log_det_v + y_p_y) / 2
        log_det_x = log_det_x - 2 * self.fixed.log_det
        return -((self.n - self.p) * log(2 * pi) + log_det_v + log_det_x + y_p_y) / 2
