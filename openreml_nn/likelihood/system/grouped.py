"""What solvers in the space of the random effects share: the data, prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import Evaluation, Problem
from openreml_nn.likelihood.residual import White
from openreml_nn.likelihood.system.placement import System
from openreml_nn.likelihood.system.roles import Roles, grid_of, separated
from openreml_nn.likelihood.system.square_root import SquareRootEvaluation
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.design import DenseDesign, Design, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["GroupedProblem"]


class GroupedProblem(Problem):
    r"""Depends on the matrices of the residual and on that of each random term.

    In names, 1 is the eliminated factor (``levels`` levels of k effects), 2
    the other random terms (q columns), f the p columns of Q and then y; rows
    are first made independent by R. With a scalar residual, its variance s
    factors out.
    """

    takes_data = True

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        self.constant: tuple[System, White] | None = None
        self.terms = list(terms)
        terms = separated(terms)
        self.roles = roles = Roles.of(terms)
        self.residual = roles.residual
        self.designs = [self.white_as_is(terms[i].design) for i in roles.random]
        self.f = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        # Levels and effects of the other terms whose levels are independent, None for the rest.
        self.grids = [grid_of(terms[i]) for i in roles.rest]
        self.forms = [terms[i].covariance for i in roles.random]
        ones = self.designs[: len(roles.eliminated)]
        self.levels = ones[0].levels if ones and isinstance(ones[0], IndexedDesign) else 0
        self.widths = [design.shape[1] // self.levels for design in ones]
        self.k = sum(self.widths)
        self.sizes = [design.shape[1] for design in self.designs[len(ones) :]]
        self.q = sum(self.sizes)

    @property
    def order(self) -> list[int]:
        """Where the random terms are in the order of their roles."""
        return self.roles.order

    def white_as_is(self, design: Design) -> Design:
        """The design, without structure where R would mix its levels."""
        if isinstance(design, IndexedDesign) and not self.residual.is_within(design.codes):
            return DenseDesign(design.dense(self.fixed.y))
        return design

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        random = [terms[i].covariance.matrix for i in self.roles.random]
        return [*self.residual.matrices(terms), *random]

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        placed = zip(self.terms, terms, strict=True)
        return SquareRootEvaluation.of(
            self, [replace(own, covariance=term.covariance) for own, term in placed]
        )

    def by_matrix(self, parts: Sequence[Tensor]) -> list[Tensor]:
        at = self.residual.at if self.residual.moves else self.residual.at[:1]
        return [parts[i] for i in (*at, *self.roles.random)]

    def by_term(self, parts: Sequence[Tensor]) -> list[Tensor]:
        at = self.residual.at if self.residual.moves else self.residual.at[:1]
        found = dict(zip((*at, *self.roles.random), parts, strict=True))
        # With one variance the derivative is that of the sum of the residual's terms.
        return [found.get(i, parts[0][:0]) for i in range(len(self.terms))]

    def with_fixed(self, fixed: FixedPart) -> Problem:
        found = super().with_fixed(fixed)
        assert isinstance(found, GroupedProblem)
        found.f = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        if self.constant is not None:
            system, white = self.constant
            A1f, A2f, Aff = found.row_products(white, white.rows(found.f))
            found.constant = replace(system, A1f=A1f, A2f=A2f, Aff=Aff), white
        return found

    def system(self, residual: Sequence[Tensor]) -> tuple[System, White, Tensor]:
        """The system of white rows, R without a scalar residual's variance, and that variance."""
        raise NotImplementedError

    # ------------------------------------------------------------------ helpers

    def row_effects(self, x1: Tensor, x2: Tensor) -> Tensor:
        r""":math:`Z_1 x_1 + Z_2 x_2` over the rows, of effects (levels * k, m) and (q, m)."""
        split = len(self.widths)
        found = x1.new_zeros(self.n, max(x1.shape[1], x2.shape[1]))
        pieces = list(x2.split(self.sizes)) if self.sizes else []
        if split:
            by_level = x1.unflatten(0, (self.levels, self.k)).split(self.widths, 1)
            pieces = [*(piece.flatten(0, 1) for piece in by_level), *pieces]
        for design, piece in zip(self.designs, pieces, strict=True):
            found = found + design.matmul(piece)
        return found

    def row_products(self, white: White, F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Products of white rows F (n, m) with :math:`[Z_1 | Z_2 | f]`."""
        back = white.back(F)
        split = len(self.widths)
        found = [design.t_matmul(back) for design in self.designs]
        ones = [x.unflatten(0, (self.levels, -1)) for x in found[:split]]
        by_level = (self.levels, self.k, F.shape[1])
        T1 = torch.cat(ones, 1) if ones else F.new_zeros(by_level)
        T2 = torch.cat(found[split:]) if found[split:] else F.new_zeros(0, F.shape[1])
        return T1, T2, self.f.mT @ back

    def joint_blocks(self, parts: Sequence[Covariance], eye: Tensor) -> Tensor:
        """Blocks of the eliminated factor, its terms' blocks along the diagonal."""
        if not parts:
            return eye[None]
        blocks = [part.blocks(self.levels, w) for part, w in zip(parts, self.widths, strict=True)]
        if len(blocks) == 1:
            return blocks[0]
        count = max(len(block) for block in blocks)
        joint = eye.new_zeros(count, self.k, self.k)
        at = 0
        for block in blocks:
            w = block.shape[1]
            pad = (at, self.k - at - w, at, self.k - at - w)
            joint = joint + torch.nn.functional.pad(block, pad)
            at += w
        return joint

    def multiply(self, parts: Sequence[Covariance], x: Tensor, transpose: bool = False) -> Tensor:
        """The other terms' block-diagonal matrix times ``x`` (q, m)."""
        if not parts:
            return x
        if len(parts) == 1:
            return parts[0].multiply(x, transpose)
        pieces = zip(parts, x.split(self.sizes), strict=True)
        return torch.cat([part.multiply(piece, transpose) for part, piece in pieces])

    def along_blocks(
        self, parts: Sequence[Covariance], derivatives: Sequence[Tensor], u: Tensor
    ) -> Tensor:
        """Each derivative of the eliminated terms' matrices times ``u``, (m, levels, k)."""
        found = []
        for part, dG, x in zip(parts, derivatives, u.split(self.widths, 1), strict=True):
            blocks = (part.with_matrix(d).blocks(*x.shape) for d in dG)
            found.append(torch.stack([(block @ x[:, :, None])[:, :, 0] for block in blocks]))
        return torch.cat(found, 2)

    def along(
        self, parts: Sequence[Covariance], derivatives: Sequence[Tensor], u: Tensor
    ) -> Tensor:
        """Each derivative of the other terms' matrices times ``u``, (m, q)."""
        found = []
        for part, dG, x in zip(parts, derivatives, u.split(self.sizes), strict=True):
            moved = [part.along(d, x[:, None])[:, 0] for d in dG]
            found.append(torch.stack(moved))
        return torch.cat(found, 1)

    def split_blocks(self, blocks: Tensor) -> list[Tensor]:
        """From (levels, k, k) to the diagonal blocks of each eliminated term."""
        found, at = [], 0
        for w in self.widths:
            found.append(blocks[:, at : at + w, at : at + w])
            at += w
        return found

    def own_products(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """The blocks of each term in :math:`a b^\\top`, by level, for a and b of shape (q, m)."""
        pieces = zip(a.split(self.sizes), b.split(self.sizes), self.grids, strict=True)
        return [
            x @ y.mT if grid is None else x.unflatten(0, grid) @ y.unflatten(0, grid).mT
            for x, y, grid in pieces
        ]
