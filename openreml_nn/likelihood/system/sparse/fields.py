r"""Residuals whose precision is sparse: autoregression in time, or over the plots of fields.

The rows are some of the cells of a covariance :math:`F = \Lambda Q^{-1} \Lambda`, with weights
:math:`R = W Z_F F Z_F^\top W`. The cells that no row has, of plots that are missing, are columns E of
the equations without a prior, as if they were observed and each had an effect of its own. That is
exact, by

.. math::
    |F|\,|E^\top F^{-1} E| = |F_{oo}|,\qquad
    F^{-1} - F^{-1} E (E^\top F^{-1} E)^{-1} E^\top F^{-1} =
    \begin{pmatrix} F_{oo}^{-1} & 0 \\ 0 & 0 \end{pmatrix}

with o the cells that are observed.

Reference:
    Gilmour, Cullis and Verbyla, Journal of Agricultural, Biological and Environmental Statistics 2
    (1997) 269, section 3, for missing plots as effects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix, dia_matrix, hstack
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.residual import Residual
from openreml_nn.likelihood.system.sparse.chains import Chain
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.moving import Moving, MovingAt
from openreml_nn.likelihood.system.sparse.part import Part
from openreml_nn.likelihood.system.sparse.rows import Rows, RowsAt, entries_within
from openreml_nn.likelihood.system.sparse.terms import Root, SparseTerm, TermAt
from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.products import one_effect
from openreml_nn.terms.term import Term, has_own_columns, residual_terms

__all__ = ["FieldResidual", "FieldRows"]


@dataclass(frozen=True)
class _At:
    """A covariance of cells at one point.

    Attributes:
        root: Λ of each cell, (q,).
        precision: Q, (q, q).
        log_det: of Q.
        entries: of its lower triangle.
        moving: Q itself, where it is not a chain's.
    """

    root: np.ndarray
    precision: csc_matrix
    log_det: float
    entries: np.ndarray
    moving: MovingAt | None = None


class FieldResidual(Residual):
    """R of one term, each row with a cell of its own.

    Args:
        at: position of the term.
        term: what it is; its numbers may move.

    Attributes:
        cells: (n,) cell of each row.
        missing: cells without a row.
        scale: (n,) W, None for ones.
        pattern: (q, q) of Q.
        low: which of its entries are of the lower triangle, column by column.
        effects: of a level, whose cells stand side by side.
        on: which of its entries are of one level.
    """

    size = 1
    moves = True

    def __init__(self, at: int, term: Term) -> None:
        self.at, self._own = [at], term.covariance
        self._form = self._single(term.covariance)
        design = term.design
        assert isinstance(design, IndexedDesign)
        self.cells = design.codes.cpu().numpy()
        q = design.shape[1]
        self.missing = np.setdiff1d(np.arange(q), self.cells)
        values = design.values
        self.scale = None if values is None else values.detach().cpu().double().numpy()[:, 0]
        g = self._form
        self._kind = Moving(g) if isinstance(g, PrecisionCovariance) else Chain(g)
        self.pattern = csr_matrix(self._kind.pattern)
        self.pattern.sort_indices()
        # Column by column, as the lower triangle of either kind is.
        place = np.repeat(np.arange(q), np.diff(self.pattern.indptr))
        self.low = self.pattern.indices >= place
        self.effects = self._own.width
        self.on = self.pattern.indices // self.effects == place // self.effects
        self._row, self._column = self.pattern.indices[self.low], place[self.low]

    @staticmethod
    def within(terms: Sequence[Term]) -> FieldResidual | None:
        """That of terms over levels; None where there is none, or another residual."""
        if residual_terms(terms):
            return None
        own = [i for i, term in enumerate(terms) if _is_field(term)]
        chained = [i for i in own if terms[i].covariance.is_chained]
        at = (chained or own)[-1:]
        return FieldResidual(at[0], terms[at[0]]) if at else None

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        return [terms[i].covariance.matrix for i in self.at]

    def covariance(self, matrix: Tensor) -> Covariance:
        """F by its entries, one effect a level."""
        return self._single(self._own.with_matrix(matrix.detach().cpu().double()))

    @staticmethod
    def _single(g: Covariance) -> Covariance:
        return one_effect(g) if isinstance(g, PrecisionCovariance) else g

    def moved(self, matrix: Tensor, derivative: Tensor, x: Tensor) -> Tensor:
        """The derivative of F at some entries, by that of these, times x (q, m)."""
        own = self._own.with_matrix(matrix.detach().cpu().double())
        return own.along(derivative.detach().cpu().double(), x)

    def at_point(self, matrix: Tensor) -> _At:
        """F at one point.

        Raises:
            NotPositiveDefiniteError: if it is not positive definite.
        """
        g, q = self.covariance(matrix), self.pattern.shape[0]
        if isinstance(self._kind, Chain):
            at = self._kind.at(g)
            root = (at.variances.numpy() ** 0.5)[self._kind.of]
            entries = at.entries.numpy()
            return _At(root, self._kind.matrix(entries), float(at.log_det), entries)
        assert isinstance(g, PrecisionCovariance)
        variance = float(g.parts()[0])
        if not variance > 0:
            raise NotPositiveDefiniteError("V is not positive definite: no residual variance")
        moving = self._kind.at(g)
        root = np.full(q, variance**0.5)
        return _At(root, moving.matrix, moving.log_det, moving.entries, moving)

    def score(self, matrix: Tensor, at: _At, C: np.ndarray, e: np.ndarray) -> Tensor:
        r"""The derivative of the log-likelihood by the entries of F.

        It is :math:`\tfrac12 (F - C - e e^\top)` by the precision.

        Args:
            matrix: these entries.
            at: F.
            C: what is not known of the cells given the data, in the order of the lower triangle.
            e: (q, m) the cells given the data, and roots of what fixed effects add.
        """
        row, column, root = self._row, self._column, at.root
        u, C = e / root[:, None], C / (root[row] * root[column])
        total = C.copy()
        for x in u.T:
            total += x[row] * x[column]
        twice = np.where(row > column, 2.0, 1.0) * at.entries * total
        if isinstance(self._kind, Chain):
            fields, of = self._kind.fields, self._kind.of
            by_field = np.bincount(of[row], twice, fields) - np.bincount(of, minlength=fields)
            variances = np.bincount(of, root**2, fields) / np.bincount(of, minlength=fields)
            return self._kind.score(
                self.covariance(matrix), by_field / (2 * variances), C, u
            ).reshape(matrix.shape)
        assert at.moving is not None
        by_variance = (twice.sum() - len(root)) / (2 * root[0] ** 2)
        by_numbers = at.moving.score(C, u, 1)
        if self.effects > 1:  # Σ stands behind the numbers there
            t = self.effects**2
            return torch.cat([by_numbers[-t:], by_numbers[:-t]])
        return torch.cat([by_numbers.new_tensor([by_variance]), by_numbers])

    def expanded(self, random: Sequence[SparseTerm]) -> list[SparseTerm]:
        """The random terms with a row for each cell, and the missing cells as one more."""
        found = [replace(own, part=self._over_cells(own.part)) for own in random]
        if len(self.missing):
            found.append(MissingCells.of(self))
        return found

    def _over_cells(self, part: Part) -> Part:
        Z = part.design if self.scale is None else part.design.multiply(1 / self.scale[:, None])
        Z = csr_matrix(Z).tocoo()
        shape = self.pattern.shape[0], Z.shape[1]
        return replace(part, design=csr_matrix((Z.data, (self.cells[Z.row], Z.col)), shape))


def _is_field(term: Term) -> bool:
    g = term.covariance
    is_sparse = g.is_chained or isinstance(g, PrecisionCovariance)
    return is_sparse and has_own_columns(term.design)


@dataclass(frozen=True)
class MissingCells(SparseTerm):
    """Columns of the equations for cells that no row has; they have no prior.

    Attributes:
        residual: whose they are.
    """

    residual: FieldResidual | None = None

    @classmethod
    def of(cls, residual: FieldResidual) -> MissingCells:  # type: ignore[override]
        """All that a residual has."""
        m, q = len(residual.missing), residual.pattern.shape[0]
        E = csr_matrix((np.ones(m), (residual.missing, np.arange(m))), (q, m))
        part = Part("missing cells", E, 1, 1, csc_matrix((m, m)), None, moves=True)
        return cls(residual.at[0], part, True, False, None, None, residual)

    def roots(self, term: Term, largest: float) -> Root:
        # Their scale, by which the equations have no unit.
        root = self._scale(term)[:, None, None]
        return Root(self.part, root, root)

    def at_point(self, term: Term) -> TermAt:
        log_det = 2 * float(np.log(self._scale(term)).sum())
        return _MissingAt(self, term, self.part, log_det, np.zeros(0))

    def _scale(self, term: Term) -> np.ndarray:
        assert self.residual is not None
        return self.residual.at_point(term.covariance.matrix).root[self.residual.missing]


class _MissingAt(TermAt):
    """The term of missing plots at one point: no parameter of the tree is its own."""

    def score(self, score: np.ndarray, within: Callable[[], np.ndarray], u: np.ndarray) -> Tensor:
        return torch.zeros_like(self.term.covariance.matrix)

    def along(self, derivatives: Tensor, u: np.ndarray, root: Root) -> np.ndarray:
        return np.zeros((len(u), len(derivatives)))


class FieldRows(Rows):
    r"""The cells of a field as rows: those of the data over W, and zeros where there are none.

    Args:
        equations: of the random terms with a row for each cell.
        residual: R.
        fixed: response and model matrix.
    """

    def __init__(self, equations: Equations, residual: FieldResidual, fixed: FixedPart) -> None:
        self._equations, self._field = equations, residual
        self.terms = residual.at
        designs = [part.design for part in equations.parts]
        q = residual.pattern.shape[0]
        self._Z = hstack(designs, format="csr") if designs else csr_matrix((q, 0))
        self._take(fixed)

    def of_rows(self, x: np.ndarray) -> np.ndarray:
        found, scale = x[self._field.cells], self._field.scale
        return found if scale is None else found / scale[:, None]

    def _take(self, fixed: FixedPart) -> None:
        rows = torch.cat([fixed.Q, fixed.y[:, None]], 1).detach().cpu().double().numpy()
        if self._field.scale is not None:
            rows = rows / self._field.scale[:, None]
        self.f = np.zeros((self._field.pattern.shape[0], rows.shape[1]))
        self.f[self._field.cells] = rows

    def at(self, matrices: Sequence[Tensor]) -> RowsAt:
        (matrix,) = matrices
        found = self._field.at_point(matrix)
        inverse = dia_matrix((1 / found.root[None], [0]), found.precision.shape)
        precision = csr_matrix(inverse @ found.precision @ inverse)
        log_det = 2 * float(np.log(found.root).sum()) - found.log_det
        if self._field.scale is not None:
            log_det += 2 * float(np.log(np.abs(self._field.scale)).sum())
        Zf, ff = self.with_data(precision)
        blocks = self._equations.products(precision)
        condition = max(1.0, float(found.precision.diagonal().max()))
        matrices = [matrix.detach().cpu().double()]
        return RowsAt(
            matrices, blocks, Zf, ff, log_det, condition, precision, None, self._Z, self.f
        )

    def scores(
        self, at: RowsAt, inner: csr_matrix, p_y: np.ndarray, lost: np.ndarray
    ) -> list[Tensor]:
        (matrix,) = at.matrices
        C = self._known_to(inner)[self._field.low]
        e = self._cells(at, np.concatenate([p_y[:, None], lost], 1))
        return [self._field.score(matrix, self._field.at_point(matrix), C, e)]

    def effects(
        self, at: RowsAt, inner: csr_matrix, p_y: np.ndarray, lost: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predictions of the cells of each level, (levels, t), and their variances, (levels, t, t); for
        the arguments see :meth:`scores`."""
        t = self._field.effects
        own = self._known_to(inner)[self._field.on].reshape(-1, t, t)
        e = self._cells(at, p_y[:, None]).reshape(-1, t)
        added = self._cells(at, lost).reshape(len(e), t, -1)
        return e, own + added @ added.transpose(0, 2, 1)

    def _cells(self, at: RowsAt, x: np.ndarray) -> np.ndarray:
        """F x for x (q, m)."""
        return self._field.covariance(at.matrices[0]).multiply(torch.from_numpy(x)).numpy()

    def _known_to(self, inner: csr_matrix) -> np.ndarray:
        """Variances of cells given the data and the fixed effects, in the order of the pattern."""
        pattern, Z = self._field.pattern, self._Z
        place = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
        within = np.arange(pattern.nnz) - pattern.indptr[place]
        member = np.full((pattern.shape[0], int(within.max()) + 1), -1)
        member[place, within] = pattern.indices
        found = entries_within(
            Z.indptr, Z.indices, Z.data, inner.indptr, inner.indices, inner.data, member
        )
        return found[place, within]

    def working(
        self, at: RowsAt, c: np.ndarray, derivatives: Sequence[Tensor], p_y: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = zip(self._equations.parts, self._equations.split(c), strict=True)
        effects = [part.to_effects(own) for part, own in parts]
        (slices,) = derivatives
        x = torch.from_numpy(p_y[:, None])
        own = [self._field.moved(at.matrices[0], d, x) for d in slices]
        w = torch.cat(own, 1).numpy()
        if effects:
            w = w + self._Z @ np.concatenate(effects)
        Rw = at.precision @ w
        return self.to_columns(self._Z.T @ Rw), self.f.T @ Rw, w.T @ Rw
