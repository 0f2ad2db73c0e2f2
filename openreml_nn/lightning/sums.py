r"""What the likelihood needs of the rows, by level: all that is kept of an epoch's mini-batches.

For :math:`y - f(x) = \sum_t Z_t b_t + e` with independent residuals the likelihood of the
covariance, and the BLUPs, follow from the cross-products :math:`Z_t^\top R^{-1} Z_u`,
:math:`Z_t^\top R^{-1} (y - f)` and :math:`(y - f)^\top R^{-1} (y - f)`, which add up over batches
and over processes. R is taken up to the residual's one variance; where a network yields it, it is
that of each row as its batch met it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from openreml_nn.covariance import (
    Matrix,
)
from openreml_nn.lightning.sharing import processes
from openreml_nn.lightning.summed import Summed
from openreml_nn.likelihood.plan import check_solver
from openreml_nn.likelihood.responses import ResponseStatistics
from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.model import MixedModel, ResidualStructure
from openreml_nn.model.batch import adjusted, check_outputs, row_values
from openreml_nn.model.residual import structure_of
from openreml_nn.model.several import check_one_level, coded_rows
from openreml_nn.model.sums import conditioned
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.terms.design import IndexedDesign

__all__ = ["LevelSums", "refuse_weights_of_responses"]


@dataclass
class _Total:
    """LevelSums of some rows.

    Attributes:
        statistics: cross-products of the designs and of :math:`y - f`; with head ``"gls"`` of
            :math:`[X T, y - X b]`; of several responses y is (n, t).
        unknown: levels that were added for rows of no known one, by random effect.
        scale: T and b, see :func:`conditioned`.
    """

    statistics: Any  # Statistics, or ResponseStatistics of several responses
    unknown: list[int]
    scale: tuple[Tensor, Tensor] | None = None

    def scaled(self, scale: tuple[Tensor, Tensor] | None) -> _Total:
        """The sums of the columns X T and y - X b for another T and b."""
        if self.scale is None or scale is None:
            return self
        (T, b), (wanted, offset) = self.scale, scale
        p, moved = len(b), (b - offset).reshape(len(b), -1)
        M = torch.eye(p + moved.shape[1], dtype=T.dtype)
        M[:p] = torch.linalg.solve_triangular(T, torch.cat([wanted, moved], 1), upper=True)
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
    response: Tensor  # (n, t), or with head "gls" X and y (n, p + t)
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
        t = self.model.responses
        sizes = ((1, 1), (t, t))
        correlated = isinstance(residual, Matrix) and residual.shape not in sizes
        if correlated or isinstance(residual, ResidualStructure):
            raise InputError(
                "residuals that are correlated within groups need all rows at once: use "
                "training='full' or 'parts'"
            )
        name = check_solver(self.model.solver).name
        takes = ("auto", "blocked", "sparse") if t == 1 else ("auto", "blocked")
        if name not in takes:
            raise InputError(
                f"solver {name!r} needs all rows at once: use training='full' or 'parts', or leave "
                "it out, for sums by level are solved by " + " or ".join(map(repr, takes[1:]))
            )
        for key, effect in self.model.effects().items():
            eye = torch.eye(effect.effects).to(effect.basis)
            if effect.responses > 1 and not torch.equal(effect.basis, eye):
                raise InputError(
                    f"the effects {key!r} of several responses have a basis, which needs all rows at "
                    "once: use training='full' or 'parts'"
                )

    @torch.no_grad()
    def add(self, batch: Mapping[str, Any], output: Tensor) -> None:
        """Add a batch with what the network has yielded for it."""
        n = len(output)
        check_outputs(output, batch)
        y = adjusted(batch, n, self.model.responses).double()
        known = output.detach().to(y)
        if self.model.head == "gls":
            response = torch.cat([known, y.reshape(n, -1)], 1)
        else:
            response = (y - known).reshape(n, -1)
        coded = coded_rows(self.model.effects(), batch, n)
        check_one_level(coded)
        if isinstance(self.model.residual, Matrix):
            if self.model.responses > 1:
                refuse_weights_of_responses(batch, n)
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
        t = self.model.responses
        X, y = response[:, :-t], response[:, -t:]
        if self.model.head == "gls":
            if self._scale is None:
                # Which b it is does not matter, so that a response that is missing may be its mean.
                filled = torch.where(y.isnan(), y.nanmean(0), y).nan_to_num(0.0)
                self._scale = conditioned(X, filled if t > 1 else filled[:, 0])
            T, b = self._scale
            X, y = X @ T, y - X @ b.reshape(len(b), t)
        own = tuple(effect.responses > 1 for effect in self.model.effects().values())
        statistics: Any
        if t == 1:
            statistics = Statistics.of(designs, torch.cat([X, y], 1), weights)
        else:
            statistics = ResponseStatistics.of(designs, own, X, y, weights)
        more = _Total(statistics, unknown, self._scale)
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
                everywhere = met.to(self.model.beta.device, copy=True)
                distributed.all_reduce(everywhere)
                self._check_whole(name, everywhere)
        there = [part for part in parts if part is not None]
        if not there:
            raise InputError("the training loader yielded no rows: expected some")
        total = there[0]
        for part in there[1:]:
            total = total + part
        return Summed(self.model, total.statistics, total.scale)


def refuse_weights_of_responses(batch: Mapping[str, Any], n: int) -> None:
    """Refuse weights (n, t) of single responses.

    Raises:
        InputError: if the batch has some.
    """
    weights = batch.get("weights")
    if isinstance(weights, Tensor) and weights.dim() == 2:
        raise InputError(
            f"`batch['weights']` is {described(weights)}: expected ({n},), or training='full' or "
            "'parts' for weights of single responses"
        )


def _joined(given: Sequence[Tensor | None], parts: Sequence[_Waiting]) -> Tensor | None:
    """What the parts have, one after the other, ones where one has none; None if none has any."""
    there = [value for value in given if value is not None]
    if not there:
        return None
    shape = there[0].shape[1:]
    pairs = zip(given, parts, strict=True)
    found = [p.response.new_ones(len(p.response), *shape) if v is None else v for v, p in pairs]
    return torch.cat(found).cpu()
