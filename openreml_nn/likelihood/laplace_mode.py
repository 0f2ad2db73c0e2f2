r"""The mode of the random effects, Laplace's approximation there, and its derivatives.

With :math:`b = \Lambda u` and :math:`a = \eta + X\beta + Zb` the approximation is

.. math::
    L = -\sum_i \ell_i(a_i) + \tfrac12 u^\top u + \tfrac12 \log|H|,\qquad
    H = I + \Lambda^\top Z^\top W Z\Lambda,\quad w_i = -\ell_i''(a_i),

at the u that minimises the first two terms. Write :math:`e = Z^\top \ell'`, :math:`r_i` for the
variance of row i's predictor, :math:`t_i = -\tfrac12 \ell_i''' r_i`,
:math:`s = H^{-1}\Lambda^\top Z^\top t`, :math:`c = Z\Lambda s` and
:math:`f = Z^\top(t - Wc)`. As the mode moves with all that it depends on, the implicit function
theorem gives

.. math::
    \partial L/\partial\eta = -\ell' + t - Wc,\qquad
    \partial L/\partial G = \left.\partial_G \tfrac12\log|H|\right|_W
        + \tfrac12(f e^\top + e f^\top - e e^\top),

which hold where G is singular as well, and for the family's parameters and y the derivative of
:math:`\sum_i (-\ell_i - \tfrac12 r_i \ell_i'' + c_i \ell_i')` with a, r and c held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log, pi

import torch
from torch import Tensor

from openreml_nn.families.family import Family
from openreml_nn.likelihood.laplace_layout import Prior, Stacked
from openreml_nn.likelihood.laplace_system import Factor, log_det, products_of
from openreml_nn.support.errors import NotPositiveDefiniteError, NumericalError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.design import Design
from openreml_nn.terms.term import Term

__all__ = ["Mode", "Rows", "find_mode", "recorded"]

#: Newton steps to the mode, at most; each may be halved.
_MOST_STEPS = 200
_MOST_HALVINGS = 40
#: A step whose squared length is this small for each effect needs no look at the density.
_SAFE = 1e-2


@dataclass(frozen=True)
class Rows:
    """What is known of the rows: the family, y, the offset of the predictor (n,) and X (n, p)."""

    family: Family
    y: Tensor
    eta: Tensor
    X: Tensor


@dataclass(frozen=True)
class Mode:
    r"""The mode at given covariances, and what was computed there.

    Attributes:
        u, beta: the random effects, of unit variance, (size,), and the coefficients of X, (p,).
        a: (n,) linear predictor.
        density: :math:`\sum_i \ell_i`.
        first, weights, third: (n,) :math:`\ell'`, :math:`-\ell''` and :math:`\ell'''`.
        steps: Newton steps that were taken.
    """

    rows: Rows
    layout: Stacked
    prior: Prior
    roots: Prior
    factor: Factor
    u: Tensor
    beta: Tensor
    a: Tensor
    density: Tensor
    first: Tensor
    weights: Tensor
    third: Tensor
    steps: int

    @property
    def value(self) -> Tensor:
        """The negative log-likelihood by Laplace's approximation, over the coefficients of X too."""
        p = len(self.beta)
        penalised = self.u @ self.u / 2 - self.density
        return penalised + self.factor.half_log_det() - p / 2 * log(2 * pi)

    @cached_property
    def dual(self) -> Tensor:
        r""":math:`e = Z^\top\ell'`, (size,): the mode is :math:`u = \Lambda^\top e`."""
        return self.layout.t_rows(self.first[:, None])[:, 0]

    @cached_property
    def effects(self) -> Tensor:
        r""":math:`b = \Lambda u`, (size,)."""
        return self.roots.times(self.u[:, None])[:, 0]

    @cached_property
    def _moved(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Half the variances of the rows' predictors, c, and the determinant's part by matrix."""
        prior, layout = self.prior, self.layout
        forms = [*prior.first, *prior.rest]
        with torch.enable_grad():
            weights = self.weights.detach().requires_grad_()
            matrices = [form.matrix.detach().requires_grad_() for form in forms]
            held = [form.with_matrix(m) for form, m in zip(forms, matrices, strict=True)]
            at = products_of(layout, layout.designs, weights, self.rows.X)
            bordered = bool(self.rows.X.shape[1]) or not layout.q
            value = (log_det if bordered else self.factor.log_det)(at, Prior(layout, held))
            half, *parts = torch.autograd.grad(
                value, [weights, *matrices], allow_unused=True, materialize_grads=True
            )
        if not bordered:
            rest = self.factor.of_rest(prior)
            parts[layout.split :] = [
                part + own.reshape(part.shape)
                for part, own in zip(parts[layout.split :], rest, strict=True)
            ]
        t = -self.third * half
        right = self.roots.times(layout.t_rows(t[:, None]), True)
        s, s_X = self.factor.solve(right, self.rows.X.mT @ t[:, None])
        c = layout.rows(self.roots.times(s)) + self.rows.X @ s_X
        return half, c[:, 0], list(parts)

    def of_predictor(self) -> Tensor:
        r""":math:`\partial L/\partial\eta`, (n,)."""
        half, c, _ = self._moved
        return -self.first - self.third * half - self.weights * c

    def of_matrices(self) -> list[Tensor]:
        """:math:`\\partial L/\\partial G` for the matrix of each term, in the terms' order."""
        layout, (half, c, parts) = self.layout, self._moved
        f = layout.t_rows((-self.third * half - self.weights * c)[:, None])
        pairs = zip(layout.by_term(self.dual[:, None]), layout.by_term(f), strict=True)
        forms = [*self.prior.first, *self.prior.rest]
        found = {}
        for j, (e, own) in enumerate(pairs):
            grid = layout.grid(j)
            e, own = (x.reshape(grid or (1, -1)) for x in (e, own))
            # e (f - e / 2)' and its transpose, level by level.
            outer = e[:, :, None] * (own - e / 2)[:, None, :]
            square = (outer + outer.mT) / 2
            form = forms[j]
            folded = form.fold(square[0]) if grid is None else form.fold_blocks(square)
            found[layout.order[j]] = parts[j] + folded.reshape(parts[j].shape)
        return [found[i] for i in sorted(found)]

    def of_family(self, y: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """:math:`\\partial L` by y, if it requires a gradient, and by parameters of the family."""
        half, c, _ = self._moved
        wanted = [*([y] if y.requires_grad else []), *parameters]
        if not wanted:
            return []
        family, a = self.rows.family, self.a.detach()
        with torch.enable_grad():
            own = y.to(a) if y.requires_grad else self.rows.y
            first, second, _ = family.derivatives(own, a)
            value = -family.log_density(own, a).sum() - (half * second).sum() + (c * first).sum()
            if not value.requires_grad:
                return [torch.zeros_like(x) for x in wanted]
            return list(
                torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
            )


def find_mode(
    rows: Rows,
    layout: Stacked,
    terms: Sequence[Term],
    start: Tensor | None = None,
    beta: Tensor | None = None,
    factor: Factor | None = None,
) -> Mode:
    r"""Newton's steps, halved on the penalised density, to the mode of u and :math:`\beta`.

    Args:
        rows: the data; what is computed has no graph.
        layout: where the effects stand.
        terms: the random terms.
        start: where u starts, such as an earlier mode; zero by default.
        beta: where the coefficients start; zero by default.
        factor: of the system near by, with which steps begin; made anew by default.

    Raises:
        NumericalError: if there is no mode, or none is found.
    """
    if start is not None:
        try:
            return _newton(rows, layout, terms, start, beta, factor)
        except NumericalError:
            # An earlier mode may be too far away; from zero it is found, or an error says why not.
            pass
    return _newton(rows, layout, terms, rows.eta.new_zeros(layout.size), None, None)


def _newton(
    rows: Rows,
    layout: Stacked,
    terms: Sequence[Term],
    start: Tensor,
    beta: Tensor | None,
    factor: Factor | None,
) -> Mode:
    prior, like = Prior.of(layout, terms), rows.eta
    roots = prior.roots(terms)
    u = start[:, None]
    beta = like.new_zeros(rows.X.shape[1]) if beta is None else beta
    family, tolerance = rows.family, _tolerance(like.dtype)
    density: Tensor | None
    a, density = _predictor(rows, layout, roots, u, beta)
    if not bool(torch.isfinite(density)):
        raise NumericalError(
            "the density of the responses is not finite at the start: `eta` is too far from them"
        )
    before = gain = float("inf")
    for step in range(_MOST_STEPS):
        first, second, third = (x.detach() for x in family.derivatives(rows.y, a))
        g = u - roots.times(layout.t_rows(first[:, None]), True)
        g_X = -rows.X.mT @ first[:, None]
        true = False
        if factor is None or not layout.q:
            factor, true = _factor(rows, layout, roots, -second)
        move, move_X, gain = _step(factor, g, g_X)
        # An earlier factor will do for a step as long as steps get shorter fast.
        if not true and (gain <= tolerance or gain > before / 20 or (step == 0 and gain > 1)):
            factor, true = _factor(rows, layout, roots, -second)
            move, move_X, gain = _step(factor, g, g_X)
        # Rounding leaves a floor, below which steps get no smaller.
        stalled = gain < 1e3 * tolerance**0.5 and gain > before / 4
        if true and (gain <= tolerance or stalled):
            _refuse_separated(layout.rows(roots.times(move)) + rows.X @ move_X)
            density = _density(rows, a) if density is None else density
            return Mode(
                rows, layout, prior, roots, factor, u[:, 0], beta, a, density, first, -second,
                third, step,
            )  # fmt: skip
        if gain < before and float((g * move).max()) < _SAFE and not len(beta):
            # So near a mode Newton's step is not questioned.
            u = u - move
            a, density = _linear(rows, layout, roots, u, beta), None
        else:
            if density is None:
                density = _density(rows, a)
            u, beta, a, density = _searched(
                rows, layout, roots, (u, beta, density), (move, move_X[:, 0]), gain
            )
        before = gain
    raise NumericalError(
        f"the mode of the random effects was not found in {_MOST_STEPS} steps: the last was "
        f"{gain**0.5:.3g} long; the responses may be separated, or the variances too large"
    )


def _factor(rows: Rows, layout: Stacked, roots: Prior, weights: Tensor) -> tuple[Factor, bool]:
    """The system's factor under weights, and whether they are the true ones.

    Away from the mode a density need not be concave: then it is without the rows where it is not.
    """
    try:
        return Factor(products_of(layout, layout.designs, weights, rows.X), roots), True
    except NotPositiveDefiniteError:
        if not bool((weights < 0).any()):
            raise
    held = products_of(layout, layout.designs, weights.clamp(min=0), rows.X)
    return Factor(held, roots), False


def _step(factor: Factor, g: Tensor, g_X: Tensor) -> tuple[Tensor, Tensor, float]:
    """Newton's step and its squared length."""
    move, move_X = factor.solve(g, g_X)
    gain = float((g * move).sum() + (g_X * move_X).sum())
    if not gain >= 0 or gain == float("inf"):
        raise NumericalError(f"the step to the mode of the random effects is {gain:.3g} long")
    return move, move_X, gain


def _searched(
    rows: Rows,
    layout: Stacked,
    roots: Prior,
    at: tuple[Tensor, Tensor, Tensor],
    move: tuple[Tensor, Tensor],
    gain: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step that does not raise the penalised density's negative."""
    u, beta, density = at
    height = float((u * u).sum() / 2 - density)
    slack = torch.finfo(u.dtype).eps * 16 * (1 + abs(height) + rows.eta.numel())
    scale = 1.0
    for _ in range(_MOST_HALVINGS):
        new_u, new_beta = u - scale * move[0], beta - scale * move[1]
        a, new_density = _predictor(rows, layout, roots, new_u, new_beta)
        new = float((new_u * new_u).sum() / 2 - new_density)
        if new <= height - 1e-4 * scale * gain + slack:
            return new_u, new_beta, a, new_density
        scale /= 2
    raise NumericalError(
        "no step to the mode of the random effects raises the density: the derivatives of the "
        f"family {type(rows.family).__name__} may be wrong"
    )


def _linear(rows: Rows, layout: Stacked, roots: Prior, u: Tensor, beta: Tensor) -> Tensor:
    """The linear predictor."""
    a = rows.eta + layout.rows(roots.times(u))[:, 0]
    return a + rows.X @ beta if len(beta) else a


def _density(rows: Rows, a: Tensor) -> Tensor:
    """The log-density of all rows."""
    return rows.family.log_density(rows.y, a).sum().detach()


def _predictor(
    rows: Rows, layout: Stacked, roots: Prior, u: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    a = _linear(rows, layout, roots, u, beta)
    return a, _density(rows, a)


def _tolerance(dtype: torch.dtype) -> float:
    """The squared length of a step that is none, in standard deviations of the effects."""
    return float((1e3 * torch.finfo(dtype).eps) ** 2) if dtype == torch.float64 else 1e-10


def _refuse_separated(move: Tensor) -> None:
    """Raise where a step that gains nothing still moves the predictor: it has no end."""
    farthest = int(move.abs().argmax())
    if float(move.abs().max()) > 0.01:
        raise NumericalError(
            "the data are separated: the density rises for ever as the linear predictor of row "
            f"{farthest} goes to {'-' if float(move[farthest]) > 0 else ''}infinity"
        )


def recorded(
    mode: Mode,
    rows: Rows,
    designs: Sequence[Design],
    covariances: Sequence[Covariance],
) -> Tensor:
    r"""The same value by plain differentiable operations, for designs and X that move.

    The mode is attached by one Newton step, of length zero, whose derivative is that of the mode.
    Second derivatives of it are not those of the approximation.

    Args:
        mode: the mode, without a graph.
        rows: the data with their graph.
        designs, covariances: of the terms, in the layout's order, with their graph.
    """
    layout, family = mode.layout, rows.family
    prior = Prior(layout, covariances)
    e, beta = mode.dual[:, None], mode.beta
    with torch.enable_grad():
        a = rows.eta + layout.rows(prior.times(e), designs)[:, 0] + rows.X @ beta
        first, _, _ = family.derivatives(rows.y, a)
        rest = e - layout.t_rows(first[:, None], designs)
        move, move_X = mode.factor.solve(mode.roots.times(rest, True), -rows.X.mT @ first[:, None])
        moved = layout.rows(mode.roots.times(move)) + mode.rows.X @ move_X
        e = e - rest + layout.t_rows(mode.weights[:, None] * moved)
        beta = beta - move_X[:, 0]
        effects = prior.times(e)
        a = rows.eta + layout.rows(effects, designs)[:, 0] + rows.X @ beta
        _, second, _ = family.derivatives(rows.y, a)
        at = products_of(layout, designs, -second, rows.X)
        penalised = (e * effects).sum() / 2 - family.log_density(rows.y, a).sum()
        return penalised + log_det(at, prior) - len(beta) / 2 * log(2 * pi)
