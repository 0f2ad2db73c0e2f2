"""The restricted likelihood as a loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.design import DenseDesign, IndexedDesign
from openreml_nn.covariance.matrix import FreeParams
from openreml_nn.covariance.terms import ScaledCovariance, Term
from openreml_nn.likelihood.dense import check_method
from openreml_nn.likelihood.fixed import FixedPart, check_data, traced
from openreml_nn.likelihood.plan import Plan, check_solver
from openreml_nn.likelihood.problem import Evaluation, Problem

__all__ = ["Objective", "REMLLoss", "listen"]


@dataclass(frozen=True)
class Objective:
    """A likelihood that was evaluated: what an optimizer needs to evaluate it elsewhere."""

    covariance: Matrix
    problem: Problem
    rows: Tensor | None

    def terms(self, free_params: FreeParams = None) -> list[Term]:
        """The lowered covariance in the precision of the data."""
        with nullcontext() if free_params is None else self.covariance.given(free_params):
            found = self.covariance.terms(self.rows)
        return [term.to(self.problem.fixed.y.dtype) for term in found]

    def evaluate(self) -> Evaluation:
        """The likelihood at the present parameters."""
        with torch.no_grad():
            return self.problem.evaluate(self.terms())

    def matrices(self, free_params: FreeParams) -> tuple[Tensor, ...]:
        """The problem's matrices as a differentiable function of the parameters."""
        return tuple(self.problem.matrices(self.terms(free_params)))


_heard: ContextVar[list[Objective] | None] = ContextVar("_heard", default=None)


