r"""The likelihood by square roots, where random effects dwarf the residual.

Sums such as :math:`V = R + Z G Z^\top` and cross-products :math:`Z^\top R^{-1} Z` lose the digits of
R that are beyond those of :math:`Z G Z^\top`: twice as many as need be. With white rows
(:math:`R = I`) and :math:`W = Z\Lambda` everything is a least-squares problem,

.. math::
    \begin{bmatrix} W \\ I \end{bmatrix} = \begin{bmatrix} Q_1 \\ Q_2 \end{bmatrix} T,\qquad
    E = \begin{bmatrix} I \\ 0 \end{bmatrix} - Q Q_1^\top,\qquad V^{-1} = E^\top E,\qquad
    |V| = |T|^2,\qquad \mathrm{cov}(b \mid y) = \Lambda T^{-1} T^{-\top} \Lambda^\top

of sums of squares without a difference. It takes the rows one by one, and is for small data.

Reference:
    Björck, Numerical Methods for Least Squares Problems (1996), sections 1.4 and 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.problem import Evaluation, Problem, cholesky, pivot_loss
from openreml_nn.support.errors import NotPositiveDefiniteError, NumericalError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.term import Term, residual_terms

__all__ = ["SquareRootEvaluation", "within"]

#: It is for likelihoods that take no more operations than these, about two seconds.
_MOST_WORK = 2e10


class SquareRootEvaluation(Evaluation):
    """The likelihood of some terms, computed in float64.

    Raises:
        NotPositiveDefiniteError: if the residual's covariance is not positive definite, or a
            random term's not positive semi-definite.
    """

    @classmethod
    def of(cls, problem: Problem, terms: Sequence[Term]) -> SquareRootEvaluation | None:
        """None where the terms have no residual, or there is too much data."""
        n, q = problem.n, sum(term.design.shape[1] for term in terms)
        if not residual_terms(terms) or 8.0 * (n + q) * (n + q) * max(n, q) > _MOST_WORK:
            return None
        try:
            found = cls(problem, terms)
            found.at(terms, problem.matrices(terms))
            return found
        except NumericalError:  # a G or an R without a root
            return None

    def __init__(self, problem: Problem, terms: Sequence[Term]) -> None:
        self.problem, self._dtype = problem, problem.fixed.y.dtype
        self._terms = terms = [term.to(torch.float64) for term in terms]
        y, X = problem.fixed.y.double(), problem.fixed.Q.double()
        self._n = n = len(y)
        self._residual = residual_terms(terms)
        self._random = [i for i in range(len(terms)) if i not in self._residual]
        R = torch.stack([terms[i].dense() for i in self._residual]).sum(0)
        self._L = cholesky(R, "R")
        self._y, self._X = self._white(y[:, None]), self._white(X)
        Z = [terms[i].design.dense(R) for i in self._random]
        roots = [terms[i].covariance.root() for i in self._random]
        parts = [root.multiply(z.mT, transpose=True).mT for root, z in zip(roots, Z, strict=True)]
        self._Z = [self._white(z) for z in Z]
        W = self._white(torch.cat(parts, 1)) if parts else R[:, :0]
        gain = float((W * W).sum(0).max()) if W.shape[1] else 0.0
        Q, T = torch.linalg.qr(torch.cat([W, torch.eye(W.shape[1]).to(W)]))
        self._E = -(Q @ Q[:n].mT)  # V^-1/2 in white rows, (n + q, n)
        self._E[:n].diagonal().add_(1)
        # Lambda T^-1 and the like, term by term.
        eye = torch.eye(len(T)).to(T)
        self._half = self._to_effects(roots, solve_triangular(T, eye, upper=True))
        basis, C = torch.linalg.qr(self._E @ self._X)
        sign = C.diagonal().sign()
        basis, C = basis * sign, C * sign[:, None]
        factor = C.mT
        self._P = self._E - basis @ (basis.mT @ self._E)  # P^1/2
        rest = self._E @ self._y
        gamma = solve_triangular(C, basis.mT @ rest, upper=True)
        e = rest - basis @ (basis.mT @ rest)
        e = e - basis @ (basis.mT @ e)
        self._e = e
        self._blups = [-x[:, 0] for x in self._to_effects(roots, e[n:])]
        of_X = self._to_effects(roots, (self._E @ self._X)[n:])
        self._lost = [solve_triangular(factor, x.mT, upper=False).mT for x in of_X]
        log_det = 2 * self._L.diagonal().log().sum() + 2 * T.diagonal().abs().log().sum()
        y_p_y = (e * e).sum()
        found = problem.assemble(log_det, 2 * C.diagonal().log().sum(), y_p_y)
        if not bool(torch.isfinite(found)):
            raise NotPositiveDefiniteError("X' V^-1 X is not positive definite")
        self.log_likelihood, self.y_p_y = found.to(self._dtype), y_p_y.to(self._dtype)
        self.gamma, self.gamma_factor = gamma[:, 0].to(self._dtype), factor.to(self._dtype)
        own = torch.finfo(torch.float64).eps
        roots_lose = max((terms[i].covariance.root_condition() for i in self._random), default=1.0)
        size = float((self._y * self._y).sum() / (n + y_p_y))
        spread = max(gain, size, 1.0)
        self.rounding = own * (spread**0.5 + pivot_loss(R, self._L) + min(roots_lose, spread))
        if self._dtype != torch.float64:
            # The data themselves have no more digits.
            self.rounding += torch.finfo(self._dtype).eps * spread**0.5

    def _white(self, x: Tensor) -> Tensor:
        return solve_triangular(self._L, x, upper=False)

    def _back(self, x: Tensor) -> Tensor:
        return solve_triangular(self._L.mT, x, upper=True)

    def _to_effects(self, roots: Sequence[Covariance], x: Tensor) -> list[Tensor]:
        """Lambda x, term by term."""
        sizes = [self._terms[i].design.shape[1] for i in self._random]
        parts = x.split(sizes) if sizes else ()
        return [root.multiply(part) for root, part in zip(roots, parts, strict=True)]

    def inverse_times_data(self) -> Tensor:
        f = torch.cat([self._X, self._y], 1)
        return self._back(self._E.mT @ (self._E @ f)).to(self._dtype)

    def _trace_root(self) -> Tensor:
        """The root of P, or with ML of the inverse of V."""
        return self._P if self.problem.method == "reml" else self._E

    def scores_unchecked(self) -> list[Tensor]:
        root, found = self._trace_root(), {}
        for i, z in zip(self._random, self._Z, strict=True):
            own, u = root @ z, (self._P @ z).mT @ self._e
            found[i] = self._terms[i].covariance.fold((u @ u.mT - own.mT @ own) / 2)
        p_y = self._back(self._P.mT @ self._e)
        back = self._back(root.mT)
        S = (p_y @ p_y.mT - back @ back.mT) / 2
        for i in self._residual:
            found[i] = self._terms[i].covariance.fold(within(self._terms[i], S))
        by_term = [found[i].to(self._dtype) for i in range(len(self._terms))]
        return self.problem.by_matrix(by_term)

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        p_y = self._back(self._P.mT @ self._e)
        working = p_y.new_zeros(self._n, len(derivatives[0]))
        us = {i: (self._P @ z).mT @ self._e for i, z in zip(self._random, self._Z, strict=True)}
        for i, (term, dG) in enumerate(
            zip(self._terms, self.problem.by_term(derivatives), strict=True)
        ):
            u = us[i] if i in us else term.design.t_matmul(p_y)
            moved = [term.covariance.along(d.double(), u) for d in dG]
            if moved:
                working = working + term.design.matmul(torch.cat(moved, 1))
        half = self._P @ self._white(working)
        return (half.mT @ half / 2).to(self._dtype)

    def random_effects(self) -> list[RandomEffects]:
        pieces = zip(self._random, self._blups, self._half, self._lost, strict=True)
        return [
            RandomEffects.of_roots(self._terms[i], b, torch.cat([half, lost], 1)).to(self._dtype)
            for i, b, half, lost in pieces
        ]


def within(term: Term, square: Tensor) -> Tensor:
    """:math:`Z^\\top S Z` for the term's design Z."""
    if isinstance(term.design, IdentityDesign):
        return square
    return term.design.t_matmul(term.design.t_matmul(square).mT)
