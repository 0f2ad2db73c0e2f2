r"""What the sparse equations take from the rows: products of the designs and data with :math:`R^{-1}`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.residual import BlockResidual, Residual
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.support.compilation import compiled
from openreml_nn.support.errors import NotPositiveDefiniteError

__all__ = ["Rows", "RowsAt", "entries_within"]


@dataclass(frozen=True)
class RowsAt:
    r"""Products at one R, with f the columns of Q and then y.

    Attributes:
        matrices: of the residual's terms, in float64.
        blocks: of :math:`Z^\top R^{-1} Z`, in the order of the equations' crosses.
        Zf: :math:`Z^\top R^{-1} f`, (q, p + 1).
        ff: :math:`f^\top R^{-1} f`, (p + 1, p + 1).
        log_det: :math:`\log|R|`.
        condition: how many times rounding is magnified in a factor of R.
        precision: :math:`R^{-1}`, (n, n).
        scale: s where R is s times known weights; None otherwise.
        Z: design of the effects, (n, q).
        f: (n, p + 1).
    """

    matrices: list[Tensor]
    blocks: list[np.ndarray]
    Zf: np.ndarray
    ff: np.ndarray
    log_det: float
    condition: float
    precision: csr_matrix
    scale: float | None
    Z: csr_matrix
    f: np.ndarray

    def rest(self, effects: np.ndarray) -> np.ndarray:
        r""":math:`R^{-1} (f - Z b)` for effects b (q, p + 1)."""
        return self.precision @ (self.f - self.Z @ effects)

    def scaled(self, n: int) -> RowsAt:
        """The products at the sum of the residual's variances, from those of n rows at 1.

        Raises:
            NotPositiveDefiniteError: if it is not above 0.
        """
        s = float(sum(float(matrix) for matrix in self.matrices))
        if not s > 0:
            raise NotPositiveDefiniteError(f"V is not positive definite: residual variance {s:.6g}")
        return replace(
            self,
            blocks=[data / s for data in self.blocks],
            Zf=self.Zf / s,
            ff=self.ff / s,
            log_det=self.log_det + n * float(np.log(s)),
            precision=self.precision / s,
            scale=s,
        )


class Rows:
    """The rows of some data.

    Args:
        equations: of the random terms.
        residual: R.
        fixed: response and model matrix.

    Attributes:
        terms: positions of the residual's terms.
    """

    def __init__(self, equations: Equations, residual: Residual, fixed: FixedPart) -> None:
        self._equations, self._residual = equations, residual
        self.terms = residual.at
        designs = [part.design for part in equations.parts]
        n = len(fixed.y)
        self._Z = hstack(designs, format="csr") if designs else csr_matrix((n, 0))
        self._member = self._members(residual, n)
        self._constant: tuple[list[np.ndarray], csr_matrix, float] | None = None
        if not residual.moves:
            one = torch.ones(1, 1, dtype=torch.float64)
            precision, log_det, _ = self._precision([one])
            self._constant = self._equations.products(precision), precision, log_det
        self._take(fixed)

    def with_fixed(self, fixed: FixedPart) -> Rows:
        """These rows with other data."""
        found = copy(self)
        found._take(fixed)
        return found

    def of_rows(self, x: np.ndarray) -> np.ndarray:
        """Numbers for the rows, (n, m), from those for what :class:`RowsAt` holds."""
        return x

    def _take(self, fixed: FixedPart) -> None:
        f = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        self.f = f.detach().cpu().double().numpy()
        self._products: tuple[np.ndarray, np.ndarray] | None = None
        if self._constant is not None:
            self._products = self.with_data(self._constant[1])

    @staticmethod
    def _members(residual: Residual, n: int) -> np.ndarray:
        """Rows of each row's group, (n, m), -1 past the last; each group's in one order."""
        if not isinstance(residual, BlockResidual):
            return np.arange(n)[:, None]
        group = residual.group.cpu().numpy()
        order = np.argsort(group, kind="stable")
        size = np.bincount(group)
        first = np.cumsum(size) - size
        found = np.full((len(size), int(size.max())), -1)
        found[group[order], np.arange(n) - first[group[order]]] = order
        return found[group]

    @classmethod
    def pattern(cls, residual: Residual) -> csr_matrix | None:
        """Pattern of the precision of the rows; None where it is diagonal."""
        if not isinstance(residual, BlockResidual) or residual.size == 1:
            return None
        member = cls._members(residual, residual.n)
        return _by_members(member, np.ones(member.shape))

    def _precision(self, matrices: Sequence[Tensor]) -> tuple[csr_matrix, float, float]:
        r""":math:`R^{-1}`, :math:`\log|R|` and the condition, at the matrices of the residual."""
        white = self._residual.white(matrices)
        inverse = white.back(white.rows(torch.from_numpy(self._probes)))
        rows = inverse.detach().numpy()
        return _by_members(self._member, rows), float(white.log_det.detach()), white.condition

    @property
    def _probes(self) -> np.ndarray:
        """For each place within a group the rows that stand there, (n, m)."""
        member = self._member
        n, m = member.shape
        found = np.zeros((n, m))
        for j in range(m):
            found[member[member[:, j] >= 0, j], j] = 1
        return found

    def with_data(self, precision: csr_matrix) -> tuple[np.ndarray, np.ndarray]:
        r""":math:`Z^\top R^{-1} f` and :math:`f^\top R^{-1} f`."""
        moved = precision @ self.f
        return self.to_columns(self._Z.T @ moved), self.f.T @ moved

    def to_columns(self, x: np.ndarray) -> np.ndarray:
        """From sums by effects (q, m) to those by columns of the equations."""
        parts = self._equations.split(x)
        found = [part.from_effects(own) for part, own in zip(self._equations.parts, parts)]
        return np.concatenate(found) if found else x

    def at(self, matrices: Sequence[Tensor]) -> RowsAt:
        """Products at the matrices of the residual's terms.

        Raises:
            NotPositiveDefiniteError: if R is not positive definite.
        """
        matrices = [matrix.detach().cpu().double() for matrix in matrices]
        if self._constant is None:
            precision, log_det, condition = self._precision(matrices)
            Zf, ff = self.with_data(precision)
            blocks = self._equations.products(precision)
            return RowsAt(
                matrices, blocks, Zf, ff, log_det, condition, precision, None, self._Z, self.f
            )
        blocks, precision, log_det = self._constant
        assert self._products is not None
        Zf, ff = self._products
        at = RowsAt(matrices, blocks, Zf, ff, log_det, 1.0, precision, 1.0, self._Z, self.f)
        return at.scaled(len(self.f))

    # ------------------------------------------------------------------ R that moves

    def scores(
        self, at: RowsAt, inner: csr_matrix, p_y: np.ndarray, lost: np.ndarray
    ) -> list[Tensor]:
        r"""Derivatives by the residual's matrices.

        Args:
            at: the products.
            inner: variances and covariances of effects that meet, given y, (q, q).
            p_y: :math:`P y`, (n,).
            lost: a root (n, m) of :math:`V^{-1} - P`.
        """
        member = self._member
        known = member >= 0
        Z, n = self._Z, len(p_y)
        own = entries_within(
            Z.indptr, Z.indices, Z.data, inner.indptr, inner.indices, inner.data, member
        )
        precision = np.zeros(member.shape)
        row = np.repeat(np.arange(n), np.diff(at.precision.indptr))
        precision[row, self._position(at.precision.indices)] = at.precision.data
        V = precision - self._product(precision, self._product(own, precision))
        S = p_y[:, None] * np.where(known, p_y[member], 0.0) - V
        for column in lost.T:
            S += column[:, None] * np.where(known, column[member], 0.0)
        weight = torch.from_numpy(S / 2)
        with torch.enable_grad():
            forms = [matrix.requires_grad_() for matrix in at.matrices]
            moved = [
                self._residual.along([x[None] for x in forms], probe)[:, 0]
                for probe in torch.from_numpy(self._probes).mT
            ]
            value = (torch.stack(moved, 1) * weight).sum()
            return list(torch.autograd.grad(value, forms))

    def _position(self, column: np.ndarray) -> np.ndarray:
        """Place of a row within its group."""
        place = np.zeros(len(self._member), np.int64)
        for j in range(self._member.shape[1]):
            at = self._member[:, j]
            place[at[at >= 0]] = j
        return place[column]

    def _product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of block diagonal matrices, each (n, m) by the members of the groups."""
        found = np.zeros_like(a)
        for j in range(a.shape[1]):
            at = self._member[:, j]
            found += np.where(at >= 0, a[:, j], 0.0)[:, None] * b[at]
        return found

    def working(
        self, at: RowsAt, c: np.ndarray, derivatives: Sequence[Tensor], p_y: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r"""Products of working variates with Z, f and themselves, by :math:`R^{-1}`.

        Args:
            at: the products.
            c: effects of the columns of the equations, (q, m).
            derivatives: of the residual's matrices, (m, *shape) each.
            p_y: :math:`P y`, (n,).
        """
        parts = zip(self._equations.parts, self._equations.split(c), strict=True)
        effects = [part.to_effects(own) for part, own in parts]
        moved = self._Z @ np.concatenate(effects) if effects else 0.0
        own = [d.detach().cpu().double() for d in derivatives]
        w = moved + self._residual.along(own, torch.from_numpy(p_y)).numpy()
        Rw = at.precision @ w
        return self.to_columns(self._Z.T @ Rw), self.f.T @ Rw, w.T @ Rw


def _by_members(member: np.ndarray, values: np.ndarray) -> csr_matrix:
    n = len(member)
    known = member >= 0
    start = np.concatenate([[0], np.cumsum(known.sum(1))])
    return csr_matrix((values[known], member[known], start), (n, n))


@compiled
def entries_within(start, index, value, start_c, index_c, value_c, member):
    """Entries of Z C Z' of rows of one group, (n, m); C is sorted by columns."""
    n, m = member.shape
    found = np.zeros((n, m))
    for i in range(n):
        for c in range(m):
            j = member[i, c]
            if j < 0:
                continue
            total = 0.0
            for a in range(start[i], start[i + 1]):
                row = index[a]
                lo, hi = start_c[row], start_c[row + 1]
                for b in range(start[j], start[j + 1]):
                    p = lo + np.searchsorted(index_c[lo:hi], index[b])
                    if p < hi and index_c[p] == index[b]:
                        total += value[a] * value_c[p] * value[b]
            found[i, c] = total
    return found
