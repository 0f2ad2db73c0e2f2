"""The likelihood by a Cholesky factor of V: for small data and for any V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.fixed import FixedPart, check_data, traced
from openreml_nn.likelihood.problem import Cost, Evaluation, Problem, cholesky, factored
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.system.square_root import SquareRootEvaluation, within
from openreml_nn.support.checks import check_choice
from openreml_nn.support.errors import InputError, NumericalError
from openreml_nn.terms.base import Meeting
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.term import Term, residual_terms

__all__ = ["Dense", "DenseProblem", "check_method", "restricted_log_likelihood"]

#: Of so few rows it is kept, between V and the scores, which of them share levels.
_FEW_ROWS = 500


def restricted_log_likelihood(y: Tensor, X: Tensor, V: Tensor, method: str = "reml") -> Tensor:
    r"""Restricted (or full) Gaussian log-likelihood of a linear mixed model.

    .. math::
        \ell_R = -\tfrac12\left[(n-p)\log 2\pi + \log|V| + \log|X^\top V^{-1}X|
                 + y^\top P y\right],

    .. math::
        P = V^{-1} - V^{-1}X(X^\top V^{-1}X)^{-1}X^\top V^{-1}

    and :math:`\ell = -\tfrac12[n\log 2\pi + \log|V| + y^\top P y]`, the fixed
    effects at their generalised least-squares estimate (BLUE).

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p). Columns that depend on earlier ones are
            dropped with a warning.
        V: covariance of y (n, n), symmetric.
        method: ``"reml"`` or ``"ml"``.

    Returns:
        A scalar, differentiable in y, X and V.

    Raises:
        NotPositiveDefiniteError: if V is not positive definite (a ValueError).
        NumericalError: if V is so close to singular that rounding leaves too few digits.
        TypeError, InputError: if dtypes or shapes do not fit, V is not symmetric, or a value is
            not finite.

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
        _check_covariance(V, y)
    fixed = FixedPart.plain(y, X) if wrapped else FixedPart.of(y, X)
    whole = Term(IdentityDesign(len(y)), DenseCovariance(V))
    return DenseProblem(fixed, [whole], method).recorded([V])


def _check_covariance(V: Tensor, y: Tensor) -> None:
    if not isinstance(V, Tensor) or not V.is_floating_point():
        got = V.dtype if isinstance(V, Tensor) else type(V).__name__
        raise TypeError(f"`V` is {got}: expected a floating-point tensor")
    if V.shape != (len(y), len(y)):
        raise InputError(f"`V` has shape {tuple(V.shape)}: expected {(len(y), len(y))}")
    if V.dtype != y.dtype:
        raise TypeError(f"`V` is {V.dtype} but `y` is {y.dtype}: convert one of them")
    if V.device != y.device:
        raise InputError(f"`V` is on {V.device} but `y` on {y.device}: move one of them")
    given = V.detach()
    if not bool(torch.isfinite(given).all()):
        row = int((~torch.isfinite(given)).any(1).nonzero()[0])
        raise InputError(f"`V` is not finite in row {row}")
    apart = (given - given.mT).abs()
    if float(apart.max()) > 1e3 * torch.finfo(V.dtype).eps * float(given.abs().max()):
        i, j = divmod(int(apart.argmax()), len(y))
        raise InputError(f"`V` is not symmetric: its entries ({i}, {j}) and ({j}, {i}) differ")


def check_method(method: str) -> None:
    """Raise InputError unless ``method`` is known."""
    check_choice("method", method, ("reml", "ml"))


@dataclass(frozen=True)
class Dense(Solver):
    """A Cholesky factor of V (n, n): for small data, and for any V."""

    name: ClassVar[str] = "dense"

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost:
        n = terms[0].design.shape[0]
        work = n**3 / 3 + 2 * n**2 * (p + 1)
        steps = (f"Cholesky factor of V, {n} x {n}",)
        return Cost(work, 3.0 * dtype.itemsize * n**2, True, "V as a whole", steps)

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return DenseProblem(fixed, terms, method)


