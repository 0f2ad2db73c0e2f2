"""BLUPs, coefficients and log-likelihood of equations with y, by the joint covariance of their errors."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor

from openreml_nn.result.cells import LevelCells
from openreml_nn.result.equations import Equations
from openreml_nn.result.joint import JointErrors

__all__ = ["Solution", "solution_of"]


class Solution(NamedTuple):
    """What equations with y say.

    Attributes:
        values: BLUPs of each random term, (levels, k).
        variances: their prediction-error variances, (levels, k, k).
        coefficients: (p,) of X with all its columns.
        covariance: (p, p) of the coefficients.
        log_likelihood: by method, ``"ml"`` and ``"reml"``.
    """

    values: list[Tensor]
    variances: list[Tensor]
    coefficients: Tensor
    covariance: Tensor
    log_likelihood: Mapping[str, float]


@torch.no_grad()
def solution_of(joint: JointErrors, equations: Equations) -> Solution:
    """What equations with y say, by their joint covariance, which is exact."""
    factored = joint.factored()
    if factored is not None:
        values, variances, gamma, y_p_y = factored.solution(equations)
        spread = torch.from_numpy(factored.variance_of_coefficients).to(gamma)
        full = factored.log_det + equations.log_det + y_p_y
        return _solution(equations, values, variances, gamma, spread, full)
    joint = joint.parts()
    C, first = joint.covariance, int(joint.first)
    M = LevelCells(joint.starts, joint.columns, joint.entries)
    (zf, ff), basis = (equations.products.zf, equations.products.ff), equations.fixed.basis
    r = basis.shape[1]
    rest = [t for t in range(len(zf)) if t != first]
    right = torch.cat([*(zf[t][:, -1] for t in rest), ff[:r, -1]])
    square = ff[-1, -1]
    values, variances = [], []
    if first >= 0:
        own = zf[first][:, -1].unflatten(0, equations.sizes[first])
        alone = (joint.conditional @ own[:, :, None])[:, :, 0]
        square = square - (own * alone).sum()
        right = right - M.t_times(own, len(C))
    found = C @ right
    for t, (levels, k) in enumerate(equations.sizes):
        if t == first:
            values.append(alone - M.times_vector(found))
            variances.append(joint.conditional + M.sandwich(C, joint.most_numbers))
            continue
        at = int(joint.offsets[t]) + torch.arange(levels * k, device=C.device).reshape(levels, k)
        values.append(found[at])
        variances.append(C[at[:, :, None], at[:, None, :]])
    m = len(C) - r
    full = float(joint.log_det) + equations.log_det + float(square - right @ found)
    return _solution(equations, values, variances, found[m:], C[m:, m:], full)


def _solution(
    equations: Equations,
    values: list[Tensor],
    variances: list[Tensor],
    gamma: Tensor,
    spread: Tensor,
    full: float,
) -> Solution:
    r"""From coefficients of Q (r,), their covariance (r, r), and :math:`\log|V| + y^\top P y`."""
    basis, r = equations.fixed.basis, len(gamma)
    # The coefficients are those of X, of which Q is a multiple.
    T = basis[basis.abs().sum(1) > 0]
    fixed = -float(torch.linalg.slogdet(spread)[1] + 2 * torch.linalg.slogdet(T)[1])
    n = equations.rows * log(2 * pi)
    likelihood = {"ml": -(n + full) / 2, "reml": -(n - r * log(2 * pi) + full + fixed) / 2}
    beta, covariance = equations.fixed.offset + basis @ gamma, basis @ spread @ basis.mT
    return Solution(values, variances, beta, covariance, likelihood)
