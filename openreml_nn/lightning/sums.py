r"""What the likelihood needs of the rows, by level: all that is kept of an epoch's mini-batches.

For :math:`y - f(x) = \sum_t Z_t b_t + e` with independent residuals the likelihood of the
covariance, and the BLUPs, follow from the cross-products :math:`Z_t^\top R^{-1} Z_u`,
:math:`Z_t^\top R^{-1} (y - f)` and :math:`(y - f)^\top R^{-1} (y - f)`, which add up over batches
and over processes. R is taken up to the residual's one variance; where a network yields it, it is
that of each row as its batch met it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, distributed

from openreml_nn.covariance import Matrix, ScalarMatrix, Sum
from openreml_nn.covariance.params import operand_name
from openreml_nn.estimation.outcome import outcome
from openreml_nn.lightning.sharing import processes
from openreml_nn.lightning.table import TableModel
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import Plan, check_solver
from openreml_nn.likelihood.solvers.blocked import Blocked, BlockedProblem
from openreml_nn.likelihood.system.products import Statistics
from openreml_nn.model import MixedModel, ResidualStructure
from openreml_nn.model.batch import check_outputs, row_values
from openreml_nn.model.residual import structure_of
from openreml_nn.model.sums import conditioned, orthonormal
from openreml_nn.result.equations import Equations, FixedBasis
from openreml_nn.result.result import Record, Result
from openreml_nn.support.errors import InputError
from openreml_nn.terms.design import IndexedDesign

__all__ = ["LevelSums"]


@dataclass
class _Total:
    """LevelSums of some rows.

    Attributes:
        statistics: cross-products of the designs and of :math:`y - f`; with head ``"gls"`` of
            :math:`[X T, y - X b]`.
        unknown: levels that were added for rows of no known one, by random effect.
        scale: T and b, see :func:`conditioned`.
    """

    statistics: Statistics
    unknown: list[int]
    scale: tuple[Tensor, Tensor] | None = None

    def scaled(self, scale: tuple[Tensor, Tensor] | None) -> _Total:
        """The sums of the columns X T and y - X b for another T and b."""
        if self.scale is None or scale is None:
            return self
        (T, b), (wanted, offset) = self.scale, scale
        p = len(b)
        M = torch.zeros(p + 1, p + 1, dtype=T.dtype)
        M[:p] = torch.linalg.solve_triangular(
            T, torch.cat([wanted, (b - offset)[:, None]], 1), upper=True
        )
        M[p, p] = 1
        return _Total(self.statistics.mapped(M), self.unknown, scale)

    def __add__(self, other: _Total) -> _Total:
        """Of the rows of both; the unknown levels of the two are different ones."""
        unknown = [a + b for a, b in zip(self.unknown, other.unknown, strict=True)]
        known = [size - a for (size, _), a in zip(self.statistics.sizes, self.unknown, strict=True)]
        sizes = [q + m for q, m in zip(known, unknown, strict=True)]
        own, theirs = [], []
        for q, a, b in zip(known, self.unknown, other.unknown, strict=True):
            own.append(torch.arange(q + a))
            theirs.append(torch.cat([torch.arange(q), q + a + torch.arange(b)]))
        statistics = self.statistics.relabelled(own, sizes) if any(unknown) else self.statistics
        theirs_now = other.scaled(self.scale).statistics
        more = theirs_now.relabelled(theirs, sizes) if any(unknown) else theirs_now
        return _Total(statistics + more, unknown, self.scale)


@dataclass
class _Waiting:
    """Rows that are not yet added up."""

    codes: list[Tensor]
    values: list[Tensor | None]
    response: Tensor  # (n, 1), or with head "gls" X and y (n, p + 1)
    weights: Tensor | None


@dataclass
class LevelSums:
    """Sums by level over the rows that were added; with head ``"gls"`` of X beside y, which is
    exact where no network is trained.

    A code of -1 is a level of its own each time. All is kept in double precision, on the CPU.

    Args:
        model: the model whose random effects and residual they are for.
        whole_groups: whether a level must be met in one batch only.
        waiting: rows whose codes and residuals wait to be added up; a sum then costs little beside
            them.
    """

    model: MixedModel
    whole_groups: bool = False
    waiting: int = 50_000
    _met: dict[str, Tensor] = field(default_factory=dict)
    _total: _Total | None = None
    _waiting: list[_Waiting] = field(default_factory=list)
    _rows: int = 0
    _scale: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        residual = self.model.residual
        if self.model.responses > 1:
            raise InputError(
                f"several responses of a row, {self.model.responses}, need all rows at once: use "
                "training='full' or 'parts'"
            )
        correlated = isinstance(residual, Matrix) and residual.shape != (1, 1)
        if correlated or isinstance(residual, ResidualStructure):
            raise InputError(
                "residuals that are correlated within groups need all rows at once: use "
                "training='full' or 'parts'"
            )
        name = check_solver(self.model.solver).name
        if name not in ("auto", "blocked"):
            raise InputError(
                f"solver {name!r} needs all rows at once: use training='full' or 'parts', or leave "
                "it out, for sums by level are solved by 'blocked'"
            )

    @torch.no_grad()
    def add(self, batch: Mapping[str, Any], output: Tensor) -> None:
        """Add a batch with what the network has yielded for it."""
        n = len(output)
        check_outputs(output, batch)
        y = batch["y"].double()
        offset = row_values(batch, "offset", n)
        if offset is not None:
            y = y - offset.to(y)
        known = output.detach().to(y)
        if self.model.head == "gls":
            response = torch.cat([known, y[:, None]], 1)
        else:
            response = (y - known)[:, None]
        coded = {name: f.coded(name, batch, n) for name, f in self.model.effects().items()}
        if isinstance(self.model.residual, Matrix):
            weights = row_values(batch, "weights", n, positive=True)
        else:
            weights = 1 / structure_of(self.model.residual).variances(batch, n)
        weights = None if weights is None else weights.double()
        values = [None if z is None else z.double() for _, z in coded.values()]
        codes = [codes for codes, _ in coded.values()]
        if self.whole_groups:
            for name, own in zip(coded, codes, strict=True):
                self._meet(name, own.cpu())
        self._waiting.append(_Waiting(codes, values, response, weights))
        self._rows += n
        if self._rows >= self.waiting:
            self._fold()

    def _meet(self, name: str, codes: Tensor) -> None:
        levels = self.model.effects()[name].levels
        met = self._met.setdefault(name, torch.zeros(levels, dtype=torch.long))
        codes = codes[codes >= 0].unique()
        met[codes] += 1
        self._check_whole(name, met)

    def _check_whole(self, name: str, met: Tensor) -> None:
        if bool((met > 1).any()):
            raise InputError(
                f"level {int(met.argmax())} of {name!r} is in more than one mini-batch: "
                "training='groups' takes batches that cut no group, as of "
                "DataLoader(data, batch_sampler=WholeGroups(groups, rows))"
            )

    def _fold(self) -> None:
        """Add up the rows that wait."""
        if not self._waiting:
            return
        parts, self._waiting, self._rows = self._waiting, [], 0
        parts = [part for part in parts if len(part.response)]
        if not parts:
            return
        designs, unknown = [], []
        for t, effect in enumerate(self.model.effects().values()):
            codes = torch.cat([part.codes[t] for part in parts]).cpu().long()
            absent = (codes < 0).nonzero()[:, 0]
            codes = codes.index_copy(0, absent, effect.levels + torch.arange(len(absent)))
            values = _joined([part.values[t] for part in parts], parts)
            levels = effect.levels + len(absent)
            designs.append(IndexedDesign(codes, values, levels, absent=False))
            unknown.append(len(absent))
        response = torch.cat([part.response for part in parts]).cpu()
        weights = _joined([part.weights for part in parts], parts)
        if self.model.head == "gls":
            X, y = response[:, :-1], response[:, -1]
            if self._scale is None:
                self._scale = conditioned(X, y)
            T, b = self._scale
            response = torch.cat([X @ T, (y - X @ b)[:, None]], 1)
        more = _Total(Statistics.of(designs, response, weights), unknown, self._scale)
        self._total = more if self._total is None else self._total + more

    # ------------------------------------------------------------------ the likelihood

    def gathered(self) -> Summed:
        """The sums of all processes' rows.

        Raises:
            InputError: if there are none, a level is in several batches where it must not be, or
                levels that are correlated have unknown ones beside them.
        """
        self._fold()
        parts: list[_Total | None] = [self._total]
        if processes() > 1:
            parts = [None] * processes()
            distributed.all_gather_object(parts, self._total)
            for name, met in self._met.items():
                everywhere = met.clone()
                distributed.all_reduce(everywhere)
                self._check_whole(name, everywhere)
        there = [part for part in parts if part is not None]
        if not there:
            raise InputError("the training loader yielded no rows: expected some")
        total = there[0]
        for part in there[1:]:
            total = total + part
        return Summed(self.model, total.statistics, tuple(total.unknown), total.scale)


def _joined(given: Sequence[Tensor | None], parts: Sequence[_Waiting]) -> Tensor | None:
    """What the parts have, one after the other, ones where one has none; None if none has any."""
    there = [value for value in given if value is not None]
    if not there:
        return None
    shape = there[0].shape[1:]
    pairs = zip(given, parts, strict=True)
    found = [p.response.new_ones(len(p.response), *shape) if v is None else v for v, p in pairs]
    return torch.cat(found).cpu()


class Summed:
    """The likelihood of the covariance, and the BLUPs, from the sums over all rows.

    Args:
        model: the model.
        statistics: cross-products of its designs and of :math:`y - f`, or of X and y by ``scale``.
        unknown: levels beyond the known ones, by random effect.
        scale: T and b of :func:`conditioned`, with head ``"gls"``.

    Attributes:
        objective: the likelihood in the covariance parameters.
        plan: how it is computed.
    """

    def __init__(
        self,
        model: MixedModel,
        statistics: Statistics,
        unknown: Sequence[int],
        scale: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        none = torch.zeros(0, dtype=torch.float64)
        square = none.reshape(0, 0)
        fixed = FixedPart(none, square, square, none, [], square)
        if scale is not None:
            names = [f"column {j}" for j in range(len(scale[1]))]
            fixed, statistics = orthonormal(scale, statistics, names)
        self._model, self._statistics, self._unknown = model, statistics, unknown
        covariance = self._covariance()
        terms = [term.to(torch.float64).detach() for term in covariance.terms()]
        solver = Blocked()
        problem = BlockedProblem(fixed, terms, model.method, solver, statistics)
        plan = Plan.of(terms, problem.p, solver, torch.float64).measured(problem)
        self.plan = replace(plan, rows=problem.n, reason="sums by level of mini-batches")
        self.objective = Objective(covariance, problem, None)

    def _covariance(self) -> Matrix:
        """The tree for a few rows, which have all levels: the sums stand for the others."""
        effects = self._model.effects()
        sizes = [size for size, _ in self._statistics.sizes]
        count = max(sizes) + len(sizes)
        grouping = self._groupings()
        parts: dict[str, Matrix] = {}
        for t, (name, effect) in enumerate(effects.items()):
            # Different factors have different codes, whatever their numbers of levels. Each
            # unknown level is there once.
            row = torch.arange(count)
            codes = torch.where(row < sizes[t], (row + grouping[t]) % sizes[t], 0)
            codes = torch.where(codes < effect.levels, codes, -1)
            square = self._statistics.products.zz[t, t].diagonal(dim1=1, dim2=2).sum(0)
            values = (square / self._statistics.rows).sqrt().expand(count, -1).clone()
            parts[operand_name(name, {"residual"})] = effect.covariance(name, codes, values)
        if isinstance(self._model.residual, Matrix):
            return Sum(parts | structure_of(self._model.residual).operands({}, count))
        residual = ScalarMatrix(count).double()
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
        evaluation = self.objective.evaluate()
        fixed = self.objective.problem.fixed
        model.remember(evaluation.random, evaluation.fixed, fixed.aliases)
        variance = fixed.T.new_ones(())
        if isinstance(model.residual, Matrix):
            variance = model.residual().detach().to(variance).reshape(())
        *random, _ = self.objective.terms()
        model.remember_equations(
            [term.detach().covariance for term in random],
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
