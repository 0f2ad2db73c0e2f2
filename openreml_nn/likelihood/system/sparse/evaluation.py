"""What follows from the sparse equations at one point: derivatives, predictions, their variances."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.sparse import csr_matrix
from torch import Tensor

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.problem import Evaluation, Problem
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.fields import FieldRows
from openreml_nn.likelihood.system.sparse.refined import noise_of, solved
from openreml_nn.likelihood.system.sparse.rows import Rows
from openreml_nn.likelihood.system.sparse.terms import SparseTerm
from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.terms.term import Term

__all__ = ["SparseEvaluation", "SparseSystem"]


class SparseSystem(NamedTuple):
    """What is known of the data before any point.

    Attributes:
        random: the random terms.
        equations: the pattern of the equations.
        rows: products over the rows.
    """

    random: list[SparseTerm]
    equations: Equations
    rows: Rows


class SparseEvaluation(Evaluation):
    """The likelihood at one point, by the factor of the equations and its selected inverse.

    Args:
        problem: the data.
        system: the random terms, the equations and the rows of that problem.
        terms: of the point.
    """

    def __init__(self, problem: Problem, system: SparseSystem, terms: Sequence[Term]) -> None:
        self.problem, self.system, self._terms = problem, system, terms
        self._at = at = system.rows.at([terms[i].covariance.matrix for i in system.rows.terms])
        equations = system.equations
        self._roots = roots = [
            own.roots(terms[own.at], size)
            for own, size in zip(system.random, equations.largest(at.blocks), strict=True)
        ]
        self._moved = [
            cross.transform(data, roots[cross.one].lifted, roots[cross.other].lifted)
            for cross, data in zip(equations.crosses, at.blocks, strict=True)
        ]
        self._points = points = [own.at_point(terms[own.at]) for own in system.random]
        prior = equations.log_det_prior + sum(point.log_det for point in points)
        try:
            self._factor = equations.factor(self._moved, [point.entries for point in points])
        except NotPositiveDefiniteError:
            raise NotPositiveDefiniteError("V is not positive definite") from None
        log_det = at.log_det + self._factor.log_det - prior
        right = self._each(at.Zf, "lifted", transpose=True)
        solution = solved(equations, points, self._moved, self._factor, right)
        self._half, inner, self._refined = solution
        F = at.ff - inner
        found, factor, white = problem.profile(
            *map(torch.as_tensor, (np.asarray(log_det), F[:-1, :-1], F[:-1, -1], F[-1, -1]))
        )
        self._y_p_y = y_p_y = float(F[-1, -1] - white @ white)
        self._C = C = factor.numpy()
        self._gamma = gamma = solve_triangular(C, white.numpy(), lower=True, trans=1)
        like = problem.fixed.y
        self.log_likelihood, self.y_p_y = found.to(like), like.new_tensor(y_p_y)
        self.gamma, self.gamma_factor = torch.from_numpy(gamma).to(like), factor.to(like)
        # What is left of the sums of squares, and how far the random effects exceed the residual.
        after = F.diagonal().copy()
        after[-1] = problem.n + y_p_y
        gain = max([1.0, *equations.largest(self._moved)])
        lost = max(float((at.ff.diagonal() / after).max()), at.condition)
        lost = max(lost, self._factor.loss**0.5 * gain)
        self.rounding = torch.finfo(torch.float64).eps * lost
        if like.dtype != torch.float64:
            self.rounding += torch.finfo(like.dtype).eps * gain**0.5
        self.recorded_rounding = self.rounding

    @cached_property
    def noise(self) -> float:  # type: ignore[override]
        return noise_of(self._factor, self._points)

    def _each(self, x: np.ndarray, which: str, transpose: bool = False) -> np.ndarray:
        r""":math:`\Lambda x`, or :math:`\Lambda^\top x`, for x (q, m)."""
        parts = self.system.equations.split(x)
        found = [
            root.times(getattr(root, which), part, transpose)
            for root, part in zip(self._roots, parts, strict=True)
        ]
        return np.concatenate(found) if found else x

    @cached_property
    def _u(self) -> np.ndarray:
        r""":math:`M^{-1}\Lambda^\top Z^\top R^{-1} f`, (q, p + 1)."""
        return self._factor.back(self._half) if self._refined is None else self._refined

    @cached_property
    def _u_y(self) -> np.ndarray:
        """BLUPs of u, (q, 1)."""
        return self._u[:, -1:] - self._u[:, :-1] @ self._gamma[:, None]

    @cached_property
    def _u_X(self) -> np.ndarray:
        """A root of what the fixed effects add to the variance of u, (q, p)."""
        return solve_triangular(self._C, self._u[:, :-1].T, lower=True).T

    def _effects(self, u: np.ndarray, which: str) -> np.ndarray:
        """Effects of the columns of Z, of u (q, m)."""
        parts = self.system.equations.split(self._each(u, which))
        own = self.system.random
        found = [x.part.to_effects(part) for x, part in zip(own, parts, strict=True)]
        return np.concatenate(found) if found else u

    def _to(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.problem.fixed.y)

    def inverse_times_data(self) -> Tensor:
        rest = self._at.rest(self._effects(self._u, "lifted"))
        return self._to(self.system.rows.of_rows(rest))

    @cached_property
    def _squared(self) -> np.ndarray:
        """What the score holds the squares of: BLUPs of u, with REML a root of their rest too."""
        if self.problem.method == "ml":
            return self._u_y
        return np.concatenate([self._u_y, self._u_X], 1)

    @cached_property
    def _pulled(self) -> list[np.ndarray]:
        r"""For each term twice :math:`\Lambda^\top S \Lambda` with S its score, summed over levels
        (1, k, k), or (levels, k, k) where each level has a covariance of its own."""
        own = self.system.random
        traces = self.system.equations.traces(
            self._factor.inverse, self._moved, [x.by_level for x in own]
        )
        u = self.system.equations.split(self._squared)
        found = []
        for x, point, trace, part in zip(own, self._points, traces, u, strict=True):
            other = point.times_prior(part)
            k = x.part.effects
            shape = (x.part.levels, k, part.shape[1])
            if x.by_level:
                total = part.reshape(shape) @ other.reshape(shape).transpose(0, 2, 1)
            else:
                one, two = (y.reshape(shape).transpose(1, 0, 2) for y in (part, other))
                total = (one.reshape(k, -1) @ two.reshape(k, -1).T)[None]
            found.append(total - trace)
        return found

    def scores_unchecked(self) -> list[Tensor]:
        problem, found = self.problem, {}
        squared = self.system.equations.split(self._squared)
        for i, (point, root) in enumerate(zip(self._points, self._roots, strict=True)):
            score = root.unpull(self._pulled[i]) / 2
            within = partial(self.system.equations.within_prior, self._factor.inverse, i)
            found[point.own.at] = point.score(score, within, squared[i]).to(problem.fixed.y)
        found |= dict(zip(self.system.rows.terms, self._scores_of_rows(), strict=True))
        return [found[i] for i in sorted(found)]

    def _scores_of_rows(self) -> list[Tensor]:
        problem, at = self.problem, self._at
        reml = problem.method == "reml"
        if at.scale is not None:
            # By V = sum Z G Z' + s R: tr(P V) = n - p and y' P V P y = y' P y.
            explained = sum(float(np.trace(x, axis1=1, axis2=2).sum()) for x in self._pulled)
            rank = problem.n - (problem.p if reml else 0)
            score = (self._y_p_y - rank - explained) / (2 * at.scale)
            return [self._to(np.full((1, 1), score)) for _ in self.system.rows.terms]
        inner, p_y, lost = self._of_rows
        found = self.system.rows.scores(at, inner, p_y, lost if reml else lost[:, :0])
        return [score.to(problem.fixed.y) for score in found]

    @cached_property
    def _of_rows(self) -> tuple[csr_matrix, np.ndarray, np.ndarray]:
        r"""Variances of effects that meet, given y; :math:`P y`; a root of :math:`V^{-1} - P`."""
        roots = [root.lifted for root in self._roots]
        rest = self._at.rest(self._effects(self._u, "lifted"))
        p_y = rest[:, -1] - rest[:, :-1] @ self._gamma
        lost = solve_triangular(self._C, rest[:, :-1].T, lower=True).T
        inner = self.system.equations.inverse_of_effects(self._factor.inverse, roots)
        return inner, p_y, lost

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        problem, at = self.problem, self._at
        u = self.system.equations.split(self._u_y)
        m = len(derivatives[0])
        moved = []
        for point, root, part in zip(self._points, self._roots, u, strict=True):
            moved.append(point.along(derivatives[point.own.at], part, root))
        c = np.concatenate(moved) if moved else np.zeros((0, m))
        own = [derivatives[i] for i in self.system.rows.terms]
        if at.scale is not None:
            # Working variates are combinations of the columns of Z and f: they cost nothing in n.
            ds = sum(d.reshape(m).cpu().double().numpy() for d in own) / at.scale
            c = c - self._each(self._u_y, "lifted") * ds
            Cf = np.zeros((problem.p + 1, m))
            Cf[-1] = ds
            T = self.system.equations.times(at.blocks, c) + at.Zf @ Cf
            Tf = at.Zf.T @ c + at.ff @ Cf
            total = c.T @ T + Cf.T @ Tf
        else:
            rest = at.rest(self._effects(self._u, "lifted"))
            p_y = rest[:, -1] - rest[:, :-1] @ self._gamma
            T, Tf, total = self.system.rows.working(at, c, own, p_y)
        e = self._factor.half(self._each(T, "lifted", transpose=True))
        inner = self._factor.inner
        part = solve_triangular(self._C, Tf[:-1] - inner(self._half[:, :-1], e), lower=True)
        return self._to((total - inner(e, e) - part.T @ part) / 2)

    def random_effects(self) -> list[RandomEffects]:
        problem = self.problem
        values = self.system.equations.split(self._effects(self._u_y, "root"))
        lost = self.system.equations.split(self._effects(self._u_X, "root"))
        found = {}
        for i, (x, root) in enumerate(zip(self.system.random, self._roots, strict=True)):
            w = x.part.width
            spread = root.variances(self.system.equations, self._factor.inverse, i)
            added = lost[i].reshape(len(lost[i]) // w, w, problem.p)
            spread = spread + added @ added.transpose(0, 2, 1)
            found[x.at] = values[i].reshape(-1, w), spread
        rows = self.system.rows
        if isinstance(rows, FieldRows):
            cells, variances = rows.effects(self._at, *self._of_rows)
            found[rows.terms[0]] = cells, variances
        names = [term.name for term in self._terms]
        return [RandomEffects(names[i], *map(self._to, found[i])) for i in sorted(found)]
