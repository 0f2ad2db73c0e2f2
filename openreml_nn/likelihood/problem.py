"""What every solver offers: a likelihood in some covariance matrices, with derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite, log, pi

import torch
from torch import Tensor

from openreml_nn.likelihood.effects import Coefficients, RandomEffects
from openreml_nn.likelihood.fixed import FixedPart, traced
from openreml_nn.support.checks import is_finite
from openreml_nn.support.errors import NotPositiveDefiniteError, NumericalError
from openreml_nn.support.modes import outside_inference
from openreml_nn.terms.kernel import private
from openreml_nn.terms.term import Term

__all__ = [
    "Cost",
    "Evaluation",
    "Problem",
    "cholesky",
    "factored",
    "pivot_loss",
]

#: Bounds of relative errors: below the first an evaluation is taken as it is, above the second it
#: is refused.
_BOUNDS = {torch.float32: (1e-4, 1e-2), torch.float64: (1e-9, 1e-6)}


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """Cholesky factor; raises an error that names the matrix. Nothing is added to it."""
    if matrix.shape[-1] == 1 and not traced(matrix):
        # Single numbers, which may be many, are far faster as such.
        if not bool(((matrix > 0) & (matrix < inf)).all()):
            raise NotPositiveDefiniteError(f"{what} is not positive definite")
        return matrix.sqrt()
    factor, info = torch.linalg.cholesky_ex(matrix)
    if torch._C._functorch.is_functorch_wrapped_tensor(matrix):
        return factor
    # A NaN or an infinite entry anywhere ends on the diagonal.
    failed = int(info) if matrix.dim() == 2 else bool(info.any())
    if failed or not is_finite(factor.diagonal(dim1=-2, dim2=-1)):
        raise NotPositiveDefiniteError(f"{what} is not positive definite")
    return factor


def factored(matrix: Tensor, what: str) -> tuple[Tensor, Tensor, float]:
    """:func:`cholesky` of one matrix, with the log-determinant and :func:`pivot_loss`, which one look
    at the pivots yields."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    lost = (matrix.diagonal() / pivots).max().item()
    # A NaN or an infinite entry anywhere ends on the diagonal.
    if int(info) or not isfinite(lost):
        raise NotPositiveDefiniteError(f"{what} is not positive definite")
    return factor, pivots.log().sum(), lost


def pivot_loss(matrix: Tensor, factor: Tensor) -> float:
    """How many times rounding is magnified in the pivots of a Cholesky factor, at most."""
    if not factor.numel():
        return 1.0
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    return float((matrix.diagonal(dim1=-2, dim2=-1) / pivots).max())


@dataclass(frozen=True)
class Cost:
    """What an evaluation of the likelihood takes.

    Attributes:
        operations: floating-point operations.
        bytes: bytes that are held meanwhile.
        exact: whether the likelihood is computed, and not estimated by Monte Carlo.
        reason: what the solver makes use of, in a few words.
        steps: what is eliminated or decomposed, in order, with sizes.
    """

    operations: float
    bytes: float
    exact: bool
    reason: str
    steps: tuple[str, ...] = ()


