"""Columns that fall apart into groups without anything in common."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["Partition"]


class Partition:
    r"""q columns in ``count`` groups of at most ``size``.

    A matrix that is block diagonal by groups is held as (count, size, size),
    with zeros where a group is smaller; a vector (q, m), in the order of the
    columns, is *spread* to (count, size, m) to be multiplied. Nested grouping
    factors fall apart like this, one group for each level of the outermost;
    crossed ones do not, and are one group.

    Args:
        group: (q,) group of each column, from 0.
    """

    def __init__(self, group: Tensor) -> None:
        self.q = len(group)
        sizes = torch.bincount(group)
        self.count, self.size = len(sizes), int(sizes.max()) if self.q else 0
        self.whole = self.count <= 1
        order = group.argsort(stable=True)
        starts = (sizes.cumsum(0) - sizes)[group[order]]
        position = torch.empty_like(group)
        position[order] = torch.arange(self.q, device=group.device) - starts
        self.group, self.position = group, position
        self._place = group * self.size + position

    @classmethod
    def of_one(cls, q: int, device: torch.device) -> Partition:
        """All columns together."""
        found = cls.__new__(cls)
        found.q, found.count, found.size, found.whole = q, min(q, 1), q, True
        found.group = torch.zeros(q, dtype=torch.long, device=device)
        found.position = found._place = torch.arange(q, device=device)
        return found

    @classmethod
    def of(cls, q: int, edges: list[tuple[Tensor, Tensor]], device: torch.device) -> Partition:
        """By which columns have something in common, directly or through others.

        All together where that is less work than to pad groups of unequal size.
        """
        one, two = (
            np.concatenate([np.asarray(end.cpu()) for end in ends]) if ends else np.zeros(0, int)
            for ends in (list(map(list, zip(*edges, strict=True))) or [[], []])
        )
        graph = coo_matrix((np.ones(len(one), dtype=np.int8), (one, two)), shape=(q, q))
        count, group = connected_components(graph, directed=False)
        found = cls(torch.from_numpy(group.astype(np.int64)).to(device))
        if count * found.size**2 > q**2:
            return cls.of_one(q, device)
        return found

    def spread(self, x: Tensor) -> Tensor:
        """From (q, m) to (count, size, m)."""
        if self.whole:
            return x[None]
        flat = x.new_zeros(self.count * self.size, x.shape[1])
        return flat.index_copy(0, self._place, x).unflatten(0, (self.count, self.size))

    def collect(self, x: Tensor) -> Tensor:
        """From (count, size, m) back to (q, m)."""
        return x[0] if self.whole else x.flatten(0, 1)[self._place]

    def index(self, i: Tensor, j: Tensor) -> Tensor:
        """Where entries (i, j), of columns of one group, stand in (count, size, size)."""
        return self._place[i] * self.size + self.position[j]

    def zeros(self, like: Tensor) -> Tensor:
        """A matrix by groups without entries, flattened."""
        return like.new_zeros(max(self.count, 1) * self.size**2)

    def square(self, flat: Tensor) -> Tensor:
        """From flattened to (count, size, size)."""
        return flat.reshape(max(self.count, 1), self.size, self.size)

    def diagonal(self, square: Tensor) -> Tensor:
        """Diagonal (q,) of a matrix by groups."""
        return self.collect(square.diagonal(dim1=-2, dim2=-1)[..., None])[:, 0]

    def own(self, square: Tensor, start: int, levels: int, k: int) -> Tensor:
        """The diagonal blocks (levels, k, k) of the columns from ``start`` on."""
        if self.whole:
            end = start + levels * k
            part = square[0, start:end, start:end].unflatten(1, (levels, k))
            return part.unflatten(0, (levels, k)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        column = torch.arange(start, start + levels * k, device=square.device).reshape(levels, k)
        return square.reshape(-1)[self.index(column[:, :, None], column[:, None, :])]
