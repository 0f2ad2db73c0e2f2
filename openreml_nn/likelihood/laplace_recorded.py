"""Laplace's approximation at a mode by plain differentiable operations."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi

import torch
from torch import Tensor

from openreml_nn.likelihood.laplace_determinant import log_det
from openreml_nn.likelihood.laplace_layout import Prior
from openreml_nn.likelihood.laplace_mode import Mode, Rows
from openreml_nn.likelihood.laplace_system import BlockedPoint, products_of
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.design import Design

__all__ = ["recorded"]


def recorded(
    mode: Mode,
    rows: Rows,
    designs: Sequence[Design],
    covariances: Sequence[Covariance],
) -> Tensor:
    r"""Laplace's approximation at a mode by plain differentiable operations, for designs and X that
    move.

    The mode is attached by one Newton step, of length zero, whose derivative is that of the mode.
    Second derivatives of it are not those of the approximation.

    Args:
        mode: the mode, without a graph.
        rows: the data with their graph.
        designs, covariances: of the terms, in the layout's order, with their graph.
    """
    point = mode.point
    assert isinstance(point, BlockedPoint)
    layout, roots = point.layout, point.roots
    prior = Prior(layout, covariances)
    # The mode is u = Lambda' e.
    e, beta = layout.t_rows(mode.first[:, None]), mode.beta
    with torch.enable_grad():
        a = rows.eta + layout.rows(prior.times(e), designs)[:, 0] + rows.X @ beta
        first, _, _ = rows.derivatives_of(rows.y, a)
        rest = e - layout.t_rows(first[:, None], designs)
        move, move_X = mode.factor.solve(roots.times(rest, True), -rows.X.mT @ first[:, None])
        moved = layout.rows(roots.times(move)) + mode.rows.X @ move_X
        e = e - rest + layout.t_rows(mode.weights[:, None] * moved)
        beta = beta - move_X[:, 0]
        effects = prior.times(e)
        a = rows.eta + layout.rows(effects, designs)[:, 0] + rows.X @ beta
        _, second, _ = rows.derivatives_of(rows.y, a)
        at = products_of(layout, designs, -second, rows.X)
        density = rows.weighted(rows.family.log_density(rows.y, a))
        penalised = (e * effects).sum() / 2 - density.sum()
        return penalised + log_det(at, prior, layout.partition) - len(beta) / 2 * log(2 * pi)
