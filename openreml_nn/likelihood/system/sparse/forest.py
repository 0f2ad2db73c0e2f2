r"""The elimination tree of a sparse matrix, and what it tells of the Cholesky factor.

Arrays are filled in loops: numba takes long to compile what NumPy makes full ones with.

Reference:
    Davis, Direct Methods for Sparse Linear Systems (2006), chapter 4.
"""

from __future__ import annotations

import numpy as np

from openreml_nn.support.compilation import compiled

__all__ = ["column_counts", "elimination_tree", "inverted", "postorder", "relabelled"]


def inverted(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes one."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place


@compiled
def elimination_tree(n, start, index, order, place):
    """Elimination tree with compressed paths."""
    parent = np.empty(n, np.int64)
    ancestor = np.empty(n, np.int64)
    for k in range(n):
        parent[k] = ancestor[k] = -1
    for k in range(n):
        column = order[k]
        for p in range(start[column], start[column + 1]):
            i = place[index[p]]
            while i != -1 and i < k:
                following = ancestor[i]
                ancestor[i] = k
                if following == -1:
                    parent[i] = k
                i = following
    return parent


@compiled
def postorder(parent):
    """Nodes of a forest, each after those below it."""
    n = len(parent)
    head = np.empty(n, np.int64)
    following = np.empty(n, np.int64)
    post = np.empty(n, np.int64)
    stack = np.empty(n, np.int64)
    for j in range(n):
        head[j] = following[j] = -1
    for j in range(n - 1, -1, -1):
        if parent[j] >= 0:
            following[j] = head[parent[j]]
            head[parent[j]] = j
    k = 0
    for root in range(n):
        if parent[root] >= 0:
            continue
        top = 0
        stack[0] = root
        while top >= 0:
            child = head[stack[top]]
            if child == -1:
                post[k] = stack[top]
                k += 1
                top -= 1
            else:
                head[stack[top]] = following[child]
                top += 1
                stack[top] = child
    return post


def relabelled(parent: np.ndarray, post: np.ndarray) -> np.ndarray:
    """The parents in a forest whose nodes are numbered anew, in the order ``post``."""
    new = inverted(post)
    found = parent[post]
    return np.where(found < 0, -1, new[found])


@compiled
def column_counts(n, start, index, order, place, parent):
    """Entries of each column of L, of columns in postorder, in a time about as long as the matrix's
    entries are many, however many L has.

    The columns that hold row i are a subtree, rooted at i. A column adds to the counts of its own,
    and takes away what is counted twice where paths to the root meet.

    Reference:
        Gilbert, Ng and Peyton, SIAM Journal on Matrix Analysis and Applications 15 (1994), 1075-1091.
    """
    first = np.empty(n, np.int64)  # the first column of the subtree
    count = np.empty(n, np.int64)
    furthest = np.empty(n, np.int64)  # of each row's leaves the last's first column
    leaf = np.empty(n, np.int64)
    up = np.empty(n, np.int64)
    for j in range(n):
        first[j] = up[j] = j
        count[j] = 1
        furthest[j] = leaf[j] = -1
    for j in range(n):
        if parent[j] >= 0:
            first[parent[j]] = min(first[parent[j]], first[j])
            count[parent[j]] = 0
    for j in range(n):
        if parent[j] >= 0:
            count[parent[j]] -= 1
        column = order[j]
        for p in range(start[column], start[column + 1]):
            i = place[index[p]]
            if i <= j or first[j] <= furthest[i]:
                continue
            furthest[i] = first[j]
            count[j] += 1
            last, leaf[i] = leaf[i], j
            if last >= 0:
                meet = last
                while up[meet] != meet:
                    meet = up[meet]
                while last != meet:
                    up[last], last = meet, up[last]
                count[meet] -= 1
        if parent[j] >= 0:
            up[j] = parent[j]
    for j in range(n):
        if parent[j] >= 0:
            count[parent[j]] += count[j]
    return count
