r"""Sparse precisions made of others: Kronecker products, and direct sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import DenseCovariance, KroneckerCovariance
from openreml_nn.terms.direct_sum import DirectSumCovariance
from openreml_nn.terms.precision import Precision, PrecisionCovariance
from openreml_nn.terms.scaled import ScaledPrecision
from openreml_nn.terms.series import StepPrecision

__all__ = [
    "DensePrecision",
    "DirectSumPrecision",
    "KroneckerPrecision",
    "kronecker_of",
    "one_effect",
    "precise",
    "rescaled",
]

_Map = Callable[[np.ndarray], np.ndarray]


class DensePrecision(Precision):
    r"""The inverse of a small covariance Σ (t, t), the entries of which are the numbers x."""

    def __init__(self, size: int) -> None:
        self.size = size
        column, row = np.triu_indices(size)
        self.row, self.column = row.astype(np.int64), column.astype(np.int64)

    @property
    def constants(self) -> list[Tensor]:
        return []

    def _sigma(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.size, self.size)

    def _inverse(self, x: np.ndarray) -> np.ndarray:
        try:
            half = np.linalg.inv(np.linalg.cholesky(self._sigma(x)))
        except np.linalg.LinAlgError:
            raise NumericalError("the covariance of effects is not positive definite") from None
        return np.asarray(half.T @ half)

    def covariance(self, x: Tensor) -> Tensor:
        return x.reshape(self.size, self.size)

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        return dx.reshape(self.size, self.size)

    def entries(self, x: np.ndarray) -> np.ndarray:
        return self._inverse(x)[self.row, self.column]

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        Q, C = self._inverse(x), np.zeros((self.size, self.size))
        C[self.row, self.column] = cotangent
        return -(Q @ (C + C.T) @ Q).reshape(-1) / 2

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        Q = self._inverse(x)
        return -Q @ (self._sigma(dx) @ (Q @ u))

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        Q = self._inverse(x)
        return float(np.linalg.slogdet(Q)[1]), -Q.reshape(-1)

    def variances(self, x: np.ndarray) -> np.ndarray:
        return self._sigma(x).diagonal().copy()

    def scales(self, x: Tensor) -> Tensor:
        return self.covariance(x).diagonal()

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._sigma(x) @ u


class KroneckerPrecision(Precision):
    r""":math:`Q = A \otimes B` of two precisions; x are the numbers of A and then those of B.

    Args:
        one, other: A and B.
        first: how many numbers A has.
    """

    def __init__(self, one: Precision, other: Precision, first: int) -> None:
        self.one, self.other, self.first = one, other, first
        self.size = one.size * other.size
        A, B = _sides(one), _sides(other)
        i, j = (x.reshape(-1) for x in np.indices((len(A[0]), len(B[0]))))
        row, column = (a[i] * other.size + b[j] for a, b in zip(A[:2], B[:2], strict=True))
        low = row >= column
        order = np.lexsort((row[low], column[low]))
        self.row, self.column = row[low][order], column[low][order]
        self._of_one, self._of_other = A[2][i][low][order], B[2][j][low][order]

    @property
    def constants(self) -> list[Tensor]:
        return [*self.one.constants, *self.other.constants]

    def covariance(self, x: Tensor) -> Tensor:
        return torch.kron(*(side.covariance(own) for side, own in self._parted(x)))

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        (A, a), (B, b) = self._parted(x)
        da, db = dx[: self.first], dx[self.first :]
        return torch.kron(A.covariance_along(a, da), B.covariance(b)) + torch.kron(
            A.covariance(a), B.covariance_along(b, db)
        )

    def _parted(self, x: Tensor) -> list[tuple[Precision, Tensor]]:
        return [(self.one, x[: self.first]), (self.other, x[self.first :])]

    def _split(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x[: self.first], x[self.first :]

    def entries(self, x: np.ndarray) -> np.ndarray:
        a, b = self._split(x)
        return self.one.entries(a)[self._of_one] * self.other.entries(b)[self._of_other]

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        a, b = self._split(x)
        A, B = self.one.entries(a), self.other.entries(b)
        by_one = np.bincount(self._of_one, cotangent * B[self._of_other], len(A))
        by_other = np.bincount(self._of_other, cotangent * A[self._of_one], len(B))
        return np.concatenate([self.one.pull(a, by_one), self.other.pull(b, by_other)])

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        (a, b), (da, db) = self._split(x), self._split(dx)
        found = self._apply(lambda v: self.one.along(a, da, v), lambda v: self.other.times(b, v), u)
        return found + self._apply(
            lambda v: self.one.times(a, v), lambda v: self.other.along(b, db, v), u
        )

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray] | None:
        a, b = self._split(x)
        A, B = self.one.log_det(a), self.other.log_det(b)
        if A is None or B is None:
            return None
        p, q = self.one.size, self.other.size
        return q * A[0] + p * B[0], np.concatenate([q * A[1], p * B[1]])

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        a, b = self._split(x)
        return self._apply(lambda v: self.one.solve(a, v), lambda v: self.other.solve(b, v), u)

    def variances(self, x: np.ndarray) -> np.ndarray:
        a, b = self._split(x)
        return np.kron(self.one.variances(a), self.other.variances(b))

    def scales(self, x: Tensor) -> Tensor | None:
        own = [part.scales(numbers) for part, numbers in self._parted(x)]
        means = [s.mean() for s in own if s is not None]
        return torch.stack(means).prod().reshape(1) if means else None

    def _apply(self, of_one: _Map, of_other: _Map, u: np.ndarray) -> np.ndarray:
        """A ⊗ B times u (q, m), by what either does."""
        p, q = self.one.size, self.other.size
        half = of_one(u.reshape(p, -1)).reshape(p, q, -1).transpose(1, 0, 2)
        whole = of_other(np.ascontiguousarray(half).reshape(q, -1))
        return whole.reshape(q, p, -1).transpose(1, 0, 2).reshape(u.shape)


class DirectSumPrecision(Precision):
    r""":math:`Q = \mathrm{diag}(Q_1 / v_1, \dots, Q_m / v_m)`; x are the variance v of each part and
    its own numbers, part by part.

    Args:
        parts: Q of each.
        counts: how many numbers each has beside its variance.
    """

    def __init__(self, parts: Sequence[Precision], counts: Sequence[int]) -> None:
        self.parts, self.counts = tuple(parts), tuple(counts)
        sizes = [part.size for part in parts]
        self.size, start = sum(sizes), np.cumsum([0, *sizes[:-1]])
        self.row, self.column = (
            np.concatenate([at + lower for at, lower in zip(start, every, strict=True)])
            for every in ([part.row for part in parts], [part.column for part in parts])
        )
        self._places = np.cumsum(sizes)[:-1]
        self._entries = np.cumsum([len(part.row) for part in parts])[:-1]
        self._numbers = np.cumsum([1 + count for count in counts])[:-1]

    @property
    def constants(self) -> list[Tensor]:
        return [constant for part in self.parts for constant in part.constants]

    def covariance(self, x: Tensor) -> Tensor:
        pieces = zip(self.parts, self._pieces(x), strict=True)
        return torch.block_diag(*(own[0] * part.covariance(own[1:]) for part, own in pieces))

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        pieces = zip(self.parts, self._pieces(x), self._pieces(dx), strict=True)
        return torch.block_diag(
            *(
                d[0] * part.covariance(own[1:]) + own[0] * part.covariance_along(own[1:], d[1:])
                for part, own, d in pieces
            )
        )

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split([1 + count for count in self.counts])

    def _of(self, x: np.ndarray) -> list[tuple[Precision, float, np.ndarray]]:
        """The parts, each with its variance and its numbers."""
        pieces = zip(self.parts, np.split(x, self._numbers), strict=True)
        found = [(part, float(own[0]), own[1:]) for part, own in pieces]
        if not all(v > 0 for _, v, _ in found):
            raise NumericalError("a block of a direct sum of covariances has no variance")
        return found

    def entries(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([part.entries(own) / v for part, v, own in self._of(x)])

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        found = []
        for (part, v, own), c in zip(self._of(x), np.split(cotangent, self._entries), strict=True):
            by_variance = -(c @ part.entries(own)) / v**2
            found += [np.array([by_variance]), part.pull(own, c / v)]
        return np.concatenate(found)

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        moved = zip(
            self._of(x), np.split(dx, self._numbers), np.split(u, self._places), strict=True
        )
        return np.concatenate(
            [
                part.along(own, d[1:], w) / v - part.times(own, w) * (d[0] / v**2)
                for (part, v, own), d, w in moved
            ]
        )

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray] | None:
        total, slopes = 0.0, []
        for part, v, own in self._of(x):
            found = part.log_det(own)
            if found is None:
                return None
            total += found[0] - part.size * float(np.log(v))
            slopes += [np.array([-part.size / v]), found[1]]
        return total, np.concatenate(slopes)

    def variances(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([v * part.variances(own) for part, v, own in self._of(x)])

    def scales(self, x: Tensor) -> Tensor:
        total = x.new_zeros(1)
        for part, own in zip(self.parts, self._pieces(x), strict=True):
            further = part.scales(own[1:])
            total = total + part.size * own[:1] * (1 if further is None else further.mean())
        return total / self.size

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        pairs = zip(self._of(x), np.split(u, self._places), strict=True)
        return np.concatenate([v * part.solve(own, w) for (part, v, own), w in pairs])


# ---------------------------------------------------------------------- covariances of them


def precise(g: Covariance) -> PrecisionCovariance | None:
    """A covariance as that of a sparse precision; None where none is known."""
    if isinstance(g, PrecisionCovariance):
        return g
    if isinstance(g, DirectSumCovariance):
        return _direct_sum([precise(part) for part in g.parts()])
    if not g.is_chained:
        return None
    if isinstance(g, DenseCovariance):
        return _of_chain(g.matrix)
    assert isinstance(g, KroneckerCovariance)
    A, B = g.parts()
    return kronecker_of(DenseCovariance(A, chained=True), DenseCovariance(B, chained=True))


def one_effect(g: PrecisionCovariance) -> PrecisionCovariance:
    """The same covariance with one effect a level: Σ is within the precision."""
    if g.effects == 1:
        return g
    sigma, x = g.parts()
    precision = KroneckerPrecision(g.precision, DensePrecision(g.effects), len(x))
    return PrecisionCovariance(torch.cat([torch.ones_like(x[:1]), x, sigma.reshape(-1)]), precision)


def kronecker_of(a: Covariance, b: Covariance) -> PrecisionCovariance | None:
    r""":math:`A \otimes B` of covariances that are known by sparse precisions; None for others."""
    one, other = precise(a), precise(b)
    if one is None or other is None:
        return None
    one, other = one_effect(one), one_effect(other)
    precision = KroneckerPrecision(one.precision, other.precision, len(one.matrix) - 1)
    x = torch.cat([one.matrix[:1] * other.matrix[:1], one.matrix[1:], other.matrix[1:]])
    return PrecisionCovariance(x, precision)


def rescaled(g: Covariance, scales: Tensor) -> PrecisionCovariance | None:
    r""":math:`S G S` with these scales (q,) on the diagonal of S; None where G is not known by a sparse
    precision."""
    found = precise(g)
    if found is None:
        return None
    one = one_effect(found)
    x = torch.cat([one.matrix[:1], scales.to(one.matrix), one.matrix[1:]])
    return PrecisionCovariance(x, ScaledPrecision(one.precision))


def _direct_sum(parts: Sequence[PrecisionCovariance | None]) -> PrecisionCovariance | None:
    known = [one_effect(part) for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    precision = DirectSumPrecision(
        [part.precision for part in known], [len(part.matrix) - 1 for part in known]
    )
    x = torch.cat([part.matrix for part in known])
    return PrecisionCovariance(torch.cat([torch.ones_like(x[:1]), x]), precision)


def _of_chain(A: Tensor) -> PrecisionCovariance:
    """A covariance whose inverse is tridiagonal, by its variances and the correlations of neighbours."""
    scales = A.diagonal().sqrt()
    steps = A.diagonal(1) / (scales[:-1] * scales[1:])
    x = torch.cat([torch.ones_like(scales[:1]), scales, steps])
    return PrecisionCovariance(x, ScaledPrecision(StepPrecision(len(A))))


def _sides(precision: Precision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns of both triangles, and which entry of the lower one stands there."""
    at = np.arange(len(precision.row))
    off = precision.row > precision.column
    row = np.concatenate([precision.row, precision.column[off]])
    column = np.concatenate([precision.column, precision.row[off]])
    return row, column, np.concatenate([at, at[off]])
