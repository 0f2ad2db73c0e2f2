"""Orders of elimination that leave few entries in a factor.

Reference:
    Karypis and Kumar, SIAM Journal on Scientific Computing 20 (1998) 359, for nested dissection.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pymetis
from scipy.sparse import csc_matrix

__all__ = ["leaves_dense", "nested_dissections"]

#: Columns that are looked at to see whether nearly all meet.
_LOOKED_AT = 32
#: So few columns may all meet.
_FEW = 300
#: Which columns are left to the last, those with so many times the mean number of neighbours (in
#: tenths), and how unequal the two sides of a separator may be (in thousandths over one): parents
#: with many offspring are in no separator, and where many are, unequal sides leave less.
_OPTIONS = ({"pfactor": 60}, {"pfactor": 30}, {"ufactor": 500})


def nested_dissections(pattern: csc_matrix) -> Iterator[np.ndarray]:
    """Orders of elimination, (n,): which column is the k-th pivot; the best as a rule comes first.

    Args:
        pattern: a symmetric pattern (n, n), both triangles.
    """
    n = pattern.shape[0]
    graph = pattern.tocoo()
    off = graph.row != graph.col
    if not off.any():
        yield np.arange(n)
        return
    edges = csc_matrix((np.ones(off.sum(), np.int8), (graph.row[off], graph.col[off])), (n, n))
    adjacency = pymetis.CSRAdjacency(edges.indptr, edges.indices)
    for options in _OPTIONS:
        order = pymetis.nested_dissection(adjacency, options=pymetis.Options(**options))[0]
        yield np.asarray(order, dtype=np.int64)


def leaves_dense(pattern: csc_matrix, first: np.ndarray) -> bool:
    """Whether all but all columns meet once some are eliminated, so that their order is of no use.

    Some columns are looked at: they meet a good part of the others, and those that meet each other
    have no more of them in common than if these were drawn at random.

    Args:
        pattern: as in :func:`nested_dissections`.
        first: (m,) columns that do not meet each other, or in small blocks only.
    """
    rest = np.delete(np.arange(pattern.shape[0]), first)
    if len(rest) <= _FEW:
        return True
    A = pattern[:, rest][first].astype(np.float32)  # (m, rest)
    some = np.unique(np.linspace(0, len(rest) - 1, _LOOKED_AT).astype(int))
    meet = (A[:, some].T @ A).toarray() > 0
    density = meet.mean()
    pairs = meet[:, some] & ~np.eye(len(some), dtype=bool)
    if density < 0.2 or not pairs.any():
        return False
    common = meet.astype(float) @ meet.T / len(rest)
    return bool(common[pairs].mean() < 2 * density**2)
