"""The likelihood by a Cholesky factor of V: for small data and for any V."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.covariance.terms import Term
from openreml_nn.errors import InputError
from openreml_nn.likelihood.fixed import FixedPart, check_data, traced
from openreml_nn.likelihood.problem import Evaluation, Problem, RandomEffects, cholesky

__all__ = ["DenseProblem", "restricted_log_likelihood"]


def restricted_log_likelihood(y: Tensor, X: Tensor, V: Tensor, method: str = "reml") -> Tensor:
    r"""Restricted (or full) Gaussian log-likelihood of a linear mixed model.

    .. math::
        \ell_R = -\tfrac12\left[(n-p)\log 2\pi + \log|V| + \log|X^\top V^{-1}X|
                 + y^\top P y\right],\quad
        P = V^{-1} - V^{-1}X(X^\top V^{-1}X)^{-1}X^\top V^{-1}

    and :math:`\ell = -\tfrac12[n\log 2\pi + \log|V| + y^\top P y]`, the fixed
    effects at their generalised least-squares estimate (BLUE).

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        V: covariance of y (n, n).
        method: ``"reml"`` or ``"ml"``.

    Returns:
        A scalar, differentiable in y, X and V.

    Raises:
        NotPositiveDefiniteError: if V is not positive definite (a ValueError).
        TypeError, ValueError: if dtypes or shapes do not fit or a value is not finite.

    Reference:
        Patterson and Thompson, Biometrika 58 (1971); Harville, JASA 72 (1977), eq. 3.2.

    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> restricted_log_likelihood(y, X, torch.eye(3))
    tensor(-4.7205)
    """
    check_method(method)
    wrapped = traced(y, X, V)
    if not wrapped:
        check_data(y, X)
    if V.shape != (len(y), len(y)):
        raise ValueError(f"`V` has shape {tuple(V.shape)}: expected {(len(y), len(y))}")
    fixed = FixedPart.plain(y, X) if wrapped else FixedPart.of(y, X)
    return DenseProblem(fixed, [], method).recorded([V])


def check_method(method: str) -> None:
    """Raise ValueError unless ``method`` is known."""
    if method not in ("reml", "ml"):
        raise InputError(f"`method` is {method!r}: expected 'reml' or 'ml'")


class DenseProblem(Problem):
    """Depends on one matrix, V itself."""

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        total = terms[0].dense()
        for term in terms[1:]:
            total = total + term.dense()
        return [total]

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        return _DenseEvaluation(self, [], matrices[0]).log_likelihood

    def _evaluate(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _DenseEvaluation(self, terms, matrices[0])


class _DenseEvaluation(Evaluation):
    def __init__(self, problem: Problem, terms: Sequence[Term], V: Tensor) -> None:
        self._problem = problem
        self._terms = terms
        y, Q = problem.fixed.y, problem.fixed.Q
        self._L = L = cholesky(V, "V")
        white = torch.linalg.solve_triangular(L, torch.cat([Q, y[:, None]], 1), upper=False)
        self._white_Q, white_y = white[:, :-1], white[:, -1]
        self.gamma_factor = cholesky(self._white_Q.mT @ self._white_Q, "X' V^-1 X")
        half = torch.linalg.solve_triangular(
            self.gamma_factor, (self._white_Q.mT @ white_y)[:, None], upper=False
        )
        self.gamma = torch.linalg.solve_triangular(self.gamma_factor.mT, half, upper=True)[:, 0]
        self._residual = white_y - self._white_Q @ self.gamma  # L^-1 (y - Q gamma)
        self.y_p_y = self._residual @ self._residual
        self.log_likelihood = problem._log_likelihood(
            2 * L.diagonal().log().sum(),
            2 * self.gamma_factor.diagonal().log().sum(),
            self.y_p_y,
        )

    def _back(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._L.mT, x, upper=True)

    def _p_y(self) -> Tensor:
        return self._back(self._residual[:, None])[:, 0]

    def _projector(self) -> Tensor:
        """P itself (n, n)."""
        half = torch.linalg.solve_triangular(self.gamma_factor, self._white_Q.mT, upper=False)
        return torch.cholesky_inverse(self._L) - self._back(half.mT) @ self._back(half.mT).mT

    def scores(self) -> list[Tensor]:
        p_y = self._p_y()
        reml = self._problem.method == "reml"
        trace = self._projector() if reml else torch.cholesky_inverse(self._L)
        return [(torch.outer(p_y, p_y) - trace) / 2]

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        working = (derivatives[0] @ self._p_y()).mT  # (n, m)
        white = torch.linalg.solve_triangular(self._L, working, upper=False)
        part = torch.linalg.solve_triangular(
            self.gamma_factor, self._white_Q.mT @ white, upper=False
        )
        return (white.mT @ white - part.mT @ part) / 2

    def random_effects(self) -> list[RandomEffects]:
        p_y, projector = self._p_y(), self._projector()
        found = []
        for term in self._terms:
            if term.is_residual:
                continue
            u = term.design.t_matmul(p_y[:, None])
            b = term.covariance.multiply(u)[:, 0]
            half = term.design.t_matmul(projector)
            found.append(RandomEffects.of(term, b, term.design.t_matmul(half.mT)))
        return found
