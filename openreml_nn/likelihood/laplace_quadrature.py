r"""Adaptive Gauss-Hermite quadrature over the random effects of one grouping factor.

With :math:`H_l = C C^\top` the curvature of level l at its mode :math:`\hat u_l`, and nodes
:math:`z_j` with weights :math:`w_j` for the standard normal distribution,

.. math::
    \int p(y_l, u)\,du \approx |C|^{-1} \sum_j w_j
        \exp\{\tfrac12 z_j^\top z_j - h_l(\hat u_l + C^{-\top} z_j)\},

where :math:`h_l(u) = -\sum_i \ell_i + \tfrac12 u^\top u`. One node is Laplace's approximation.

Reference:
    Pinheiro and Bates, J. Comput. Graph. Stat. 4 (1995) 12; Liu and Pierce, Biometrika 81 (1994) 624.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import log

import numpy as np
import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.utils.checkpoint import checkpoint

from openreml_nn.likelihood.laplace_layout import Prior, Stacked
from openreml_nn.likelihood.laplace_mode import Mode, Rows
from openreml_nn.likelihood.laplace_space import Space
from openreml_nn.likelihood.laplace_system import BlockedPoint, products_of
from openreml_nn.likelihood.problem import cholesky
from openreml_nn.support.errors import InputError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import RepeatedCovariance
from openreml_nn.terms.design import Design, IndexedDesign

__all__ = ["by_quadrature", "check_quadrature"]

#: Effects of a level that are integrated at most.
_MOST_EFFECTS = 3


def check_quadrature(layout: Space, points: int) -> None:
    """Refuse terms over which there is no quadrature.

    Raises:
        InputError: if there are several grouping factors, or too many effects of a level.
    """
    assert isinstance(layout, Stacked)
    if layout.q or not layout.levels:
        raise InputError(
            f"`quadrature` is {points}: expected 1, as the covariance has more than one grouping "
            "factor, or effects that are correlated between levels"
        )
    if layout.k > _MOST_EFFECTS:
        raise InputError(
            f"`quadrature` is {points}: expected 1, as a level has {layout.k} effects, more than "
            f"{_MOST_EFFECTS}"
        )


def by_quadrature(
    mode: Mode,
    rows: Rows,
    designs: Sequence[Design],
    covariances: Sequence[Covariance],
    points: int,
    held: int = 2**22,
) -> Tensor:
    """The negative log-likelihood, differentiable once in what has a graph.

    Args:
        mode: the mode, without a graph.
        rows: the data with their graph.
        designs, covariances: of the terms, in the layout's order, with their graph.
        points: nodes for each effect of a level.
        held: rows times nodes that are worked on at a time.
    """
    point, family = mode.point, rows.family
    assert isinstance(point, BlockedPoint)
    layout = point.layout
    levels, k = layout.levels, layout.k
    L = _roots(point, covariances, mode.u)  # (levels or 1, k, k)
    first_design = designs[0]
    assert isinstance(first_design, IndexedDesign)
    codes = first_design.codes

    def predictor(u: Tensor) -> Tensor:
        """For u (levels, k, m), (n, m)."""
        return rows.eta[:, None] + layout.rows((L @ u).flatten(0, 1), designs)

    u = mode.u.reshape(levels, k, 1)
    # The mode attached by a Newton step of length zero, and then the curvature there.
    first, _, _ = rows.derivatives_of(rows.y, predictor(u)[:, 0])
    g = u - L.mT @ layout.t_rows(first[:, None], designs).reshape(levels, k, 1)
    u = u - mode.factor.solve(g.flatten(0, 1), g.new_zeros(0, 1))[0].reshape(levels, k, 1)
    _, second, _ = rows.derivatives_of(rows.y, predictor(u)[:, 0])
    at = products_of(layout, designs, -second, rows.X)
    H = torch.eye(k, dtype=L.dtype, device=L.device) + L.mT @ at.A11 @ L
    C = torch.linalg.cholesky(H)

    nodes, weights = _grid(points, k, L)
    binomial = rows.y.dim() == 2

    def part(own: Tensor, u: Tensor, C: Tensor) -> Tensor:
        """The terms of some nodes (k, m), levels by nodes."""
        shift = solve_triangular(C.mT, own.expand(levels, -1, -1), upper=True)
        at = u + shift
        a = predictor(at)
        m = own.shape[1]
        y = (
            rows.y.repeat_interleave(m, 0)
            if binomial
            else rows.y[:, None].expand(-1, m).reshape(-1)
        )
        density = rows.weighted(family.log_density(y, a.reshape(-1)).reshape(-1, m))
        total = density.new_zeros(levels, m).index_add(0, codes, density)
        return total - (at * at).sum(1) / 2 + (own * own).sum(0) / 2

    width = max(1, held // max(1, len(rows.eta)))
    recording = torch.is_grad_enabled()
    found = []
    for own in nodes.split(width, 1):
        if recording and nodes.shape[1] > width:
            found.append(checkpoint(part, own, u, C, use_reentrant=False))
        else:
            found.append(part(own, u, C))
    marginal = torch.logsumexp(torch.cat(found, 1) + weights, 1)
    return C.diagonal(dim1=1, dim2=2).log().sum() - marginal.sum()


def _grid(points: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes (k, points^k) of the standard normal distribution and the logarithms of their weights."""
    z, w = np.polynomial.hermite_e.hermegauss(points)
    logs = np.log(w) - 0.5 * log(2 * np.pi)
    nodes = np.array(list(product(z, repeat=k))).T
    weights = np.array([sum(part) for part in product(logs, repeat=k)])
    return torch.from_numpy(nodes).to(like), torch.from_numpy(weights).to(like)


def _roots(point: BlockedPoint, covariances: Sequence[Covariance], like: Tensor) -> Tensor:
    r"""Blocks of :math:`\Lambda`, with a graph.

    A standard deviation of zero has none: its derivative is that of Laplace's approximation.
    """
    parts: list[Covariance] = []
    for form, own in zip(covariances, point.roots.first, strict=True):
        if isinstance(form, RepeatedCovariance) and form.factor is not None:
            parts.append(RepeatedCovariance(form.factor, form.levels))
        elif not form.matrix.requires_grad:
            parts.append(own)
        elif form.matrix.dim() == 2 and len(form.matrix) > 1:
            parts.append(own.with_matrix(cholesky(form.matrix, _SINGULAR)))
        else:
            held = torch.where(form.matrix > 0, form.matrix, 1)
            parts.append(own.with_matrix(torch.where(form.matrix > 0, held.sqrt(), 0)))
    return Prior(point.layout, parts).blocks(like)


_SINGULAR = "with quadrature, the covariance of the effects of a level, not held by its factor,"
