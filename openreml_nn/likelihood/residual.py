r"""The covariance R of the residuals, and rows made independent by it.

With :math:`R = L L^\top` the likelihood of y is that of the white rows
:math:`L^{-1} y`, less :math:`\log|R| / 2`. R is a multiple of known weights
(:class:`ScalarResidual`), or has blocks within groups of rows, of any size,
perhaps between such weights (:class:`BlockResidual`): a single row under variances by stratum, the
occasions of a subject under autocorrelation.

Reference:
    Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), section 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.fixed import traced
from openreml_nn.likelihood.problem import cholesky, pivot_loss
from openreml_nn.support.errors import InputError, NotPositiveDefiniteError
from openreml_nn.terms.design import (
    DenseDesign,
    Design,
    IdentityDesign,
    IndexedDesign,
    MembershipDesign,
)
from openreml_nn.terms.term import Term, residual_terms

__all__ = ["BlockResidual", "Residual", "ScalarResidual", "White"]


class White:
    """Rows made independent by one R.

    Attributes:
        log_det: :math:`\\log|R|`.
        condition: how many times rounding is magnified in a factor of R.
    """

    log_det: Tensor
    condition: float = 1.0

    def rows(self, x: Tensor) -> Tensor:
        r""":math:`L^{-1} x` for x (n, m)."""
        raise NotImplementedError

    def back(self, x: Tensor) -> Tensor:
        r""":math:`L^{-\top} x` for x (n, m)."""
        raise NotImplementedError

    def design(self, design: Design) -> Design:
        r""":math:`L^{-1} Z`; an indexed design stays one."""
        if isinstance(design, IndexedDesign):
            return design.with_values(self.rows, self.log_det)
        return DenseDesign(self.rows(design.dense(self.log_det)))


class Residual:
    """R for some data.

    Args:
        terms: the lowered covariance.

    Attributes:
        at: positions of its terms.
        size: size of its largest block.
        moves: whether more than a factor of it depends on parameters.

    Raises:
        InputError: if there is none of known structure.
    """

    at: list[int]
    size: int
    moves: bool
    #: Operations of the factors of its blocks and of their derivatives.
    work: float = 0.0

    @staticmethod
    def of(terms: Sequence[Term]) -> Residual:
        """The residual of some terms."""
        at = residual_terms(terms)
        over_rows = [i for i, term in enumerate(terms) if isinstance(term.design, IdentityDesign)]
        odd = [terms[i].name for i in over_rows if i not in at]
        if odd or not at:
            raise InputError(
                "the blocked solver needs residuals that are independent, or within groups: "
                + (f"term {odd[0]!r} is over the rows and is not" if odd else "there are none")
            )
        parts = [terms[i] for i in at]
        if all(term.covariance.is_scalar for term in parts) and _are_equal(parts):
            return ScalarResidual(at, parts)
        return BlockResidual(at, parts)

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        """What R depends on, from terms of the same designs."""
        raise NotImplementedError

    def white(self, matrices: Sequence[Tensor]) -> White:
        """R at some matrices; with a scalar R, at 1."""
        raise NotImplementedError

    def along(self, derivatives: Sequence[Tensor], x: Tensor) -> Tensor:
        """Derivatives of R, from those (m, \\*shape) of its matrices, times x (n,): (n, m)."""
        raise NotImplementedError

    def is_within(self, codes: Tensor) -> bool:
        """Whether the rows of a block have the same code."""
        raise NotImplementedError


def _scale(term: Term) -> Tensor | None:
    """Known standard deviations of the rows, (n, 1), up to a factor."""
    return term.design.values if isinstance(term.design, IndexedDesign) else None


def _are_equal(parts: Sequence[Term]) -> bool:
    """Whether the known weights of the parts are the same, or none have any."""
    first, *others = map(_scale, parts)
    return all(
        first is v
        or (
            first is not None
            and v is not None
            # Of two that move, each has a gradient of its own.
            and (
                first.data_ptr() == v.data_ptr()
                or (
                    not (first.requires_grad or v.requires_grad)
                    and first.dtype == v.dtype
                    and torch.equal(first, v)
                )
            )
        )
        for v in others
    )


# ---------------------------------------------------------------------- one variance


class ScalarResidual(Residual):
    r""":math:`R = s\,\mathrm{diag}(v^2)` with known v; ``matrices`` is s alone, (1, 1)."""

    size = 1
    moves = False

    def __init__(self, at: list[int], parts: Sequence[Term]) -> None:
        self.at = at
        self._v = _scale(parts[0])

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        return [torch.stack([terms[i].covariance.matrix for i in self.at]).sum(0)]

    def white(self, matrices: Sequence[Tensor]) -> White:
        return _ScaledRows(self._v, matrices[0])

    def is_within(self, codes: Tensor) -> bool:
        return True


class _ScaledRows(White):
    def __init__(self, v: Tensor | None, like: Tensor) -> None:
        self._v = None
        self.log_det = like.new_zeros(())
        if v is not None:
            if bool((v == 0).any()):
                raise NotPositiveDefiniteError("V is not positive definite: a row has no residual")
            self._v = v.to(like)
            self.log_det = 2 * self._v.abs().log().sum()

    def rows(self, x: Tensor) -> Tensor:
        return x if self._v is None else x / self._v

    back = rows

    def design(self, design: Design) -> Design:
        if self._v is not None and isinstance(design, MembershipDesign):
            return design.with_values(self.rows, self.log_det)
        return design if self._v is None else super().design(design)


# ---------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class _Bucket:
    """Groups of m rows. Groups whose rows stand in the same positions share a block of R.

    Attributes:
        rows: (groups, m) rows.
        pattern: (groups,) which block.
        positions: for each part, (patterns, m) positions in its matrix.
        joint: for each part, (patterns, m, m) whether rows belong together.
        count: (patterns,) groups of each.
    """

    rows: Tensor
    pattern: Tensor
    positions: list[Tensor]
    joint: list[Tensor]
    count: Tensor


class BlockResidual(Residual):
    """R with blocks within groups of rows; ``matrices`` are those of its parts.

    Attributes:
        group: (n,) group of each row, from 0.
    """

    moves = True

    def __init__(self, at: list[int], parts: Sequence[Term]) -> None:
        self.at = at
        if not _are_equal(parts):
            raise InputError(
                "the blocked solver needs the same weights for all parts of the residual: "
                f"{', '.join(repr(part.name) for part in parts)} have others"
            )
        self._v = _scale(parts[0])
        self._forms = [part.covariance for part in parts]
        places = [_places(part) for part in parts]
        group = _joined([block for block, _ in places])
        self.n = len(group)
        self.group = group
        order = torch.argsort(group, stable=True)
        size = torch.bincount(group)
        self.size = int(size.max())
        start = size.cumsum(0) - size
        self._buckets = []
        for m in size.unique().tolist():
            groups = (size == m).nonzero()[:, 0]
            rows = order[start[groups][:, None] + torch.arange(m, device=group.device)]
            self._buckets.append(_bucket(rows, places))
            self.work += 4.0 * m**3 * len(self._buckets[-1].count)

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        return [terms[i].covariance.matrix for i in self.at]

    def white(self, matrices: Sequence[Tensor]) -> White:
        blocks = [self._blocks(bucket, matrices) for bucket in self._buckets]
        return _WhiteBlocks(self._buckets, blocks, self._v)

    def _blocks(self, bucket: _Bucket, matrices: Sequence[Tensor]) -> Tensor:
        """Blocks of R, one for each pattern, (patterns, m, m)."""
        parts = []
        for form, matrix, at, joint in zip(
            self._forms, matrices, bucket.positions, bucket.joint, strict=True
        ):
            parts.append(form.with_matrix(matrix).among(at, joint))
        return torch.stack(parts).sum(0)

    def of_first(self, count: int, matrices: Sequence[Tensor]) -> Tensor:
        """R of the first rows (count, count), with which no others share a group."""
        found = matrices[0].new_zeros(count, count)
        for bucket in self._buckets:
            at = (bucket.rows < count).all(1)
            rows, blocks = bucket.rows[at], self._blocks(bucket, matrices)[bucket.pattern[at]]
            found = found.index_put((rows[:, :, None], rows[:, None, :]), blocks)
        return found

    def along(self, derivatives: Sequence[Tensor], x: Tensor) -> Tensor:
        found = x.new_zeros(len(derivatives[0]), self.n)
        v = None if self._v is None else self._v.to(x)[:, 0]
        x = x if v is None else v * x
        for bucket in self._buckets:
            local = x[bucket.rows][:, :, None]  # (groups, m, 1)
            for j, matrices in enumerate(zip(*derivatives, strict=True)):
                moved = self._blocks(bucket, matrices)[bucket.pattern] @ local
                found[j, bucket.rows.reshape(-1)] = moved.reshape(-1)
        return (found if v is None else v * found).mT

    def is_within(self, codes: Tensor) -> bool:
        return _nests(self.group, codes)


class _WhiteBlocks(White):
    def __init__(
        self, buckets: Sequence[_Bucket], blocks: Sequence[Tensor], v: Tensor | None
    ) -> None:
        self._buckets = buckets
        self._scale = None if v is None else _ScaledRows(v, blocks[0])
        factors = [cholesky(block, "R") for block in blocks]
        if not traced(*blocks):
            pairs = zip(blocks, factors, strict=True)
            self.condition = max(pivot_loss(R.detach(), L.detach()) for R, L in pairs)
        self._inverse = []
        total = []
        for bucket, L in zip(buckets, factors, strict=True):
            eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
            self._inverse.append(solve_triangular(L, eye, upper=False))
            total.append(2 * (bucket.count * L.diagonal(dim1=1, dim2=2).log().sum(1)).sum())
        self.log_det = torch.stack(total).sum()
        if self._scale is not None:
            self.log_det = self.log_det + self._scale.log_det

    def rows(self, x: Tensor) -> Tensor:
        scaled = x if self._scale is None else self._scale.rows(x)
        return self._apply(scaled, self._inverse)

    def back(self, x: Tensor) -> Tensor:
        found = self._apply(x, [inverse.mT for inverse in self._inverse])
        return found if self._scale is None else self._scale.back(found)

    def _apply(self, x: Tensor, inverses: Sequence[Tensor]) -> Tensor:
        rows, parts = [], []
        for bucket, inverse in zip(self._buckets, inverses, strict=True):
            local = x[bucket.rows]  # (groups, m, columns)
            every = inverse if len(inverse) == 1 else inverse[bucket.pattern]
            parts.append((every @ local).flatten(0, 1))
            rows.append(bucket.rows.reshape(-1))
        return torch.empty_like(x).index_copy(0, torch.cat(rows), torch.cat(parts))


def _places(part: Term) -> tuple[Tensor, Tensor]:
    """Block of each row, and its position in the part's matrix."""
    z, g = part.design, part.covariance
    n = z.shape[0]
    codes = z.codes if isinstance(z, IndexedDesign) else torch.arange(n, device=g.matrix.device)
    return g.places(codes)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """Groups of rows (n,), from 0, so that every part's blocks are within one."""
    found = blocks[0].unique(return_inverse=True)[1]
    for block in blocks[1:]:
        other = block.unique(return_inverse=True)[1]
        for fine, coarse in ((found, other), (other, found)):
            if _nests(fine, coarse):
                found = coarse
                break
        else:
            raise InputError("the blocked solver needs residual blocks that are nested")
    return found


