r"""The mode of the random effects, Laplace's approximation there, and its derivatives.

With :math:`b = \Lambda u`, Q the precision of u (the identity, or a known kernel's inverse) and
:math:`a = \eta + X\beta + Zb` the approximation is

.. math::
    L = -\sum_i \ell_i(a_i) + \tfrac12 u^\top Q u + \tfrac12 \log|H| - \tfrac12 \log|Q|,\qquad
    H = Q + \Lambda^\top Z^\top W Z\Lambda,\quad w_i = -\ell_i''(a_i),

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
from dataclasses import dataclass, replace
from functools import cached_property
from math import log, pi

import torch
from torch import Tensor

from openreml_nn.families.family import Family
from openreml_nn.likelihood.laplace_space import Factor, Point
from openreml_nn.likelihood.laplace_steps import Steps
from openreml_nn.support.errors import NotPositiveDefiniteError, NumericalError
from openreml_nn.terms.term import Term

__all__ = ["Mode", "Rows", "average_information", "column_information", "find_mode", "projected"]

#: Newton steps to the mode, at most; each may be halved.
_MOST_STEPS = 200
_MOST_HALVINGS = 40
#: A step whose squared length is this small for each effect needs no look at the density.
_SAFE = 1e-2
#: The squared length of a step so near a mode that fits begin there.
_NEAR = 1e-4
#: Rows whose densities are computed at a time.
_CHUNK = 2**15


@dataclass(frozen=True)
class Rows:
    """What is known of the rows: the family, y, the offset of the predictor (n,) and X (n, p), the
    sum of what the log-density has beside :meth:`Family.kernel`, and the factors (n,) of the rows'
    log-densities, None where all are one."""

    family: Family
    y: Tensor
    eta: Tensor
    X: Tensor
    constant: float = 0.0
    weights: Tensor | None = None

    def density(self, a: Tensor) -> Tensor:
        """The log-density of all rows at a predictor."""
        density = self.family.kernel if self.family.has_kernel else self.family.log_density
        parts = []
        for at in range(0, len(a), _CHUNK):
            part = slice(at, at + _CHUNK)
            found = density(self.y[part], a[part]).detach()
            if self.weights is not None:
                found = found * self.weights[part]
            parts.append(found.sum())
        return torch.stack(parts).sum() + self.constant if parts else a.sum()

    def weighted(self, found: Tensor) -> Tensor:
        """What a family says of all rows (n, ...), each times its factor."""
        if self.weights is None:
            return found
        return found * self.weights.reshape(-1, *[1] * (found.dim() - 1))

    def derivatives_of(self, y: Tensor, a: Tensor) -> list[Tensor]:
        """The three derivatives at a predictor, while autograd may record."""
        return [self.weighted(found) for found in self.family.derivatives(y, a)]

    def derivatives(self, a: Tensor, out: Sequence[Tensor]) -> None:
        """Put the first, minus the second, and the third derivative at a predictor into ``out``.

        Rows are taken some at a time: what a family computes on the way then stays in the cache.
        """
        first, weights, third = out
        for at in range(0, len(a), _CHUNK):
            part = slice(at, at + _CHUNK)
            one, two, three = (x.detach() for x in self.family.derivatives(self.y[part], a[part]))
            if self.weights is not None:
                one, two, three = (x * self.weights[part] for x in (one, two, three))
            first[part], third[part] = one, three
            torch.neg(two, out=weights[part])


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
    point: Point
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
        penalised = self.u @ self.point.prior(self.u) / 2 - self.density
        return penalised + self.factor.half_log_det() - p / 2 * log(2 * pi)

    @cached_property
    def _moved(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Half the variances of the rows' predictors, s, c, and t - Wc."""
        half, X = self.factor.half_variances(), self.rows.X
        t = (self.third * half).neg_()
        s, s_X = self.factor.solve(self.point.slope(t)[:, None], X.mT @ t[:, None])
        c = self.point.predictor(s[:, 0])
        if len(s_X):
            c += (X @ s_X)[:, 0]
        return half, s, c, t.addcmul_(self.weights, c, value=-1)

    def of_predictor(self) -> Tensor:
        r""":math:`\partial L/\partial\eta`, (n,)."""
        return self._moved[3] - self.first

    def of_matrices(self) -> list[Tensor]:
        """:math:`\\partial L/\\partial G` for the matrix of each term, in the terms' order."""
        _, s, _, f = self._moved
        return self.factor.of_matrices(self.u, s, self.first, f)

    def of_family(self, y: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """:math:`\\partial L` by y, if it requires a gradient, and by parameters of the family."""
        half, _, c, _ = self._moved
        wanted = [*([y] if y.requires_grad else []), *parameters]
        if not wanted:
            return []
        rows, a = self.rows, self.a.detach()
        with torch.enable_grad():
            own = y.to(a) if y.requires_grad else rows.y
            first, second, _ = rows.derivatives_of(own, a)
            density = rows.weighted(rows.family.log_density(own, a)).sum()
            value = -density - (half * second).sum() + (c * first).sum()
            if not value.requires_grad:
                return [torch.zeros_like(x) for x in wanted]
            return list(
                torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
            )


def average_information(mode: Mode, terms: Sequence[Term], derivatives: Sequence[Tensor]) -> Tensor:
    r"""Average information of covariance parameters in the working linear model at a mode.

    With :math:`q_i = Z \dot G_i Z^\top\ell'` it is :math:`\tfrac12 q_i^\top P q_j`,
    :math:`P = W - W Z\Lambda H^{-1}\Lambda^\top Z^\top W`, X projected out where the mode is one of
    its coefficients too.

    Args:
        mode: the mode.
        terms: the random terms, without a graph.
        derivatives: for the matrix of each term, its derivatives by the m parameters, (m, *shape).

    Shape:
        Output: (m, m).
    """
    q = mode.first.new_zeros(len(mode.first), len(derivatives[0]))
    for term, parts in zip(terms, derivatives, strict=True):
        e = term.design.t_matmul(mode.first[:, None])
        moved = [term.covariance.along(part, e) for part in parts]
        q = q + term.design.matmul(torch.cat(moved, 1)) if moved else q
    Wq = mode.weights[:, None] * q
    return (q.mT @ Wq - _lost(mode.point, mode.factor, mode.rows.X, Wq)) / 2


def column_information(mode: Mode, X: Tensor, columns: Tensor) -> Tensor:
    r""":math:`m^\top P m` for columns m (n, k) in the working linear model at a mode, (k,), with
    X (n, p) projected out.

    Raises:
        NotPositiveDefiniteError: if X has no full rank there.
    """
    factor = mode.point.factor(mode.weights, X)
    W_m = mode.weights[:, None] * columns
    return (columns * W_m).sum(0) - _lost(mode.point, factor, X, W_m).diagonal()


def projected(mode: Mode, X: Tensor, columns: Tensor) -> Tensor:
    r""":math:`P m` for columns m (n, k) in the working linear model at a mode, (n, k), with X (n, p)
    projected out.

    Raises:
        NotPositiveDefiniteError: if X has no full rank there.
    """
    W_m = mode.weights[:, None] * columns
    _, _, u, beta = _solved(mode.point, mode.point.factor(mode.weights, X), X, W_m)
    moved = [mode.point.predictor(part.contiguous()) for part in u.unbind(1)]
    rows = torch.stack(moved, 1) if moved else columns
    return W_m - mode.weights[:, None] * (rows + X @ beta)


def _lost(point: Point, factor: Factor, X: Tensor, columns: Tensor) -> Tensor:
    """What random effects and X take from products of columns, weighted by W."""
    right, of_X, u, beta = _solved(point, factor, X, columns)
    return right.mT @ u + of_X.mT @ beta


def _solved(
    point: Point, factor: Factor, X: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r""":math:`\Lambda^\top Z^\top m` and :math:`X^\top m` of columns, and the system's solutions by them."""
    half = [point.slope(column.contiguous()) for column in columns.unbind(1)]
    like = point.slope(columns.new_zeros(len(columns)))
    right = torch.stack(half, 1) if half else like.new_zeros(len(like), 0)
    of_X = X.mT @ columns
    return right, of_X, *factor.solve(right, of_X)


def find_mode(
    rows: Rows,
    point: Point,
    start: Tensor | None = None,
    beta: Tensor | None = None,
    factor: Factor | None = None,
    same: bool = False,
    rough: bool = False,
) -> Mode:
    r"""Newton's steps, halved on the penalised density, to the mode of u and :math:`\beta`.

    Args:
        rows: the data; what is computed has no graph.
        point: the random effects.
        start: where u starts, such as an earlier mode; zero by default.
        beta: where the coefficients start; zero by default.
        factor: of the system near by, with which steps begin; made anew by default.
        same: whether that is of these covariances and this X, so that it is the true one under its
            weights.
        rough: whether it is enough to come near the mode: the factor is then one of near by, where one
            takes long.

    Raises:
        NumericalError: if there is no mode, or none is found.
    """
    u = point.slope(rows.eta.new_zeros(len(rows.eta)))
    if start is not None or beta is not None:
        try:
            return _newton(rows, point, u if start is None else start, beta, factor, same, rough)
        except NumericalError:
            # An earlier mode may be too far away; from zero it is found, or an error says why not.
            pass
    return _newton(rows, point, u, None, None, False, rough)


def _newton(
    rows: Rows,
    point: Point,
    start: Tensor,
    beta: Tensor | None,
    factor: Factor | None,
    same: bool,
    rough: bool,
) -> Mode:
    like, u = rows.eta, start
    beta = like.new_zeros(rows.X.shape[1]) if beta is None else beta
    tolerance, floor = _tolerances(like)
    density: Tensor | None = None
    a = _linear(rows, point, u, beta)
    first, weights, third = (torch.empty_like(like) for _ in range(3))
    before = gain = float("inf")
    steps = None if factor is None else Steps(factor, len(u))
    for step in range(_MOST_STEPS):
        rows.derivatives(a, (first, weights, third))
        if step == 0 and not bool(torch.isfinite(first.sum())):
            raise NumericalError(
                "the density of the responses is not finite at the start: `eta` is too far from them"
            )
        g = torch.cat([point.prior(u) - point.slope(first), -(rows.X.mT @ first)])
        x = torch.cat([u, beta])
        true = same and step == 0 and factor is not None and torch.equal(factor.weights, weights)
        if steps is None or point.is_cheap:
            factor, true = _factor(rows, point, weights)
            steps = Steps(factor, len(u))
        move, gain = steps.step(x, g)
        near = rough and gain <= _NEAR and not point.is_cheap
        # An earlier factor will do for a step as long as steps get shorter fast, and until one by the
        # true one is none for certain.
        if not (true or near) and (gain <= tolerance / 10 or gain > before / 20):
            factor, true = _factor(rows, point, weights)
            steps = Steps(factor, len(u))
            move, gain = steps.step(x, g)
        move_u, move_X = move[: len(u)], move[len(u) :]
        # Rounding leaves a floor, below which steps get no smaller.
        stalled = gain < floor and gain > before / 4
        if near or (true and (gain <= tolerance or stalled)):
            if not near:
                _refuse_separated(_linear(replace(rows, eta=0 * a[:1]), point, move_u, move_X))
            density = rows.density(a) if density is None else density
            return Mode(rows, point, steps.factor, u, beta, a, density, first, weights, third, step)
        if gain < before and float((g * move).max()) < _SAFE and not len(beta):
            # So near a mode Newton's step is not questioned.
            u = u - move
            a, density = _linear(rows, point, u, beta), None
        else:
            if density is None:
                density = rows.density(a)
            u, beta, a, density = _searched(rows, point, (u, beta, density), (move_u, move_X), gain)
        before = gain
    raise NumericalError(
        f"the mode of the random effects was not found in {_MOST_STEPS} steps: the last was "
        f"{gain**0.5:.3g} long; the responses may be separated, or the variances too large"
    )


def _factor(rows: Rows, point: Point, weights: Tensor) -> tuple[Factor, bool]:
    """The system's factor under weights, and whether they are the true ones.

    Away from the mode a density need not be concave: then it is without the rows where it is not.
    """
    try:
        return point.factor(weights, rows.X), True
    except NotPositiveDefiniteError:
        if not bool((weights < 0).any()):
            raise
    return point.factor(weights.clamp(min=0), rows.X), False


def _searched(
    rows: Rows,
    point: Point,
    at: tuple[Tensor, Tensor, Tensor],
    move: tuple[Tensor, Tensor],
    gain: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step that does not raise the penalised density's negative."""
    u, beta, density = at
    height = float(u @ point.prior(u) / 2 - density)
    slack = torch.finfo(u.dtype).eps * 16 * (1 + abs(height) + rows.eta.numel())
    scale = 1.0
    for _ in range(_MOST_HALVINGS):
        new_u, new_beta = u - scale * move[0], beta - scale * move[1]
        a = _linear(rows, point, new_u, new_beta)
        new_density = rows.density(a)
        new = float(new_u @ point.prior(new_u) / 2 - new_density)
        if new <= height - 1e-4 * scale * gain + slack:
            return new_u, new_beta, a, new_density
        scale /= 2
    raise NumericalError(
        "no step to the mode of the random effects raises the density: the derivatives of the "
        f"family {type(rows.family).__name__} may be wrong"
    )


def _linear(rows: Rows, point: Point, u: Tensor, beta: Tensor) -> Tensor:
    """The linear predictor."""
    a = point.predictor(u).add_(rows.eta)
    return a.add_(rows.X @ beta) if len(beta) else a


def _tolerances(like: Tensor) -> tuple[float, float]:
    """Squared lengths of steps, in standard deviations of the effects, that are none, as they move
    the likelihood by no more than its rounding, and that may be all that rounding allows."""
    if like.dtype != torch.float64:
        return 1e-10, 1e-2
    eps = torch.finfo(like.dtype).eps
    return max(1e3, 10.0 * len(like)) ** 2 * eps**2, 1e6 * eps


def _refuse_separated(move: Tensor) -> None:
    """Raise where a step that gains nothing still moves the predictor: it has no end."""
    low, high = (float(end) for end in move.aminmax())
    if max(-low, high) > 0.01:
        farthest = int(move.abs().argmax())
        raise NumericalError(
            "the data are separated: the density rises for ever as the linear predictor of row "
            f"{farthest} goes to {'-' if float(move[farthest]) > 0 else ''}infinity"
        )
