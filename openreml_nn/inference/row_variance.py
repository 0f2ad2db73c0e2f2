"""The variance that each random term gives to a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.terms.base import Covariance
from openreml_nn.terms.blocks import BlockCovariance
from openreml_nn.terms.covariance import DiagonalCovariance, KroneckerCovariance, ScaledCovariance
from openreml_nn.terms.design import IdentityDesign, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["row_variances"]


def row_variances(terms: Sequence[Term]) -> list[Tensor]:
    """Mean over the rows of each term's variance."""
    return [_row_variance(term) for term in terms]


def _row_variance(term: Term) -> Tensor:
    z, G = term.design, term.covariance
    if isinstance(z, IdentityDesign):
        blocks, codes, values = _blocks(G, 1), torch.arange(z.shape[0]), None
    elif isinstance(z, IndexedDesign):
        blocks, codes, values = _blocks(G, z.effects), z.codes, z.values
    else:
        Z = z.dense(G.matrix)
        return (Z * G.multiply(Z.mT).mT).sum(1).mean()
    if values is None and len(blocks) == 1:
        return blocks.reshape(())
    block = blocks[codes.to(blocks.device) % len(blocks)]
    values = block.new_ones(len(block), 1) if values is None else values.to(block)
    return (values[:, None] @ block @ values[..., None]).mean()


def _blocks(G: Covariance, effects: int) -> Tensor:
    """Covariances of the effects of a level, (m, k, k), those of level i at i modulo m."""
    if isinstance(G, ScaledCovariance | KroneckerCovariance):
        # As tables show it: a variance component, whatever the inbreeding of the animals.
        return G.shown()[None]
    if isinstance(G, BlockCovariance):
        square = G.matrix.unflatten(2, (-1, effects)).unflatten(1, (-1, effects))
        return square.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
    if isinstance(G, DiagonalCovariance):
        return G.matrix.reshape(-1, effects).diag_embed()
    square = G.matrix.unflatten(1, (-1, effects)).unflatten(0, (-1, effects))  # (m, k, m, k)
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
