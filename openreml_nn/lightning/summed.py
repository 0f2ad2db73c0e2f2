"""The likelihood of the covariance, and the BLUPs, from the sums by level over all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    Matrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.covariance.params import operand_name
from openreml_nn.estimation.outcome import outcome
from openreml_nn.lightning.table import TableModel
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import Plan
from openreml_nn.likelihood.prepared import precision_of
from openreml_nn.likelihood.problem import Problem
from openreml_nn.likelihood.responses import ResponsesProblem, ResponseStatistics
from openreml_nn.likelihood.solvers.blocked import Blocked
from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.model import MixedModel
from openreml_nn.model.residual import structure_of
from openreml_nn.model.sums import fixed_part
from openreml_nn.result.equations import Equations, FixedBasis
from openreml_nn.result.result import Record, Result
from openreml_nn.support.errors import InputError

__all__ = ["Summed"]


class Summed:
    """The likelihood of the covariance, and the BLUPs, from the sums over all rows.

    Args:
        model: the model, on whose device all is computed.
        statistics: cross-products of its designs and of :math:`y - f`, or of X and y by ``scale``.
        scale: T and b of :func:`conditioned`, with head ``"gls"``.

    Attributes:
        objective: the likelihood in the covariance parameters.
        plan: how it is computed.
    """

    def __init__(
        self,
        model: MixedModel,
        statistics: Statistics | ResponseStatistics,
        scale: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._model, self._open = model, None
        device = self._device = model.beta.device
        statistics = statistics.to(device)
        scale = None if scale is None else (scale[0].to(device), scale[1].to(device))
        if isinstance(statistics, ResponseStatistics):
            self._open, t = statistics, model.responses
            statistics = statistics.at(torch.eye(t, dtype=torch.float64, device=device))
            if scale is not None:  # of [I x X | y]
                scale = torch.block_diag(*[scale[0]] * t), scale[1].mT.reshape(-1)
        none = torch.zeros(0, dtype=torch.float64, device=device)
        square = none.reshape(0, 0)
        fixed, M = FixedPart(none, square, square, none, [], square), none.new_ones(1, 1)
        if scale is not None:
            names = [f"column {j}" for j in range(len(scale[1]))]
            fixed, M = fixed_part(scale, statistics.products.ff, statistics.rows, names)
        self._statistics, self._M = statistics.mapped(M), M
        covariance = self._covariance()
        terms = [term.detach() for term in covariance.terms(None, torch.float64)]
        # With one variance of all responses R is known up to that.
        if self._open is not None and not _has_covariance(model):
            self._open = None
        if self._open is not None:
            problem: Problem = ResponsesProblem(fixed, terms, model.method, self._open, M)
            plan = Plan.of(terms, problem.p, Blocked(), torch.float64)
        else:
            p, sums = len(fixed.T), self._statistics
            plan = Plan.of(terms, p, model.solver, torch.float64, sums)
            problem = plan.choice.problem_of_sums(fixed, terms, model.method, sums)
        plan = plan.measured(problem)
        self.plan = replace(plan, rows=problem.n, reason="sums by level of mini-batches")
        self.objective = Objective(covariance, problem, None)

    def _covariance(self) -> Matrix:
        """The tree for a few rows, which have all levels: the sums stand for the others."""
        effects, t = self._model.effects(), self._model.responses
        sizes = [size for size, _ in self._statistics.sizes]
        count = max(sizes, default=1) + len(sizes)
        grouping = self._groupings()
        parts: dict[str, Matrix] = {}
        for i, (name, effect) in enumerate(effects.items()):
            # Different factors have different codes, whatever their numbers of levels.
            row = torch.arange(count, device=self._device)
            codes = torch.where(row < sizes[i], (row + grouping[i]) % sizes[i], 0)
            square = self._statistics.products.zz[i, i].diagonal(dim1=1, dim2=2).sum(0)
            values = (square / self._statistics.rows).sqrt().expand(count * t, -1).clone()
            # Unknown levels are there too, as others.
            own = effect.g_of(sizes[i])
            if own is None:
                raise InputError(
                    f"group {name!r} has the code -1, a level that is not known, in rows of the "
                    "likelihood: expected known levels, because its levels are correlated"
                )
            z = DummyMatrix.from_codes(codes.repeat_interleave(t), sizes[i], values)
            parts[operand_name(name, {"residual"})] = CovariancePropagation(z=z, g=own)
        if isinstance(self._model.residual, Matrix):
            cells = {"residual": torch.arange(count * t, device=self._device)}
            return Sum(parts | structure_of(self._model.residual).operands(cells, count * t))
        residual = ScalarMatrix(count * t).to(self._device, torch.float64)
        residual.fix("sigma^2", 0.0)
        return Sum({**parts, "residual": residual})

    def _groupings(self) -> list[int]:
        """For each random effect the first one of the same grouping factor."""
        found: list[int] = []
        for t in range(len(self._statistics.sizes)):
            same = (u for u in range(t) if found[u] == u and self._is_same(u, t))
            found.append(next(same, t))
        return found

    def _is_same(self, t: int, u: int) -> bool:
        a, b = self._statistics.cells[t, u]
        return self._statistics.sizes[t][0] == self._statistics.sizes[u][0] and torch.equal(a, b)

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self._statistics.rows

    def update(self) -> None:
        """Store BLUPs and what their variances need in the model."""
        model, statistics = self._model, self._statistics
        variance = torch.ones((), dtype=torch.float64, device=self._device)
        evaluation = self.objective.evaluate()
        fixed = self.objective.problem.fixed
        # Sums are float64 whatever they are of, BLUPs as the model's parameters are.
        own = [model.residual, *(effect.g for effect in model.effects().values())]
        dtype = precision_of(own)
        random = [found.to(dtype) for found in evaluation.random]
        model.remember(random, evaluation.fixed, fixed.aliases)
        if isinstance(model.residual, Matrix):
            with model.residual.computed_in(torch.float64):
                R = model.residual().detach()
            if self._open is None:
                variance = R.reshape(())
            else:
                statistics = self._open.at(R).mapped(self._M)
        *terms, _ = self.objective.terms()
        model.remember_equations(
            [term.detach().covariance for term in terms],
            statistics.sizes,
            len(fixed.T),
            lambda: Equations.of_statistics(statistics, variance, FixedBasis.of(fixed)),
        )

    def result(self, history: Sequence[Record], table: TableModel | None) -> Result:
        """The result at the present parameters."""
        labels = {} if table is None else table.labels
        p = len(self.objective.problem.fixed.aliases)
        names = [] if not p else None if table is None else table.names(p)
        found = outcome(self.objective, self.plan, None, None, history, names, labels)
        levels = [effect.levels for effect in self._model.effects().values()]
        random = tuple(
            replace(r, values=r.values[:q], variances=r.variances[:q])
            for r, q in zip(found.random, levels, strict=True)
        )
        return replace(found, random=random)


def _has_covariance(model: MixedModel) -> bool:
    """Whether the responses of a row have a covariance, and not one variance."""
    return isinstance(model.residual, Matrix) and model.residual.shape != (1, 1)