@contextmanager
def listen() -> Iterator[list[Objective]]:
    """Collect the objectives that are evaluated within the context."""
    heard: list[Objective] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


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
            more than 4 GiB; :attr:`plan` says which and why.
        reduction: ``"mean"`` divides by the number of rows, ``"sum"`` does not.

    Attributes:
        names: names of the columns of X, for warnings; None by default.

    Raises:
        ValueError: if an option is unknown or the solver does not fit the covariance.

    >>> from openreml_nn.covariance import ScalarMatrix
    >>> loss = REMLLoss(ScalarMatrix(3), reduction="sum")
    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> loss(y, X)
    tensor(4.7205, grad_fn=<NegBackward0>)
    """

    def __init__(
        self,
        covariance: Matrix,
        method: str = "reml",
        solver: str = "auto",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(covariance, Matrix):
            raise TypeError(f"`covariance` is a {type(covariance).__name__}: expected a Matrix")
        check_method(method)
        check_solver(solver)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` is {reduction!r}: expected 'mean' or 'sum'")
        self.covariance = covariance
        self.method = method
        self.solver = solver
        self.reduction = reduction
        self.names: Sequence[str] | None = None
        self._plan: Plan | None = None
        self._prepared: _Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared for some data can be had again; a copy need not carry it.
        return {**self.__dict__, "_prepared": None}

    def extra_repr(self) -> str:
        return f"method={self.method!r}, solver={self.solver!r}, reduction={self.reduction!r}"

    @property
    def plan(self) -> Plan:
        """The plan of the last call; before the first, what it would be without fixed effects."""
        if self._plan is None:
            terms = self.covariance.terms()
            return Plan.of(terms, 0, self.solver, terms[0].covariance.matrix.dtype)
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
            TypeError, ValueError: if dtypes, shapes or devices do not fit or a
                value is not finite.
        """
        device = y.device.type if isinstance(y, Tensor) else "cpu"
        with torch.autocast(device, enabled=False):
            problem, terms, fixed, recorded = self._prepare(y, X, rows)
            matrices = problem.matrices(terms)
            if recorded:
                value = problem.recorded(matrices)
            else:
                value = _LogLikelihood.apply(problem, terms, fixed.y, fixed.Q, *matrices)
        return -value / len(y) if self.reduction == "mean" else -value

    def objective(self, y: Tensor, X: Tensor, rows: Tensor | None = None) -> Objective:
        """The likelihood of some data as an optimizer wants it, prepared and not evaluated.

        Raises:
            TypeError, ValueError: as in calling the loss.
        """
        with torch.no_grad():
            problem = self._prepare(y, X, rows)[0]
        return Objective(self.covariance, problem, rows)

    def _has_seen(self, y: Tensor, X: Tensor) -> bool:
        """Whether a problem is prepared for these data, unchanged since."""
        return self._prepared is not None and _unchanged([y, X], self._prepared.data)

    def _check_rows(self, y: Tensor, rows: Tensor | None) -> None:
        n = self.covariance.shape[0]
        if rows is None:
            if len(y) != n:
                raise ValueError(f"`y` has {len(y)} rows but the covariance has {n}: pass `rows`")
        elif rows.dim() != 1 or len(rows) != len(y) or rows.is_floating_point():
            raise ValueError(
                f"`rows` is {rows.dtype} of shape {tuple(rows.shape)}: expected {len(y)} integers"
            )
        elif len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < n):
            raise ValueError(f"`rows` reaches beyond the {n} rows of the covariance")
        for tensor in self.covariance.parameters():
            if tensor.device != y.device:
                raise ValueError(
                    f"`y` is on {y.device} but the covariance on {tensor.device}: move one of them"
                )

    def _prepare(
        self, y: Tensor, X: Tensor, rows: Tensor | None
    ) -> tuple[Problem, list[Term], FixedPart, bool]:
        """The problem for some data, the terms, the data, and whether autograd must record all."""
        wrapped = traced(y, X, *self.covariance.parameters())
        if not wrapped and not self._has_seen(y, X):
            check_data(y, X)
        self._check_rows(y, rows)
        terms = self.covariance.terms(rows)
        dtype = torch.promote_types(y.dtype, terms[0].covariance.matrix.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        terms = [term.to(dtype) for term in terms]
        constants = [rows, *_constants(terms)]
        known = not wrapped and self._is_prepared(constants, dtype)
        if known and self._has_seen(y, X) and not (y.requires_grad or X.requires_grad):
            assert self._prepared is not None
            problem = self._prepared.problem
            self._hear(problem, rows)
            return problem, terms, problem.fixed, False
        seen = y, X
        y, X = y.to(dtype), X.to(dtype)
        fixed = FixedPart.plain(y, X) if wrapped else FixedPart.of(y, X, self.names)
        plain = fixed if wrapped else fixed.detach()
        if known and self._prepared is not None and self._prepared.problem.takes_data:
            problem = self._prepared.problem.with_fixed(plain)
        else:
            self._plan = Plan.of(terms, fixed.Q.shape[1], self.solver, dtype)
            problem = self._plan.problem(plain, terms, self.method)
            self._plan = self._plan.measured(problem, terms)
            if self._plan.solver == "krylov" and self.solver == "auto":
                warnings.warn(
                    f"the likelihood is approximate: {self._plan.reason}; "
                    "solver='blocked' insists on an exact one",
                    RuntimeWarning,
                    stacklevel=4,
                )
        recorded = wrapped
        if torch.is_grad_enabled() and not wrapped:
            moving = y.requires_grad or X.requires_grad
            recorded = any(t is not None and t.requires_grad for t in constants)
            recorded = recorded or (moving and not problem.takes_data)
            if recorded and moving:
                problem = type(problem)(fixed, terms, self.method)
        if not wrapped:
            self._hear(problem, rows)
        if recorded or torch.is_inference_mode_enabled():
            # What is made in inference mode cannot be recorded later.
            self._prepared = None
        else:
            # Kept by identity and version, so that an in-place change is seen.
            self._prepared = _Prepared(_stamped(seen), _stamped(constants), problem)
        return problem, terms, fixed, recorded

    def _is_prepared(self, constants: Sequence[Tensor | None], dtype: torch.dtype) -> bool:
        kept = self._prepared
        if kept is None or kept.problem.fixed.y.dtype != dtype:
            return False
        return kept.problem.method == self.method and _unchanged(constants, kept.constants)

    def _hear(self, problem: Problem, rows: Tensor | None) -> None:
        heard = _heard.get()
        if heard is not None:
            heard.append(Objective(self.covariance, problem, rows))


def _constants(terms: Sequence[Term]) -> list[Tensor | None]:
    """What a prepared problem takes from the terms beside their matrices."""
    found: list[Tensor | None] = []
    for term in terms:
        if isinstance(term.design, DenseDesign):
            found.append(term.design.matrix)
        elif isinstance(term.design, IndexedDesign):
            found += [term.design.codes, term.design.values]
        if isinstance(term.covariance, ScaledCovariance):
            found.append(term.covariance.kernel.source)
    return found


_Stamped = list[tuple[Tensor | None, int]]


@dataclass(frozen=True)
class _Prepared:
    """A problem with the data, and the other constants, that it was prepared for."""

    data: _Stamped
    constants: _Stamped
    problem: Problem


def _stamped(tensors: Sequence[Tensor | None]) -> _Stamped:
    """Tensors with their versions, which rise with each change in place."""
    return [(t, -1 if t is None else t._version) for t in tensors]


def _unchanged(tensors: Sequence[Tensor | None], kept: _Stamped) -> bool:
    """Whether they are the same tensors, unchanged since."""
    return len(tensors) == len(kept) and all(
        t is old and (t is None or t._version == version)
        for t, (old, version) in zip(tensors, kept, strict=True)
    )


class _LogLikelihood(torch.autograd.Function):
    """The log-likelihood of a prepared problem with its closed-form score.

    Under ``create_graph`` the score itself is recorded, through the plain
    formula of the likelihood.
    """

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, terms: list[Term], y: Tensor, Q: Tensor, *matrices: Tensor
    ) -> Tensor:
        ctx.problem = problem
        ctx.evaluation = problem.evaluate(terms)
        ctx.save_for_backward(y, Q, *matrices)
        return ctx.evaluation.log_likelihood.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        found: list[Tensor | None] = [None] * len(needed)
        if torch.is_grad_enabled():
            y, Q, *matrices = ctx.saved_tensors
            problem = ctx.problem
            if any(needed[:2]):
                problem = problem.with_fixed(replace(problem.fixed, y=y, Q=Q))
            value = problem.recorded(matrices)
            wanted = [t for t, need in zip((y, Q, *matrices), needed, strict=True) if need]
            parts = iter(torch.autograd.grad(value, wanted, create_graph=True))
            found = [next(parts) if need else None for need in needed]
        else:
            if any(needed[:2]):
                found[:2] = ctx.evaluation.data_scores()
            if any(needed[2:]):
                found[2:] = ctx.evaluation.scores()
        scaled = [
            part * cotangent if need and part is not None else None
            for part, need in zip(found, needed, strict=True)
        ]
        return (None, None, *scaled)
