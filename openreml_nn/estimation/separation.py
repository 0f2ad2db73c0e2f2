"""Responses of which the likelihood has no maximum: of one category in each level, or without spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openreml_nn.families import Beta, Binomial, Family, Gamma, Ordinal
from openreml_nn.terms.design import DenseDesign, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = [
    "Separation",
    "separated_levels",
    "separation_of",
    "tells_responses",
    "told_apart",
    "told_exactly",
]

#: With more rows than these no linear programme is solved to tell which effects separate responses.
_MANY_ROWS = 20_000
#: A row is told apart where its predictor is beyond this, of coefficients of one at most.
_APART = 1e-4
#: Responses are told without error where this part of what the fixed effects leave, or less, is left,
_EXACT = 1e-8
#: after so many steps of a least-squares method, which finds it for a few factors.
_STEPS = 60


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


def told_apart(family: Family, y: Tensor, term: Term) -> int:
    """How many levels of grouped rows have binary responses that their effects tell apart without error,
    those of one category among them.

    Args:
        family: of binary responses.
        y: responses (n,).
        term: grouped rows, of a name that :func:`separated_levels` gives.
    """
    assert isinstance(term.design, IndexedDesign)
    value, codes, z = family.observed(y).to(torch.float64), term.design.codes, term.design.values
    z = value.new_ones(len(value), 1) if z is None else z
    kept = (codes >= 0).nonzero()[:, 0]
    by_level = kept[codes[kept].argsort(stable=True)]
    sizes = codes[kept].unique(return_counts=True)[1].tolist()
    parts = zip(z[by_level].split(sizes), value[by_level].split(sizes), strict=True)
    return sum(_tells_apart(columns, shares) for columns, shares in parts)


def _tells_apart(columns: Tensor, shares: Tensor) -> bool:
    """Whether some combination of columns (n, p) is nowhere negative where the share of successes is 1,
    nowhere positive where it is 0, zero where it is between, and not zero everywhere: then binary
    responses have no maximum (Albert and Anderson, Biometrika 71 (1984) 1)."""
    from scipy.optimize import linprog

    unit = (columns / columns.abs().amax(0).clamp(min=1e-300)).double().numpy(force=True)
    share = shares.numpy(force=True)
    sign = (share == 1) * 1.0 - (share == 0)
    rows, between = sign[:, None] * unit, sign == 0
    ties = {"A_eq": unit[between], "b_eq": np.zeros(between.sum())} if between.any() else {}
    found = linprog(
        -rows.sum(0), A_ub=-rows[~between], b_ub=np.zeros((~between).sum()), bounds=(-1, 1), **ties
    )
    return found.status == 0 and bool((rows @ found.x).max(initial=0.0) > _APART)


def _of_thresholds(columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Ordered responses as one binary response for each threshold, of which the column comes first."""
    ends = values.unique()[:-1]
    above = (values > ends[:, None]).to(columns)  # (thresholds, n)
    own = torch.eye(len(ends)).to(columns).repeat_interleave(len(values), 0)
    return torch.cat([own, columns.repeat(len(ends), 1)], 1), above.flatten()


def separation_of(family: Family, y: Tensor, terms: Sequence[Term], X: Tensor) -> str:
    """What separates responses of which the likelihood has no maximum: the levels of a grouping factor
    where all of them have one category each, the fixed effects, or these with the random ones.

    Args:
        family: of the responses.
        y: responses (n,).
        terms: random effects of the linear predictor.
        X: model matrix (n, p) of the fixed effects.
    """
    for found in separated_levels(family, y, terms):
        if found.alike == found.levels:
            return (
                f"the data are separated: each of the {found.levels} levels of {found.name} has "
                f"responses of one category alone, so that the variance of {found.name} has no finite "
                "estimate"
            )
    columns, value = X, family.observed(y).to(X)
    if len(X) > _MANY_ROWS:
        what = "the fixed effects, or of them with the random ones,"
    else:
        if isinstance(family.base, Ordinal):
            columns, value = _of_thresholds(columns, value)
        alone = bool(columns.shape[1]) and _tells_apart(columns, value)
        what = "the fixed effects" if alone else "the fixed effects with the random ones"
    return (
        f"the data are separated: a combination of {what} tells responses apart without error, so that "
        "its coefficient has no finite estimate"
    )


def tells_responses(
    family: Family, y: Tensor, offset: Tensor, terms: Sequence[Term], X: Tensor
) -> bool:
    """Whether fewer effects than there are rows tell the responses without error but for rounding, so that
    the likelihood rises without end as the family's spread falls.

    Args:
        family: of the responses.
        y: responses (n,).
        terms: random effects of the linear predictor.
        X: model matrix of the fixed effects (n, p).
        offset: (n,) known part of the linear predictor.

    Reference:
        Paige and Saunders, ACM Transactions on Mathematical Software 8 (1982) 43, for least squares by
        products alone.
    """
    value = family.exact_predictor(y)
    if value is None or not bool(torch.isfinite(value).all()):
        return False
    from scipy.sparse.linalg import LinearOperator, lsqr

    designs = [DenseDesign(X), *(term.design for term in terms)]
    sizes = [design.shape[1] for design in designs]
    shape = len(value), sum(sizes)
    if shape[1] >= shape[0]:
        return False

    def effect(x: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(x).to(X)[:, None].split(sizes)
        moved = (design.matmul(part) for design, part in zip(designs, parts, strict=True))
        return sum(moved, X.new_zeros(shape[0], 1)).double().numpy(force=True)

    def transposed(r: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(r).to(X).reshape(-1, 1)
        found = torch.cat([design.t_matmul(rows) for design in designs])
        return found.double().numpy(force=True)

    target = (value - offset).double().numpy(force=True)
    # A response's place says nothing of its spread: what fixed effects tell is taken away first.
    fixed = X.double().numpy(force=True)
    first = target - fixed @ np.linalg.lstsq(fixed, target, rcond=None)[0]
    Z = LinearOperator(shape, matvec=effect, rmatvec=transposed, dtype=np.float64)
    left = lsqr(Z, first, atol=_EXACT / 10, btol=_EXACT / 10, iter_lim=_STEPS)[3]
    rounding = 4 * torch.finfo(y.dtype).eps * np.linalg.norm(target)
    return bool(left <= _EXACT * np.linalg.norm(first) + rounding)


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
