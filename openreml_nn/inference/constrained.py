r"""The maximum of a likelihood where a standard deviation or a correlation has a value.

An unstructured covariance is seen here by its standard deviations and angles: row i of its Cholesky
factor is

.. math:: L_i = \sigma_i\,(\cos\theta_{i1},\ \sin\theta_{i1}\cos\theta_{i2},\ \dots,\
    \sin\theta_{i1}\cdots\sin\theta_{ii}),

so that :math:`\sigma_i` and the correlation :math:`\cos\theta_{i1}` with the first effect are
coordinates themselves, and 0 and ±1 ordinary points, about which the likelihood is even.

Reference:
    Pinheiro and Bates, Statistics and Computing 6 (1996) 289, section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from math import cos, inf, pi

import torch
from torch import Tensor

from openreml_nn.covariance.owner import Entry
from openreml_nn.covariance.transform import Transform, TransformChain
from openreml_nn.covariance.triangular import UnstructuredMatrix
from openreml_nn.estimation.coordinates import Coordinates
from openreml_nn.estimation.curvature import spectrum_in_scales
from openreml_nn.estimation.derivatives import expand, hessian_of_value
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.problem import Evaluation
from openreml_nn.support.errors import NotPositiveDefiniteError

__all__ = ["Ascent", "Natural", "Quantity"]

#: A step that promises no more of the log-likelihood is the last.
_LAST = 1e-6


@dataclass(frozen=True)
class Quantity:
    """A quantity that is held at a value.

    Attributes:
        function: the quantity t as a function of the coordinates.
        bounds: of t.
        longest: a step that is long for it.
        correlation: whether it is one.
        angle: whether t is its angle.
        trans: what makes of t what is reported, where that is another number.
    """

    function: Callable[[Tensor], Tensor]
    bounds: tuple[float, float]
    longest: float
    correlation: bool = False
    angle: bool = False
    trans: Transform | None = None

    def value(self, t: float) -> float:
        """What is reported for t."""
        if self.trans is not None:
            return float(self.trans(torch.tensor([t], dtype=torch.float64)))
        return cos(t) if self.angle else t

    @property
    def limits(self) -> tuple[float, float]:
        """Bounds of what is reported."""
        if self.trans is not None:
            return self.trans.codomain
        low, high = sorted(self.value(bound) for bound in self.bounds)
        return low, high

    def at(self, v: Tensor) -> float:
        """t at some coordinates, exactly at a bound where it is within rounding of it."""
        with torch.no_grad():
            t = float(self.function(v))
        for bound in self.bounds:
            if abs(t - bound) < 1e-6 * self.longest:
                return bound
        return t

    def slope(self, v: Tensor) -> tuple[float, Tensor, Tensor]:
        """Value, gradient and Hessian."""
        with torch.no_grad():
            value = float(self.function(v))
        return value, *hessian_of_value(self.function, v)


class Natural:
    """Standard deviations and angles of a model, and the matrices that they stand for.

    Args:
        objective: the likelihood, at its maximum.
        like: of the dtype and device of the data; taken from the likelihood by default.

    Attributes:
        start: their values there.
        unit: the largest standard deviation there.
        sizes: which of them are standard deviations.
    """

    def __init__(self, objective: Objective, like: Tensor | None = None) -> None:
        self.objective = objective
        like = objective.problem.fixed.y if like is None else like
        self.at = Coordinates([objective])
        # The rows of unstructured matrices, as places of their entries in the coordinates.
        self._rows: list[list[int]] = []
        self._row_of: dict[tuple[int, int], int] = {}
        place = {(id(e.leaf), e.local): j for j, e in enumerate(self.at.entries)}
        for leaf in {id(e.leaf): e.leaf for e in self.at.entries}.values():
            if not isinstance(leaf, UnstructuredMatrix):
                continue
            names = leaf.param_names
            if any((id(leaf), name) not in place for name in names):
                continue
            if any(isinstance(trans, TransformChain) for trans in leaf.own_trans.values()):
                continue  # bounded by a user, so that its coordinates are no entries
            for i in range(leaf.shape[0]):
                self._row_of[id(leaf), i] = len(self._rows)
                first = i * (i + 1) // 2
                self._rows.append([place[id(leaf), n] for n in names[first : first + i + 1]])
        self.sizes = [e.trans.vanishes for e in self.at.entries]
        for size, *angles in self._rows:
            self.sizes[size] = True
            for j in angles:
                self.sizes[j] = False
        self.start = self._inverse(self.at.read(like))
        terms = [term.detach() for term in objective.terms()]
        self.unit = max(float(t.covariance.shown().abs().max()) for t in terms) ** 0.5

    def coordinates(self, v: Tensor) -> Tensor:
        """Coordinates of estimation."""
        u = v
        for row in self._rows:
            size, angles = v[row[0]], v[row[1:]]
            ones = torch.ones_like(size)[None]
            sines = torch.cat([ones, angles.sin().cumprod(0)])
            u = u.index_copy(
                0,
                torch.tensor(row, device=v.device),
                size * sines * torch.cat([angles.cos(), ones]),
            )
        return u

    def _inverse(self, u: Tensor) -> Tensor:
        v = u.clone()
        for row in self._rows:
            left = u[row].square().flip(0).cumsum(0).flip(0).sqrt()  # norms of what follows
            v[row[0]] = left[0]
            for a, j in enumerate(row[1:]):
                if a + 2 == len(row):
                    angle = torch.atan2(u[row[-1]].abs(), u[row[a]])
                else:
                    angle = torch.atan2(left[a + 1], u[row[a]])
                v[j] = angle if float(left[a]) > 0 else pi / 2
        return v

    def of(self, objective: Objective) -> Natural:
        """These natural parameters with the likelihood of other data."""
        found = copy(self)
        found.objective = objective
        return found

    def matrices(self, v: Tensor) -> tuple[Tensor, ...]:
        """Matrices of the problem."""
        return self.objective.matrices(self.at.natural(0, self.coordinates(v)))

    def evaluate(self, v: Tensor) -> Evaluation:
        """The likelihood."""
        with torch.no_grad():
            terms = self.objective.terms(self.at.natural(0, self.coordinates(v)))
            return self.objective.problem.evaluate(terms)

    def even(self) -> list[tuple[int, float, float]]:
        """Points about which the likelihood is even: the coordinate, the point, and the sign of the
        way to where the coordinate is."""
        angles = {j for row in self._rows for j in row[1:]}
        found = [(j, edge, sign) for j in angles for edge, sign in ((0.0, 1.0), (pi, -1.0))]
        for j, e in enumerate(self.at.entries):
            if j not in angles:
                bounds = e.trans.bounds
                found += [(j, edge, 1.0 if edge == min(bounds) else -1.0) for edge in bounds]
        return found

    def held(self, index: int, i: int, j: int) -> Quantity | None:
        """The standard deviation (i = j) or the correlation of effects of a term.

        None where the likelihood does not depend on it, or it does not exist.
        """
        entry = self._leaf_of(index)
        if entry is not None and i == j:
            at = self._rows[self._row_of[id(entry.leaf), i]][0]
            return Quantity(lambda v: v[at], (0.0, inf), self.unit)
        if entry is not None and j == 0:
            at = self._rows[self._row_of[id(entry.leaf), i]][1]
            return Quantity(lambda v: v[at], (0.0, pi), 1.0, True, True)

        def entry_of(v: Tensor) -> Tensor:
            recorded = self.at.natural(0, self.coordinates(v))
            matrix = self.objective.terms(recorded)[index].covariance.shown()
            if i == j:
                # A square root has no slope at zero, where another standard deviation is.
                return matrix[i, i].clamp(min=1e-30 * self.unit**2).sqrt()
            return matrix[i, j] / (matrix[i, i] * matrix[j, j]).sqrt()

        bounds, longest = ((0.0, inf), self.unit) if i == j else ((-1.0, 1.0), 1.0)
        own = self._own_scale(index, i) if i == j else None
        held = Quantity(entry_of if own is None else (lambda v: v[own]), bounds, longest)
        value, slope, _ = held.slope(self._inner(self.start))
        return held if value == value and bool((slope != 0).any()) else None

    def _inner(self, v: Tensor) -> Tensor:
        """A point nearby at which no coordinate is at a boundary."""
        v = v.clone()
        for j, edge, sign in self.even():
            if abs(float(v[j]) - edge) < 1e-6:
                v[j] += sign * 1e-3
        return v

    def _leaf_of(self, index: int) -> Entry | None:
        """A parameter of the unstructured matrix that a term's covariance is."""
        entries = self._entries_of(index)
        known = [e for e in entries if (id(e.leaf), 0) in self._row_of]
        size = len(self.objective.terms()[index].covariance.shown())
        alone = len(entries) == size * (size + 1) // 2
        return known[0] if known and len(known) == len(entries) and alone else None

    def _own_scale(self, index: int, i: int) -> int | None:
        """The coordinate that is the standard deviation of a term of one variance, beside which
        may be correlations: it is one at zero too, where a square root has no slope."""
        scales = [e for e in self._entries_of(index) if e.trans.vanishes]
        if len(scales) != 1:
            return None
        at, v = self.at.entries.index(scales[0]), self._inner(self.start)
        with torch.no_grad():
            recorded = self.at.natural(0, self.coordinates(v))
            matrix = self.objective.terms(recorded)[index].covariance.shown()
        return at if bool(torch.isclose(matrix[i, i].sqrt(), v[at].abs(), rtol=1e-10)) else None

    def _entries_of(self, index: int) -> list[Entry]:
        name = self.objective.terms()[index].name
        return [e for e in self.at.entries if e.name.startswith(f"{name}/") or e.name == name]


