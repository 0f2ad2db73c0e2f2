r"""The system of the random effects by products alone, with weights that move.

It is that of the krylov solver, with the weights of the rows in the place of :math:`R^{-1}`. Solves are
by conjugate gradients, so that the mode is exact to their tolerance. The log-determinant is estimated,
see :class:`Traces`, and its derivatives are those of the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.laplace_border import Border
from openreml_nn.likelihood.laplace_layout import Prior
from openreml_nn.likelihood.laplace_listed import ListedLayout, ListedSystem
from openreml_nn.likelihood.laplace_traces import Traces, of_blocks, outer
from openreml_nn.likelihood.problem import Cost
from openreml_nn.likelihood.solvers.krylov import Krylov
from openreml_nn.likelihood.system.control import Control, is_every
from openreml_nn.likelihood.system.listed import through
from openreml_nn.terms.term import Term

__all__ = ["KrylovPoint", "KrylovSpace"]

#: The largest condition of a root through which derivatives by a covariance are taken.
_SINGULAR = 1e10


class KrylovSpace(ListedLayout):
    """Where the random effects of some terms stand, with the random signs of the other terms' effects.

    Args:
        terms: the random terms, at least one.
        solver: with its options.
        reason: why it is taken.

    Raises:
        InputError: if a term is no grouping factor with independent levels, or related by a known
            inverse.
    """

    def __init__(self, terms: Sequence[Term], solver: Krylov, reason: str = "asked for") -> None:
        super().__init__(terms)
        like = terms[0].covariance.matrix
        self.solver, self.reason, self._dtype = solver, reason, like.dtype
        self.signs = solver.signs(self.q, self.others.are_related)
        self.control = Control(self.others, self.signs.to(like), solver.probe_tolerance)

    @staticmethod
    def forecast(terms: Sequence[Term]) -> Cost:
        """What an evaluation of terms that have such a system would take."""
        columns = sum(term.design.shape[1] for term in terms)
        related = any(term.covariance.known_kernel is not None for term in terms)
        dtype = terms[0].covariance.matrix.dtype
        return Krylov().cost(terms[0].design.shape[0], columns, 0, related, dtype, ())

    def at(self, terms: Sequence[Term]) -> KrylovPoint:
        return KrylovPoint(self, terms)

    def cost(self, p: int) -> Cost:
        """What an evaluation takes with p coefficients of X."""
        rows, dtype = self.designs[0].shape[0], self._dtype
        related = self.others.are_related
        return self.solver.cost(rows, self.size, p, related, dtype, self._steps())

    def _steps(self) -> tuple[str, ...]:
        """What is eliminated, in order."""
        found = [f"{self.levels} blocks of {self.k} x {self.k}"] if self.levels else []
        return (*found, f"conjugate gradients, {self.q} columns") if self.q else tuple(found)


class KrylovPoint:
    """The random effects at some covariances.

    Args:
        space: where they stand.
        terms: with these covariances.
    """

    #: A step solves by products alone, whatever its weights.
    is_cheap = True

    def __init__(self, space: KrylovSpace, terms: Sequence[Term]) -> None:
        self.space = space
        self.forms = [terms[i].detach().covariance for i in space.order]
        bare = [replace(x, covariance=x.covariance.without_kernel()) for x in terms]
        self.roots = Prior.of(space, bare).roots(bare)

    def predictor(self, u: Tensor) -> Tensor:
        return self.space.rows(self.roots.times(u[:, None]))[:, 0]

    def slope(self, v: Tensor) -> Tensor:
        return self.roots.times(self.space.t_rows(v[:, None]), True)[:, 0]

    def prior(self, u: Tensor) -> Tensor:
        space = self.space
        if not space.others.are_related:
            return u
        one, two = space.split_flat(u[:, None])
        return space.joined(one, space.others.times_priors(two))[:, 0]

    def factor(self, weights: Tensor, X: Tensor) -> KrylovFactor:
        return KrylovFactor(self, weights, X)


class KrylovFactor:
    r""":math:`H = Q + \Lambda^\top Z^\top W Z\Lambda`, bordered by the coefficients of X.

    Args:
        point: the random effects with :math:`\Lambda`.
        weights: of the rows, (n,).
        X: (n, p).

    Raises:
        NotPositiveDefiniteError: if the system is not positive definite.
    """

    def __init__(self, point: KrylovPoint, weights: Tensor, X: Tensor) -> None:
        self._point, self.weights = point, weights.clone()
        self.space = space = point.space
        self._at = ListedSystem(space, point.roots, weights, space.solver.tolerance)
        if space.q and bool((weights < 0).any()):
            # Where it has a negative curvature, steps from a vector of all directions meet it.
            self._at.solve_rest(space.signs[:, :1].to(weights))
        self._border = Border(point, self._at.solve, weights, X)

    def solve(self, g: Tensor, g_X: Tensor) -> tuple[Tensor, Tensor]:
        return self._border.solve(self._at.solve(g), g_X)

    def alone(self) -> KrylovFactor:
        return KrylovFactor(self._point, self.weights, self._border.X[:, :0])

    def fixed_covariance(self) -> Tensor:
        return self._border.covariance()

    # ------------------------------------------------------------------ what is estimated

    @cached_property
    def _traces(self) -> Traces:
        space, weights = self.space, self.weights
        shares, tolerance = space.control.shares(weights), space.solver.probe_tolerance
        return Traces(self._at, space.signs, shares, tolerance, weights)

    def half_log_det(self) -> Tensor:
        space, found = self.space, self._at.C.diagonal(dim1=1, dim2=2).log().sum()
        if space.q:
            rest = self._at.scaled.log_det + space.others.log_det + self._traces.log_det
            found = found + rest / 2
        return found + self._border.half_log_det()

    @property
    def error(self) -> float:
        """Standard error of :meth:`half_log_det`."""
        q, m = self.space.signs.shape
        if is_every(q, m):
            return 0.0
        return float(self.space.control.controlled(self._traces.samples).std() / m**0.5 / 2)

    @cached_property
    def _slopes(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Derivatives of :meth:`half_log_det`, without the border, by the weights, by the covariances of the
        eliminated terms, and by the roots of the others: of the blocks by recorded operations, and of
        what is estimated by sums."""
        space, split = self.space, self.space.split
        first, rest = self._point.forms[:split], self._point.roots.rest
        with torch.enable_grad():
            weights = self.weights.detach().requires_grad_()
            matrices = [x.matrix.detach().requires_grad_() for x in (*first, *rest)]
            held = [x.with_matrix(m) for x, m in zip((*first, *rest), matrices, strict=True)]
            by_scale = self._traces.by_scale if space.q else []
            value = of_blocks(space, weights, Prior(space, held), by_scale)
            half, *parts = torch.autograd.grad(
                value / 2, [weights, *matrices], allow_unused=True, materialize_grads=True
            )
        if space.q:
            traces = self._traces
            half = half + traces.rows / 2
            ends = [sum(space.widths[: j + 1]) for j in range(split)]
            for j, (form, end, width) in enumerate(zip(first, ends, space.widths, strict=True)):
                own = slice(end - width, end)
                parts[j] = parts[j] - form.fold_blocks(traces.first[:, own, own] / 2)
            for i, root in enumerate(rest):
                parts[split + i] = parts[split + i] + root.fold_blocks(traces.by_root[i] / 2)
        return half, list(parts[:split]), list(parts[split:])

    def half_variances(self) -> Tensor:
        half = self._slopes[0]
        return half + self._border.rest.square().sum(1) / 2 if self._border.count else half

    def of_matrices(self, u: Tensor, s: Tensor, first: Tensor, f: Tensor) -> list[Tensor]:
        space, split = self.space, self.space.split
        _, parts, by_root = self._slopes
        # e (f - e / 2)' and its transpose, and for each column of X minus a half of its square.
        left, right = first[:, None], f[:, None] - first[:, None] / 2
        if self._border.count:
            of_X = self.weights[:, None] * self._border.rest
            left, right = torch.cat([left, of_X], 1), torch.cat([right, -of_X / 2], 1)
        both = [space.by_term(space.t_rows(x)) for x in (left, right)]
        found = {}
        for j, (e, other, form) in enumerate(zip(*both, self._point.forms, strict=True)):
            grid = space.grid(j)
            assert grid is not None
            e, other = e.unflatten(0, grid), other.unflatten(0, grid)
            kernel = form.known_kernel
            square = outer(e, other) if kernel is None else through(kernel, e, other)
            square = (square + square.mT) / 2
            part = form.fold_blocks(square) if kernel is None else square
            own = parts[j] if j < split else self._by_covariance(j - split, by_root[j - split])
            found[space.order[j]] = own + part.reshape(form.matrix.shape)
        return [found[i] for i in sorted(found)]

    def _by_covariance(self, i: int, slope: Tensor) -> Tensor:
        """From a derivative by the root of an other term's covariance to that by the covariance.

        Where a root is singular the estimate has none: then it is that of the likelihood, estimated.
        """
        root = self._point.roots.rest[i]
        L = root.matrix
        if root.is_diagonal:
            gone = L == 0
            found = slope / (2 * torch.where(gone, 1, L))
            return torch.where(gone, self._even(i), found) if bool(gone.any()) else found
        if not bool((torch.linalg.cond(L) < _SINGULAR).all()):
            return self._even(i)
        # G = L L' for a triangle L: the symmetric S of which 2 S L has the slope below its diagonal.
        product = (L.mT @ slope).tril()
        product.diagonal(dim1=-2, dim2=-1).div_(2)
        back = solve_triangular(L.mT, product, upper=True)
        found = solve_triangular(L, back, upper=False, left=False)
        return (found + found.mT) / 2

    def _even(self, i: int) -> Tensor:
        r""":math:`\tfrac12(E - E N E)`, :math:`N = \Lambda M^{-1}\Lambda^\top`, in an other term's own
        part, estimated: the derivative of half the log-determinant by its covariance."""
        space, others, at = self.space, self.space.others, self._at
        form, kernel = self._point.forms[space.split + i], others.kernels[i]
        z, roots = space.signs.to(self.weights), self._point.roots
        share = space.control.shares(z)
        explained = roots.times_rest(at.solve_rest(roots.times_rest(z, True)))
        lost, met = (others.by_levels(at.times_rest(x))[i] for x in (explained, z))
        if kernel is None:
            square = at.own[i] - outer(lost * share, met)
            return form.fold_blocks((square + square.mT) / 4)
        parts = [x if t == i else torch.zeros_like(x) for t, x in enumerate(others.by_levels(z))]
        own = others.by_levels(at.times_rest(others.flat(parts, z)))[i]
        square = through(kernel, own * share, parts[i]) - through(kernel, lost * share, met)
        return (square + square.mT) / 4

    # ------------------------------------------------------------------ after the mode

    def random(self, terms: Sequence[Term], u: Tensor) -> list[RandomEffects]:
        """The modes, and variances of which those of the eliminated factor are averages over probes in
        part, and all others too."""
        space, roots = self.space, self._point.roots
        system = self._at
        halves, variances = system.scaled.halves, []
        whole = system.K
        if space.q and space.levels:
            met = self._traces.met
            for (a, b, value), half in zip(system.W.cells, halves, strict=True):
                part = value @ half.mT[b]
                met = met.index_add(0, a, part @ part.mT)
            whole = whole + whole @ met @ whole
        at = 0
        for width in space.widths:
            variances.append(whole[:, at : at + width, at : at + width])
            at += width
        for i, half in enumerate(halves):
            eye = torch.eye(half.shape[1], dtype=half.dtype, device=half.device)
            variances.append(half.mT @ (eye + self._traces.own[i]) @ half)
        found = {}
        parts = space.by_term(roots.times(u[:, None]))
        for i, values, spread in zip(space.order, parts, variances, strict=True):
            found[i] = RandomEffects(terms[i].name, values.reshape(spread.shape[:2]), spread)
        return [found[i] for i in sorted(found)]
