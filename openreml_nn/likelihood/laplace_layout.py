"""Where the random effects of some terms stand, and their covariances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openreml_nn.likelihood.system.crossproducts import Pattern, same_codes
from openreml_nn.likelihood.system.elimination import root
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.likelihood.system.roles import by_levels, grid_of
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.design import Design, IdentityDesign, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["Prior", "Stacked", "times_blocks", "with_levels"]


class Stacked:
    r"""The designs of the random terms and where their effects stand.

    A vector of effects is flat: first those of the eliminated factor, level by level, then those of
    the other terms.

    Args:
        terms: the random terms, at least one.
        eliminates: whether a factor is eliminated.

    Attributes:
        order: positions of the terms, those eliminated first.
        designs: their designs.
        effects: effects of a level of each.
        levels, k: levels of the eliminated factor, and effects of each.
        q: columns of the other terms.
    """

    def __init__(self, terms: Sequence[Term], eliminates: bool = True) -> None:
        effects = [term.effects for term in terms]
        terms = [with_levels(term) for term in terms]
        grids = [grid_of(term) if eliminates else None for term in terms]
        factors: list[list[int]] = []
        for i, grid in enumerate(grids):
            for factor in factors if grid is not None else ():
                one, two = terms[factor[0]].design, terms[i].design
                assert isinstance(one, IndexedDesign) and isinstance(two, IndexedDesign)
                if same_codes(one, two):
                    factor.append(i)
                    break
            else:
                if grid is not None:
                    factors.append([i])
        width = [sum(terms[i].design.shape[1] for i in factor) for factor in factors]
        first = factors[width.index(max(width))] if factors else []
        rest = [i for i in range(len(terms)) if i not in first]
        self.order = [*first, *rest]
        self.split = len(first)
        self.grids = [grids[i] for i in rest]
        self.effects = [effects[i] for i in self.order]
        self.designs = [terms[i].design for i in self.order]
        self.widths = [self.designs[j].shape[1] // self._levels() for j in range(self.split)]
        self.levels, self.k = self._levels(), sum(self.widths)
        self.sizes = [design.shape[1] for design in self.designs[self.split :]]
        self.q = sum(self.sizes)
        self.pattern = Pattern.of(self.designs)

    def _levels(self) -> int:
        first = self.designs[0] if self.split else None
        return first.levels if isinstance(first, IndexedDesign) else 0

    def grid(self, j: int) -> tuple[int, int] | None:
        """Levels and effects of the j-th term in order, None where its levels are not independent."""
        if j < self.split:
            return self.levels, self.widths[j]
        return self.grids[j - self.split]

    @property
    def size(self) -> int:
        """Number of random effects."""
        return self.levels * self.k + self.q

    def of_designs(self, terms: Sequence[Term]) -> list[Design]:
        """The designs of the same terms, with their graph, in order."""
        return [with_levels(terms[i]).design for i in self.order]

    def split_flat(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From flat effects (size, m) to (levels, k, m) and (q, m)."""
        one, two = x[: self.levels * self.k], x[self.levels * self.k :]
        return one.reshape(self.levels, self.k, x.shape[1]), two

    def joined(self, one: Tensor, two: Tensor) -> Tensor:
        """From (levels, k, m) and (q, m) to flat effects."""
        return torch.cat([one.flatten(0, 1), two]) if self.q else one.flatten(0, 1)

    def by_term(self, x: Tensor) -> list[Tensor]:
        """Effects (size, m) of each term, in order."""
        one, two = self.split_flat(x)
        found = [part.flatten(0, 1) for part in one.split(self.widths, 1)] if self.split else []
        return [*found, *two.split(self.sizes)]

    def rows(self, x: Tensor, designs: Sequence[Design] | None = None) -> Tensor:
        r""":math:`Z x` for flat effects (size, m)."""
        found: Tensor | None = None
        for design, part in zip(designs or self.designs, self.by_term(x), strict=True):
            product = design.matmul(part)
            found = product if found is None else found + product
        assert found is not None
        return found

    def t_rows(self, v: Tensor, designs: Sequence[Design] | None = None) -> Tensor:
        r""":math:`Z^\top v` for (n, m), flat."""
        found = [design.t_matmul(v) for design in designs or self.designs]
        ones = [x.unflatten(0, (self.levels, -1)) for x in found[: self.split]]
        one = torch.cat(ones, 1) if ones else v.new_zeros(self.levels, self.k, v.shape[1])
        rest = found[self.split :]
        return self.joined(one, torch.cat(rest) if rest else v.new_zeros(0, v.shape[1]))


