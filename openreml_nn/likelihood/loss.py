"""The restricted likelihood as a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.matrix import FreeParams
from openreml_nn.likelihood.fixed import check_data, check_shapes
from openreml_nn.likelihood.plan import Plan, check_solver
from openreml_nn.likelihood.prepared import Likelihood, LikelihoodOptions, Ready, precision_of
from openreml_nn.likelihood.problem import Evaluation, Problem
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.dense import check_method
from openreml_nn.support.checks import check_choice, check_tensor, refuse_tracing
from openreml_nn.support.errors import InputError
from openreml_nn.support.modes import in_full_precision
from openreml_nn.terms.term import Term

__all__ = ["Heard", "Objective", "REMLLoss", "listen", "loss_of"]


@dataclass(frozen=True)
class Objective:
    """A likelihood that was evaluated: what an optimizer needs to evaluate it elsewhere."""

    covariance: Matrix
    problem: Problem
    rows: Tensor | None

    def terms(self, free_params: FreeParams = None) -> list[Term]:
        """The lowered covariance, computed in the precision of the data."""
        with nullcontext() if free_params is None else self.covariance.given(free_params):
            return self.covariance.terms(self.rows, self.problem.fixed.y.dtype)

    @cached_property
    def moves(self) -> bool:
        """Whether designs, or networks within the covariance, move with parameters."""
        own = {id(e.tensor) for e in self.covariance.parameter_entries().entries}
        if any(p.requires_grad and id(p) not in own for p in self.covariance.parameters()):
            return True
        with torch.enable_grad():
            constants = [t for term in self.terms() for t in term.constants]
        return any(t is not None and t.requires_grad for t in constants)

    def evaluate(self) -> Evaluation:
        """The likelihood at the present parameters."""
        with torch.no_grad():
            terms = self.terms()
            return self._problem_of(terms).evaluate(terms)

    def recorded(self, free_params: FreeParams = None) -> Tensor:
        """The log-likelihood by plain differentiable operations, designs among them."""
        terms = self.terms(free_params)
        problem = self._problem_of(terms)
        return problem.recorded(problem.matrices(terms))

    def gradient(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Derivatives of the log-likelihood by parameters; zero for what it does not depend on."""
        scores = None if self.moves else self.evaluate().scores()
        with torch.enable_grad():
            if scores is None:
                value = self.recorded()
            else:
                pairs = zip(scores, self.matrices(None), strict=True)
                value = torch.stack([(s * m).sum() for s, m in pairs]).sum()
            if not value.requires_grad:
                return [torch.zeros_like(p) for p in parameters]
            found = torch.autograd.grad(
                value, list(parameters), allow_unused=True, materialize_grads=True
            )
        return list(found)

    def _problem_of(self, terms: list[Term]) -> Problem:
        """The problem, prepared anew where its designs may have moved."""
        if not self.moves:
            return self.problem
        return self.problem.anew(self.problem.fixed.detach(), terms)

    def matrices(self, free_params: FreeParams) -> tuple[Tensor, ...]:
        """The problem's matrices as a differentiable function of the parameters."""
        return tuple(self.problem.matrices(self.terms(free_params)))


def loss_of(
    ready: Ready, count: int, covariance: Callable[[], Matrix], rows: Tensor | None = None
) -> Tensor:
    """The negative log-likelihood divided by ``count``, as :func:`listen` hears of it.

    Args:
        ready: the likelihood.
        count: of rows.
        covariance: makes the tree of which it is, where somebody listens.
        rows: which rows of that.
    """
    refuse_tracing("a likelihood")
    loss = ready.value(-1 / count)
    heard = _heard.get()
    if heard is not None and loss.requires_grad:
        heard.append(Heard(loss, Objective(covariance(), ready.problem, rows), -1 / count))
    return loss


