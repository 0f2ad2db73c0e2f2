r"""The system of the random effects by a sparse Cholesky factor, with weights that move.

It is that of the sparse solver, with the weights of the rows in the place of
:math:`R^{-1}`. Derivatives come from the entries of the inverse within the pattern of the factor: the
variances of the rows' predictors, and the traces by covariances, for which no n × n is formed. All is
computed in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.laplace_border import Border
from openreml_nn.likelihood.problem import Cost
from openreml_nn.likelihood.solvers.sparse import Sparse, cost_of
from openreml_nn.likelihood.system.sparse.bordered import Factored
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.second_order import SecondOrder, near_solve
from openreml_nn.likelihood.system.sparse.terms import SparseTerm, TermAt, is_dense
from openreml_nn.likelihood.system.sparse.weighted import EffectRows
from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.terms.design import DenseDesign
from openreml_nn.terms.term import Term

__all__ = ["SparseFactor", "SparsePoint", "SparseSpace"]

#: Operations a row up to which a factor takes no longer than a step's work on the rows,
_CHEAP = 100.0
#: and beyond which it takes so much longer that steps to an optimum near by are worth while.
_DEAR = 2000.0


class SparseSpace:
    """Where the random effects of some terms stand in the sparse system.

    Args:
        terms: the random terms.
        solver: with its options.
    """

    reason = "the weights of the rows move"

    def __init__(self, terms: Sequence[Term], solver: Sparse) -> None:
        self.solver = solver
        self.random = SparseTerm.of_all(terms, ())
        self.equations = Equations(
            [own.part for own in self.random], None, solver.ordering, solver.progress
        )
        self.rows = EffectRows(terms, self.equations)
        self.count = terms[0].design.shape[0]
        self.largest = self.equations.largest(self.rows.products(np.ones(self.count)))
        operations = self.equations.symbolic.operations
        self.is_cheap = operations < _CHEAP * self.count
        #: Whether levels are independent, and a factor takes far longer than what is done to the rows.
        self.is_dear = operations > _DEAR * self.count and all(
            own.part.prior is None and own.part.basis is None for own in self.random
        )

    def check_memory(self) -> None:
        """Refuse a factor that would hold more than the solver may.

        Raises:
            InputError: if it would.
        """
        self.solver.check_memory(self.equations.symbolic.bytes, self.equations.size)

    @staticmethod
    def fits(terms: Sequence[Term]) -> bool:
        """Whether the system of some terms is sparse: each row meets few columns, and they others."""
        return all(
            not isinstance(term.design, DenseDesign) and not is_dense(term) for term in terms
        )

    @property
    def size(self) -> int:
        return self.equations.size

    def at(self, terms: Sequence[Term]) -> SparsePoint:
        return SparsePoint(self, [term.detach() for term in terms])

    def cost(self, p: int) -> Cost:
        """What an evaluation takes with p coefficients of X."""
        return cost_of(self.equations, self.count, p)


class SparsePoint:
    """The random effects at some covariances.

    Args:
        space: where they stand.
        terms: with these covariances.
    """

    def __init__(self, space: SparseSpace, terms: Sequence[Term]) -> None:
        self.space, self.terms = space, terms
        self.is_cheap = space.is_cheap
        self.roots = [
            own.roots(self.terms[own.at], size)
            for own, size in zip(space.random, space.largest, strict=True)
        ]
        self.at = [own.at_point(self.terms[own.at]) for own in space.random]
        self.log_det = space.equations.log_det_prior + sum(point.log_det for point in self.at)

    def each(self, x: np.ndarray, transpose: bool = False) -> np.ndarray:
        r""":math:`\Lambda x`, or :math:`\Lambda^\top x`, for x (size, m)."""
        pairs = zip(self.roots, self.space.equations.split(x), strict=True)
        return np.concatenate([root.times(root.lifted, part, transpose) for root, part in pairs])

    def times_prior(self, x: np.ndarray) -> list[np.ndarray]:
        """:math:`Q x` for x (size, m), part by part."""
        pairs = zip(self.at, self.space.equations.split(x), strict=True)
        return [point.part.times_prior(own) for point, own in pairs]

    def predictor(self, u: Tensor) -> Tensor:
        return torch.from_numpy(self.space.rows.times(self.each(u.numpy()[:, None])[:, 0]))

    def slope(self, v: Tensor) -> Tensor:
        by_effect = self.space.rows.t_times(np.ascontiguousarray(v.numpy()))
        return torch.from_numpy(self.each(by_effect[:, None], transpose=True)[:, 0])

    def prior(self, u: Tensor) -> Tensor:
        if all(point.part.prior is None for point in self.at):
            return u
        return torch.from_numpy(np.concatenate(self.times_prior(u.numpy()[:, None]))[:, 0])

    def factor(self, weights: Tensor, X: Tensor) -> SparseFactor:
        return SparseFactor(self, weights, X)

    def nearby(self, weights: Tensor, X: Tensor, factor: SparseFactor) -> SparseFactor:
        """That of the system whose determinant and inverse are to second order about the diagonal, see
        :class:`SecondOrder`, and whose solves are those of another factor."""
        return SparseFactor(self, weights, X, factor)


class SparseFactor:
    r"""The factor of :math:`H = Q + \Lambda^\top Z^\top W Z\Lambda`, bordered by the coefficients of X.

    Args:
        point: the random effects with :math:`\Lambda`.
        weights: of the rows, (n,).
        X: (n, p).
        near: one that solves in its place, see :meth:`SparsePoint.nearby`; it solves itself by default.

    Raises:
        NotPositiveDefiniteError: if the system is not positive definite.
    """

    error = 0.0

    def __init__(
        self, point: SparsePoint, weights: Tensor, X: Tensor, near: SparseFactor | None = None
    ) -> None:
        self._point = point
        self.weights = weights.clone()
        space, roots = point.space, point.roots
        blocks = space.rows.products(weights.contiguous().numpy())
        self._moved = [
            cross.transform(data, roots[cross.one].lifted, roots[cross.other].lifted)
            for cross, data in zip(space.equations.crosses, blocks, strict=True)
        ]
        self._factor: Factored
        self._whole: Factored | SecondOrder
        if near is not None:
            self._factor, self._whole = near._factor, SecondOrder(space.equations, self._moved)
        else:
            try:
                entries = [at.entries for at in point.at]
                self._factor = self._whole = space.equations.factor(self._moved, entries)
            except NotPositiveDefiniteError:
                raise NotPositiveDefiniteError(
                    "the curvature of the random effects at the mode is not positive definite"
                ) from None
        self._border = Border(point, self._solve, weights, X)

    def alone(self) -> SparseFactor:
        found = copy(self)
        found._border = Border(self._point, self._solve, self.weights, self._border.X[:, :0])
        return found

    def _solve(self, g: Tensor) -> Tensor:
        if isinstance(self._whole, SecondOrder):
            times = partial(self._point.space.equations.times, self._moved)
            found = near_solve(lambda x: x + times(x), self._by_factor, g.numpy())
            return torch.from_numpy(found)
        return torch.from_numpy(self._by_factor(g.numpy()))

    def _by_factor(self, g: np.ndarray) -> np.ndarray:
        return self._factor.back(self._factor.half(g))

    def half_log_det(self) -> Tensor:
        half = (self._whole.log_det - self._point.log_det) / 2
        return self._border.half_log_det() + half

    def solve(self, g: Tensor, g_X: Tensor) -> tuple[Tensor, Tensor]:
        return self._border.solve(self._solve(g), g_X)

    def fixed_covariance(self) -> Tensor:
        return self._border.covariance()

    def half_variances(self) -> Tensor:
        point, equations = self._point, self._point.space.equations
        left = [root.lifted.transpose(0, 2, 1) for root in point.roots]
        inverse = self._whole.inverse
        blocks = [
            cross.transform(inverse[cross.place], left[cross.one], left[cross.other])
            for cross in equations.crosses
        ]
        found = torch.from_numpy(point.space.rows.quadratic(blocks)) / 2
        return found + self._border.rest.square().sum(1) / 2 if self._border.count else found

    def of_matrices(self, u: Tensor, s: Tensor, first: Tensor, f: Tensor) -> list[Tensor]:
        # By Lambda, the derivative is half of T - u (Q u)' + s (Q u)' + u (Q s)', summed over levels.
        point, equations = self._point, self._point.space.equations
        # Of a variance next to nothing u is so small that steps to the mode leave it no digits.
        rest = (point.prior(u) - point.slope(first)).numpy()[:, None]
        u = u - torch.from_numpy(self._by_factor(rest))[:, 0]
        of_X = [self._border.root] if self._border.count else []
        C = torch.cat([u[:, None] - s, *of_X, s], 1).numpy()
        sign = np.ones(C.shape[1])
        sign[-1] = -1.0
        own = point.space.random
        traces = equations.traces(self._whole.inverse, self._moved, [x.by_level for x in own])
        columns, others = equations.split(C), point.times_prior(C * sign)
        found = {}
        for i, (x, root, T) in enumerate(zip(own, point.roots, traces, strict=True)):
            pulled = _outer(x, columns[i], others[i]) - T
            score = root.unpull(pulled) / 2
            within = partial(equations.within_prior, self._whole.inverse, i)
            found[x.at] = -_score(point.at[i], score, within, columns[i])
        return [found[i] for i in sorted(found)]

    def random(self, terms: Sequence[Term], u: Tensor) -> list[RandomEffects]:
        point, equations = self._point, self._point.space.equations
        parts, found = equations.split(u.numpy()[:, None]), []
        for i, (x, root) in enumerate(zip(point.space.random, point.roots, strict=True)):
            w = x.part.width
            values = root.times(root.root, parts[i]).reshape(-1, w)
            spread = root.variances(equations, self._whole.inverse, i)
            name = terms[x.at].name
            found.append(RandomEffects(name, torch.from_numpy(values), torch.from_numpy(spread)))
        return found


def _outer(x: SparseTerm, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Products of two columns' effects of a level, summed over levels where these share G."""
    k = x.part.effects
    a, b = (y.reshape(x.part.levels, k, y.shape[1]) for y in (one, other))
    if x.by_level:
        return a @ b.transpose(0, 2, 1)
    every, also = (y.transpose(1, 0, 2).reshape(k, -1) for y in (a, b))
    return (every @ also.T)[None]


def _score(
    at: TermAt, score: np.ndarray, within: Callable[[], np.ndarray], columns: np.ndarray
) -> Tensor:
    """The derivative by the entries that G holds, the square of the last column taken off."""
    whole = at.score(score, within, columns[:, :-1])
    if at.entries is None:
        return whole
    # The score is linear in the squares: of none of them it is what the last column is taken from.
    none = np.zeros_like(score)
    last, bare = (at.score(none, within, part) for part in (columns[:, -1:], columns[:, :0]))
    return whole - last + bare
