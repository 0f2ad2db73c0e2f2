"""Mini-batches of rows for the likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils.data import Sampler

from openreml_nn.support.checks import check_count, check_mapping
from openreml_nn.support.errors import InputError

__all__ = ["WholeGroups", "connected_rows", "in_order", "whole"]


def connected_rows(groups: Mapping[str, Tensor]) -> Tensor:
    """Number of the set of rows (n,) that each row belongs to: rows that share a level of any
    factor, directly or through others, are in one set. A code of -1 is shared by none.

    Raises:
        InputError: if a row has several levels of one factor.

    >>> connected_rows({"a": torch.tensor([0, 0, 1, 2]), "b": torch.tensor([0, 1, 1, 2])})
    tensor([0, 0, 0, 1])
    """
    for name, codes in groups.items():
        if codes.dim() != 1:
            raise InputError(
                f"`groups[{name!r}]` has shape {tuple(codes.shape)}: expected (n,), one level a row"
            )
    first, *others = [_own_codes(codes).cpu().numpy() for codes in groups.values()]
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


def _own_codes(codes: Tensor) -> Tensor:
    """With a code of its own in the place of each -1, which narrow integers may not hold."""
    codes = codes.long()
    absent = (codes < 0).nonzero()[:, 0]
    start = int(codes.max()) + 1 if len(codes) else 0
    return codes.index_copy(0, absent, start + torch.arange(len(absent)).to(codes))


class WholeGroups(Sampler[list[int]]):
    """Batches of about ``rows`` rows that cut no group: a ``batch_sampler`` for
    ``training="groups"``. Each epoch has an order of its own.

    Args:
        groups: codes (n,) of each grouping factor, by name.
        rows: rows of a batch.
        seed: of the order.

    Raises:
        TypeError, InputError: if ``groups`` are no codes of one length, or ``rows`` is no positive
            whole number.

    >>> sampler = WholeGroups({"g": torch.tensor([0, 1, 0, 1, 2, 2])}, rows=2)
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 2], [1, 3], [4, 5]]
    """

    def __init__(self, groups: Mapping[str, Tensor], rows: int, seed: int = 0) -> None:
        check_mapping("groups", groups, Tensor)
        self._sets = connected_rows(groups)
        self._rows = check_count("rows", rows, 1)
        self._seed = check_count("seed", seed)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch, as for torch's :class:`DistributedSampler`; Lightning calls
        it."""
        self._epoch = epoch

    @property
    def sampler(self) -> WholeGroups:
        """Itself: Lightning tells the epoch to what a batch sampler samples from."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        for batch in whole(self._sets, self._rows, generator):
            yield batch.tolist()

    def __len__(self) -> int:
        return len(whole(self._sets, self._rows, torch.Generator().manual_seed(self._seed)))


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
