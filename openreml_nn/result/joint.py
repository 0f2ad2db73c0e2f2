r"""The joint error covariance of coefficients and BLUPs, by Henderson's mixed-model equations.

For :math:`y = X\beta + Z_1 b_1 + Z_2 b_2 + e` the covariance of the errors of
:math:`(\hat b_1, \hat b_2, \hat\beta)` is the inverse of

.. math:: \begin{pmatrix} Z_1^\top R^{-1} Z_1 + G_1^{-1} & A_{12} \\ A_{21} & A_{22} \end{pmatrix}

in which 2 stands for :math:`b_2` and :math:`\beta` together. With independent levels of the first
factor its part is block diagonal, :math:`P_i` of each level, and the rest follows from the
covariance C of the second part and :math:`M = P A_{12}`: the error of :math:`z_1^\top\hat b_1 +
w_2^\top(\hat b_2, \hat\beta)` has the variance

.. math:: z_1^\top P_i z_1 + (w_2 - M_i^\top z_1)^\top C (w_2 - M_i^\top z_1).

Of the rows nothing is needed but their cross-products with :math:`R^{-1}`, the :class:`Equations`.

Reference:
    Henderson, Biometrics 31 (1975) 423, section 3; Robinson, Statistical Science 6 (1991) 15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from openreml_nn.likelihood.problem import cholesky
from openreml_nn.result.cells import LevelCells
from openreml_nn.result.equations import Equations
from openreml_nn.result.factored import FactoredErrors
from openreml_nn.result.places import PlacedDesign
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import RepeatedCovariance
from openreml_nn.terms.design import CodedDesign, IndexedDesign

__all__ = ["JointErrors"]

# Covariances of the random terms, and what yields the equations of the rows.
_Given = tuple[Sequence[Covariance], Callable[[], Equations | None]]


class JointErrors(nn.Module):
    """What the variance of a prediction needs; its buffers travel with the checkpoint.

    Args:
        most_columns: more than these beside the first factor's are no part of a checkpoint, their
            square at once; then a sparse factor yields the variances, see :class:`FactoredErrors`,
            or, of a dense kernel, parts that are computed when one is asked for.
        most_numbers: so many are held at a time for the rows that are asked for.
        most_entries: of a factor, sparse or not.

    Attributes:
        is_known: whether there were data.
        is_exact: whether the parts below were computed from them.
        first: which factor is eliminated first, -1 for none.
        offsets: the first column of each other factor in ``covariance``.
        conditional: :math:`P` (levels, k, k) of that factor.
        starts, columns, entries: :math:`M` (levels · k, m) by the columns that each level meets.
        covariance: :math:`C` (m, m) of the other factors' effects and the coefficients.
        basis: (p, r) what the r coefficients in ``covariance`` are for: columns of
            :math:`X \\cdot` ``basis`` are orthonormal.
    """

    is_known: Tensor
    is_exact: Tensor
    first: Tensor
    offsets: Tensor
    conditional: Tensor
    starts: Tensor
    columns: Tensor
    entries: Tensor
    covariance: Tensor
    basis: Tensor

    def __init__(
        self,
        most_columns: int = 2_000,
        most_numbers: int = 10_000_000,
        most_entries: int = 50_000_000,
    ) -> None:
        super().__init__()
        self.most_columns, self.most_numbers = most_columns, most_numbers
        self.most_entries = most_entries
        none = torch.zeros(0, dtype=torch.float64)
        self.log_det = none.new_zeros(())  # of the effects' system, of the last update
        self._pending: _Given | None = None
        self._large: _Given | None = None  # of which a factor may be had
        self._factored: FactoredErrors | None = None
        self._dense: tuple[JointErrors, ...] = ()  # one at most, which is no submodule
        self.register_buffer("is_known", torch.tensor(False))
        self.register_buffer("is_exact", torch.tensor(False))
        self.register_buffer("first", torch.tensor(-1))
        self.register_buffer("offsets", torch.zeros(0, dtype=torch.long))
        self.register_buffer("conditional", none.reshape(0, 0, 0))
        self.register_buffer("starts", torch.zeros(1, dtype=torch.long))
        self.register_buffer("columns", torch.zeros(0, dtype=torch.long))
        self.register_buffer("entries", none.reshape(0, 0))
        self.register_buffer("covariance", none.reshape(0, 0))
        self.register_buffer("basis", none.reshape(0, 0))

    @torch.no_grad()
    def update(
        self,
        covariances: Sequence[Covariance],
        sizes: Sequence[tuple[int, int]],
        r: int,
        equations: Callable[[], Equations | None],
    ) -> None:
        """Take up the rows of a fit. The parts are computed when one is asked for.

        Args:
            covariances: of each random term, in the precision of the equations.
            sizes: levels and effects of each.
            r: number of coefficients.
            equations: yields those of the rows, or None where they cannot be had.
        """
        widths = [levels * k for levels, k in sizes]
        free = [w for w, g in zip(widths, covariances, strict=True) if _is_free(g)]
        self.is_known.fill_(True)
        self.is_exact.fill_(False)
        too_many = sum(widths) - max(free, default=0) + r > self.most_columns
        given = covariances, equations
        self._factored, self._dense = None, ()
        self._pending, self._large = (None, given) if too_many else (given, None)

    @torch.no_grad()
    def settle(self) -> None:
        """Compute the parts, if they are not yet."""
        if self._pending is None:
            return
        (covariances, given), self._pending = self._pending, None
        equations = given()
        if equations is None:
            return
        widths = [levels * k for levels, k in equations.sizes]
        like, r = equations.products.ff, equations.fixed.basis.shape[1]
        free = [
            width if _is_free(g) and equations.is_blocked(t) else 0
            for t, (width, g) in enumerate(zip(widths, covariances, strict=True))
        ]
        first = max(range(len(free)), key=free.__getitem__) if max(free, default=0) else -1
        rest = [t for t in range(len(free)) if t != first]
        q = sum(widths[t] for t in rest)
        if q + r > self.most_columns:
            self._large = covariances, given
            return
        roots = [g.root() for g in covariances]
        starts = [sum(widths[t] for t in rest[:i]) for i in range(len(rest))]
        S = _dense(equations, rest)
        conditional, cells = like.new_zeros(0, 0, 0), LevelCells.none(like)
        log_det = like.new_zeros(())
        if first >= 0:
            levels, k = equations.sizes[first]
            conditional, log_det = _conditional(
                roots[first].blocks(levels, k), equations.own(first)
            )
            cells = LevelCells.of(equations, first, rest)
            moved = cells.times(conditional)
            S = S - cells.inner(moved, q + r, self.most_numbers)
            cells = moved
        self.covariance, more = _left(S, [roots[t] for t in rest], [widths[t] for t in rest])
        self.log_det = log_det + more
        self.starts, self.columns, self.entries = cells.starts, cells.columns, cells.entries
        self.first.fill_(first)
        # Levels that no prediction asks for, as of rows of no known one, have columns too.
        place = dict(zip(rest, starts, strict=True))
        offsets = torch.tensor([place.get(t, 0) for t in range(len(free))], dtype=torch.long)
        self.offsets = offsets.to(like.device)
        self.conditional, self.basis = conditional, equations.fixed.basis
        self.is_exact.fill_(True)

    @torch.no_grad()
    def factored(self) -> FactoredErrors | None:
        """The sparse factor that is in place of the parts where these are too large; None where it
        cannot be had. It is not in a checkpoint, but the equations and parameters are."""
        self.settle()
        if self._large is not None:
            (covariances, given), self._large = self._large, None
            equations = given()
            if equations is not None:
                self._factored = FactoredErrors.of(covariances, equations, self.most_entries)
                if self._factored is None:
                    self._dense = _parts_of(self, covariances, equations)
        return self._factored

    def parts(self) -> JointErrors:
        """Where the parts below are: here, or, of a dense kernel too large for a checkpoint, in one that
        is in none."""
        self.factored()
        return self._dense[0] if self._dense else self

    def has_variances(self) -> bool:
        """Whether :meth:`variance` is there, which is exact."""
        return self.factored() is not None or bool(self.parts().is_exact)

    def variance(self, designs: Sequence[CodedDesign | PlacedDesign], X: Tensor) -> Tensor:
        """Variance of the error of :math:`x^\\top\\hat\\beta + z^\\top\\hat b` of some rows (n,).

        Args:
            designs: of each random effect; a level that is not known is a row of zeros.
            X: (n, p), with p = 0 where there are no coefficients.
        """
        if self._factored is not None:
            return self._factored.variance(designs, X, self.most_numbers)
        if self._dense:
            return self._dense[0].variance(designs, X)
        n, m = len(X), len(self.covariance)
        step = max(1, self.most_numbers // max(m, 1))
        parts = [
            _some(self, [d.take(at) for d in designs], X[at])
            for at in torch.arange(n, device=X.device).split(step)
        ]
        return torch.cat(parts) if parts else X.new_zeros(0)

    # Whoever looks at the buffers, or moves them, gets those of the last update.

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.settle()
        for whole in self._dense:
            whole._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return self.__dict__

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "covariance" in state_dict:
            self._pending = self._large = self._factored = None
            self._dense = ()
        # The sizes are known only once there were data.
        names = ("offsets", "conditional", "starts", "columns", "entries", "covariance", "basis")
        for name in names:
            if prefix + name in state_dict:
                own = getattr(self, name)
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _parts_of(
    joint: JointErrors, covariances: Sequence[Covariance], equations: Equations
) -> tuple[JointErrors, ...]:
    """All parts at once, where their factor has no more entries than it may."""
    r = equations.fixed.basis.shape[1]
    columns = sum(levels * k for levels, k in equations.sizes) + r
    free = [
        levels * k
        for (levels, k), g in zip(equations.sizes, covariances, strict=True)
        if _is_free(g)
    ]
    beside = columns - max(free, default=0)
    if beside * (beside + 1) // 2 > joint.most_entries:
        return ()
    whole = JointErrors(columns, joint.most_numbers, joint.most_entries)
    whole.to(equations.products.ff.device)
    whole.update(covariances, equations.sizes, r, lambda: equations)
    whole.settle()
    return (whole,)


def _some(joint: JointErrors, designs: Sequence[CodedDesign | PlacedDesign], X: Tensor) -> Tensor:
    """:meth:`JointErrors.variance` of rows that are held at once."""
    C, first, n = joint.covariance, int(joint.first), len(X)
    w = C.new_zeros(n, len(C))
    rows = torch.arange(n, device=X.device)
    found = C.new_zeros(n)
    for i, design in enumerate(designs):
        if isinstance(design, PlacedDesign):
            at, own = design.entries(C)
            w[design.kriging.rows] = w[design.kriging.rows].scatter_add(
                1, joint.offsets[i] + at, own
            )
            design = design.levels
        if i != first or not isinstance(design, IndexedDesign):
            at, own = design.entries(C)
            w = w.scatter_add(1, joint.offsets[i] + at, own)  # a level may stand twice
            continue
        z = C.new_ones(n, 1) if design.values is None else design.values.to(C)
        codes = design.codes
        found = torch.einsum("nk,nkl,nl->n", z, joint.conditional[codes], z)
        # The cells of each row's level, one after the other.
        lengths = (joint.starts[1:] - joint.starts[:-1])[codes]
        row = rows.repeat_interleave(lengths)
        offset = joint.starts[:-1][codes] - lengths.cumsum(0) + lengths
        place = torch.arange(len(row), device=X.device) + offset[row]
        by = (z[row] * joint.entries[place]).sum(1)
        w.index_put_((row, joint.columns[place]), -by, accumulate=True)
    w[:, len(C) - joint.basis.shape[1] :] += X.to(C) @ joint.basis
    return found + ((w @ C) * w).sum(1)


def _dense(equations: Equations, rest: Sequence[int]) -> Tensor:
    """The equations of some terms and of the coefficients, (q + r, q + r)."""
    like, r = equations.products.ff, equations.fixed.basis.shape[1]
    widths = [levels * k for levels, k in (equations.sizes[t] for t in rest)]
    starts = [sum(widths[:i]) for i in range(len(rest))]
    q = sum(widths)
    S = like.new_zeros(q + r, q + r)
    for i, (t, start) in enumerate(zip(rest, starts, strict=True)):
        at = slice(start, start + widths[i])
        S[at, q:] = equations.products.zf[t][:, :r]
        for j in range(i, len(rest)):
            S[at, starts[j] : starts[j] + widths[j]] = equations.dense(t, rest[j])
    S[q:, q:] = like[:r, :r]
    upper = S.triu(1)
    return upper + upper.mT + torch.diag(S.diagonal())


def _is_free(g: Covariance) -> bool:
    """Whether levels are known to be independent."""
    return isinstance(g, RepeatedCovariance)


def _left(S: Tensor, roots: Sequence[Covariance], widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """C from what the first factor leaves of the equations, and the logarithm of the determinant of
    its system."""
    q = sum(widths)

    def by_root(x: Tensor, transpose: bool) -> Tensor:
        parts = zip(roots, x.split(list(widths)), strict=True)
        return torch.cat([root.multiply(part, transpose) for root, part in parts])

    inner = S[:q, :q]
    for _ in range(2 if q else 0):
        inner = by_root(inner.mT, True)
    inner = inner + torch.eye(q, dtype=S.dtype, device=S.device)
    L = cholesky((inner + inner.mT) / 2, "V")
    back = torch.linalg.solve_triangular(L.mT, torch.eye(q).to(S), upper=True)
    half = by_root(back, False) if q else back
    N = half @ half.mT
    T = N @ S[:q, q:]
    spread = torch.cholesky_inverse(cholesky(S[q:, q:] - S[:q, q:].mT @ T, "X' V^-1 X"))
    cross = -T @ spread
    top = torch.cat([N - cross @ T.mT, cross], 1)
    found = torch.cat([top, torch.cat([cross.mT, spread], 1)])
    return found, 2 * L.diagonal().log().sum()


def _conditional(root: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """P of each level (levels, k, k): the covariance of its effects, given all others; and the
    logarithm of the determinant of their system.

    Args:
        root: of the covariance of each level, or of all.
        own: products with R^-1 of each level's columns.
    """
    k = own.shape[-1]
    inner = root.mT @ own @ root + torch.eye(k, dtype=own.dtype, device=own.device)
    L = cholesky(inner, "V")
    half = torch.linalg.solve_triangular(L, root.mT.expand_as(L), upper=False)
    return half.mT @ half, 2 * L.diagonal(dim1=1, dim2=2).log().sum()
