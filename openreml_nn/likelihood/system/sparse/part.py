"""A random term as the sparse equations have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import qr
from scipy.sparse import bsr_matrix, csc_matrix, csr_matrix

from openreml_nn.terms.descent import Descent

__all__ = ["Between", "Cross", "Part", "by_rows", "is_identity", "ones_of"]

#: Gives :math:`Z_i^\top R^{-1} Z_j` for parts i ≤ j.
Between = Callable[[int, int], csr_matrix]


@dataclass(frozen=True)
class Part:
    r"""One random term.

    Attributes:
        name: of the term.
        design: Z, (n, levels * effects), columns level by level.
        effects: k, the size of the blocks of Λ.
        width: effects of a level that belong together, whose joint variance is wanted.
        prior: the inverse of the kernel between levels, (levels, levels), or None for the identity.
        null: what the prior is zero on, (levels, k) orthonormal, and effects have nothing of; None
            for nothing.
        moves: whether only the pattern of the prior is known, and its numbers move with parameters.
        basis: C, (levels, levels), with :math:`Z C` in the place of Z, or None for the identity.
    """

    name: str
    design: csr_matrix
    effects: int
    width: int
    prior: csc_matrix | None = None
    basis: np.ndarray | None = None
    moves: bool = False
    null: np.ndarray | None = None

    @property
    def columns(self) -> int:
        """Columns of the equations."""
        return int(self.design.shape[1])

    @property
    def levels(self) -> int:
        """Blocks of Λ."""
        return self.columns // self.effects

    @property
    def counts(self) -> bool:
        """Whether the design has ones alone, so that products with it count rows."""
        return bool((self.design.data == 1).all())

    def times_prior(self, x: np.ndarray) -> np.ndarray:
        """:math:`Q x` for x (columns, m)."""
        if self.prior is None:
            return x
        return (self.prior @ x.reshape(self.levels, self.effects * x.shape[1])).reshape(x.shape)

    def log_det_by_descent(self) -> float | None:
        r""":math:`\log|Q|` where Q is of a pedigree, 0 where it is of none or moves; else None."""
        if self.prior is None or self.moves:
            return 0.0
        found = Descent.of(self.prior) if self.null is None else None
        return None if found is None else self.effects * found.log_det

    def to_effects(self, x: np.ndarray) -> np.ndarray:
        """:math:`C x` for x (columns, m)."""
        if self.basis is None:
            return x
        return (self.basis @ x.reshape(self.levels, self.effects * x.shape[1])).reshape(x.shape)

    def from_effects(self, x: np.ndarray) -> np.ndarray:
        """:math:`C^\\top x` for x (columns, m)."""
        if self.basis is None:
            return x
        return (self.basis.T @ x.reshape(self.levels, self.effects * x.shape[1])).reshape(x.shape)

    def border(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Columns that together fix what the prior is zero on, what is added to the diagonal there
        to make it positive definite, and that null space of all effects, (columns, k)."""
        assert self.null is not None and self.prior is not None
        levels = qr(self.null.T, mode="r", pivoting=True)[1][: self.null.shape[1]]
        corners = (levels[:, None] * self.effects + np.arange(self.effects)).reshape(-1)
        weight = np.full(len(corners), self.prior.diagonal().mean())
        return corners, weight, np.kron(self.null, np.eye(self.effects))


@dataclass(frozen=True)
class Cross:
    """Where two parts meet: blocks of a matrix between their columns.

    Attributes:
        one, other: the parts, the first not after the second.
        row, column: (b,) levels of each block, row by row.
        start: (levels + 1,) where the blocks of a row begin.
        shape: the blocks', (k of one, k of other).
        place: (b, k, k) where their entries stand in the factor's values.
        kept: which of them, flattened, assemble the matrix: of a symmetric pair only one; None for
            all.
    """

    one: int
    other: int
    row: np.ndarray
    column: np.ndarray
    start: np.ndarray
    shape: tuple[int, int]
    place: np.ndarray
    kept: np.ndarray | None

    def transform(self, data: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """:math:`L^\\top B R` for each block B, with L and R for each level or one for all."""
        if self.shape == (1, 1):
            factor = left[:, 0, 0] if len(left) == 1 else left[self.row, 0, 0]
            factor = factor * (right[:, 0, 0] if len(right) == 1 else right[self.column, 0, 0])
            return data * factor[:, None, None]
        left = left if len(left) == 1 else left[self.row]
        right = right if len(right) == 1 else right[self.column]
        return left.transpose(0, 2, 1) @ data @ right

    def matrix(self, data: np.ndarray, columns: int) -> bsr_matrix | csr_matrix:
        """The blocks as a matrix with so many columns."""
        size = ((len(self.start) - 1) * self.shape[0], columns)
        if self.shape == (1, 1):  # the transpose of which is no copy
            return csr_matrix((data.reshape(-1), self.column, self.start), size)
        return bsr_matrix((data, self.column, self.start), size)


def by_rows(designs: Sequence[csr_matrix], rows: csr_matrix | None) -> Between:
    """Products of designs by the precision of their rows; None is the identity."""
    return lambda i, j: csr_matrix(
        designs[i].T @ (designs[j] if rows is None else rows @ designs[j])
    )


def ones_of(matrix: csr_matrix) -> csr_matrix:
    """Ones in the places of a matrix."""
    return csr_matrix((np.ones(matrix.nnz), matrix.indices, matrix.indptr), matrix.shape)


def is_identity(matrix: csr_matrix) -> bool:
    """Whether a matrix is the identity, held without zeros."""
    n = matrix.shape[0]
    if matrix.nnz != n or not bool((matrix.data == 1).all()):
        return False
    return bool((matrix.indices == np.arange(n)).all() and (np.diff(matrix.indptr) == 1).all())
