"""The determinant of the system of the random effects as a function of its products and covariances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.likelihood.laplace_layout import Prior, times_blocks
from openreml_nn.likelihood.system.elimination import inner
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.likelihood.system.placement import System
from openreml_nn.terms.design import Design, IndexedDesign

__all__ = ["log_det", "reduced", "slopes_alone"]


def log_det(at: System, prior: Prior, by: Partition) -> Tensor:
    r"""Half of :math:`\log|I + A G|`, bordered by X, by plain differentiable operations.

    In G itself: a factor of G has no derivative where G is singular.
    """
    layout = prior.layout
    eye = torch.eye(layout.k, dtype=at.A11.dtype, device=at.A11.device)
    D, K = reduced(at, prior)
    value = D.log().sum() if layout.k == 1 else torch.linalg.slogdet(D).logabsdet.sum()
    KA = K @ at.A1f
    E2f = at.A2f
    Eff = at.Aff - inner(at.A1f, KA)
    if layout.q:
        E22 = at.A22 - at.W.gram(eye.expand_as(K), K)
        E2f = E2f - at.W.t_times(KA)
        M = by.spread(prior.times_rest(by.collect(E22)))  # G2 E22
        M = M + torch.eye(by.size, dtype=M.dtype, device=M.device)
        value = value + torch.linalg.slogdet(M).logabsdet.sum()
        x = by.collect(torch.linalg.solve(M, by.spread(prior.times_rest(E2f))))
        Eff = Eff - E2f.mT @ x
    return value / 2 + torch.linalg.slogdet(Eff).logabsdet / 2


def reduced(at: System, prior: Prior) -> tuple[Tensor, Tensor]:
    r""":math:`D = I + A_{11} G_1` and :math:`G_1 D^{-1}`, level by level."""
    G1 = prior.blocks(at.A11)
    eye = torch.eye(prior.layout.k, dtype=G1.dtype, device=G1.device)
    D = eye + times_blocks(at.A11, G1)
    if prior.layout.k == 1:
        return D, G1 / D
    return D, torch.linalg.solve(D.mT, G1.mT.expand_as(D)).mT


def slopes_alone(
    at: System, prior: Prior, root: Tensor, designs: Sequence[Design]
) -> tuple[Tensor, list[Tensor]]:
    r"""Derivatives of half the log-determinant where all terms are of the eliminated factor: by the
    weights of the rows, :math:`\tfrac12 z_i^\top P z_i` with :math:`P = G_1 D^{-\top}`, (n,), and by the
    matrix of each term, of :math:`\tfrac12 D^{-1} A_{11}`, :math:`D = I + A_{11} G_1`.

    Args:
        at: the products of the designs.
        prior: the covariances.
        root: R of :math:`P = R^\top R`, (levels, k, k).
        designs: of the terms, indexed.
    """
    P = times_blocks(root.mT, root)
    columns = [column for design in designs for column in _columns(design)]
    half = root.new_zeros(len(columns[0][0]))
    for i, (codes, one) in enumerate(columns):
        for j, (_, other) in enumerate(columns[: i + 1]):
            part = P[:, i, j].index_select(0, codes)
            for values in (one, other):
                part = part if values is None else part * values.to(part)
            half.add_(part, alpha=0.5 if i == j else 1.0)
    D, _ = reduced(at, prior)
    A11 = at.A11
    square = (A11 / D if len(D[0]) == 1 else torch.linalg.solve(D, A11.expand_as(D))) / 2
    parts, start = [], 0
    for form, width in zip(prior.first, prior.layout.widths, strict=True):
        own = slice(start, start + width)
        parts.append(form.fold_blocks(square[:, own, own]).reshape(form.matrix.shape))
        start += width
    return half, parts


def _columns(design: Design) -> list[tuple[Tensor, Tensor | None]]:
    """The codes of the rows with the values of each effect of a level, (n,); None for ones."""
    assert isinstance(design, IndexedDesign)
    values = [None] if design.values is None else design.values.unbind(1)
    return [(design.codes, column) for column in values]