class Heard:
    """A loss that was evaluated and recorded by autograd, and its likelihood.

    Args:
        value: the loss, ``scale`` times the log-likelihood.
        objective: the likelihood.
        scale: the factor between them.

    Attributes:
        pulled: the cotangents of the value in the backward passes so far; None without one.
    """

    def __init__(self, value: Tensor, objective: Objective, scale: float) -> None:
        self.value, self.objective, self.scale = value, objective, scale
        self.pulled: float | None = None
        # The hook belongs to this very value: on a device, backward runs in a thread of its own.
        self._handle = value.register_hook(self._see)

    def _see(self, cotangent: Tensor) -> None:
        self.pulled = (self.pulled or 0.0) + float(cotangent)

    def forget(self) -> None:
        """Stop watching."""
        self._handle.remove()


_heard: ContextVar[list[Heard] | None] = ContextVar("_heard", default=None)


@contextmanager
def listen() -> Iterator[list[Heard]]:
    """Collect the losses that are evaluated within the context and recorded by autograd.

    Whether any of them is to be optimised is for the listener to find out.
    """
    heard: list[Heard] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)
        for loss in heard:
            loss.forget()


class REMLLoss(nn.Module):
    r"""Negative restricted log-likelihood of :math:`y \sim N(X\beta, V(\theta))`.

    The fixed effects are profiled out by generalised least squares. The
    formula is that of :func:`restricted_log_likelihood`, constants included.

    Args:
        covariance: the covariance V of all rows.
        method: ``"reml"``, or ``"ml"`` for the full likelihood.
        solver: ``"dense"`` (Cholesky of V), ``"blocked"`` (in the space of the
            random effects, V never formed), ``"krylov"`` (the same by conjugate
            gradients and random probes, for crossed factors that are too large;
            approximate), ``"spectral"`` (one known kernel and independent errors,
            by one eigendecomposition), ``"grid"`` (a Kronecker product over a complete
            grid, such as a field of plots, by two small ones), or ``"auto"``, which takes the exact one with
            least work, and the approximate one, with a warning, where that would hold
            more than 4 GiB or take more than 10¹² operations and ten times those of the approximate one;
            or a solver with its options, such as
            ``Krylov(probes=100)`` or ``Auto(memory=2**34)``. :attr:`plan` says which and why.
        reduction: ``"mean"`` divides by the number of rows, ``"sum"`` does not.

    Attributes:
        names: names of the columns of X, for warnings; None by default.
        likelihood: where what is prepared for the last data is kept.
        check: refuses data that are not those; by default what :func:`check_data` refuses.

    Raises:
        InputError: if an option is unknown, or, when the loss is called, the solver does not fit
            the covariance.

    >>> from openreml_nn.covariance import ScalarMatrix
    >>> loss = REMLLoss(ScalarMatrix(3), reduction="sum")
    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> loss(y, X)
    tensor(4.7205, grad_fn=<LogLikelihoodBackward>)
    """

    def __init__(
        self,
        covariance: Matrix,
        method: str = "reml",
        solver: str | Solver = "auto",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(covariance, Matrix):
            raise TypeError(f"`covariance` is a {type(covariance).__name__}: expected a Matrix")
        check_method(method)
        check_solver(solver)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.covariance = covariance
        self.method = method
        self.solver = solver
        self.reduction = reduction
        self.names: Sequence[str] | None = None
        self.likelihood = Likelihood()
        self.check: Callable[[Tensor, Tensor], None] = check_data
        self._plan: Plan | None = None

    def extra_repr(self) -> str:
        return f"method={self.method!r}, solver={self.solver!r}, reduction={self.reduction!r}"

    @property
    def plan(self) -> Plan:
        """The plan of the last call; before the first, what it would be without fixed effects."""
        if self._plan is None:
            dtype = precision_of([self.covariance])
            return Plan.of(self.covariance.terms(None, dtype), 0, self.solver, dtype)
        return self._plan

    def forward(self, y: Tensor, X: Tensor, rows: Tensor | None = None) -> Tensor:
        """The loss.

        Computed in the wider of the precisions of ``y`` and the covariance,
        at least float32, also under autocast.

        Args:
            y: response (n,).
            X: model matrix of the fixed effects (n, p). Columns that depend on
                earlier ones are dropped with a warning.
            rows: the n rows of the covariance that the data belong to; all,
                in order, by default.

        Returns:
            A scalar, differentiable in the covariance parameters, y, X, and a
            trainable Z.

        Raises:
            NotPositiveDefiniteError: if V is not positive definite (a ValueError).
            NumericalError: if rounding leaves too few digits: fewer than six in float64, two in
                float32.
            TypeError, InputError: if dtypes, shapes or devices do not fit or a
                value is not finite.
        """
        device = y.device.type if isinstance(y, Tensor) else "cpu"
        with in_full_precision(device):
            ready = self._ready(y, X, rows)
            count = len(y) if self.reduction == "mean" else 1
            return loss_of(ready, count, lambda: self.covariance, rows)

    def evaluate(self, y: Tensor, X: Tensor, rows: Tensor | None = None) -> Evaluation:
        r"""The likelihood of some data at the present parameters, without a fit.

        What the evaluation offers is computed when it is asked for, and has no graph:
        ``log_likelihood``, a scalar tensor, of all rows whatever the reduction; ``fixed``, with
        ``estimate`` (p,), ``covariance`` (p, p) and the ``columns`` of X that were kept; and
        ``random``, for each random term ``name``, BLUPs ``values`` (q, k) and prediction-error
        variances ``variances`` (q, k, k), in the order of the design's levels.

        Args:
            y, X, rows: as in calling the loss.

        Raises:
            NumericalError: if V is not positive definite, or rounding leaves too few digits.
            TypeError, InputError: as in calling the loss.

        Reference:
            Henderson, Biometrics 31 (1975) 423; Robinson, Statistical Science 6 (1991) 15.

        >>> from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
        >>> z = DummyMatrix(["a", "a", "b", "b"])
        >>> V = Sum(group=CovariancePropagation(z=z, g=ScalarMatrix(2)), residual=ScalarMatrix(4))
        >>> found = REMLLoss(V).evaluate(torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.ones(4, 1))
        >>> f"{found.fixed.estimate.item():.3f}", found.random[0].values[:, 0].round(decimals=3)
        ('3.000', tensor([-1.,  1.]))
        """
        return self.objective(y, X, rows).evaluate()

    def objective(self, y: Tensor, X: Tensor, rows: Tensor | None = None) -> Objective:
        """The likelihood of some data as an optimizer wants it, prepared and not evaluated.

        Raises:
            TypeError, InputError: as in calling the loss.
        """
        with torch.no_grad():
            return Objective(self.covariance, self._ready(y, X, rows).problem, rows)

    def _ready(self, y: Tensor, X: Tensor, rows: Tensor | None) -> Ready:
        check_shapes(y, X)
        self._check_rows(y, rows)
        options = LikelihoodOptions(self.method, self.solver, self.names)
        terms = self.covariance.terms(rows, precision_of([self.covariance], y))
        for term in terms:
            where = term.covariance.matrix.device
            if where != y.device and not (y.is_meta or where.type == "meta"):
                raise InputError(
                    f"`y` is on {y.device} but the covariance on {where}: move one of them"
                )
        found = self.likelihood.ready(y, X, terms, options, rows, self.check)
        self._plan = found.plan
        return found

    def _check_rows(self, y: Tensor, rows: Tensor | None) -> None:
        n = self.covariance.shape[0]
        if rows is None:
            if len(y) != n:
                raise InputError(f"`y` has {len(y)} rows but the covariance has {n}: pass `rows`")
            return
        check_tensor("rows", rows, (len(y),), "integer")
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < n):
            raise InputError(f"`rows` reaches beyond the {n} rows of the covariance")
