r"""Precisions of places that are regressed on their neighbours."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import spsolve_triangular
from torch import Tensor

from openreml_nn.support.compilation import compiled
from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.precision import Precision

__all__ = ["NeighbourPrecision"]


class NeighbourPrecision(Precision):
    r""":math:`Q = (I - B)^\top D^{-1} (I - B)`, each place regressed on some of those before it.

    The numbers x are the diagonal of D (q,) and then B (q, m) row by row.

    Args:
        order: (q,) the places, those that come first at the front.
        neighbours: (q, m) the places that each is regressed on; -1 past the last.

    Attributes:
        neighbours: with the place itself in place of -1.
        pairs: (q, (m + 1)(m + 2)/2) where the pairs of a place and its neighbours, the place first,
            stand among the entries, those of a lower triangle row by row.
    """

    def __init__(self, order: np.ndarray, neighbours: np.ndarray) -> None:
        self.size, m = neighbours.shape
        own = np.arange(self.size)[:, None]
        self.order, self._count = order, (neighbours >= 0).sum(1)
        self.neighbours = np.where(neighbours >= 0, neighbours, own)
        self._rank = np.empty_like(order)
        self._rank[order] = np.arange(self.size)
        p, q = np.tril_indices(m + 1)
        both = np.concatenate([own, self.neighbours], 1)
        one, other = both[:, p], both[:, q]
        key = np.minimum(one, other) * self.size + np.maximum(one, other)
        found, place = np.unique(key, return_inverse=True)
        self.column, self.row = found // self.size, found % self.size
        self.pairs = place.reshape(key.shape).astype(np.int32)

    @property
    def constants(self) -> list[Tensor]:
        return [torch.from_numpy(self.order), torch.from_numpy(self.neighbours)]

    def _parts(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The diagonal of D, and B."""
        return x[: self.size], x[self.size :].reshape(self.neighbours.shape)

    def _checked(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d, B = self._parts(x)
        if not (d > 0).all():
            raise NumericalError(
                f"place {int((~(d > 0)).argmax())} has no variance of its own beside its neighbours"
            )
        return d, B

    def covariance(self, x: Tensor) -> Tensor:
        d = x[: self.size]
        is_plain = not torch._C._functorch.is_functorch_wrapped_tensor(x)
        if is_plain and not bool((d > 0).all()):
            self._checked(x.detach().cpu().double().numpy())
        half = self._mixed(x) * d.sqrt()
        return half @ half.mT

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        mixed = self._mixed(x)
        change = mixed @ self._whole(dx[self.size :]) @ self.covariance(x)
        return change + change.mT + (mixed * dx[: self.size]) @ mixed.mT

    def _mixed(self, x: Tensor) -> Tensor:
        """The inverse of I - B, (q, q)."""
        q, device = self.size, x.device
        rank, order = (torch.from_numpy(at).to(device) for at in (self._rank, self.order))
        B = self._whole(x[q:])[order][:, order]
        eye = torch.eye(q, dtype=x.dtype, device=device)
        # What is past the last neighbour stands on the diagonal, which is not looked at.
        found = torch.linalg.solve_triangular(eye - B, eye, upper=False, unitriangular=True)
        return found[rank][:, rank]

    def _whole(self, B: Tensor) -> Tensor:
        """B, (q, q), from its entries row by row."""
        q, device = self.size, B.device
        at = torch.arange(q, device=device)[:, None] * q
        at = at + torch.from_numpy(self.neighbours).to(device)
        return B.new_zeros(q * q).index_add(0, at.reshape(-1), B).reshape(q, q)

    def entries(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(_entries(*self._checked(x), self.pairs, self._count, len(self.row)))

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        by_d, by_B = _pull(*self._parts(x), self.pairs, self._count, cotangent)
        return np.concatenate([by_d, by_B.reshape(-1)])

    # What neighbours all but determine has a variance next to nothing: products with Q, whose entries
    # are then huge and cancel, are taken by way of what is left, (I - B) u.

    def pull_square(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        d, B = self._parts(x)
        left = (u - self._times(B, u)) / d[:, None]
        by_B = np.einsum("ik,ijk->ij", left, u[self.neighbours])
        by_B = np.where(np.arange(B.shape[1]) < self._count[:, None], -by_B, 0.0)
        return np.concatenate([-(left**2).sum(1) / 2, by_B.reshape(-1)])

    def times(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        d, B = self._checked(x)
        left = (u - self._times(B, u)) / d[:, None]
        return left - self._back(B, left)

    def inner(self, x: np.ndarray, u: np.ndarray, effects: int) -> np.ndarray:
        d, B = self._checked(x)
        by_level = u.reshape(self.size, -1)
        half = (by_level - self._times(B, by_level)) / np.sqrt(d)[:, None]
        half = half.reshape(u.shape)
        return np.asarray(half.T @ half)

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        (d, B), (dd, dB) = self._parts(x), self._parts(dx)
        d, dd = d[:, None], dd[:, None]
        left = u - self._times(B, u)  # (I - B) u
        change = -(self._times(dB, u)) / d - left * dd / d**2
        return change - self._back(B, change) - self._back(dB, left / d)

    def _times(self, B: np.ndarray, u: np.ndarray) -> np.ndarray:
        """:math:`B u`."""
        return np.asarray(self._lower(B) @ u)

    def _back(self, B: np.ndarray, u: np.ndarray) -> np.ndarray:
        """:math:`B^\\top u`."""
        return np.asarray(self._lower(B).T @ u)

    def _lower(self, B: np.ndarray) -> csr_matrix:
        """B, (q, q)."""
        start = np.arange(self.size + 1) * B.shape[1]
        return csr_matrix((B.reshape(-1), self.neighbours.reshape(-1), start), 2 * (self.size,))

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        d, B = self._checked(x)
        return -float(np.log(d).sum()), np.concatenate([-1 / d, np.zeros(B.size)])

    def variances(self, x: np.ndarray) -> np.ndarray:
        return np.ones(self.size)  # regressions are those of a correlation

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        d, B = self._checked(x)
        eye = csr_matrix((np.ones(self.size), (self.order, self.order)), 2 * (self.size,))
        L = (eye - self._lower(B))[self.order][:, self.order].tocsr()
        half = spsolve_triangular(L.T.tocsr(), u[self.order], lower=False, unit_diagonal=True)
        half = spsolve_triangular(L, d[self.order][:, None] * half, lower=True, unit_diagonal=True)
        return np.asarray(half[self._rank])


@compiled
def _entries(d, B, pairs, count, size):
    """Sums of the products a_p a_q / d of the pairs of each place, with a = (1, -B)."""
    found = np.zeros(size)
    a = np.empty(B.shape[1] + 1)
    for i in range(len(d)):
        a[0] = 1.0
        for p in range(count[i]):
            a[p + 1] = -B[i, p]
        k = 0
        for p in range(count[i] + 1):
            scaled = a[p] / d[i]
            for q in range(p + 1):
                found[pairs[i, k]] += scaled * a[q]
                k += 1
    return found


@compiled
def _pull(d, B, pairs, count, cotangent):
    """Derivatives by d and B of the sum of the entries, each times its cotangent."""
    by_d, by_B = np.zeros(len(d)), np.zeros(B.shape)
    a, by_a = np.empty(B.shape[1] + 1), np.empty(B.shape[1] + 1)
    for i in range(len(d)):
        m = count[i] + 1
        a[0] = 1.0
        for p in range(1, m):
            a[p] = -B[i, p - 1]
        for p in range(m):
            by_a[p] = 0.0
        k = 0
        for p in range(m):
            for q in range(p + 1):
                S = cotangent[pairs[i, k]]
                by_a[p] += S * a[q]
                by_a[q] += S * a[p]
                k += 1
        total = 0.0
        for p in range(m):
            total += by_a[p] * a[p]
        # The sum of squares is half of that of the products with their derivatives.
        by_d[i] = -total / (2.0 * d[i] * d[i])
        for p in range(1, m):
            by_B[i, p - 1] = -by_a[p] / d[i]
    return by_d, by_B
