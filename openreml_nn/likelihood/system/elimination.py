"""The largest factor eliminated from the system of the random effects, at one point."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.problem import Evaluation, cholesky, pivot_loss
from openreml_nn.likelihood.residual import White
from openreml_nn.likelihood.system.blocks import block_solve, block_times
from openreml_nn.likelihood.system.grouped import GroupedProblem
from openreml_nn.likelihood.system.placement import System
from openreml_nn.support.errors import NotPositiveDefiniteError, NumericalError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.term import Term

__all__ = ["EliminatedEvaluation", "inner", "root"]


class EliminatedEvaluation(Evaluation):
    r"""The factor with most columns eliminated, level by level.

    With :math:`D = I + \Lambda_1^\top A_{11} \Lambda_1 / s = C C^\top`, what is left of the other
    terms and of the data are :math:`E_{22}` and :math:`E_{2f}`.

    Attributes:
        system: cross-products of white rows.
        white: R, without a scalar residual's variance.
        s: that variance, 1 where there is none.
        first, rest: covariances of the eliminated terms, and of the others.
        L1: :math:`\Lambda_1`, (levels or 1, k, k).
        root2: :math:`\Lambda_2`, a root for each other term.
        C: Cholesky factor of D, (levels, k, k).
        half: :math:`C^{-1} \Lambda_1^\top`.
        half_f: :math:`C^{-1} \Lambda_1^\top A_{1f} / s`.
        N1: :math:`\Lambda_1 D^{-1} \Lambda_1^\top`.
        E2f: (q, p + 1).
        log_det: :math:`\log|R| + \log|D|`.
        gain_1: largest diagonal entry of D.
        pivot_loss: how many times rounding is magnified in the pivots of C.
    """

    problem: GroupedProblem
    system: System
    white: White

    def __init__(
        self, problem: GroupedProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
    ) -> None:
        self.problem = problem
        self.terms = terms
        self.matrices = matrices
        roles = problem.roles
        residual = matrices[: len(matrices) - len(roles.random)]
        self.system, self.white, s = at, white, s = problem.system(residual)
        self.s = s
        if not float(s) > 0:
            raise NotPositiveDefiniteError(f"V is not positive definite: residual variance {s:.6g}")
        self.first = [terms[i].covariance for i in roles.eliminated]
        self.rest = [terms[i].covariance for i in roles.rest]
        eye = torch.eye(problem.k, dtype=s.dtype, device=s.device)
        self.L1 = problem.joint_blocks([root(terms[i]) for i in roles.eliminated], eye)
        self.root2 = [self.root_of(terms[i]) for i in roles.rest]

        D = eye + block_times(block_times(self.L1.mT, at.A11), self.L1) / s
        self.C = cholesky(D, "V")
        self.gain_1 = D.diagonal(dim1=1, dim2=2).amax() if D.numel() else s.new_ones(())
        self.pivot_loss = pivot_loss(D, self.C)
        self.half = block_solve(self.C, self.L1.mT.expand_as(D))
        self.N1 = block_times(self.half.mT, self.half)  # L1 D^-1 L1'
        # By roots, because P times f is a difference where a level has fewer rows than effects.
        self.half_f = block_solve(self.C, block_times(self.L1.mT, at.A1f)) / s
        self.E2f = at.A2f
        if problem.q:
            self.E2f = at.A2f / s - at.W.t_times(block_times(self.half.mT, self.half_f) / s)
        self.log_det = (
            white.log_det + problem.n * s.log() + 2 * self.C.diagonal(dim1=1, dim2=2).log().sum()
        )

    @staticmethod
    def root_of(term: Term) -> Covariance:
        """The root of an other term's covariance."""
        return root(term)

    def reduced(self, x: Tensor) -> Tensor:
        r""":math:`(I + A_{11} G_1 / s)^{-1} x` for x (levels, k, m).

        Not as :math:`I - A_{11} \Lambda D^{-1} \Lambda^\top`: where a level has fewer rows than
        effects that is a difference of large numbers.
        """
        if not len(x):
            return x
        if self.problem.k == 1:
            return x / self.C**2
        return torch.linalg.lu_solve(*self._factors, x)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        problem, at = self.problem, self.system
        eye = torch.eye(problem.k, dtype=self.s.dtype, device=self.s.device)
        G1 = problem.joint_blocks(self.first, eye)
        LU, pivots = torch.linalg.lu_factor(eye + at.A11 @ G1 / self.s)
        return LU, pivots

    def profile(self, log_det: Tensor, F: Tensor) -> Tensor:
        """Profile the fixed effects out of :math:`[Q | y]^\top V^{-1} [Q | y]`; the log-likelihood."""
        found, self.gamma_factor, half = self.problem.profile(
            log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1]
        )
        self.y_p_y = F[-1, -1] - half @ half
        self.gamma = solve_triangular(self.gamma_factor.mT, half[:, None], upper=True)[:, 0]
        # What is left of the sums of squares, and how far the random effects exceed the residual.
        before, after = self.system.Aff.diagonal() / self.s, F.diagonal().clone()
        after[-1] = self.problem.n + self.y_p_y
        lost = max(float((before / after).max()), float(self.gain()), self.white.condition)
        self.rounding = torch.finfo(F.dtype).eps * lost
        return found

    def gain(self) -> Tensor:
        r"""The largest entry on the diagonal of :math:`\Lambda^\top Z^\top R^{-1} Z \Lambda`."""
        raise NotImplementedError


def root(term: Term) -> Covariance:
    try:
        return term.covariance.root()
    except NumericalError as error:
        raise NotPositiveDefiniteError(
            f"the covariance of {term.name!r} is not positive semi-definite: {error}"
        ) from None


def inner(a: Tensor, b: Tensor) -> Tensor:
    """:math:`a^\\top b` over levels and effects, of (levels, k, m) and (levels, k, r)."""
    return a.flatten(0, 1).mT @ b.flatten(0, 1)
