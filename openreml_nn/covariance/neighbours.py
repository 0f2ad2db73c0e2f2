"""Which places come first, and which are near."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import numpy as np

__all__ = ["first_to_last", "nearest", "nearest_before"]


def first_to_last(places: np.ndarray) -> np.ndarray:
    """An order from coarse to fine, (n,): each place is the farthest from those before it.

    The first is the one nearest to their mean; of places equally far the first by its coordinates
    comes first, so that the order does not depend on that of the rows.

    Args:
        places: (n, s), all different.
    """
    from scipy.spatial import cKDTree

    n = len(places)
    sorted_by = np.lexsort(places.T[::-1])
    at = places[sorted_by]
    tree = cKDTree(at)
    first = int(((at - at.mean(0)) ** 2).sum(1).argmin())
    far = np.linalg.norm(at - at[first], axis=1)
    far[first] = -1.0
    heap = [(-x, i) for i, x in enumerate(far.tolist()) if i != first]
    heapify(heap)
    order = [first]
    while len(order) < n:
        minus, i = heappop(heap)
        if far[i] != -minus:
            continue  # it has come nearer since, and stands in the heap again
        order.append(i)
        reach = far[i]
        far[i] = -1.0
        # Those within reach alone can come nearer: none is farther from all than this one was.
        around = np.asarray(tree.query_ball_point(at[i], reach * (1 + 1e-12)))
        distance = np.linalg.norm(at[around] - at[i], axis=1)
        nearer = distance < far[around]
        around, distance = around[nearer], distance[nearer]
        far[around] = distance
        for j, x in zip(around.tolist(), distance.tolist(), strict=True):
            heappush(heap, (-x, j))
    return sorted_by[np.array(order)]


def nearest_before(places: np.ndarray, order: np.ndarray, m: int) -> np.ndarray:
    """The m nearest of those that come before each place, (n, m), the nearest first; -1 past the last.

    Args:
        places: (n, s).
        order: (n,) the places, the first at the front.
        m: how many.
    """
    from scipy.spatial import cKDTree

    n, at = len(places), places[order]
    found = np.full((n, m), -1, np.int64)
    begin = 1
    while begin < n and m:
        end = min(2 * begin, n)
        tree = cKDTree(at[:end])
        left, count = np.arange(begin, end), min(3 * m + 1, end)
        while len(left):
            near = tree.query(at[left], count)[1].reshape(len(left), count)
            before = near < left[:, None]
            enough = (before.sum(1) >= np.minimum(m, left)) | (count == end)
            rows, kept = left[enough], before[enough]
            rank = np.cumsum(kept, 1) - 1
            kept &= rank < m
            which, column = kept.nonzero()
            found[rows[which], rank[which, column]] = near[enough][which, column]
            left, count = left[~enough], min(2 * count, end)
        begin = end
    back = np.empty((n, m), np.int64)
    back[order] = np.where(found < 0, -1, order[found])
    return back


def nearest(places: np.ndarray, others: np.ndarray, m: int) -> np.ndarray:
    """The m nearest of the others to each place, (k, m), the nearest first."""
    from scipy.spatial import cKDTree

    return cKDTree(others).query(places, m)[1].reshape(len(places), m)
