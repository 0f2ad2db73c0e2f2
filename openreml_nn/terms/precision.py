r"""Covariances whose inverse is sparse and moves with parameters: places beside their neighbours.

The inverse of :math:`G = Q^{-1} \otimes \Sigma` is known by the pattern of Q and by the numbers that
it is made of, such as its entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import coo_matrix, csc_matrix
from scipy.sparse.linalg import splu
from torch import Tensor

from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.base import Covariance, condition, square_root
from openreml_nn.terms.covariance import DenseCovariance, RepeatedCovariance

__all__ = ["GraphPrecision", "Precision", "PrecisionCovariance"]

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

    def pull_square(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        r"""The derivative by x of :math:`\tfrac12 \mathrm{tr}\, u^\top Q u` for u (q, m)."""
        total = np.zeros(len(self.row))
        for one in u.T:
            total += one[self.row] * one[self.column]
        return self.pull(x, total * np.where(self.row > self.column, 1.0, 0.5))

    def times(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        """:math:`Q u` for u (q, m)."""
        return np.asarray(self.matrix(self.entries(x)) @ u)

    def inner(self, x: np.ndarray, u: np.ndarray, effects: int) -> np.ndarray:
        r""":math:`u^\top (Q \otimes I) u` (m, m) for u (q t, m), of t effects of a level."""
        by_level = u.reshape(self.size, -1)
        return np.asarray(u.T @ self.times(x, by_level).reshape(u.shape))

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        r""":math:`\dot Q u` for u (q, m), with :math:`\dot Q` the derivative along dx."""
        raise NotImplementedError

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray] | None:
        r""":math:`\log|Q|` and its derivative by x; None where it takes a factor of Q."""
        raise NotImplementedError

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        r""":math:`Q^{-1} u` for u (q, m)."""
        raise NotImplementedError

    def variances(self, x: np.ndarray) -> np.ndarray:
        """The diagonal of :math:`Q^{-1}`, (q,): variances of the levels over Σ."""
        found = np.empty(self.size)
        for some in np.array_split(np.arange(self.size), -(-self.size // 512)):
            unit = np.zeros((self.size, len(some)))
            unit[some, np.arange(len(some))] = 1
            found[some] = self.solve(x, unit)[some].diagonal()
        return found

    def scales(self, x: Tensor) -> Tensor | None:
        """The variances of the levels over Σ that x tells, (q,), or their mean, (1,), where levels are of
        several parts; None where Σ is that of a level."""
        return None

    def matrix(self, entries: np.ndarray) -> csc_matrix:
        """Both triangles of Q from its lower one."""
        at, row, start = self._both
        found = csc_matrix((entries[at], row, start), (self.size, self.size))
        found.has_sorted_indices = True
        return found

    @cached_property
    def _both(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For both triangles, column by column, which entry stands there, its row, and where the
        columns begin."""
        at = np.arange(len(self.row))
        off = self.row > self.column
        row = np.concatenate([self.row, self.column[off]])
        column = np.concatenate([self.column, self.row[off]])
        both = np.concatenate([at, at[off]])
        found = coo_matrix((both, (row, column)), (self.size, self.size)).tocsc()
        found.sort_indices()
        return found.data, found.indices, found.indptr


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

    def shown(self, effects: int = 1) -> Tensor:
        sigma, numbers = self.parts()
        own = self.precision.scales(numbers)
        if own is None:
            return sigma
        return sigma[0] * own if len(sigma) == 1 < len(own) else sigma * own.mean()

    def of_new(self) -> Tensor:
        """The covariance of the effects of a level that is not among these, (t, t): the mean of theirs."""
        sigma, numbers = self.parts()
        return sigma * float(self.precision.variances(_numbers(numbers)).mean())

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
    """Whether the numbers of a tensor cannot be looked at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