class DenseProblem(Problem):
    """Depends on the matrix of each term; V is their sum."""

    takes_data = True
    prepares = False

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        self.terms = terms

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        return [term.covariance.matrix for term in terms]

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        evaluation = _DenseEvaluation(self, self._with(matrices))
        self.check_rounding(evaluation.rounding)
        return evaluation.log_likelihood

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _DenseEvaluation(self, self.placed(terms))

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        return SquareRootEvaluation.of(self, self.placed(terms))

    def placed(self, terms: Sequence[Term]) -> list[Term]:
        """The prepared terms with the covariances of others."""
        pairs = zip(self.terms, terms, strict=True)
        return [own.with_covariance(term.covariance) for own, term in pairs]

    def _with(self, matrices: Sequence[Tensor]) -> list[Term]:
        pairs = zip(self.terms, matrices, strict=True)
        return [term.with_covariance(term.covariance.with_matrix(matrix)) for term, matrix in pairs]


class _DenseEvaluation(Evaluation):
    def __init__(self, problem: DenseProblem, terms: Sequence[Term]) -> None:
        self.problem = problem
        self._terms = terms
        y, Q = problem.fixed.y, problem.fixed.Q
        # Of many rows it is made again, as it would be held as long as V.
        few = problem.n <= _FEW_ROWS
        self._meetings = [term.meeting() if few else None for term in terms]
        V = _total(terms, self._meetings)
        if traced(V):
            L = cholesky(V, "V")
            log_det_v = 2 * L.diagonal().log().sum()
        else:
            L, log_det_v, lost = factored(V, "V")
            self.rounding = self.recorded_rounding = torch.finfo(V.dtype).eps * lost
        self._L = L
        log_det_x: Tensor | float = 0.0
        if problem.p:
            white = torch.linalg.solve_triangular(L, torch.cat([Q, y[:, None]], 1), upper=False)
            log_det_x = self._profile_fixed(white[:, :-1], white[:, -1])
        else:
            fixed = problem.fixed  # of no columns, as these are
            self._white_Q, self.gamma, self.gamma_factor = Q, fixed.offset, fixed.T
            self._residual = torch.linalg.solve_triangular(L, y[:, None], upper=False)[:, 0]
        self.y_p_y = self._residual @ self._residual
        self.log_likelihood = problem.assemble(log_det_v, log_det_x, self.y_p_y)

    def _profile_fixed(self, white_Q: Tensor, white_y: Tensor) -> Tensor:
        """Take the fixed effects off white rows by least squares; log |Q' V^-1 Q|."""
        self._white_Q = white_Q
        self.gamma_factor = cholesky(white_Q.mT @ white_Q, "X' V^-1 X")
        half = torch.linalg.solve_triangular(
            self.gamma_factor, (white_Q.mT @ white_y)[:, None], upper=False
        )
        self.gamma = torch.linalg.solve_triangular(self.gamma_factor.mT, half, upper=True)[:, 0]
        self._residual = white_y - white_Q @ self.gamma  # L^-1 (y - Q gamma)
        return 2 * self.gamma_factor.diagonal().log().sum()

    def _back(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._L.mT, x, upper=True)

    def data_scores(self) -> tuple[Tensor, Tensor]:
        return super().data_scores() if self.problem.p else (-self._p_y, self._white_Q)

    def inverse_times_data(self) -> Tensor:
        if not self.problem.p:
            return self._p_y[:, None]
        white_y = self._residual + self._white_Q @ self.gamma
        return self._back(torch.cat([self._white_Q, white_y[:, None]], 1))

    @cached_property
    def _p_y(self) -> Tensor:
        return self._back(self._residual[:, None])[:, 0]

    def _projector(self) -> Tensor:
        """P itself (n, n)."""
        half = torch.linalg.solve_triangular(self.gamma_factor, self._white_Q.mT, upper=False)
        lost = self._back(half.mT)
        return torch.cholesky_inverse(self._L).addmm_(lost, lost.mT, alpha=-1)

    def scores_unchecked(self) -> list[Tensor]:
        p_y = self._p_y
        reml = self.problem.method == "reml" and self.problem.p > 0
        trace = self._projector() if reml else torch.cholesky_inverse(self._L)
        # In place: matrices of this size take longer to write than to compute.
        S = trace.addr_(p_y, p_y, beta=-0.5, alpha=0.5).mT  # by rows, as the others are
        pairs = zip(self._terms, self._meetings, strict=True)
        return [term.fold(S, meeting) for term, meeting in pairs]

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        p_y = self._p_y
        working = p_y.new_zeros(len(p_y), len(derivatives[0]))  # dV_j P y
        for term, dG in zip(self._terms, derivatives, strict=True):
            u = term.design.t_matmul(p_y[:, None])
            moved = [term.covariance.along(d, u) for d in dG]
            working = working + term.design.matmul(torch.cat(moved, 1))
        white = torch.linalg.solve_triangular(self._L, working, upper=False)
        part = torch.linalg.solve_triangular(
            self.gamma_factor, self._white_Q.mT @ white, upper=False
        )
        return (white.mT @ white - part.mT @ part) / 2

    def random_effects(self) -> list[RandomEffects]:
        residual = residual_terms(self._terms)
        random = [i for i in range(len(self._terms)) if i not in residual]
        p_y, eps = self._p_y, torch.finfo(self._L.dtype).eps
        roots: list[Tensor] | None = None
        rounding = self.rounding**2 / eps
        if random and residual:
            spread = self._spread_roots(random, residual)
            # By the residuals, unless these are so alike that V has more digits than R.
            if spread is not None:
                found_by, gain = spread
                if self.problem.has_digits(eps * gain) or eps * gain < rounding:
                    roots, rounding = found_by, eps * gain
        if random and not self.problem.has_digits(rounding):
            better = self.problem.precise(self.at_terms)
            if better is not None and better.rounding < rounding:
                return better.random_effects()
            self.problem.check_rounding(rounding)
        projector = self._projector() if random and roots is None else p_y
        found = []
        for j, i in enumerate(random):
            term = self._terms[i]
            u = term.design.t_matmul(p_y[:, None])
            b = term.covariance.multiply(u)[:, 0]
            if roots is None:
                # The prior less what is known: a difference, of which more digits are lost.
                found.append(RandomEffects.of(term, b, within(term, projector)))
            else:
                found.append(RandomEffects.of_roots(term, b, roots[j]))
        return found

    def _spread_roots(
        self, random: list[int], residual: list[int]
    ) -> tuple[list[Tensor], float] | None:
        r"""Roots of prediction-error variances :math:`\Lambda M^{-1} \Lambda^\top`, with what the
        fixed effects add, and the largest entry of M; None where G is not positive semi-definite, or
        R or M not positive definite."""
        terms, Q = [self._terms[i] for i in random], self.problem.fixed.Q
        try:
            roots = [term.covariance.root() for term in terms]
            own = [self._terms[i] for i in residual]
            L = cholesky(_total(own, [None] * len(own)), "R")
        except NumericalError:
            return None
        parts = [
            g.multiply(term.design.dense(Q).mT, transpose=True).mT
            for g, term in zip(roots, terms, strict=True)
        ]
        W = torch.linalg.solve_triangular(L, torch.cat([*parts, Q], 1), upper=False)
        W, X = W[:, : W.shape[1] - Q.shape[1]], W[:, W.shape[1] - Q.shape[1] :]
        M = W.mT @ W
        M.diagonal().add_(1)
        try:
            Lc = cholesky(M, "M")
        except NumericalError:
            return None
        eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
        of_X = torch.cholesky_solve(W.mT @ X, Lc)
        lost = torch.linalg.solve_triangular(self.gamma_factor, of_X.mT, upper=False).mT
        half = torch.cat([torch.linalg.solve_triangular(Lc.mT, eye, upper=True), lost], 1)
        sizes = [part.shape[1] for part in parts]
        found = [g.multiply(part) for g, part in zip(roots, half.split(sizes), strict=True)]
        return found, float(M.diagonal().max())


def _total(terms: Sequence[Term], meetings: Sequence[Meeting | None]) -> Tensor:
    """V, what is a multiple of the identity added to its diagonal alone."""
    nugget = [term.covariance.matrix.reshape(()) for term in terms if term.is_residual]
    pairs = [pair for pair in zip(terms, meetings, strict=True) if not pair[0].is_residual]
    if not pairs:
        return torch.stack([term.dense() for term in terms]).sum(0)
    parts = [term.dense(meeting) for term, meeting in pairs]
    variance = sum(nugget[1:], nugget[0]) if nugget else None
    V, (first, _) = parts[0], pairs[0]
    if torch.is_grad_enabled() or traced(V, variance) or isinstance(first.design, IdentityDesign):
        for part in parts[1:]:
            V = V + part
        return V if variance is None else torch.diagonal_scatter(V, V.diagonal() + variance)
    # What nobody else holds is written to in place.
    for part in parts[1:]:
        V.add_(part)
    if variance is not None:
        V.diagonal().add_(variance)
    return V
