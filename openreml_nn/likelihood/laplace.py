"""The marginal likelihood of responses that are not Gaussian, as a loss."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance import Matrix
from openreml_nn.families.family import Family
from openreml_nn.likelihood.laplace_attached import Attached
from openreml_nn.likelihood.laplace_choice import laplace_solver, planned, space_of
from openreml_nn.likelihood.laplace_evaluation import LaplaceEvaluation
from openreml_nn.likelihood.laplace_integral import Integral
from openreml_nn.likelihood.laplace_mode import (
    Mode,
    Rows,
    average_information,
    column_information,
    find_mode,
    projected,
)
from openreml_nn.likelihood.laplace_quadrature import check_quadrature
from openreml_nn.likelihood.laplace_sparse import SparseSpace
from openreml_nn.likelihood.laplace_task import (
    CheckedResponses,
    Kept,
    Task,
    check_call,
    constants_of,
    factors_of,
)
from openreml_nn.likelihood.plan import Plan
from openreml_nn.likelihood.prepared import precision_of
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers import Sparse
from openreml_nn.support.checks import (
    check_choice,
    check_constant,
    check_count,
    check_instance,
    refuse_tracing,
)
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import DiagonalCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.term import Term

__all__ = ["LaplaceLoss"]


class LaplaceLoss(nn.Module):
    r"""Negative marginal log-likelihood of :math:`y_i \sim p(y_i \mid a_i)`,
    :math:`a = \eta + X\beta + Zb`, :math:`b \sim N(0, G(\theta))`.

    The random effects are integrated by Laplace's approximation at their mode, or, for one grouping
    factor, by adaptive Gauss-Hermite quadrature. All constants are counted. For Gaussian responses it
    is the exact likelihood.

    Args:
        covariance: the covariance of the random part of the predictor: random terms only, as the
            residual belongs to the family. An identity term is an effect of each observation.
        family: of the responses; its parameters are estimated with those of the covariance.
        method: ``"ml"``, in which the coefficients of X, if it is given, are those of maximum
            likelihood; ``"reml"`` integrates them with the random effects by Laplace's
            approximation.
        quadrature: points of adaptive Gauss-Hermite quadrature for each effect of a level; 1 is
            Laplace's approximation.
        solver: ``"sparse"`` takes a sparse factor, for indexed designs and related levels of a known
            inverse, on the CPU; ``"blocked"`` eliminates the factor with most levels first, and
            ``"dense"`` takes all random effects together. ``"krylov"`` has exact modes and estimates the
            determinant. ``"auto"`` is the first where it fits, in float64, and else the second, or, with
            a warning, the last as :class:`Auto` has it; or such a solver with its options.

    Raises:
        TypeError, InputError: if an argument is of another kind or an option unknown.

    Reference:
        Kristensen et al., Journal of Statistical Software 70(5) (2016); Pinheiro and Chao,
        J. Comput. Graph. Stat. 15 (2006) 58.

    >>> from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix
    >>> from openreml_nn.families import Binomial
    >>> Z = DummyMatrix(["a", "a", "b", "b"])
    >>> loss = LaplaceLoss(CovariancePropagation(z=Z, g=ScalarMatrix(2)), Binomial())
    >>> loss(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.zeros(4))
    tensor(2.8247, grad_fn=<AttachedBackward>)
    """

    def __init__(
        self,
        covariance: Matrix,
        family: Family,
        method: str = "ml",
        quadrature: int = 1,
        solver: str | Solver = "auto",
    ) -> None:
        super().__init__()
        check_instance("covariance", covariance, Matrix)
        check_instance("family", family, Family)
        check_choice("method", method, ("ml", "reml"))
        quadrature = check_count("quadrature", quadrature, 1)
        if quadrature > 1 and method == "reml":
            raise InputError(
                f"`quadrature` is {quadrature} but `method` is 'reml': expected 1, or method 'ml'"
            )
        self.covariance = covariance
        self.family = family
        self.method = method
        self.quadrature = quadrature
        self.solver = laplace_solver(solver)
        self._near = False
        self._kept: Kept | None = None
        self._size: tuple[int, int] | None = None
        self._known: CheckedResponses | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Where the last mode was can be found again; a copy need not carry it.
        return {**self.__dict__, "_kept": None, "_known": None}

    def extra_repr(self) -> str:
        return f"method={self.method!r}, quadrature={self.quadrature}, solver={self.solver.name!r}"

    def forward(
        self,
        y: Tensor,
        eta: Tensor,
        X: Tensor | None = None,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss, summed over the rows.

        Args:
            y: the responses, (n,), or (n, 2) successes and failures of a binomial family.
            eta: (n,) known part of the linear predictor, such as a network's output.
            X: model matrix of fixed effects (n, p); none by default.
            rows: the n rows of the covariance that the data belong to; all, in order, by default.
            weights: (n,) positive factors of the rows' log-densities, a row of weight 2 counting as two
                alike; of binomial proportions the trials, see :meth:`Family.with_weights`. One by default.

        Returns:
            A scalar, differentiable once in the parameters of covariance and family, eta, X, y
            where its family is continuous, and a trainable Z.

        Raises:
            NumericalError: if the mode is not found, or the data are separated.
            TypeError, InputError: if dtypes, shapes or devices do not fit, or a response is not one
                of the family.
        """
        refuse_tracing("a likelihood")
        task = self._task(y, eta, X, rows, weights)
        terms = task.terms
        inputs = [task.rows.eta, task.rows.X, y, *[t.covariance.matrix for t in terms]]
        inputs += [*factors_of(terms), *constants_of(terms), *self.family.parameters()]
        recording = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return Attached.apply(
            lambda: self._integral(task).with_derivatives(recording, inputs), *inputs
        )

    def evaluate(
        self,
        y: Tensor,
        eta: Tensor,
        X: Tensor | None = None,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> LaplaceEvaluation:
        """The likelihood of some data at the present parameters, with the modes of the effects.

        Args:
            y, eta, X, rows, weights: as in calling the loss.

        Raises:
            NumericalError, TypeError, InputError: as in calling the loss.
        """
        with torch.no_grad():
            task = self._task(y, eta, X, rows, weights)
            integral = self._integral(task)
            mode = integral.mode()
            value = integral.value(mode)
            random = mode.factor.random(task.terms, mode.u)
            bordered = mode
            if not len(mode.beta) and task.rows.X.shape[1]:
                bordered = find_mode(task.rows, mode.point, mode.u, task.beta)
            p = task.rows.X.shape[1]
            spread = bordered.factor.fixed_covariance() if p else value.new_zeros(0, 0)
            beta = mode.beta if self.method == "reml" else task.beta
            information = mode.weights.clamp(min=torch.finfo(mode.weights.dtype).tiny ** 0.5)
            errors = Term(IdentityDesign(len(mode.a)), DiagonalCovariance(1 / information))
            known = mode.factor.error
            return LaplaceEvaluation(-value, beta, spread, mode.a, errors, tuple(random), known)

    def penalised(
        self,
        y: Tensor,
        eta: Tensor,
        X: Tensor,
        start: Tensor,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """About the coefficients of X that are a mode together with the random effects, those of penalised
        quasi-likelihood, (p,), and their covariance, (p, p): where a fit may begin.

        Args:
            y, eta, X, rows, weights: as in calling the loss.
            start: (p,) where the search begins.

        Raises:
            NumericalError, TypeError, InputError: as in calling the loss.
        """
        with torch.no_grad():
            task = self._task(y, eta, X, rows, weights)
            mode = self._integral(task).joint_mode(start, rough=True)
            return mode.beta, mode.factor.fixed_covariance()

    def information(
        self,
        y: Tensor,
        eta: Tensor,
        X: Tensor | None,
        derivatives: Sequence[Tensor],
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Average information of covariance parameters at the mode, see :func:`average_information`.

        Args:
            y, eta, X, rows, weights: as in calling the loss.
            derivatives: for the matrix of each term, its derivatives by the m parameters.

        Raises:
            NumericalError, TypeError, InputError: as in calling the loss.

        Shape:
            Output: (m, m).
        """
        with torch.no_grad():
            task = self._task(y, eta, X, rows, weights)
            terms = [term.detach() for term in task.terms]
            return average_information(self._integral(task).mode(), terms, derivatives)

    def scores(
        self,
        y: Tensor,
        eta: Tensor,
        X: Tensor,
        columns: Tensor,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""What further columns m of X say, one at a time, in the working linear model at the mode.

        Args:
            y, eta, X, weights: as in calling the loss.
            columns: (n, k).

        Returns:
            The derivatives of the log-likelihood by their coefficients at zero, (k,); the
            information :math:`m^\top P m`, (k,), and :math:`m^\top V^{-1} m`, (k,), which is that
            without X.

        Raises:
            NumericalError, TypeError, InputError: as in calling the loss.
        """
        with torch.no_grad():
            task = self._task(y, eta, X, None, weights)
            integral, X = self._integral(task), task.rows.X
            mode = integral.mode()
            slope = -(columns.mT @ integral.of_predictor(mode))
            information = column_information(mode, X, columns)
            return slope, information, column_information(mode, X[:, :0], columns)

    def project(
        self, y: Tensor, eta: Tensor, X: Tensor, columns: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        r""":math:`P m` of columns m (n, k), with X projected out, in the working linear model at the mode,
        (n, k): that of errors of the variance :math:`-1/\ell''_i`.

        Args:
            y, weights: as in calling the loss.
            eta: (n,) the linear predictor but for the random effects, that of X among it.
            X: (n, p).
            columns: m.

        Raises:
            TypeError, InputError, NumericalError: as calling the loss does; also if X has no full rank.
        """
        with torch.no_grad():
            mode = self._mode(y, eta, weights)
            return projected(mode, X.to(mode.a), columns.to(mode.a))

    def effects_in_use(
        self, y: Tensor, eta: Tensor, X: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        r"""The effective number of coefficients of X and random effects, a scalar.

        With C = [X Z], W of :math:`-\ell''_i` at the mode and S the precision of the random effects, zero
        for the coefficients, it is :math:`\operatorname{tr}[C^\top W C\,(C^\top W C + S)^{-1}]`.

        Args:
            y, eta, X, weights: as :meth:`project` takes them.

        Raises:
            TypeError, InputError, NumericalError: as :meth:`project`.
        """
        with torch.no_grad():
            mode = self._mode(y, eta, weights)
            factor = mode.point.factor(mode.weights, X.to(mode.a))
            return 2 * (mode.weights * factor.half_variances()).sum()

    def _mode(self, y: Tensor, eta: Tensor, weights: Tensor | None) -> Mode:
        """The mode of the random effects."""
        none = eta.new_zeros(len(eta), 0)
        return self._integral(self._task(y, eta, none, None, weights)).joint_mode()

    def nearby(self) -> LaplaceLoss | None:
        r"""A loss of the same parameters with an optimum near by for far less work: of :math:`\log|H|` it has
        what is of second order about the diagonal, and the mode is found roughly: where a fit may begin.
        None before the first call, and where the loss takes little work or has no such part; coefficients of
        X by maximum likelihood, as :meth:`forward` finds them, leave it the loss itself.
        """
        space = None if self._kept is None else self._kept.space
        if self.quadrature > 1 or not isinstance(space, SparseSpace) or not space.is_dear:
            return None
        found = copy(self)
        found._near, found._kept, found._known = True, self._kept, self._known
        return found

    @property
    def plan(self) -> Plan:
        """The plan of the last call; before the first, what it would be without X."""
        rows, p = self._size or (self.covariance.shape[0], 0)
        if self._kept is not None:
            return planned(self._kept.space, rows, p)
        with torch.no_grad():
            dtype = precision_of([self.covariance])
            terms = [term.detach() for term in self.covariance.terms(None, dtype)]
            return planned(space_of(terms, self.solver, self.quadrature > 1), rows, p)

    # ------------------------------------------------------------------ data

    def precision(self, *data: Tensor) -> torch.dtype:
        """In which the loss of some data is computed: the widest of data and parameters, float32 at
        least; float64 by a sparse factor."""
        if isinstance(self.solver, Sparse):
            return torch.float64
        return precision_of([self.covariance], *data)

    def _task(
        self,
        y: Tensor,
        eta: Tensor,
        X: Tensor | None,
        rows: Tensor | None,
        weights: Tensor | None,
    ) -> Task:
        check_call(self.covariance, self.method, y, eta, X, rows, weights)
        n = len(eta)
        known = self._known
        if known is None or not known.is_of(self.family, y, weights):
            known = self._known = CheckedResponses.of(self.family, y, weights)
        if known.y.shape != y.shape:
            check_constant("y", y)  # a proportion of whole trials does not move
        dtype = self.precision(y, eta, *([] if X is None else [X]))
        if isinstance(self.solver, Sparse) and eta.device.type != "cpu":
            raise InputError(
                f"`solver` is 'sparse', which works on the CPU, but `eta` is on {eta.device}: "
                "expected 'auto', 'blocked' or 'dense'"
            )
        terms = self.covariance.terms(rows, dtype)
        X = eta.new_zeros(n, 0) if X is None else X
        self._size = (n, X.shape[1])
        factors = None if known.weights is None else known.weights.to(dtype)
        y = known.y.to(dtype)
        data = Rows(self.family, y, eta.to(dtype), X.to(dtype), known.beside, factors)
        return Task(data, terms)

    def _integral(self, task: Task) -> Integral:
        """The likelihood of some data; where effects stand is taken again for the same designs."""
        by_blocks = task.is_recorded(self.method, self.quadrature)
        forms: list[Any] = [by_blocks, *(term.form for term in task.terms)]
        constants = [tensor for term in task.terms for tensor in term.constants]
        kept = self._kept
        if kept is None or not kept.is_of(forms, constants):
            with torch.inference_mode(False), torch.no_grad():
                held = [term.held() for term in task.terms]
                copies = [tensor for term in held for tensor in term.constants]
                kept = self._kept = Kept(forms, copies, space_of(held, self.solver, by_blocks))
                if self.quadrature > 1:
                    check_quadrature(kept.space, self.quadrature)
        return Integral(task, kept, self.method, self.quadrature, self._near)
