"""What follows from who is whose parent: an order, inbreeding, and products with the relationship
matrix and its inverse."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
import torch
from torch import Tensor

from openreml_nn.support.compilation import compiled
from openreml_nn.support.errors import InputError

__all__ = [
    "inbreeding_of",
    "parents_first",
    "pass_down",
    "quaas_inverse",
    "relate",
    "sampling_variances",
]


def parents_first(
    names: list[str | None],
    sires: list[str | None],
    dams: list[str | None],
    groups: tuple[str, ...],
) -> tuple[list[str], np.ndarray]:
    """Animals with parents first, and the positions of their parents (n, 2): -1 if unknown,
    n + k of the k-th group."""
    known: dict[str, tuple[str | None, str | None]] = {}
    for row, (name, sire, dam) in enumerate(zip(names, sires, dams, strict=True), 1):
        if name is None:
            raise InputError(f"`animal` has no name in row {row}")
        if name in known:
            raise InputError(f"`animal` {name!r} stands in two rows, the second is row {row}")
        known[name] = (sire, dam)
    origin = {name: k for k, name in enumerate(groups)}
    for parent in (*sires, *dams):
        if parent is not None and parent not in origin:
            known.setdefault(parent, (None, None))
    position: dict[str, int] = {}
    visiting: set[str] = set()
    for first in sorted(known, key=lambda name: known[name] != (None, None)):
        stack = [first]
        while stack:
            name = stack[-1]
            if name in position:
                stack.pop()
                continue
            waiting = [
                p for p in known[name] if p is not None and p not in position and p not in origin
            ]
            if not waiting:
                position[name] = len(position)
                visiting.discard(name)
                stack.pop()
                continue
            visiting.add(name)
            for parent in waiting:
                if parent in visiting:
                    raise InputError(_loop(parent, [a for a in stack if a in visiting]))
            stack += waiting
    parents = np.full((len(position), 2), -1, dtype=np.int64)
    for name, i in position.items():
        for side, parent in enumerate(known[name]):
            if parent is not None:
                at = origin.get(parent)
                parents[i, side] = position[parent] if at is None else len(position) + at
    return list(position), parents


def _loop(animal: str, visiting: list[str]) -> str:
    """What is said of an animal that is its own ancestor, with the way from it to itself."""
    way = list(dict.fromkeys(reversed(visiting)))
    way = [animal, *way[: way.index(animal) + 1]]
    shown = way if len(way) <= 8 else [*way[:4], "...", *way[-3:]]
    return (
        f"`animal` {animal!r} is its own ancestor, by {' > '.join(shown)}: expected parents that "
        "do not descend from their offspring; correct one of these rows"
    )


@compiled
def inbreeding_of(parents):  # type: ignore[no-untyped-def]
    """By tracing each animal's ancestors from the youngest to the oldest.

    Args:
        parents: (n, 2) positions of the parents, before that of the animal; -1 if unknown.
    """
    n = len(parents)
    F, variance, weight = np.zeros(n), np.ones(n), np.zeros(n)
    for i in range(n):
        queue = [0]  # of what type it is
        queue.clear()
        for parent in parents[i]:
            if parent >= 0:
                variance[i] -= 0.25 * (1 + F[parent])
                if weight[parent] == 0:
                    heappush(queue, -parent)
                weight[parent] += 0.5
        if min(parents[i]) < 0:
            for parent in parents[i]:
                if parent >= 0:
                    weight[parent] = 0
            continue  # an unknown parent: not inbred
        total = 0.0
        while len(queue) > 0:
            j = -heappop(queue)
            w = weight[j]
            weight[j] = 0
            total += w * w * variance[j]
            for parent in parents[j]:
                if parent >= 0:
                    if weight[parent] == 0:
                        heappush(queue, -parent)
                    weight[parent] += w / 2
        # The path of the animal itself contributes its own sampling variance.
        F[i] = total + variance[i] - 1
    return F


@compiled
def relate(parents, sampling, x):  # type: ignore[no-untyped-def]
    """A x in place of x (n, m), by A = T D T' where T passes half of a parent's value down."""
    n, m = x.shape
    for i in range(n - 1, -1, -1):
        for parent in parents[i]:
            if parent >= 0:
                for j in range(m):
                    x[parent, j] += 0.5 * x[i, j]
    for i in range(n):
        for j in range(m):
            x[i, j] *= sampling[i]
        for parent in parents[i]:
            if parent >= 0:
                for j in range(m):
                    x[i, j] += 0.5 * x[parent, j]


@compiled
def pass_down(parents, shares):  # type: ignore[no-untyped-def]
    """Means of the parents' shares in place of zeros; that of an unknown one is in the last row."""
    for i in range(len(parents)):
        for parent in parents[i]:
            shares[i] += 0.5 * shares[parent]


def sampling_variances(parents: np.ndarray, F: np.ndarray) -> np.ndarray:
    """Mendelian sampling variances: 1, 3/4 or 1/2 less a quarter of the parents' inbreeding."""
    return 1.0 - np.where(parents >= 0, 0.25 * (1 + F[parents]), 0.0).sum(1)


def quaas_inverse(parents: np.ndarray, sampling: np.ndarray, size: int) -> Tensor:
    r""":math:`W^\top D^{-1} W` (size, size), in which row i of W is 1 at i and -1/2 at its parents."""
    at = np.arange(len(parents))
    weight = 1 / sampling
    columns = [
        (at, np.ones(len(at))),
        (parents[:, 0], -0.5 * np.ones(len(at))),
        (parents[:, 1], -0.5 * np.ones(len(at))),
    ]
    rows, cols, values = [], [], []
    for i, a in columns:
        for j, b in columns:
            kept = (i >= 0) & (j >= 0)
            rows.append(i[kept])
            cols.append(j[kept])
            values.append((a * b * weight)[kept])
    index = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(cols)]))
    entries = torch.from_numpy(np.concatenate(values))
    return torch.sparse_coo_tensor(index, entries, (size, size), check_invariants=True).coalesce()