class Prior:
    r"""The covariances of the random effects, :math:`G = \Lambda\Lambda^\top`.

    Args:
        layout: where the effects stand.
        covariances: of the terms, in the layout's order.
    """

    def __init__(self, layout: Stacked, covariances: Sequence[Covariance]) -> None:
        self.layout = layout
        self.first = list(covariances[: layout.split])
        self.rest = list(covariances[layout.split :])

    @classmethod
    def of(cls, layout: Stacked, terms: Sequence[Term]) -> Prior:
        """That of terms, without their graph."""
        return cls(layout, [terms[i].detach().covariance for i in layout.order])

    def roots(self, terms: Sequence[Term]) -> Prior:
        r""":math:`\Lambda` of terms in the place of G.

        Raises:
            NotPositiveDefiniteError: if a covariance is not positive semi-definite.
        """
        return Prior(self.layout, [root(terms[i].detach()) for i in self.layout.order])

    def blocks(self, like: Tensor) -> Tensor:
        """Blocks of the eliminated factor, (levels or 1, k, k)."""
        layout = self.layout
        parts = [
            part.blocks(layout.levels, width)
            for part, width in zip(self.first, layout.widths, strict=True)
        ]
        if not parts:
            return like.new_zeros(1, 0, 0)
        if len(parts) == 1:
            return parts[0]
        joint = like.new_zeros(max(map(len, parts)), layout.k, layout.k)
        at = 0
        for part in parts:
            after = layout.k - at - part.shape[1]
            joint = joint + torch.nn.functional.pad(part, (at, after, at, after))
            at += part.shape[1]
        return joint

    def times(self, x: Tensor, transpose: bool = False) -> Tensor:
        """The whole matrix times flat effects (size, m)."""
        one, two = self.layout.split_flat(x)
        if self.first:
            blocks = self.blocks(x)
            one = times_blocks(blocks.mT if transpose else blocks, one)
        return self.layout.joined(one, self.times_rest(two, transpose))

    def times_rest(self, x: Tensor, transpose: bool = False) -> Tensor:
        """The other terms' part times (q, m)."""
        pieces = zip(self.rest, x.split(self.layout.sizes), strict=True)
        found = [part.multiply(piece, transpose) for part, piece in pieces]
        return torch.cat(found) if len(found) > 1 else found[0] if found else x

    def sandwich(self, square: Tensor, by: Partition, transpose: bool = False) -> Tensor:
        r""":math:`\Lambda^\top S \Lambda` of the other terms, or with the transposes, for symmetric S by
        groups of columns."""
        if all(root.is_scalar for root in self.rest):
            scale = by.spread(self.times_rest(square.new_ones(self.layout.q, 1)))
            return square * scale * scale.mT
        half = by.spread(self.times_rest(by.collect(square), not transpose))
        return by.spread(self.times_rest(by.collect(half.mT), not transpose))


def times_blocks(a: Tensor, b: Tensor) -> Tensor:
    """Products of blocks; of one entry they are numbers."""
    return a * b if a.shape[-2:] == (1, 1) else a @ b


def with_levels(term: Term) -> Term:
    """The term with a column for each of the effects of a level; an effect of each row is one of a factor
    that has a level for each."""
    if isinstance(term.design, IdentityDesign):
        codes = torch.arange(term.design.shape[0], device=term.covariance.matrix.device)
        term = replace(term, design=IndexedDesign(codes, None, len(codes), absent=False))
    return by_levels(term)
