"""The variance that each random term gives to a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.terms.base import Covariance
from openreml_nn.terms.blocks import BlockCovariance
from openreml_nn.terms.covariance import (
    DiagonalCovariance,
    KroneckerCovariance,
    RepeatedCovariance,
    ScaledCovariance,
)
from openreml_nn.terms.design import IdentityDesign, IndexedDesign, MembershipDesign
from openreml_nn.terms.direct_sum import DirectSumCovariance
from openreml_nn.terms.kernel import Kernel
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.term import Term

__all__ = ["effect_variances", "row_variances"]

#: Columns of a known matrix that are held at a time.
_AT_A_TIME = 512


def row_variances(terms: Sequence[Term]) -> list[Tensor]:
    """Mean over the rows of each term's variance."""
    return [_row_variance(term) for term in terms]


def effect_variances(term: Term) -> Tensor:
    """Variances of the effects of a level (k,), where levels have several."""
    z = term.design
    effects = z.width if isinstance(z, MembershipDesign) else z.effects
    return _blocks(term.covariance, effects).mean(0).diagonal()


def _row_variance(term: Term) -> Tensor:
    z, G = term.design, term.covariance
    if isinstance(z, IdentityDesign):
        blocks, codes, values = _blocks(G, 1), torch.arange(z.shape[0]), None
    elif isinstance(z, IndexedDesign):
        blocks, codes, values = _blocks(G, z.effects), z.codes, z.values
    elif isinstance(z, MembershipDesign) and isinstance(G, ScaledCovariance | RepeatedCovariance):
        block = _blocks(G, z.width)[0]
        return (block * _squares(z, G).to(block)).sum()
    else:
        Z = z.dense(G.matrix)
        return (Z * G.multiply(Z.mT).mT).sum(1).mean()
    if values is None and len(blocks) == 1:
        return blocks.reshape(())
    block = blocks[codes.to(blocks.device) % len(blocks)]
    values = block.new_ones(len(block), 1) if values is None else values.to(block)
    return (values[:, None] @ block @ values[..., None]).mean()


def _squares(z: MembershipDesign, G: ScaledCovariance | RepeatedCovariance) -> Tensor:
    r"""Mean over the rows of :math:`\sum_{jl} K_{jl} z_j z_l^\top` (k, k), with K (m, m) among the
    levels of a row: 1 of a level with itself, as tables show its variance."""
    values = z.by_level.double()
    m = values.shape[1]
    found = values.new_zeros(values.shape[2], values.shape[2])
    for j in range(m):
        for other in range(m):
            one, two = z.codes[:, j], z.codes[:, other]
            K = (one == two).double()
            if isinstance(G, ScaledCovariance) and other != j:
                K = torch.where(one == two, 1.0, _entries(G.kernel, one, two))
            found = found + (K[:, None] * values[:, j]).mT @ values[:, other] / len(K)
    return found


def _entries(kernel: Kernel, one: Tensor, two: Tensor) -> Tensor:
    """Entries of K of pairs of levels (n,)."""
    if len(one.unique()) < len(two.unique()):
        one, two = two, one
    levels, at = two.unique(return_inverse=True)
    found = torch.zeros(len(one), dtype=torch.float64, device=one.device)
    for some in torch.arange(len(levels), device=one.device).split(_AT_A_TIME):
        unit = torch.zeros(kernel.size, len(some), dtype=torch.float64, device=one.device)
        unit[levels[some], some - some[0]] = 1
        here = (at >= some[0]) & (at <= some[-1])
        found[here] = kernel.multiply(unit).to(found)[one[here], at[here] - some[0]]
    return found


def _blocks(G: Covariance, effects: int) -> Tensor:
    """Covariances of the effects of a level, (m, k, k), those of level i at i modulo m."""
    if isinstance(
        G, ScaledCovariance | KroneckerCovariance | PrecisionCovariance | DirectSumCovariance
    ):
        # As tables show it: a variance component, whatever the inbreeding of the animals.
        matrix = G.shown(effects)
        if matrix.dim() == 1:
            return matrix.reshape(-1, effects).diag_embed()
        if len(matrix) <= effects:
            return matrix[None]
        return _on_diagonal(matrix, effects)
    if isinstance(G, BlockCovariance):
        square = G.matrix.unflatten(2, (-1, effects)).unflatten(1, (-1, effects))
        return square.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
    if isinstance(G, DiagonalCovariance):
        return G.matrix.reshape(-1, effects).diag_embed()
    matrix = G.matrix
    if isinstance(G, RepeatedCovariance) and len(matrix) < effects:
        # The effects of a level are repetitions themselves, as of the basis of a spline.
        matrix = torch.block_diag(*[matrix] * (effects // len(matrix)))
    return _on_diagonal(matrix, effects)


def _on_diagonal(matrix: Tensor, effects: int) -> Tensor:
    """The blocks on the diagonal of a matrix (m k, m k), (m, k, k)."""
    square = matrix.unflatten(1, (-1, effects)).unflatten(0, (-1, effects))  # (m, k, m, k)
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