class Ascent:
    """Steps to the maximum under a constraint, by Newton's method on the Lagrangian.

    Args:
        natural: the model.
        v: where it starts.
        max_iterations: steps of an ascent, at most.

    Attributes:
        v: where it is.
        arrived: whether the last ascent ended at a maximum.
    """

    def __init__(self, natural: Natural, v: Tensor, max_iterations: int = 60) -> None:
        self.natural, self.v, self.arrived = natural, v.clone(), True
        self._max_iterations = max_iterations
        self._is_size = torch.tensor(natural.sizes, device=v.device)

    def climb(self) -> float:
        """Go to the maximum; returns the log-likelihood there."""
        return self._ascend(None, 0.0)

    def hold(self, held: Quantity, target: float) -> float:
        """Go to the maximum where a quantity has a value; returns the log-likelihood there."""
        return self._ascend(held, target)

    def _ascend(self, held: Quantity | None, target: float) -> float:
        self._leave_boundary(held)
        scale = 1.0 if held is None else max(abs(target), 1e-3 * held.longest)
        for _ in range(self._max_iterations):
            score, curvature = self._curvature()
            if held is not None and held.correlation:
                # At zero, and the likelihood falls from there: it stays.
                stays = self._is_size & (self.v == 0) & (score < 0)
                score = torch.where(stays, 0, score)
                curvature = torch.where(
                    stays[:, None] | stays, torch.diag(stays.to(score)), curvature
                )
            inverse, K = _positive(curvature)
            multiplier = gap = 0.0
            move = inverse @ score
            if held is not None:
                value, a, bend = held.slope(self.v)
                gap = target - value
                # The square root of a variance that is zero has no slope: there it is held anyway.
                for _ in range(2 if a.any() else 0):
                    multiplier = float((a @ inverse @ score - gap) / (a @ inverse @ a))
                    move = inverse @ (score - multiplier * a)
                    inverse, K = _positive(curvature + multiplier * bend)
            promised = float(move @ K @ move)
            if promised < 1e-9 and abs(gap) < 1e-10 * scale:
                break
            self._step(move, held, target, abs(multiplier))
            if promised < _LAST:
                # Newton's step squares what is left: that is seen without another curvature.
                with torch.no_grad():
                    gap = 0.0 if held is None else target - float(held.function(self.v))
                if abs(gap) < 1e-10 * scale:
                    break
        self.arrived = promised < 1e-6 and abs(gap) < 1e-6 * scale
        return float(self.natural.evaluate(self.v).log_likelihood)

    def spread(self) -> Tensor:
        """Inverse of the curvature."""
        _, curvature = self._curvature()
        return _positive(curvature)[0]

    def _curvature(self) -> tuple[Tensor, Tensor]:
        """Score and observed information; the average information where the solver has no second
        derivatives of its own."""
        problem, matrices = self.natural.objective.problem, self.natural.matrices
        if problem.has_second_derivatives:
            score, bend = hessian_of_value(lambda v: problem.recorded(matrices(v)), self.v)
            return score, -(bend + bend.mT) / 2
        evaluation = self.natural.evaluate(self.v)
        score, bend, slopes = expand(matrices, evaluation.scores(), self.v)
        information = evaluation.information(slopes)
        return score, information - (bend + bend.mT) / 2

    def _leave_boundary(self, held: Quantity | None) -> None:
        """Move off points about which the likelihood is even: no gradient shows whether it rises
        from there, and Newton's method returns in a few steps where it does not."""
        if held is not None and held.correlation:
            self.v = torch.where(self._is_size, self.v.abs(), self.v)
            start = self.natural.start.abs()
            self.v = torch.where(
                self._is_size & (self.v == 0), 0.1 * start + 1e-3 * self.natural.unit, self.v
            )
        near = []
        for j, edge, sign in self.natural.even():
            most = 0.1 * self.natural.unit if bool(self._is_size[j]) else 0.1
            if abs(float(self.v[j]) - edge) < 1e-3 * most:
                near.append((j, edge, sign, most))
        if not near:
            return
        _, curvature = self._curvature()
        for j, edge, sign, most in near:
            away = min(0.1 / float(curvature[j, j].abs().clamp(min=1e-300)) ** 0.5, most)
            if abs(float(self.v[j]) - edge) < 1e-3 * away:
                self.v[j] = edge + sign * away

    def _step(self, move: Tensor, held: Quantity | None, target: float, price: float) -> None:
        """Move, by less where the likelihood less the price of the gap falls."""

        def merit(v: Tensor) -> float:
            try:
                value = float(self.natural.evaluate(v).log_likelihood)
            except NotPositiveDefiniteError:
                return -inf
            if held is None:
                return value
            with torch.no_grad():
                return value - 2 * price * abs(float(held.function(v)) - target)

        start, length = merit(self.v), 1.0
        for _ in range(12):
            if merit(self.v + length * move) >= start - 1e-9 * (1 + abs(start)):
                break
            length /= 2
        moved = self.v + length * move
        if held is not None and held.correlation:
            # A standard deviation below zero would turn the sign of the correlation.
            moved = torch.where(self._is_size, moved.clamp(min=0), moved)
        self.v = moved


def _positive(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of a curvature with its eigenvalues made positive, and that curvature."""
    if not len(curvature):
        return curvature, curvature
    size = curvature.diagonal().abs()
    size = size + 1e-12 * size.max()
    unit = torch.where(size > 0, size, 1).sqrt()
    values, vectors = spectrum_in_scales(curvature, unit)
    values = values.abs().clamp(min=1e-8)
    inverse = (vectors / values) @ vectors.mT / (unit[:, None] * unit)
    return inverse, (vectors * values) @ vectors.mT * (unit[:, None] * unit)
