"""Responses of which the likelihood has no maximum: of one category in each level, or without spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.families import Beta, Binomial, Family, Gamma, Ordinal
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["SEPARATED", "Separation", "separated_levels", "separation_of", "told_exactly"]

#: What is said where no grouping factor alone is at fault.
SEPARATED = (
    "the data are separated: a combination of the fixed effects tells responses apart without "
    "error, so that its coefficient has no finite estimate"
)


@dataclass(frozen=True)
class Separation:
    """How many levels of a term have responses of one category alone.

    Attributes:
        name: of the term.
        alike: those levels.
        levels: all levels that have rows.
    """

    name: str
    alike: int
    levels: int


def separated_levels(family: Family, y: Tensor, terms: Sequence[Term]) -> list[Separation]:
    """The terms of grouped rows of a binary or ordered response, with what their levels have; none of
    other responses.

    Args:
        family: of the response.
        y: the responses, with the family's inputs where it has some.
        terms: of the random effects, in their order.
    """
    if not isinstance(family.base, Binomial | Ordinal):
        return []
    value, found = family.observed(y).to(torch.float64), []
    for term in terms:
        if not isinstance(term.design, IndexedDesign):
            continue
        codes = term.design.codes.to(value.device)
        kept = codes >= 0
        levels, at = codes[kept].unique(return_inverse=True)
        if not len(levels) < len(at):
            continue  # a row of its own for each level
        ends = [
            value.new_zeros(len(levels)).scatter_reduce(0, at, value[kept], how, include_self=False)
            for how in ("amin", "amax")
        ]
        alike = ends[0] == ends[1]
        if isinstance(family.base, Binomial):
            alike &= (ends[0] == 0) | (ends[0] == 1)  # a share is of both
        found.append(Separation(term.name, int(alike.sum()), len(levels)))
    return found


def separation_of(family: Family, y: Tensor, terms: Sequence[Term]) -> str:
    """What separates responses of which the likelihood has no maximum: the levels of a grouping factor
    where all of them have one category each, else the fixed effects.

    Args:
        family, y, terms: as :func:`separated_levels` takes them.
    """
    for found in separated_levels(family, y, terms):
        if found.alike == found.levels:
            return (
                f"the data are separated: each of the {found.levels} levels of {found.name} has "
                f"responses of one category alone, so that the variance of {found.name} has no finite "
                "estimate"
            )
    return SEPARATED


def told_exactly(family: Family, like: Tensor, end: float) -> str:
    """What is said of a precision or a dispersion without units that has gone beyond an end of its range, as
    it does where the linear predictor tells the responses without error; nothing if none has.

    Args:
        family: at the parameters in question.
        like: a tensor of their dtype and device.
        end: how large, or how small as its inverse, is too far.
    """
    if not isinstance(family, Beta | Gamma):
        return ""
    phi = float(family.natural("phi", like).detach())
    if 1 / end < phi < end:
        return ""
    return (
        f"the likelihood has no maximum: phi is {phi:.2g} where the steps ended, as the linear predictor "
        "tells the responses without error"
    )
