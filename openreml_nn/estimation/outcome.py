"""What a fit found, from the likelihood at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf, log, nan
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance import DummyMatrix, MembershipMatrix
from openreml_nn.covariance.operator import Operator
from openreml_nn.estimation.basis import (
    factor_in_user_basis,
    factor_names,
    history_in_user_basis,
)
from openreml_nn.estimation.curvature import CONVERGED, Curvature
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.estimation.spread import Spread
from openreml_nn.estimation.starts import CLOSEST
from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import Plan
from openreml_nn.likelihood.problem import Evaluation
from openreml_nn.result import (
    Component,
    Estimate,
    FixedEffects,
    Label,
    Record,
    Result,
    Source,
    Start,
)
from openreml_nn.result.parts import RESIDUAL_GROUP
from openreml_nn.support.errors import InputError
from openreml_nn.support.spectrum import eigenvalues
from openreml_nn.terms.covariance import KroneckerCovariance
from openreml_nn.terms.term import Term, residual_terms

__all__ = ["outcome", "unreached"]

#: A random effect this many residual standard deviations small is none (as in lme4).
SINGULAR = 1e-4


def outcome(
    objective: Objective,
    plan: Plan,
    y: Tensor | None,
    X: Tensor | None,
    history: Sequence[Record] = (),
    names: Sequence[str] | None = None,
    labels: Mapping[str, Label] | None = None,
    starts: Sequence[Start] = (),
) -> Result:
    """The result at the present parameters, however they were found.

    Without the rows, ``y`` and ``X``, there are no fitted values.
    """
    with torch.no_grad():
        found = _Builder(objective, labels or {}).build(plan, y, X, history, names)
        return replace(found, starts=tuple(starts))


def unreached(norm: float, history: Sequence[Record]) -> str:
    """What a fit has not reached that ended at this score norm, in standard errors, without having
    converged."""
    if norm >= CONVERGED:
        return f"score norm {norm:.3g} standard errors, expected below {CONVERGED}"
    moving = bool(history) and history[-1].step > 0
    what = "its steps had not ended" if moving else "no step led further"
    return f"{what}, at a score norm of {norm:.3g} standard errors"


class _Builder:
    def __init__(self, objective: Objective, labels: Mapping[str, Label]) -> None:
        self._objective = objective
        self._labels = labels
        self._bases = {name: x.basis for name, x in labels.items() if x.basis is not None}
        self._evaluation: Evaluation = objective.evaluate()
        self._terms = [term.detach() for term in objective.terms()]
        self._curvature = Curvature([objective])

    def build(
        self,
        plan: Plan,
        y: Tensor | None,
        X: Tensor | None,
        history: Sequence[Record],
        names: Sequence[str] | None,
    ) -> Result:
        problem, evaluation = self._objective.problem, self._evaluation
        fixed = self._fixed(names)
        dtype = problem.fixed.y.dtype
        names_of_effects = {term.name for term in self._random_terms}
        every = evaluation.random_effects()
        random = [self._by_level(e) for e in every if e.name in names_of_effects]
        if lost := names_of_effects - {e.name for e in every}:
            # A known covariance takes the residual's place, of which there are no BLUPs.
            raise InputError(
                f"all parameters of {min(lost)!r} are held beside errors that are estimated: leave one "
                "of them free, or hold the errors' variance too"
            )
        fitted = residuals = fixed.estimate.new_empty(0)
        if y is not None and X is not None:
            fitted = X.detach().to(dtype)[:, list(fixed.columns)] @ fixed.estimate
            for term, effects in zip(self._random_terms, random, strict=True):
                fitted = fitted + term.design.matmul(effects.values.reshape(-1, 1))[:, 0]
            residuals = y.detach().to(dtype) - fitted
        random = [self._in_user_basis(effects) for effects in random]
        if self._bases:
            history = [
                replace(step, parameters=history_in_user_basis(step.parameters, self._bases))
                for step in history
            ]
        negligible = self._negligible()
        components = self._components(negligible)
        curvature = self._curvature
        return Result(
            method=problem.method,
            # A run that was still moving ended at its limit of iterations, perhaps as near as steps go.
            converged=curvature.is_optimum
            and (curvature.norm < CLOSEST or not (history and history[-1].step > 0)),
            singular=tuple(dict.fromkeys(c.group for c in components if c.singular)),
            # Of a variance that is zero the data say nothing more.
            indistinct=tuple(
                name
                for name in curvature.indistinct
                if not any(name.startswith(f"{term}/") for term in negligible)
            ),
            boundary=curvature.boundary,
            score_norm=curvature.norm,
            condition=curvature.condition,
            rows=problem.n,
            log_likelihood=float(evaluation.log_likelihood),
            log_likelihood_error=evaluation.error + evaluation.noise,
            fixed=fixed,
            parameters=self._parameters(),
            components=tuple(components),
            random=tuple(random),
            fitted=fitted,
            residuals=residuals,
            history=tuple(history),
            plan=plan,
            num_params=len(curvature.at),
            kinks=curvature.kinked,
            source=self._source(y, X, names),
        )

    def _source(
        self, y: Tensor | None, X: Tensor | None, names: Sequence[str] | None
    ) -> Source | None:
        if y is None or X is None:
            return None
        objective = self._objective
        names = tuple(names or [f"X{j}" for j in range(X.shape[1])])
        return Source(objective.covariance, y, X, objective.rows, names, self._labels)

    @cached_property
    def _residual(self) -> list[int]:
        """Positions of the residuals' terms: those that are labelled so, else those of that form."""
        labelled = [
            i
            for i, term in enumerate(self._terms)
            if term.name in self._labels and self._labels[term.name].is_residual
        ]
        return labelled or residual_terms(self._terms)

    def _by_level(self, found: RandomEffects) -> RandomEffects:
        """BLUPs level by level, as they are labelled, also where all levels are one block."""
        label = self._labels.get(found.name)
        if label is None or len(label.effects) == found.values.shape[1]:
            return found
        k, (q, m) = len(label.effects), found.values.shape
        if len(label.levels) * k != q * m or m % k:
            return found
        blocks = found.variances.unflatten(2, (-1, k)).unflatten(1, (-1, k))  # (q, m / k, k, ...)
        own = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
        return RandomEffects(found.name, found.values.reshape(-1, k), own)

    @property
    def _random_terms(self) -> list[Term]:
        return [term for i, term in enumerate(self._terms) if i not in self._residual]

    def _fixed(self, names: Sequence[str] | None) -> FixedEffects:
        found = self._evaluation.fixed
        names = names or [f"X{j}" for j in range(max(found.columns, default=-1) + 1)]
        kept = tuple(names[j] for j in found.columns)
        aliases = self._objective.problem.fixed.aliases
        return FixedEffects(kept, found.estimate, found.covariance, found.columns, aliases)

    @cached_property
    def _spread(self) -> Spread:
        """Of the coordinates, as they are at their boundaries."""
        curvature = self._curvature
        at_boundary = curvature.at.on_boundary(curvature.u)
        at_boundary[curvature.held] = True
        return Spread(curvature.information, bool(curvature.indistinct), at_boundary)

    def _parameters(self) -> tuple[Estimate, ...]:
        covariance = self._objective.covariance
        at, u = self._curvature.at, self._curvature.u
        own = self._spread.errors(torch.eye(len(u)).to(u))
        errors = dict(
            zip(
                [id(e.tensor) for e in at.entries],  # which several leaves may share
                zip(u, own, strict=True),
                strict=False,
            )
        )
        found = []
        for e in covariance.parameter_entries().entries:
            x = e.tensor.detach().to(u)
            value, stored = float(e.trans(x)), float(x)
            std_error = stored_error = nan
            if id(e.tensor) in errors:
                coordinate, spread = errors[id(e.tensor)]
                std_error = float(_slope(e.trans.at_coordinate, coordinate) * spread)
                stored_error = float(_slope(e.trans.from_coordinate, coordinate) * spread)
            fixed = not (e.free and e.tensor.requires_grad)
            found.append(Estimate(e.name, value, std_error, stored, stored_error, fixed))
        # Weights of designs and networks, as they are.
        start = len(at.entries)
        rest = zip(at.names, u.tolist(), own.tolist(), strict=True)
        for name, value, error in list(rest)[start:]:
            found.append(Estimate(name, value, error, value, error))
        moved = self._moved({estimate.name: estimate for estimate in found})
        return tuple(moved.get(estimate.name, estimate) for estimate in found)

    def _moved(self, found: Mapping[str, Estimate]) -> dict[str, Estimate]:
        """The factors of terms that were estimated in another basis than the user's."""
        if not self._bases:
            return {}
        u, at = self._curvature.u, self._curvature.at
        names = {term: factor_names(found, term) for term in self._bases}

        def factors(x: Tensor) -> tuple[Tensor, ...]:
            terms = {term.name: term for term in self._objective.terms(at.natural(0, x))}
            parts = []
            for name, entries in names.items():
                L = factor_in_user_basis(terms[name].covariance.root().matrix, self._bases[name])
                i, j = zip(*entries.values(), strict=True)
                parts.append(L[list(i), list(j)])
            return tuple(parts)

        values = factors(u)
        jacobians = jacobian(factors, u) if len(u) else [u.new_zeros(0, len(v)) for v in values]
        moved = {}
        for entries, value, J in zip(names.values(), values, jacobians, strict=True):
            errors = self._spread.errors(J)
            for (name, (i, j)), x, error in zip(
                entries.items(), value.tolist(), errors.tolist(), strict=True
            ):
                stored, slope = (log(x) if x > 0 else -inf, x) if i == j else (x, 1.0)
                stored_error = error / slope if slope > 0 else nan
                moved[name] = Estimate(name, x, error, stored, stored_error, found[name].fixed)
        return moved

    def _in_user_basis(self, effects: RandomEffects) -> RandomEffects:
        if effects.name not in self._bases:
            return effects
        B = self._bases[effects.name]
        return replace(
            effects, values=effects.values @ B.mT, variances=B @ effects.variances @ B.mT
        )

    def _components(self, negligible: Mapping[str, Tensor]) -> list[Component]:
        u = self._curvature.u
        at = self._curvature.at

        def matrices(x: Tensor) -> tuple[Tensor, ...]:
            terms = self._objective.terms(at.natural(0, x))
            return tuple(self._shown(term) for term in terms)

        jacobians = jacobian(matrices, u) if len(u) else [None] * len(self._terms)
        found = []
        for term, J in zip(self._terms, jacobians, strict=True):
            matrix = self._shown(term)
            error = torch.zeros_like(matrix)
            if J is not None:
                error = torch.where(matrix == 0, nan, self._spread.errors(J))
            group, effects, levels, _ = self._label(term)
            names = tuple(effects), tuple(levels)
            gone = negligible.get(term.name)
            vanished = () if gone is None else tuple(e for e, g in zip(names[0], gone) if g)
            found.append(
                Component(term.name, group, *names, matrix, error, gone is not None, vanished)
            )
        return found

    def _shown(self, term: Term) -> Tensor:
        """The covariance of the effects of a level, on average where levels have their own."""
        matrix = term.shown()
        if term.name in self._bases:
            return self._bases[term.name] @ matrix @ self._bases[term.name].mT
        k = len(self._labels[term.name].effects) if term.name in self._labels else 0
        if k == 1 and matrix.dim() == 1:  # a variance for each row
            return matrix.mean().reshape(1, 1)
        if k and matrix.dim() == 2:
            if term.effects == len(matrix) < k and term.covariance.is_related:
                # Places in series are not independent, and their correlations too many.
                return matrix.diagonal().repeat(k // len(matrix))
            if len(matrix) < k:  # all effects have one variance
                eye = torch.eye(k // len(matrix), dtype=matrix.dtype, device=matrix.device)
                return torch.kron(eye, matrix)
            if len(matrix) > k:
                blocks = matrix.unflatten(1, (-1, k)).unflatten(0, (-1, k))
                return blocks.diagonal(dim1=0, dim2=2).mean(-1)
        return matrix

    def _label(self, term: Term) -> Label:
        if term.name in self._labels:
            return self._labels[term.name]
        if any(term is self._terms[i] for i in self._residual):
            size = len(term.covariance.matrix)
            return Label(RESIDUAL_GROUP, [str(i) for i in range(size)] if size > 1 else ("",), ())
        k = term.shown().shape[0]
        effects = ("(Intercept)",) if k == 1 else tuple(f"effect_{i}" for i in range(k))
        return Label(term.name, effects, self._levels(term, term.design.shape[1] // k))

    def _levels(self, term: Term, count: int) -> tuple[str, ...]:
        """Names of a term's levels: those of its design's labels, or places."""
        node: Any = self._objective.covariance
        for name in filter(None, term.name.split("/")):
            node = node.operands.get(name) if isinstance(node, Operator) else None
        named = DummyMatrix, MembershipMatrix
        if isinstance(node, Operator):
            for operand in node.operands.values():
                if isinstance(operand, named) and len(operand.labels) == count:
                    return tuple(operand.labels)
        g = term.covariance
        if isinstance(g, KroneckerCovariance) and g.sizes[0] * g.sizes[1] == count:
            rows, columns = (range(1, size + 1) for size in g.sizes)
            return tuple(f"{i}:{j}" for i in rows for j in columns)
        return tuple(map(str, range(count)))

    def _negligible(self) -> dict[str, Tensor]:
        """Terms of which some combination of effects is negligible beside the residual, by name,
        each with which of its effects (k,) are themselves."""
        residual = 0.0
        for i in self._residual:
            matrix = self._terms[i].shown()
            residual += float((matrix if matrix.dim() == 1 else matrix.diagonal()).mean())
        found: dict[str, Tensor] = {}
        if not residual:
            return found
        for term in self._random_terms:
            matrix = term.shown()
            if matrix.dim() == 1:
                variances, least = matrix, matrix.min()
            elif term.covariance.block or len(matrix) == term.effects:
                met = term.met(matrix)
                least = eigenvalues(met, f"the covariance of {term.name!r}")[0]
                variances = met.diagonal()
            else:  # levels that are correlated by what is estimated: all vanish, or none
                variances = self._shown(term).diagonal()
                least = variances.max()
            if float(least) < SINGULAR**2 * residual:
                found[term.name] = variances < SINGULAR**2 * residual
        return found


def _slope(function: Any, u: Tensor) -> Tensor:
    with torch.enable_grad():
        x = u.detach().clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0].abs()