class Evaluation:
    """The likelihood of some data at one point; what derives from it is computed when asked for.

    Attributes:
        log_likelihood: the (restricted) log-likelihood, a scalar tensor.
        y_p_y: the generalised residual sum of squares :math:`y^\\top P y`.
        gamma: (p,) generalised least-squares coefficients of Q.
        gamma_factor: (p, p) Cholesky factor of :math:`Q^\\top V^{-1} Q`.
        error: Monte Carlo standard error of the log-likelihood; 0 where it is exact.
        noise: what rounding leaves unknown of the log-likelihood, where that is more than of a sum of
            its terms; else 0.
        rounding: bound of the relative error that rounding leaves in all that derives from it:
            the precision of the dtype times how often the factorisations magnify it.
        recorded_rounding: the same of the plain formula that second derivatives come from.
        problem: the problem that it is an evaluation of.
        at_terms: the terms at which it was evaluated, as :meth:`at` has them.
        at_matrices: the matrices at which it was evaluated, as :meth:`at` has them.
    """

    log_likelihood: Tensor
    y_p_y: Tensor
    gamma: Tensor
    gamma_factor: Tensor
    error: float = 0.0
    noise: float = 0.0
    rounding: float = 0.0
    recorded_rounding: float = 0.0
    problem: Problem
    at_matrices: list[Tensor]
    at_terms: Sequence[Term]

    @cached_property
    def fixed(self) -> Coefficients:
        """BLUEs of the fixed effects, with their covariance."""
        part = self.problem.fixed
        with outside_inference(recording=False):
            spread = part.T @ torch.cholesky_inverse(self.gamma_factor) @ part.T.mT
            return Coefficients(part.coefficients(self.gamma), spread, tuple(part.columns))

    @cached_property
    def random(self) -> tuple[RandomEffects, ...]:
        """BLUPs of each random term, with prediction-error variances, level by level."""
        with outside_inference(recording=False):
            return tuple(self.random_effects())

    def at(self, terms: Sequence[Term], matrices: list[Tensor]) -> None:
        """Say where it was evaluated."""
        self.at_terms, self.at_matrices = terms, matrices

    @cached_property
    def _checked_scores(self) -> list[Tensor]:
        """Scores, with digits left for the derivatives by parameters.

        These are sums over entries of each matrix; where it is close to singular they cancel.
        """
        with outside_inference(recording=False):
            problem, found = self.problem, self.scores_unchecked()
            terms = sum(map(_size_of_product, found, self.at_matrices))
            lost = self.rounding * terms / (problem.n + float(self.y_p_y))
            if problem.has_digits(lost):
                return found
            better = problem.more_precise(self)
            if better is not None:
                return better.scores()
            problem.check_rounding(lost)
            return found

    def scores(self) -> list[Tensor]:
        r""":math:`\partial\ell/\partial G_t` for each matrix of the problem, in its shape.

        Raises:
            NumericalError: if rounding leaves too few digits.
        """
        return self._checked_scores

    def scores_unchecked(self) -> list[Tensor]:
        """:meth:`scores`, whatever digits are lost in sums over them."""
        raise NotImplementedError

    def data_scores(self) -> tuple[Tensor, Tensor]:
        r"""Derivatives of the log-likelihood by the problem's y (n,) and Q (n, p).

        :math:`\partial\ell/\partial y = -Py`, and :math:`\partial\ell/\partial Q =
        Py\,\hat\gamma^\top`, less :math:`V^{-1}Q(Q^\top V^{-1}Q)^{-1}` with REML.
        """
        V_f = self.inverse_times_data()
        V_Q, V_y = V_f[:, :-1], V_f[:, -1]
        if not self.problem.p:
            return -V_y, V_Q
        p_y = V_y - V_Q @ self.gamma
        by_Q = torch.outer(p_y, self.gamma)
        if self.problem.method == "reml":
            by_Q = by_Q - V_Q @ torch.cholesky_inverse(self.gamma_factor)
        return -p_y, by_Q

    def inverse_times_data(self) -> Tensor:
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
    #: Whether what is prepared of designs alone takes long, so that it is kept for other data.
    prepares = True
    #: Whether :meth:`recorded` takes about as long as an evaluation, so that second derivatives
    #: are to be had from it.
    has_second_derivatives = True

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        self.fixed = fixed
        self.method = method
        self.n, self.p = fixed.Q.shape
        self._last: tuple[list[Tensor], Evaluation] | None = None

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        """The matrices on which the likelihood depends, from terms of the same designs."""
        raise NotImplementedError

    def anew(self, fixed: FixedPart, terms: Sequence[Term]) -> Problem:
        """A problem of other designs, or of data with a graph, prepared in the same way."""
        return type(self)(fixed, terms, self.method)

    def cost(self) -> Cost | None:
        """What an evaluation takes, where preparing the data has shown it; None otherwise."""
        return None

    def with_fixed(self, fixed: FixedPart) -> Problem:
        """A problem of these designs with other data: what depends on designs alone is kept."""
        found = copy(self)
        found.fixed = fixed
        found.p = fixed.Q.shape[1]
        found._last = None
        return found

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        """The log-likelihood by plain differentiable operations."""
        raise NotImplementedError

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        """The likelihood at these terms, whatever digits it has lost.

        Args:
            terms: of the same designs, without a graph.
            matrices: those of :meth:`matrices` at these terms.

        Returns:
            An evaluation that has set ``problem``, ``log_likelihood``, ``y_p_y``, ``gamma``,
            ``gamma_factor``, ``rounding`` and ``recorded_rounding``.

        Raises:
            NotPositiveDefiniteError: if V is not positive definite.
        """
        raise NotImplementedError

    def by_matrix(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """From something for each term to that for each of :meth:`matrices`."""
        return list(parts)

    def by_term(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """From derivatives of each of :meth:`matrices` to those for each term."""
        return list(parts)

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        """The evaluation by a slower way that keeps more digits; None where there is none."""
        return None

    def evaluate(self, terms: Sequence[Term]) -> Evaluation:
        """The likelihood at these terms, without recording.

        The last evaluation is kept, as plain numbers, and given again for
        equal matrices: a loss and the step that follows share one.

        Raises:
            NumericalError: if V is not positive definite, or rounding leaves too few digits.
        """
        with outside_inference(recording=False):
            terms = [term.with_covariance(term.covariance.map(_plain)) for term in terms]
            matrices = self.matrices(terms)
            if self._last is not None and all(map(torch.equal, self._last[0], matrices)):
                return self._last[1]
            self._last = None  # the memory of one factor serves the next
            evaluation = self._checked(terms, matrices)
            evaluation.at(terms, matrices)
            self._last = ([matrix.clone() for matrix in matrices], evaluation)
            return evaluation

    def has_digits(self, rounding: float) -> bool:
        """Whether a bound of the relative error is as small as it usually is."""
        return rounding <= _BOUNDS[self.fixed.y.dtype][0]

    def _checked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        evaluation, failure = None, None
        try:
            evaluation = self.evaluate_unchecked(terms, matrices)
            if self.has_digits(evaluation.rounding):
                return evaluation
        except NotPositiveDefiniteError as error:
            failure = error
        better = self.precise(terms)
        if better is not None and not (evaluation and evaluation.rounding <= better.rounding):
            better.recorded_rounding = inf if evaluation is None else evaluation.recorded_rounding
            evaluation = better
        if evaluation is None:
            assert failure is not None
            raise failure
        self.check_rounding(evaluation.rounding)
        return evaluation

    def more_precise(self, evaluation: Evaluation) -> Evaluation | None:
        """The evaluation with more digits; None where there is no such way, or it was taken already."""
        better = self.precise(evaluation.at_terms)
        if better is None or better.rounding >= evaluation.rounding:
            return None
        return better

    def check_rounding(self, rounding: float) -> None:
        """Raise unless a bound of the relative error leaves digits enough.

        Raises:
            NumericalError: if it does not.
        """
        dtype = self.fixed.y.dtype
        if rounding <= _BOUNDS[dtype][1]:
            return
        wider = "use float64, or " if dtype == torch.float32 else ""
        raise NumericalError(
            f"the likelihood has lost its digits in {dtype}: V is so close to singular, its residual "
            f"so small beside the other terms, that the relative error may reach {rounding:.1e}; "
            f"{wider}hold the residual variance further from zero"
        )

    def profile(
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
        return self.assemble(log_det_v, log_det_x, yy - white @ white), factor, white

    def assemble(self, log_det_v: Tensor, log_det_x: Tensor | float, y_p_y: Tensor) -> Tensor:
        """Assemble the log-likelihood of the original response and model matrix."""
        if self.method == "ml":
            return (log_det_v + y_p_y) * -0.5 - self.n * log(2 * pi) / 2
        log_det_x = log_det_x - 2 * self.fixed.log_det
        return -((self.n - self.p) * log(2 * pi) + log_det_v + log_det_x + y_p_y) / 2


def _size_of_product(x: Tensor, m: Tensor) -> float:
    """The sum of the sizes of the products of entries."""
    return abs(float(x) * float(m)) if x.numel() == 1 else float((x * m).abs().sum())


def _plain(tensor: Tensor) -> Tensor:
    """Without a graph, and not of inference mode."""
    return private(tensor) if tensor.is_inference() else tensor.detach()
