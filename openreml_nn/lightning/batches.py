"""Mini-batches of rows for the likelihood."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["connected_rows", "in_order", "whole"]


def connected_rows(groups: Mapping[str, Tensor]) -> Tensor:
    """Number of the set of rows (n,) that each row belongs to: rows that share a level of any
    factor, directly or through others, are in one set.

    >>> connected_rows({"a": torch.tensor([0, 0, 1, 2]), "b": torch.tensor([0, 1, 1, 2])})
    tensor([0, 0, 0, 1])
    """
    first, *others = [codes.cpu().numpy() for codes in groups.values()]
    sizes = [int(codes.max()) + 1 for codes in (first, *others)]
    starts = np.cumsum([0, *sizes])
    total = int(starts[-1])
    rows = np.tile(first, len(others))
    none = np.zeros(0, dtype=np.int64)
    columns = np.concatenate([none, *(c + s for c, s in zip(others, starts[1:], strict=False))])
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(total, total))
    _, label = connected_components(graph, directed=False)
    found = torch.from_numpy(label[first].astype(np.int64)).unique(return_inverse=True)[1]
    return found.to(next(iter(groups.values())).device)


def whole(sets: Tensor, rows: int, generator: torch.Generator) -> list[Tensor]:
    """Batches of about ``rows`` rows in a new order that cut no set."""
    sizes = sets.bincount()
    place = torch.randperm(len(sizes), generator=generator).to(sets.device)
    moved = torch.empty_like(sizes)
    moved[place] = sizes
    n, count = len(sets), max(1, len(sets) // rows)
    batch = (moved.cumsum(0) - moved) * count // n
    per_batch = torch.zeros(count, dtype=torch.long, device=sets.device)
    per_batch.scatter_add_(0, batch, moved)
    order = place[sets].argsort(stable=True)
    return [at for at in order.split(per_batch.tolist()) if len(at)]


def in_order(n: int, rows: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Batches of ``rows`` rows in a new order."""
    return list(torch.randperm(n, generator=generator).to(device).split(rows))
