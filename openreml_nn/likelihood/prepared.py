"""The likelihood of data by terms, and what is prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openreml_nn.covariance.parametrized import widest_dtype
from openreml_nn.likelihood.fixed import FixedPart, check_data, traced
from openreml_nn.likelihood.plan import Auto, Plan, check_solver, warning_of
from openreml_nn.likelihood.problem import Problem
from openreml_nn.likelihood.recorded import LogLikelihood
from openreml_nn.likelihood.solver import Solver
from openreml_nn.support.errors import InputError
from openreml_nn.support.modes import outside_inference
from openreml_nn.support.warning import warn
from openreml_nn.terms.kernel import private, same_content
from openreml_nn.terms.term import Term

__all__ = ["Likelihood", "LikelihoodOptions", "Ready", "precision_of"]


def precision_of(modules: Iterable[nn.Module], *data: Tensor) -> torch.dtype:
    """In which a likelihood is computed: the widest of parameters and data, float32 at least."""
    dtype = torch.float32
    for found in (*map(widest_dtype, modules), *(tensor.dtype for tensor in data)):
        if found != dtype:
            dtype = torch.promote_types(dtype, found)
    return dtype


class LikelihoodOptions(NamedTuple):
    """How a likelihood is computed, see :class:`REMLLoss`; ``names`` of the columns of X are for
    warnings."""

    method: str
    solver: str | Solver
    names: Sequence[str] | None = None


class Ready(NamedTuple):
    """A likelihood that can be evaluated.

    Attributes:
        problem: the likelihood in the covariance matrices.
        plan: how it is computed.
        terms: where it is to be evaluated, in the precision of the computation.
        fixed: the data.
        recorded: whether autograd must record every operation of it.
    """

    problem: Problem
    plan: Plan
    terms: list[Term]
    fixed: FixedPart
    recorded: bool

    def value(self, scale: float) -> Tensor:
        """The log-likelihood times ``scale``, differentiable in the terms and the data."""
        matrices = self.problem.matrices(self.terms)
        if self.recorded:
            return self.problem.recorded(matrices) * scale
        data = self.fixed.y, self.fixed.Q
        return LogLikelihood.apply(self.problem, self.terms, scale, *data, *matrices)


class Likelihood:
    """The likelihood of data by terms. What it has prepared for the last data is used again for
    data of the same content."""

    def __init__(self) -> None:
        self._kept: _Prepared | None = None
        self._plan: tuple[tuple[object, ...], Plan] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # What is prepared for some data can be had again; a copy need not carry it.
        return Likelihood, ()

    def ready(
        self,
        y: Tensor,
        X: Tensor,
        terms: Sequence[Term],
        options: LikelihoodOptions,
        rows: Tensor | None = None,
        check: Callable[[Tensor, Tensor], None] = check_data,
    ) -> Ready:
        """Prepare the likelihood of some data.

        Args:
            y, X: the data.
            terms: the lowered covariance of their rows, in the precision of the computation, which
                is that of the data or wider.
            options: how it is computed.
            rows: which rows of a covariance the terms are of.
            check: refuses data that were not seen before.

        Raises:
            TypeError, InputError: as :class:`REMLLoss`.
        """
        if any(term.covariance.matrix.is_meta for term in terms):
            raise InputError(
                "the covariance is on the meta device, where its parameters have no values: load them first"
            )
        constants = [rows, *(tensor for term in terms for tensor in term.constants)]
        wrapped = traced(y, X, *constants, *(term.covariance.matrix for term in terms))
        recording = torch.is_grad_enabled()
        recorded = wrapped or (
            recording and any(t is not None and t.requires_grad for t in constants)
        )
        # What was prepared without recording, perhaps of the same numbers, has no graph of designs.
        kept = None if recorded else self._kept
        same_data = kept is not None and kept.has_seen(y, X)
        if not wrapped and not same_data:
            check(y, X)
        terms, dtype = list(terms), terms[0].covariance.matrix.dtype
        if kept is not None and not kept.is_of(terms, constants, options, dtype):
            kept = None
        if kept is not None and same_data:
            return Ready(kept.problem, kept.plan, terms, kept.problem.fixed, False)
        moving = recording and (y.requires_grad or X.requires_grad)
        # What is prepared may be used in training later: no tensor of it is one of inference mode.
        with outside_inference(recording):
            data = (y, X) if wrapped or moving else (private(y), private(X))
            y, X = data if y.dtype == dtype else (part.to(dtype) for part in data)
            fixed = FixedPart.plain(y, X) if wrapped else FixedPart.of(y, X, options.names)
            plain = fixed if wrapped else fixed.detach()
            # What is recorded is taken as it is; all else where nobody else can change it.
            held = terms if recorded else [term.held() for term in terms]
            if kept is not None and kept.problem.takes_data:
                problem, plan = kept.problem.with_fixed(plain), kept.plan
            else:
                problem, plan = self._planned(plain, held, options, dtype, recorded)
            recorded = recorded or (moving and not problem.takes_data)
            if recorded and moving and not wrapped:
                problem = problem.anew(fixed, terms)
            again = not recorded and (problem.prepares or not moving)
            copies = [None if rows is None or not again else private(rows)]
        self._kept = None
        if again:
            # Of terms that were prepared before, the constants are of the same content.
            copies += [tensor for term in held for tensor in term.constants]
            found, forms = None if moving else data, [term.form for term in held]
            self._kept = _Prepared(found, forms, copies, options, problem, plan)
        return Ready(problem, plan, terms, fixed, recorded)

    def _planned(
        self,
        fixed: FixedPart,
        terms: Sequence[Term],
        options: LikelihoodOptions,
        dtype: torch.dtype,
        recorded: bool,
    ) -> tuple[Problem, Plan]:
        """A problem prepared by the solver of least work.

        One that is recorded has its own plain formula: what its solver would find out of the
        designs serves nothing, and cannot be found out within a transform.
        """
        key = fixed.Q.shape, options.solver, dtype, *(term.form for term in terms)
        if self._plan is not None and self._plan[0] == key:
            plan = self._plan[1]
            return plan.choice.problem(fixed, terms, options.method), plan
        plan = Plan.of(terms, fixed.Q.shape[1], options.solver, dtype)
        problem = plan.choice.problem(fixed, terms, options.method)
        if not plan.exact and isinstance(check_solver(options.solver), Auto):
            warn(warning_of(plan.reason))
        if recorded:
            return problem, plan
        plan = plan.measured(problem)
        # Where nothing is prepared the work is that of the forms, as those of the next batch are.
        self._plan = None if problem.prepares else (key, plan)
        return problem, plan


@dataclass(frozen=True)
class _Prepared:
    """A problem with private copies of the data, and of the other constants, that it was
    prepared for.

    Contents are compared and not identities, because memory also changes through NumPy,
    through ``.data`` and by loading a state, of which a tensor's version does not tell.
    """

    data: tuple[Tensor, Tensor] | None
    forms: list[tuple[object, ...]]
    constants: list[Tensor | None]
    options: LikelihoodOptions
    problem: Problem
    plan: Plan

    def has_seen(self, y: Tensor, X: Tensor) -> bool:
        """Whether the data are those that it was prepared for, and have no graph."""
        if self.data is None or not (isinstance(y, Tensor) and isinstance(X, Tensor)):
            return False
        return not (y.requires_grad or X.requires_grad) and _all_same([y, X], self.data)

    def is_of(
        self,
        terms: Sequence[Term],
        constants: Sequence[Tensor | None],
        options: LikelihoodOptions,
        dtype: torch.dtype,
    ) -> bool:
        """Whether it was prepared for terms of the same forms, designs, kernels and rows, by the
        same method and solver."""
        problem = self.problem
        if problem.fixed.y.dtype != dtype or self.options[:2] != options[:2]:
            return False
        if self.forms != [term.form for term in terms]:
            return False
        return _all_same(constants, self.constants)


def _all_same(tensors: Sequence[Tensor | None], kept: Sequence[Tensor | None]) -> bool:
    return len(tensors) == len(kept) and all(map(same_content, tensors, kept))