def _nests(fine: Tensor, coarse: Tensor) -> bool:
    """Whether rows of one fine group are of one coarse group, codes (n,) each."""
    first = torch.zeros_like(coarse).scatter_(0, fine, coarse)
    return bool((first[fine] == coarse).all())


def _bucket(rows: Tensor, places: Sequence[tuple[Tensor, Tensor]]) -> _Bucket:
    # Rows in the order of their positions, so that equal groups are seen to be equal.
    for _, position in reversed(places):
        order = position[rows].argsort(dim=1, stable=True)
        rows = rows.gather(1, order)
    keys = []
    for block, position in places:
        local = block[rows]
        keys += [position[rows], (local[:, :, None] == local[:, None, :]).long().argmax(2)]
    stacked = torch.stack(keys, 1)  # (groups, keys, m)
    pattern = torch.zeros_like(rows[:, 0])
    for key in stacked.flatten(1).unbind(1):
        # One column at a time: far faster than distinct rows of a matrix.
        pattern = (pattern * (int(key.max()) + 1) + key).unique(return_inverse=True)[1]
    count = torch.bincount(pattern)
    example = torch.zeros_like(count).scatter_(0, pattern, torch.arange(len(rows)).to(rows))
    distinct = stacked[example]
    positions = [distinct[:, 2 * i] for i in range(len(places))]
    joint = [
        distinct[:, 2 * i + 1, :, None] == distinct[:, 2 * i + 1, None, :]
        for i in range(len(places))
    ]
    return _Bucket(rows, pattern, positions, joint, count)
