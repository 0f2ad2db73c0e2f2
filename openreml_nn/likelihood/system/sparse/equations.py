r"""The mixed-model equations :math:`M = \Lambda^\top Z^\top R^{-1} Z \Lambda + Q` as a sparse matrix.

The effects of a term are :math:`b = \Lambda u` with the precision Q of u known: the identity, or the
inverse of a kernel for each of its effects. Λ is block diagonal by levels, so that M has the pattern
of :math:`Z^\top R^{-1} Z` and Q wherever the parameters are, zero among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from scipy.sparse import bmat, bsr_matrix, coo_matrix, csc_matrix, csr_matrix, eye, kron

from openreml_nn.likelihood.system.sparse.bordered import Bordered, Factored
from openreml_nn.likelihood.system.sparse.factor import Factor
from openreml_nn.likelihood.system.sparse.ordering import leaves_dense
from openreml_nn.likelihood.system.sparse.part import (
    Between,
    Cross,
    Part,
    by_rows,
    is_identity,
    ones_of,
)
from openreml_nn.likelihood.system.sparse.symbolic import Symbolic
from openreml_nn.support.errors import InputError, NotPositiveDefiniteError

__all__ = ["Equations"]

#: A matrix whose pivots have lost so many digits has none left.
_SINGULAR = 1e13


class Equations:
    """The pattern of M for some terms, analysed once.

    Args:
        parts: the random terms.
        rows: pattern of the precision of the rows, (n, n), or None for a diagonal one; or products
            of the parts, where there are no rows.
        order: gives an order of elimination for a pattern; nested dissection by default.
        progress: see :class:`Factor`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rows: csr_matrix | Between | None = None,
        order: Callable[[csc_matrix], np.ndarray] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self.parts = list(parts)
        self._progress = progress
        self.start = np.concatenate([[0], np.cumsum([part.columns for part in parts])]).astype(int)
        between = (
            rows
            if callable(rows)
            else by_rows(
                [ones_of(part.design) for part in self.parts],
                None if rows is None else ones_of(rows),
            )
        )
        found = []
        self._counts: dict[tuple[int, int], csr_matrix] = {}
        for i, one in enumerate(self.parts):
            for j in range(i, len(self.parts)):
                other = self.parts[j]
                A = between(i, j)
                if rows is None and one.counts and other.counts:
                    A.sort_indices()  # as those of the blocks are, which share them
                    self._counts[i, j] = A
                A = ones_of(A)
                if i == j:
                    A = (
                        A
                        + _blocks_of(one.columns, one.width)
                        + _blocks_of(one.columns, one.effects)
                    )
                if one.basis is not None or other.basis is not None:
                    A = csr_matrix(np.ones(A.shape))
                if A.nnz:
                    blocks = bsr_matrix(A, blocksize=(one.effects, other.effects))
                    blocks.sort_indices()
                    found.append((i, j, blocks))
        self.symbolic = self._analysed(found, order)
        self.crosses = [self._placed(*each) for each in found]
        self._diagonal = self.symbolic.where(*2 * (np.arange(self.size),))
        self._priors = [self._placed_prior(i) for i in range(len(self.parts))]

    @property
    def size(self) -> int:
        """Columns of all parts."""
        return int(self.start[-1])

    def split(self, x: np.ndarray) -> list[np.ndarray]:
        """What of x (size, m) belongs to each part."""
        return [x[a:b] for a, b in zip(self.start[:-1], self.start[1:], strict=True)]

    def _analysed(
        self,
        blocks: Sequence[tuple[int, int, bsr_matrix]],
        order: Callable[[csc_matrix], np.ndarray] | None,
    ) -> Symbolic:
        row, column = [np.arange(self.size)], [np.arange(self.size)]
        for i, j, A in blocks:
            whole = bsr_matrix(
                (np.ones(A.data.shape, np.int8), A.indices, A.indptr), A.shape
            ).tocoo()
            row.append(whole.row + self.start[i])
            column.append(whole.col + self.start[j])
        for i, part in enumerate(self.parts):
            if part.prior is not None:
                whole = kron(part.prior, eye(part.effects), format="coo")
                row.append(whole.row + self.start[i])
                column.append(whole.col + self.start[i])
        r, c = np.concatenate(row), np.concatenate(column)
        both = np.concatenate([r, c]), np.concatenate([c, r])
        pattern = coo_matrix((np.ones(len(both[0]), np.int8), both), (self.size, self.size)).tocsc()
        if order is None:
            first = self._independent(blocks)
            if first is None or not leaves_dense(pattern, first):
                return Symbolic.of(pattern)
            rest = np.delete(np.arange(self.size), first)
            return Symbolic.of(pattern, np.concatenate([first, rest]))
        given = np.asarray(order(pattern))
        if given.shape != (self.size,) or not (np.sort(given) == np.arange(self.size)).all():
            raise InputError(
                f"`ordering` gives {given.shape} numbers that are no order of {self.size} columns: "
                f"expected each of 0 to {self.size - 1} once"
            )
        return Symbolic.of(pattern, given.astype(np.int64))

    def _independent(self, blocks: Sequence[tuple[int, int, bsr_matrix]]) -> np.ndarray | None:
        """Columns of the largest part, if no two of its levels meet."""
        i = max(range(len(self.parts)), key=lambda i: self.parts[i].columns, default=-1)
        if i < 0:
            return None
        own = next(A for one, other, A in blocks if one == other == i)
        if self.parts[i].prior is not None or own.nnz > self.parts[i].columns * own.blocksize[0]:
            return None
        return np.arange(self.start[i], self.start[i + 1])

    def _placed(self, i: int, j: int, A: bsr_matrix) -> Cross:
        level, (k, m) = np.repeat(np.arange(len(A.indptr) - 1), np.diff(A.indptr)), A.blocksize
        row = self.start[i] + level[:, None, None] * k + np.arange(k)[:, None]
        column = self.start[j] + A.indices[:, None, None].astype(np.int64) * m + np.arange(m)
        row, column = (
            np.ascontiguousarray(x).reshape(-1) for x in np.broadcast_arrays(row, column)
        )
        shape = (len(level), k, m)
        place = self.symbolic.where(row, column).reshape(shape)
        kept = None if i != j else np.flatnonzero(row >= column)
        column_level = A.indices.astype(np.int64)
        return Cross(i, j, level, column_level, A.indptr, (k, m), place, kept)

    def _placed_prior(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows, columns (blocks), values and places (b, k) of the lower triangle of a prior."""
        part = self.parts[i]
        if part.prior is None:
            at = np.arange(part.columns)
            return at, at, np.ones(part.columns), self._diagonal[self.start[i] + at][:, None]
        Q, k = part.prior.tocoo(), part.effects
        low = Q.row >= Q.col
        row, column = Q.row[low].astype(np.int64), Q.col[low].astype(np.int64)
        at = self.start[i] + np.stack([row, column])[:, :, None] * k + np.arange(k)
        place = self.symbolic.where(at[0].reshape(-1), at[1].reshape(-1)).reshape(-1, k)
        return row, column, Q.data[low], place

    def products(self, rows: csr_matrix | Between) -> list[np.ndarray]:
        """Blocks of :math:`Z^\\top R^{-1} Z` in the order of ``crosses``, by the rows' precision or
        by the products themselves."""
        between = rows if callable(rows) else by_rows([x.design for x in self.parts], rows)
        known: dict[tuple[int, int], csr_matrix] = {}
        if not callable(rows) and is_identity(rows):
            # How often levels meet is known from the pattern, and not asked for again.
            known, self._counts = self._counts, {}
        found = []
        for x in self.crosses:
            A = known.pop((x.one, x.other), None)
            found.append(self._product(x, between(x.one, x.other) if A is None else A))
        return found

    def _product(self, cross: Cross, A: csr_matrix) -> np.ndarray:
        one, other = self.parts[cross.one], self.parts[cross.other]
        (k, m), data = cross.shape, np.zeros(cross.place.shape)
        if one.basis is not None or other.basis is not None:
            dense = one.from_effects(other.from_effects(A.toarray().T).T)
            four = dense.reshape(one.levels, k, other.levels, m)
            return np.ascontiguousarray(four[cross.row, :, cross.column])
        A = A.tocoo()
        key = A.row.astype(np.int64) // k * other.levels + A.col // m
        known = cross.row * other.levels + cross.column
        if k * m == 1 and len(key) == len(known) and bool((key == known).all()):
            return A.data.reshape(-1, 1, 1)
        at = key if len(known) == one.levels * other.levels else np.searchsorted(known, key)
        data[at, A.row % k, A.col % m] = A.data
        return data

    def factor(
        self, moved: Sequence[np.ndarray], priors: Sequence[np.ndarray | None] = ()
    ) -> Factored:
        r"""The factor of M from the blocks of :math:`\Lambda^\top Z^\top R^{-1} Z \Lambda`.

        Args:
            moved: the blocks, in the order of ``crosses``.
            priors: for each part the entries of the lower triangle of a prior that moves.

        Raises:
            NotPositiveDefiniteError: if M is not positive definite.
        """
        values = self.symbolic.memory.take()
        values.fill(0.0)
        for cross, data in zip(self.crosses, moved, strict=True):
            place, data = cross.place.reshape(-1), data.reshape(-1)
            if cross.kept is not None:
                place, data = place[cross.kept], data[cross.kept]
            values[place] += data
        own = priors or [None] * len(self.parts)
        for (_, _, known, place), given in zip(self._priors, own, strict=True):
            values[place] += (known if given is None else given)[:, None]
        return self._within(values, range(len(self.parts)))

    def _within(self, values: np.ndarray, which: Iterable[int]) -> Factored:
        """The factor of a matrix, within the subspace of the effects of some parts."""
        borders = [self._borders[i] for i in which if i in self._borders]
        if not borders:
            return Factor(self.symbolic, values, self._progress)
        corners, weight, null = (
            np.concatenate(x, axis) for x, axis in zip(zip(*borders), (0, 0, 1), strict=True)
        )
        values[self._diagonal[corners]] += weight
        factor = Factor(self.symbolic, values, self._progress)
        return Bordered(factor, corners, weight, null)

    @cached_property
    def _borders(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Corners, their weights and the null space, (size, k), of the parts that have one."""
        found = {}
        for i, part in enumerate(self.parts):
            if part.null is not None:
                corners, weight, own = part.border()
                null = np.zeros((self.size, own.shape[1]))
                null[self.start[i] : self.start[i + 1]] = own
                found[i] = self.start[i] + corners, weight, null
        return found

    def within_prior(self, inverse: np.ndarray, i: int) -> np.ndarray:
        """Entries of the inverse in the lower triangle of a part's prior, summed over effects."""
        return np.asarray(inverse[self._priors[i][3]].sum(1))

    @cached_property
    def log_det_prior(self) -> float:
        r""":math:`\log|Q|` of all parts but those whose prior moves.

        Raises:
            NotPositiveDefiniteError: if one of them is not positive definite, by name.
        """
        by_descent = [part.log_det_by_descent() for part in self.parts]
        total = sum(x for x in by_descent if x is not None)
        known = [i for i, x in enumerate(by_descent) if x is None]
        if not known:
            return total
        found = self._prior_factor(known)
        if found is None:
            for i in known:
                if self._prior_factor([i]) is None:
                    raise NotPositiveDefiniteError(
                        f"the inverse of the kernel of {self.parts[i].name!r} is not positive "
                        "definite, so that there is no kernel: expected one that is, as of a pedigree, "
                        "or `KnownInverseMatrix(..., null=...)` with what it is zero on"
                    )
        assert found is not None
        return total + found.log_det

    def _prior_factor(self, known: Sequence[int]) -> Factored | None:
        """The factor of the precisions of some parts, the identity for others; None where it is
        singular to working precision."""
        values = np.zeros(self.symbolic.entries)
        values[self._diagonal] = 1.0
        for i in known:
            values[self._diagonal[self.start[i] : self.start[i + 1]]] = 0.0
            _, _, entries, place = self._priors[i]
            values[place] += entries[:, None]
        try:
            found = self._within(values, known)
        except NotPositiveDefiniteError:
            return None
        return found if found.loss < _SINGULAR else None

    def times(self, blocks: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
        """:math:`A x` for the symmetric A of such blocks, x (size, m)."""
        found = np.zeros_like(x)
        for cross, data in zip(self.crosses, blocks, strict=True):
            a, b = (slice(*self.start[i : i + 2]) for i in (cross.one, cross.other))
            A = cross.matrix(data, b.stop - b.start)
            found[a] += A @ x[b]
            if cross.one != cross.other:
                found[b] += A.T @ x[a]
        return found

    def traces(
        self, inverse: np.ndarray, moved: Sequence[np.ndarray], by_level: Sequence[bool]
    ) -> list[np.ndarray]:
        r"""Sums over a part's levels of the blocks of :math:`M^{-1}\Lambda^\top Z^\top R^{-1} Z\Lambda`.

        Args:
            inverse: of the factor.
            moved: as in :meth:`factor`.
            by_level: for each part, whether its levels are left apart.

        Returns:
            For each part (1, k, k), or (levels, k, k).
        """
        found = [
            np.zeros((part.levels if apart else 1, part.effects, part.effects))
            for part, apart in zip(self.parts, by_level, strict=True)
        ]
        for cross, data in zip(self.crosses, moved, strict=True):
            Z = inverse[cross.place]
            sides = [(cross.one, cross.row, "bij,bkj->ik")]
            if cross.one != cross.other:
                sides.append((cross.other, cross.column, "bji,bjk->ik"))
            for part, level, rule in sides:
                if by_level[part]:
                    each = np.einsum(rule.replace(">", ">b"), Z, data, optimize=True)
                    np.add.at(found[part], level, each)
                elif Z.shape[1:] == (1, 1):
                    found[part][0] += np.vdot(Z, data)
                else:
                    found[part][0] += np.einsum(rule, Z, data, optimize=True)
        return found

    def largest(self, blocks: Sequence[np.ndarray]) -> list[float]:
        """The largest entry on the diagonal of each part's own blocks."""
        found = [0.0] * len(self.parts)
        for cross, data in zip(self.crosses, blocks, strict=True):
            if cross.one == cross.other:
                own = data[cross.row == cross.column].diagonal(axis1=1, axis2=2)
                found[cross.one] = float(own.max(initial=0.0))
        return found

    def inverse_of_effects(self, inverse: np.ndarray, roots: Sequence[np.ndarray]) -> csr_matrix:
        r""":math:`C \Lambda M^{-1} \Lambda^\top C^\top` where effects meet in a row, (size, size).

        Args:
            inverse: of the factor.
            roots: Λ of each part, (levels or 1, k, k).
        """
        parts: list[list[csr_matrix | None]] = [[None] * len(self.parts) for _ in self.parts]
        for cross in self.crosses:
            left, right = (roots[i].transpose(0, 2, 1) for i in (cross.one, cross.other))
            data = cross.transform(inverse[cross.place], left, right)
            A = cross.matrix(data, self.parts[cross.other].columns).tocsr()
            one, other = self.parts[cross.one], self.parts[cross.other]
            if one.basis is not None or other.basis is not None:
                A = csr_matrix(one.to_effects(other.to_effects(A.toarray().T).T))
            parts[cross.one][cross.other] = A
            parts[cross.other][cross.one] = A.T.tocsr()
        for i, part in enumerate(self.parts):
            if parts[i][i] is None:
                parts[i][i] = csr_matrix((part.columns, part.columns))
        if not self.parts:
            return csr_matrix((0, 0))
        found = bmat(parts, format="csr")
        found.sort_indices()
        return found

    def own(self, inverse: np.ndarray, i: int, w: int) -> np.ndarray:
        r"""Blocks of :math:`M^{-1}` of a part's columns, (columns / w, w, w)."""
        part = self.parts[i]
        at = self.start[i] + np.arange(part.columns).reshape(-1, w)
        row, column = np.broadcast_arrays(at[:, :, None], at[:, None, :])
        place = self.symbolic.where(row.reshape(-1), column.reshape(-1))
        return inverse[place].reshape(-1, w, w)


def _blocks_of(size: int, width: int) -> csr_matrix:
    return csr_matrix(kron(eye(size // width), np.ones((width, width))))
