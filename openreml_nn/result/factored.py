r"""The joint error covariance of coefficients and BLUPs by a sparse factor, where it is too large to
be held.

With effects :math:`b_t = \Lambda_t u_t`, the precision :math:`\Omega_t` of :math:`u_t` the identity or
a sparse one, and :math:`W = R^{-1/2} Z \Lambda`, the equations of u and of the coefficients of Q are

.. math:: \begin{pmatrix} A & B \\ B^\top & D \end{pmatrix},\qquad
    A = W^\top W + \Omega,\; B = W^\top R^{-1/2} Q,\; D = Q^\top R^{-1} Q.

With :math:`S = A^{-1} B` and :math:`C = (D - B^\top S)^{-1}` the error of :math:`w^\top u + x^\top
\gamma` has the variance :math:`w^\top A^{-1} w + (x - S^\top w)^\top C (x - S^\top w)`. Its first part
comes from entries of the selected inverse where all that w has meet in the factor, and else from a
solve.

Reference:
    Takahashi, Fagan and Chen (1973); Henderson, Biometrics 31 (1975) 423.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from scipy.sparse import block_diag, coo_matrix, csc_matrix, eye, kron
from torch import Tensor

from openreml_nn.likelihood.system.sparse.factor import Factor
from openreml_nn.likelihood.system.sparse.symbolic import Symbolic
from openreml_nn.result.equations import Equations
from openreml_nn.result.places import PlacedDesign
from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import RepeatedCovariance, ScaledCovariance
from openreml_nn.terms.design import CodedDesign, IndexedDesign
from openreml_nn.terms.precision import PrecisionCovariance

__all__ = ["FactoredErrors"]


class FactoredErrors:
    """The factor of some equations, which never change; see above for the letters.

    Args:
        priors: of each random term.
        equations: of all rows.
        symbolic, values: the pattern of A, and its entries there.

    Attributes:
        log_det: :math:`\\log|V| - \\log|R|`.
        variance_of_coefficients: C (r, r).

    Raises:
        NotPositiveDefiniteError: if A or D - B'S is not positive definite.
    """

    def __init__(
        self,
        priors: Sequence[_Prior],
        equations: Equations,
        symbolic: Symbolic,
        values: np.ndarray,
    ) -> None:
        self._factor = Factor(symbolic, values)
        self._starts = _starts(equations)
        self._sizes = list(equations.sizes)
        self._root = block_diag([prior.root for prior in priors], format="csr")
        self._basis = _numbers(equations.fixed.basis)
        self.log_det = self._factor.log_det - sum(prior.log_det for prior in priors)
        r = self._basis.shape[1]
        B = self.right(equations)[:, :r]
        self._S = self._factor.solve(B)
        left = _numbers(equations.products.ff)[:r, :r] - B.T @ self._S
        try:
            half = np.linalg.inv(np.linalg.cholesky((left + left.T) / 2))
        except np.linalg.LinAlgError:
            raise NotPositiveDefiniteError("X' V^-1 X is not positive definite") from None
        self.variance_of_coefficients = half.T @ half

    @classmethod
    def of(
        cls, covariances: Sequence[Covariance], equations: Equations, most_entries: int
    ) -> FactoredErrors | None:
        """The factor; None where a covariance is of another kind, or the factor would have more than
        ``most_entries`` entries."""
        priors = [_Prior.of(g, *size) for g, size in zip(covariances, equations.sizes, strict=True)]
        known = [prior for prior in priors if prior is not None]
        if len(known) < len(priors) or equations.statistics() is None:
            return None
        row, column, value = _entries(equations, known)
        N = int(_starts(equations)[-1])
        both = np.concatenate([row, column]), np.concatenate([column, row])
        pattern = coo_matrix((np.ones(len(both[0]), np.int8), both), (N, N)).tocsc()
        symbolic = Symbolic.of(pattern)
        if symbolic.entries > most_entries:
            return None
        place = symbolic.where(row, column)
        values = np.bincount(place, value, symbolic.entries)
        return cls(known, equations, symbolic, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def right(self, equations: Equations) -> np.ndarray:
        r""":math:`\Lambda^\top Z^\top R^{-1}` times the columns of the fixed part, (N, columns)."""
        zf = [_numbers(part) for part in equations.products.zf]
        none = np.zeros((0, len(equations.products.ff)))
        return np.asarray(self._root.T @ np.concatenate(zf)) if zf else none

    def variance(
        self, designs: Sequence[CodedDesign | PlacedDesign], X: Tensor, most_numbers: int
    ) -> Tensor:
        """See :meth:`JointErrors.variance`.

        Args:
            designs, X: as there.
            most_numbers: so many are held at a time.
        """
        if torch.is_grad_enabled():
            indexed = [design for design in designs if isinstance(design, IndexedDesign)]
            leaves = [X, *(design.values for design in indexed)]
            recorded = any(x is not None and x.requires_grad for x in leaves)
            if recorded and len(indexed) == len(designs):
                return self._recorded(indexed, X)
        w = csc_matrix(self._root.T @ self._columns(designs, len(X)))
        d = _numbers(X) @ self._basis - np.asarray(w.T @ self._S)
        found = self._quadratic(w, most_numbers)
        found += np.einsum("ni,ij,nj->n", d, self.variance_of_coefficients, d)
        return torch.from_numpy(found).to(X.device)

    def _recorded(self, designs: Sequence[IndexedDesign], X: Tensor) -> Tensor:
        """Variances of the rows as a differentiable function of X and of the values of the designs."""
        z = [X.new_ones(len(X), 1) if d.values is None else d.values.to(X) for d in designs]
        among, T = (torch.from_numpy(x).to(X) for x in self._of_levels([d.codes for d in designs]))
        values, C = torch.cat(z, 1), torch.from_numpy(self.variance_of_coefficients).to(X)
        d = X @ torch.from_numpy(self._basis).to(X) - torch.einsum("nk,nkr->nr", values, T)
        return torch.einsum("nk,nkl,nl->n", values, among, values) + ((d @ C) * d).sum(1)

    def _of_levels(self, codes: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        r""":math:`\Lambda A^{-1} \Lambda^\top` (n, K, K) and :math:`\Lambda S` (n, K, r) of the K effects that
        each row meets."""
        # Rows of the same levels have the same numbers.
        whole = _effects_of(codes, self._starts, self._sizes)
        at, of_row = np.unique(whole, axis=0, return_inverse=True)
        K = at.shape[1]
        row, column = np.broadcast_arrays(at[:, :, None], at[:, None, :])
        place = self._factor.symbolic.where(row.reshape(-1), column.reshape(-1)).reshape(row.shape)
        inverse = self._factor.inverse[place]
        for i in np.flatnonzero((place < 0).any(axis=(1, 2))):
            unit = np.zeros((self._root.shape[0], K))
            unit[at[i], np.arange(K)] = 1
            half = self._factor.half(unit)
            inverse[i] = half.T @ half
        first = _effects_of([torch.tensor([0])] * len(codes), self._starts, self._sizes).reshape(-1)
        L = self._root[first][:, first].toarray()  # the same for each level
        row = of_row.reshape(-1)
        return (L @ inverse @ L.T)[row], (L @ self._S[at])[row]

    def _columns(self, designs: Sequence[CodedDesign | PlacedDesign], n: int) -> csc_matrix:
        """The rows of the designs as columns, (N, n)."""
        parts = [coo_matrix((int(self._starts[-1]), n))]
        for start, design in zip(self._starts[:-1], designs, strict=False):
            like = torch.zeros(0, dtype=torch.float64)
            own = design.levels if isinstance(design, PlacedDesign) else design
            where = own.codes.device
            groups = [(torch.arange(n).numpy(), *own.entries(like.to(where)))]
            if isinstance(design, PlacedDesign):
                rows = design.kriging.rows.numpy(force=True)
                groups.append((rows, *design.entries(like.to(where))))
            for rows, columns, entries in groups:
                column = np.repeat(rows, columns.shape[1])
                place = start + columns.numpy(force=True).reshape(-1)
                value = _numbers(entries).reshape(-1)
                parts.append(coo_matrix((value, (place, column)), parts[0].shape))
        return csc_matrix(sum(part.tocsc() for part in parts))

    def _quadratic(self, w: csc_matrix, most_numbers: int) -> np.ndarray:
        r""":math:`w^\top A^{-1} w` of each column, (n,)."""
        w.eliminate_zeros()
        lengths, found = np.diff(w.indptr).astype(np.int64), np.zeros(w.shape[1])
        pairs = np.concatenate([[0], np.cumsum(lengths**2)])
        start = 0
        while start < len(found):
            end = max(
                start + 1, int(np.searchsorted(pairs, pairs[start] + most_numbers, "right")) - 1
            )
            self._selected(w, lengths, slice(start, end), found)
            start = end
        missing = np.isnan(found).nonzero()[0]
        step = max(1, most_numbers // max(w.shape[0], 1))
        for i in range(0, len(missing), step):
            at = missing[i : i + step]
            half = self._factor.half(w[:, at].toarray())
            found[at] = (half * half).sum(0)
        return found

    def _selected(self, w: csc_matrix, lengths: np.ndarray, at: slice, found: np.ndarray) -> None:
        """Variances by the selected inverse; NaN where two entries do not meet in the factor."""
        own = lengths[at]
        column = np.repeat(np.arange(at.start, at.stop), own**2)
        if not len(column):
            return
        # Pair number p of a column of m entries is of its entries p // m and p % m.
        p = np.arange(len(column)) - np.repeat(np.cumsum(own**2) - own**2, own**2)
        one, other = (w.indptr[column] + x for x in np.divmod(p, lengths[column]))
        place = self._factor.symbolic.where(
            w.indices[one].astype(np.int64), w.indices[other].astype(np.int64)
        )
        entries = np.where(place < 0, np.nan, self._factor.inverse[place])
        weights = w.data[one] * w.data[other] * entries
        found[at] = np.bincount(column - at.start, weights, at.stop - at.start)

    def solution(self, equations: Equations) -> tuple[list[Tensor], list[Tensor], Tensor, float]:
        r"""What the equations with y say.

        Returns:
            BLUPs of each term (levels, k), their error variances (levels, k, k), coefficients of Q
            (r,), and :math:`y^\top P y`.
        """
        like, r = equations.products.ff, self._basis.shape[1]
        b, ff, C = self.right(equations)[:, -1:], _numbers(like), self.variance_of_coefficients
        alone = self._factor.solve(b)[:, 0]
        rest = ff[:r, -1] - self._S.T @ b[:, 0]
        gamma = C @ rest
        square = float(ff[-1, -1] - b[:, 0] @ alone - rest @ gamma)
        effects = self._root @ (alone - self._S @ gamma)
        moved = np.asarray(self._root @ self._S)
        values, variances = [], []
        for start, (levels, k) in zip(self._starts[:-1], self._sizes, strict=True):
            at = start + np.arange(levels * k).reshape(levels, k)
            values.append(torch.from_numpy(effects[at]).to(like))
            row, column = np.broadcast_arrays(at[:, :, None], at[:, None, :])
            place = self._factor.symbolic.where(row.reshape(-1), column.reshape(-1))
            inverse = self._factor.inverse[place].reshape(levels, k, k)
            Lambda = self._root[at[0][:, None], at[0]].toarray() if levels else np.zeros((k, k))
            T = moved[at]  # (levels, k, r)
            spread = Lambda @ inverse @ Lambda.T + T @ C @ T.transpose(0, 2, 1)
            variances.append(torch.from_numpy(spread).to(like))
        return values, variances, torch.from_numpy(gamma).to(like), square


class _Prior:
    r"""The prior of a term: Λ (levels · k, levels · k), the same for each level, the lower triangle of
    the precision Ω of u, and its log-determinant."""

    def __init__(self, root: Tensor, levels: int, precision: csc_matrix | None) -> None:
        k = len(root)
        self.root = kron(eye(levels), _numbers(root), format="csr")
        self.log_det = 0.0
        if precision is None:
            self.precision = eye(levels * k, format="coo")
            return
        self.log_det = k * _log_det(precision)
        self.precision = kron(precision, eye(k), format="coo")

    @classmethod
    def of(cls, g: Covariance, levels: int, k: int) -> _Prior | None:
        """None for a covariance of another kind."""
        if isinstance(g, RepeatedCovariance):
            return cls(g.root().blocks(levels, k)[0], levels, None)
        if isinstance(g, PrecisionCovariance) and g.effects == k:
            sigma, x = g.parts()
            precision = g.precision
            at = (
                np.maximum(precision.row, precision.column),
                np.minimum(precision.row, precision.column),
            )
            low = csc_matrix((precision.entries(_numbers(x)), at), 2 * (levels,))
            return cls(RepeatedCovariance(sigma).root().matrix, levels, low)
        if isinstance(g, ScaledCovariance) and g.kernel.null is None and len(g.matrix) == k:
            inverse = g.kernel.inverse
            if inverse is None or inverse.layout == torch.strided:
                return None
            whole = inverse.to_sparse_coo().coalesce()
            (row, column), value = whole.indices().numpy(force=True), _numbers(whole.values())
            low = row >= column
            low = csc_matrix((value[low], (row[low], column[low])), 2 * (levels,))
            return cls(RepeatedCovariance(g.matrix).root().matrix, levels, low)
        return None


def _log_det(low: csc_matrix) -> float:
    """That of a sparse matrix by its lower triangle."""
    part = low.tocoo()
    row, column = part.row.astype(np.int64), part.col.astype(np.int64)
    symbolic = Symbolic.of(csc_matrix(low + low.T))
    values = np.bincount(symbolic.where(row, column), part.data, symbolic.entries)
    return Factor(symbolic, values).log_det


def _entries(
    equations: Equations, priors: Sequence[_Prior]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of the lower triangle of A, which add up where they stand twice."""
    starts, found = _starts(equations), []
    for i, prior in enumerate(priors):
        levels, k = equations.sizes[i]
        found.append((prior.precision, starts[i], starts[i]))
        # All effects of a level meet, also of one without rows.
        first = np.arange(levels)[:, None, None] * k
        sides = np.broadcast_arrays(first + np.arange(k)[:, None], first + np.arange(k))
        zeros = coo_matrix((np.zeros(sides[0].size), tuple(x.reshape(-1) for x in sides)))
        found.append((zeros, starts[i], starts[i]))
        for j in range(i, len(priors)):
            level, column, entries = equations.between(i, j)
            one = level[:, None] * k + torch.arange(k, device=level.device)
            other = column[:, None].expand_as(one)
            at = tuple(x.reshape(-1).numpy(force=True) for x in (one, other))
            shape = prior.root.shape[0], priors[j].root.shape[0]
            block = csc_matrix((_numbers(entries).reshape(-1), at), shape)
            found.append(((prior.root.T @ block @ priors[j].root).tocoo(), starts[i], starts[j]))
    rows = np.concatenate([part.row.astype(np.int64) + start for part, start, _ in found])
    columns = np.concatenate([part.col.astype(np.int64) + start for part, _, start in found])
    values = np.concatenate([part.data for part, _, _ in found])
    # Products of two terms stand above the diagonal, of a term with itself on both sides.
    same = np.concatenate([np.full(len(p.data), a == b) for p, a, b in found])
    kept = ~same | (rows >= columns)
    rows, columns = rows[kept], columns[kept]
    return np.maximum(rows, columns), np.minimum(rows, columns), values[kept]


def _effects_of(
    codes: Sequence[Tensor], starts: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> np.ndarray:
    """The columns of the effects of levels of each term, (n, all effects)."""
    parts = zip(codes, starts[:-1], sizes, strict=True)
    found = [at + code.numpy(force=True)[:, None] * k + np.arange(k) for code, at, (_, k) in parts]
    return np.concatenate(found, 1)


def _starts(equations: Equations) -> np.ndarray:
    """The first column of each term, and their number, (terms + 1,)."""
    return np.concatenate([[0], np.cumsum([q * k for q, k in equations.sizes])]).astype(np.int64)


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
