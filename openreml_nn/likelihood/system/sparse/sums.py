"""Sums by level in the place of the rows: all that the sparse equations need with one variance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import bsr_matrix, csr_matrix
from torch import Tensor

from openreml_nn.likelihood.residual import Residual
from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.part import Between
from openreml_nn.likelihood.system.sparse.rows import Rows, RowsAt

__all__ = ["SumRows", "are_nested_sums", "between_levels"]


def between_levels(sums: Statistics) -> Between:
    """Products of the columns of two random terms."""

    def between(i: int, j: int) -> csr_matrix:
        (levels, k), (others, m) = sums.sizes[i], sums.sizes[j]
        a, b = (x.numpy(force=True) for x in sums.cells[i, j])
        start = np.searchsorted(a, np.arange(levels + 1))
        data = _numbers(sums.products.zz[i, j])
        return bsr_matrix((data, b, start), (levels * k, others * m)).tocsr()

    return between


def are_nested_sums(sums: Statistics) -> bool:
    """Whether each factor's levels are within those of the next, from the finest to the coarsest."""
    order = sorted(range(len(sums.sizes)), key=lambda i: -sums.sizes[i][0])
    for fine, coarse in itertools.pairwise(order):
        pair = sums.cells[min(fine, coarse), max(fine, coarse)]
        own = pair[0 if fine < coarse else 1]
        if len(own.unique()) < len(own):
            return False
    return True


class SumRows(Rows):
    """No rows, with the sums by level over those that there were.

    Args:
        equations: of the random terms.
        residual: R, of one variance.
        sums: cross-products of the random terms, in their order, and of f.
    """

    def __init__(self, equations: Equations, residual: Residual, sums: Statistics) -> None:
        self.terms, self._count = residual.at, sums.rows
        zf = zip(equations.parts, sums.products.zf, strict=True)
        moved = [part.from_effects(_numbers(own)) for part, own in zf]
        ff = _numbers(sums.products.ff)
        f, q = np.zeros((0, len(ff))), equations.size
        self._one = RowsAt(
            matrices=[],
            blocks=equations.products(between_levels(sums)),
            Zf=np.concatenate([f, *moved]),
            ff=ff,
            log_det=sums.log_det,
            condition=1.0,
            precision=csr_matrix((0, 0)),
            scale=1.0,
            Z=csr_matrix((0, q)),
            f=f,
        )

    def at(self, matrices: Sequence[Tensor]) -> RowsAt:
        own = [matrix.detach().cpu().double() for matrix in matrices]
        return replace(self._one, matrices=own).scaled(self._count)


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
