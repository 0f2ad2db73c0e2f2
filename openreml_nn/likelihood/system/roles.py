"""Which term of a covariance does what in the space of the random effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from openreml_nn.likelihood.residual import Residual
from openreml_nn.likelihood.system.crossproducts import same_codes
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.term import Term, residual_terms

__all__ = ["Roles", "by_levels", "grid_of", "separated", "steps_of"]

#: A covariance of more effects than these within a level is taken as dense.
_MOST_EFFECTS = 64


@dataclass(frozen=True)
class Roles:
    """Which term does what; positions refer to the list of terms.

    Attributes:
        residual: the covariance R of the residuals.
        eliminated: terms of the grouping factor that is eliminated first; they
            share its level codes, and their effects stand side by side.
        rest: the other random terms.
    """

    residual: Residual
    eliminated: list[int]
    rest: list[int]

    @classmethod
    def of(cls, terms: Sequence[Term]) -> Roles:
        """Give each term its role.

        Raises:
            InputError: if the residuals are neither independent nor within groups.
        """
        residual = Residual.of(terms)
        random = [i for i in range(len(terms)) if i not in residual.at]
        factors: list[list[tuple[int, IndexedDesign]]] = []
        for i in random:
            design = terms[i].design
            # Rows that R makes dependent must be of one level, or levels would mix.
            if not isinstance(design, IndexedDesign) or not _separable(terms[i]):
                continue
            if not residual.is_within(design.codes):
                continue
            for factor in factors:
                if same_codes(factor[0][1], design):
                    factor.append((i, design))
                    break
            else:
                factors.append([(i, design)])
        width = [sum(design.shape[1] for _, design in factor) for factor in factors]
        eliminated = [i for i, _ in factors[width.index(max(width))]] if factors else []
        return cls(residual, eliminated, [i for i in random if i not in eliminated])

    @property
    def random(self) -> list[int]:
        """The random terms, those eliminated first."""
        return [*self.eliminated, *self.rest]

    @property
    def order(self) -> list[int]:
        """Where the random terms are in the order of their roles."""
        return [sorted(self.random).index(i) for i in self.random]

    def sizes(self, terms: Sequence[Term]) -> tuple[int, int]:
        """Levels of the eliminated factor and effects of each, (0, 1) if there is none."""
        if not self.eliminated:
            return 0, 1
        levels = getattr(terms[self.eliminated[0]].design, "levels", 1)
        return levels, sum(terms[i].design.shape[1] for i in self.eliminated) // levels


def steps_of(
    terms: Sequence[Term], roles: Roles, p: int, groups: Partition | None = None
) -> tuple[str, ...]:
    """What is eliminated, in order; ``groups`` are those of the other terms' columns, None where
    they are not factorised."""
    steps = []
    if roles.residual.moves:
        block = f"{roles.residual.size} x {roles.residual.size}"
        steps.append(f"residuals: blocks of at most {block}, anew at each evaluation")
    if roles.eliminated:
        levels, k = roles.sizes(terms)
        names = " and ".join(repr(terms[i].name) for i in roles.eliminated)
        steps.append(f"{names}: {levels} blocks of {k} x {k}")
    if roles.rest:
        q = sum(terms[i].design.shape[1] for i in roles.rest)
        names = ", ".join(repr(terms[i].name) for i in roles.rest)
        if groups is None:
            steps.append(f"{names}: conjugate gradients, {q} columns")
        elif groups.whole:
            steps.append(f"{names}: dense, {q} x {q}")
        else:
            size = f"{groups.size} x {groups.size}"
            steps.append(f"{names}: {groups.count} groups of at most {size}")
    return (*steps, f"fixed effects: dense, {p} x {p}")


def _separable(term: Term) -> bool:
    """Whether levels are independent, so that the term is block diagonal by level."""
    z, g = term.design, term.covariance
    if not isinstance(z, IndexedDesign):
        return False
    return g.block > 0 and z.effects % g.block == 0


def separated(terms: Sequence[Term]) -> list[Term]:
    r"""Terms with independent levels seen as such.

    A covariance of the cells of levels and occasions,
    :math:`I \otimes \Sigma` with a column for each cell, is that of so many
    effects of each level.
    """
    residual = residual_terms(terms)
    return [term if i in residual else by_levels(term) for i, term in enumerate(terms)]


def by_levels(term: Term) -> Term:
    """The term with a column for each of the effects of a level, where its levels are independent."""
    z, k = term.design, term.covariance.width
    if not isinstance(z, IndexedDesign) or z.effects != 1 or not 1 < k <= _MOST_EFFECTS:
        return term
    values = torch.nn.functional.one_hot(z.codes % k, k).to(term.covariance.matrix.dtype)
    if z.values is not None:
        values = values * z.values
    return replace(term, design=IndexedDesign(z.codes // k, values, z.levels // k))


def grid_of(term: Term) -> tuple[int, int] | None:
    """Levels and effects of a term whose levels are independent."""
    z = term.design
    return (z.levels, z.effects) if _separable(term) and isinstance(z, IndexedDesign) else None
