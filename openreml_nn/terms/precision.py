r"""Covariances whose inverse is sparse and moves with parameters: places beside their neighbours.

The inverse of :math:`G = Q^{-1} \otimes \Sigma` is known by the pattern of Q and by the numbers that
it is made of: its entries, or those of :math:`Q = (I - B)^\top D^{-1} (I - B)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix, csc_matrix, csr_matrix
from scipy.sparse.linalg import splu, spsolve_triangular
from torch import Tensor

from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.base import Covariance, condition, square_root
from openreml_nn.terms.covariance import DenseCovariance, RepeatedCovariance

__all__ = ["GraphPrecision", "NeighbourPrecision", "Precision", "PrecisionCovariance"]

#: Columns beyond which products are by Q's dense inverse.
_FEW = 32


class Precision:
    r"""How a sparse precision Q is made of numbers x.

    Attributes:
        size: q.
        row, column: (e,) its lower triangle, column by column.
    """

    size: int
    row: np.ndarray
    column: np.ndarray

    @property
    def constants(self) -> list[Tensor]:
        """What it holds."""
        raise NotImplementedError

    def covariance(self, x: Tensor) -> Tensor:
        r""":math:`Q^{-1}`, (q, q), differentiable in x.

        Raises:
            NumericalError: if Q is not positive definite.
        """
        raise NotImplementedError

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        r"""The derivative of :math:`Q^{-1}` along dx, (q, q), differentiable in both."""
        raise NotImplementedError

    def entries(self, x: np.ndarray) -> np.ndarray:
        """Entries of Q in its lower triangle, (e,).

        Raises:
            NumericalError: if Q is seen not to be positive definite.
        """
        raise NotImplementedError

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        """The derivative by x of the sum of such entries, each times its cotangent (e,)."""
        raise NotImplementedError

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        r""":math:`\dot Q u` for u (q, m), with :math:`\dot Q` the derivative along dx."""
        raise NotImplementedError

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray] | None:
        r""":math:`\log|Q|` and its derivative by x; None where it takes a factor of Q."""
        raise NotImplementedError

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        r""":math:`Q^{-1} u` for u (q, m)."""
        raise NotImplementedError

    def variance_of_new(self, x: np.ndarray) -> float:
        r"""The variance of a level that is not among these, over Σ: the mean of theirs."""
        total = 0.0
        for some in np.array_split(np.arange(self.size), -(-self.size // 512)):
            unit = np.zeros((self.size, len(some)))
            unit[some, np.arange(len(some))] = 1
            total += float(np.trace(self.solve(x, unit)[some]))
        return total / self.size

    def matrix(self, entries: np.ndarray) -> csc_matrix:
        """Both triangles of Q from its lower one."""
        off = self.row > self.column
        row = np.concatenate([self.row, self.column[off]])
        column = np.concatenate([self.column, self.row[off]])
        both = np.concatenate([entries, entries[off]])
        found = coo_matrix((both, (row, column)), (self.size, self.size)).tocsc()
        found.sort_indices()
        return found


class GraphPrecision(Precision):
    """Q by its own entries, x those of its lower triangle.

    Args:
        size: q.
        row, column: (e,) its lower triangle, column by column, each diagonal entry among them.
    """

    def __init__(self, size: int, row: np.ndarray, column: np.ndarray) -> None:
        self.size, self.row, self.column = size, row, column

    @property
    def constants(self) -> list[Tensor]:
        return [torch.from_numpy(self.row), torch.from_numpy(self.column)]

    def covariance(self, x: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(self._whole(x))
        if not _traced(x) and int(info):
            raise NumericalError("the precision is not positive definite")
        # Second derivatives of torch.cholesky_inverse in forward mode are wrong.
        eye = torch.eye(self.size, dtype=x.dtype, device=x.device)
        half = torch.linalg.solve_triangular(factor, eye, upper=False)
        return half.mT @ half

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        K = self.covariance(x)
        return -K @ self._whole(dx) @ K

    def _whole(self, x: Tensor) -> Tensor:
        """Q itself, (q, q)."""
        row, column = (torch.from_numpy(at).to(x.device) for at in (self.row, self.column))
        low = x.new_zeros(self.size**2).index_add(0, row * self.size + column, x)
        low = low.reshape(self.size, self.size)
        return low + low.tril(-1).mT

    def entries(self, x: np.ndarray) -> np.ndarray:
        return x

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        return cotangent

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        return np.asarray(self.matrix(dx) @ u)

    def log_det(self, x: np.ndarray) -> None:
        return None

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        options = {"SymmetricMode": True}
        factor = splu(self.matrix(x), "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        return np.asarray(factor.solve(u))


class NeighbourPrecision(Precision):
    r""":math:`Q = (I - B)^\top D^{-1} (I - B)`, each place regressed on some of those before it.

    The numbers x are the diagonal of D (q,) and then B (q, m) row by row.

    Args:
        order: (q,) the places, those that come first at the front.
        neighbours: (q, m) the places that each is regressed on; -1 past the last, where B is zero.

    Attributes:
        neighbours: with the place itself in place of -1.
    """

    def __init__(self, order: np.ndarray, neighbours: np.ndarray) -> None:
        self.size, m = neighbours.shape
        own = np.arange(self.size)[:, None]
        self.order, self._known = order, neighbours >= 0
        self.neighbours = np.where(self._known, neighbours, own)
        self._rank = np.empty_like(order)
        self._rank[order] = np.arange(self.size)
        # All pairs of a place and its neighbours: (a_p, a_q) with a = (1, -B_i).
        self._p, self._q = np.tril_indices(m + 1)
        both = np.concatenate([own, self.neighbours], 1)
        one, other = both[:, self._p], both[:, self._q]
        key = np.minimum(one, other) * self.size + np.maximum(one, other)
        found, place = np.unique(key, return_inverse=True)
        self.column, self.row = found // self.size, found % self.size
        self._place = place.reshape(key.shape).astype(np.int32)

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
        if not _traced(x) and not bool((d > 0).all()):
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
        d, B = self._checked(x)
        a = np.concatenate([np.ones((self.size, 1)), -B], 1)
        products = a[:, self._p] * a[:, self._q] / d[:, None]
        # A place that stands for a missing neighbour has B zero: nothing is added for it.
        return np.bincount(self._place.reshape(-1), products.reshape(-1), len(self.row))

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        d, B = self._parts(x)
        a = np.concatenate([np.ones((self.size, 1)), -B], 1)
        by_a, by_d = np.zeros_like(a), np.zeros(self.size)
        for k, (p, q) in enumerate(zip(self._p, self._q, strict=True)):
            S = cotangent[self._place[:, k]] / d
            by_a[:, p] += S * a[:, q]
            by_a[:, q] += S * a[:, p]
            by_d -= S * a[:, p] * a[:, q] / d
        by_B = np.where(self._known, -by_a[:, 1:], 0.0)
        return np.concatenate([by_d, by_B.reshape(-1)])

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
        start = np.arange(0, B.size + 1, B.shape[1])
        return csr_matrix((B.reshape(-1), self.neighbours.reshape(-1), start), 2 * (self.size,))

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        d, B = self._checked(x)
        return -float(np.log(d).sum()), np.concatenate([-1 / d, np.zeros(B.size)])

    def variance_of_new(self, x: np.ndarray) -> float:
        return 1.0  # regressions are those of a correlation

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        d, B = self._checked(x)
        eye = csr_matrix((np.ones(self.size), (self.order, self.order)), 2 * (self.size,))
        L = (eye - self._lower(B))[self.order][:, self.order].tocsr()
        half = spsolve_triangular(L.T.tocsr(), u[self.order], lower=False, unit_diagonal=True)
        half = spsolve_triangular(L, d[self.order][:, None] * half, lower=True, unit_diagonal=True)
        return np.asarray(half[self._rank])


@dataclass(frozen=True)
class PrecisionCovariance(Covariance):
    r""":math:`G = Q^{-1} \otimes \Sigma` with ``matrix`` the entries of Σ (t, t) and then the numbers
    that Q is made of.

    Columns stand level by level, the t effects of a level together.
    """

    precision: Precision
    effects: int = 1

    @property
    def width(self) -> int:
        return self.effects

    @property
    def is_related(self) -> bool:
        return True

    @property
    def form(self) -> tuple[object, ...]:
        return *super().form, type(self.precision), self.effects

    @property
    def constants(self) -> list[Tensor | None]:
        return list(self.precision.constants)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Σ, and the numbers of Q."""
        t = self.effects
        return self.matrix[: t * t].reshape(t, t), self.matrix[t * t :]

    def with_matrix(self, matrix: Tensor) -> PrecisionCovariance:
        return PrecisionCovariance(matrix, self.precision, self.effects)

    def with_effects(self, sigma: Tensor) -> PrecisionCovariance | None:
        if self.effects > 1:
            return None
        scale, x = self.parts()
        found = torch.cat([(scale * sigma).reshape(-1), x])
        return PrecisionCovariance(found, self.precision, len(sigma))

    def times(self, scale: Tensor) -> PrecisionCovariance:
        sigma, x = self.parts()
        return self.with_matrix(torch.cat([(scale * sigma).reshape(-1), x]))

    def without_kernel(self) -> Covariance:
        return RepeatedCovariance(self.parts()[0], self.precision.size)

    def shown(self) -> Tensor:
        return self.parts()[0]

    def of_new(self) -> Tensor:
        """The covariance of the effects of a level that is not among these, (t, t)."""
        sigma, numbers = self.parts()
        return sigma * self.precision.variance_of_new(_numbers(numbers))

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        sigma, numbers = self.parts()
        q = self.precision.size
        by_level = x.reshape(q, -1)
        if by_level.shape[1] <= _FEW and not (torch.is_grad_enabled() and numbers.requires_grad):
            moved = self._solved(by_level)
        else:
            moved = self.precision.covariance(numbers) @ by_level
        return self._among(sigma.mT if transpose else sigma, moved).reshape(x.shape)

    def _among(self, sigma: Tensor, x: Tensor) -> Tensor:
        """Σ times the effects of each level, x (q, t m)."""
        if self.effects == 1:
            return sigma[0] * x
        return (sigma @ x.reshape(len(x), self.effects, -1)).reshape(x.shape)

    def _solved(self, x: Tensor) -> Tensor:
        numbers = _numbers(self.parts()[1])
        return torch.from_numpy(self.precision.solve(numbers, _numbers(x))).to(x)

    def along(self, derivative: Tensor, x: Tensor) -> Tensor:
        (sigma, numbers), (d_sigma, dx) = self.parts(), self.with_matrix(derivative).parts()
        half = self._solved(x.reshape(self.precision.size, -1))
        change = self.precision.along(_numbers(numbers), _numbers(dx), _numbers(half))
        moved = self._solved(torch.from_numpy(change).to(x))
        return (self._among(d_sigma, half) - self._among(sigma, moved)).reshape(x.shape)

    def whole(self, size: int) -> Tensor:
        sigma, numbers = self.parts()
        K = self.precision.covariance(numbers)
        if self.effects == 1:
            return sigma * K
        return torch.einsum("ij,ab->iajb", K, sigma).reshape(size, size)

    def root(self) -> Covariance:
        return DenseCovariance(square_root(self.whole(self.precision.size * self.effects)))

    def root_condition(self) -> float:
        return condition(self.whole(self.precision.size * self.effects))

    def fold(self, cotangent: Tensor) -> Tensor:
        with torch.enable_grad():
            entries = self.matrix.detach().requires_grad_()
            G = self.with_matrix(entries).whole(len(cotangent))
            return torch.autograd.grad(G, entries, cotangent)[0]

    def inner(self, folded: Tensor) -> Tensor:
        # G is linear in the entries of its one side.
        t = self.effects
        return folded[: t * t] @ self.matrix[: t * t]


def _traced(x: Tensor) -> bool:
    """Whether its numbers cannot be looked at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
