r"""Hypotheses of the terms of a formula: contrasts L of which :math:`L\beta = 0` says that a term has
no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.inference.refit import source_of
from openreml_nn.support.errors import InputError
from openreml_nn.table.matrix import Coding
from openreml_nn.table.syntax import bare

__all__ = ["TYPES", "term_contrasts"]

Term = Sequence[Coding]


def term_contrasts(result: Result, kind: int) -> dict[str, Tensor]:
    """Contrasts (q, p) of the kept columns for each term, by its name; the intercept has none.

    Args:
        result: a fit with a formula.
        kind: 1, 2 or 3, see :func:`openreml_nn.inference.anova`.

    Raises:
        InputError: if there is no formula, or means that type 3 compares are not estimable.
    """
    source = source_of(result)
    if result.encoder is None:
        raise InputError("`result` has no formula: tests of its terms are for fits by lmm()")
    rows = source.cells.iloc[:1] if len(source.cells) else source.cells.reindex([0])
    terms = result.encoder.fixed_codings(rows.assign(**source.means))
    # Thresholds stand for the intercept of an ordinal response, after which other terms come.
    held = [0] if result.family == "ordinal" and source.names[:1] == ("(Intercept)",) else []
    columns = [*held, *result.fixed.columns]
    if kind == 3 and len(columns) < source.X.shape[1]:
        dropped = [name for j, name in enumerate(source.names) if j not in columns]
        raise InputError(
            f"`type` is 3, but the data do not have all cells of the fixed effects ({dropped[0]!r} "
            "was dropped), so that means which type 3 compares are not estimable: use type=2 or 1"
        )
    X = source.X.detach().to(result.fixed.covariance)
    if source.weights is not None:
        # Rows count by the prior weights of a response that is not Gaussian.
        X = X * source.weights.to(X).sqrt()[:, None]
    found = TYPES[kind](X, columns, terms)
    return {name: L[:, len(held) :] for name, L in found.items()}


def _sequential(X: Tensor, columns: Sequence[int], terms: Sequence[Term]) -> dict[str, Tensor]:
    """Each term after those before it."""
    places = _kept_places(columns, terms)
    order = [j for at in places for j in at]
    by_column = _after_those_before(X[:, columns], order)
    named = zip(_names(terms), terms, places, strict=True)
    return {name: by_column[at] for name, term, at in named if term and at}


def _marginal(X: Tensor, columns: Sequence[int], terms: Sequence[Term]) -> dict[str, Tensor]:
    """Each term after all others that do not contain it."""
    places, kept = _kept_places(columns, terms), X[:, columns]
    eye = torch.eye(kept.shape[1], dtype=X.dtype, device=X.device)
    found = {}
    for name, term, own in zip(_names(terms), terms, places, strict=True):
        if not term or not own:
            continue
        within = [i for i, other in enumerate(terms) if _contains(other, term)]
        others = [j for i, at in enumerate(places) if i not in within for j in at if j not in own]
        after = [j for i in within for j in places[i]]
        order = [*others, *own, *after]
        # What no term contains, is last: its coefficients themselves are zero.
        found[name] = (_after_those_before(kept, order) if after else eye)[own]
    return found


def _of_means(X: Tensor, columns: Sequence[int], terms: Sequence[Term]) -> dict[str, Tensor]:
    """Each term's effects averaged over the levels of the factors with which others cross it."""
    starts = [0]
    for term in terms:
        starts.append(starts[-1] + _size(term))
    found = {}
    for name, term in zip(_names(terms), terms, strict=True):
        if not term:
            continue
        L = X.new_zeros(0, X.shape[1])
        for other, start in zip(terms, starts, strict=False):
            if other is not term and not _contains(other, term):
                continue
            part = _averaged(term, other, X)
            if not len(L):
                L = X.new_zeros(len(part), X.shape[1])
            L[:, start : start + part.shape[1]] = part
        found[name] = L
    return found


TYPES: dict[int, Callable[[Tensor, Sequence[int], Sequence[Term]], dict[str, Tensor]]] = {
    1: _sequential,
    2: _marginal,
    3: _of_means,
}


def _names(terms: Sequence[Term]) -> list[str]:
    """The names of terms, of columns without backticks, as coefficients have them, but for those that
    would then be the same."""
    written = [":".join(coding.variable for coding in term) for term in terms]
    plain = [":".join(bare(coding.variable) for coding in term) for term in terms]
    return [
        own if plain.count(short) > 1 else short for own, short in zip(written, plain, strict=True)
    ]


def _size(term: Term) -> int:
    size = 1
    for coding in term:
        size *= coding.columns
    return size


def _kept_places(columns: Sequence[int], terms: Sequence[Term]) -> list[list[int]]:
    """Positions of each term's columns among those that were kept."""
    position = {column: i for i, column in enumerate(columns)}
    found, start = [], 0
    for term in terms:
        columns = range(start, start + _size(term))
        found.append([position[j] for j in columns if j in position])
        start += len(columns)
    return found


def _after_those_before(X: Tensor, order: Sequence[int]) -> Tensor:
    r"""Rows L (p, p), of which row j says that column j has no effect after those before it.

    With :math:`X = QR` in that order they are the rows of R, each divided by its diagonal entry.
    """
    R = torch.linalg.qr(X[:, list(order)]).R
    L = torch.zeros_like(R)
    scaled = R / R.diagonal()[:, None]
    at = torch.tensor(order, device=X.device)
    L[at[:, None], at] = scaled
    return L


def _contains(other: Term, term: Term) -> bool:
    """Whether a term is another one crossed with factors."""
    names = {coding.variable for coding in term}
    more = [coding for coding in other if coding.variable not in names]
    return len(other) == len(term) + len(more) > len(term) and all(
        coding.levels is not None for coding in more
    )


def _averaged(term: Term, other: Term, like: Tensor) -> Tensor:
    """What the columns of a term that contains another add to the effects of that one, on average.

    A factor that is coded by contrasts has as effects the differences of its levels from the
    first; one with an indicator of each level, the levels themselves; a factor of the
    containing term alone has one effect, the mean over its levels.
    """
    own = {coding.variable: coding for coding in term}
    order = [coding.variable for coding in term]
    found, rows = like.new_ones(1, 1), []
    for coding in other:
        if coding.levels is None:
            part = torch.eye(coding.columns, dtype=like.dtype, device=like.device)
        else:
            levels = torch.from_numpy(coding.levels).to(like)
            if coding.variable not in own:
                part = levels.mean(0, keepdim=True)
            elif own[coding.variable].is_full:
                part = levels
            else:
                part = levels[1:] - levels[0]
        # Columns of the first variable are the fastest, and so are rows.
        found = torch.kron(part.contiguous(), found.contiguous())
        rows.append((coding.variable, len(part)))
    # The rows in the order of the term's own variables.
    grid = found.reshape(*[size for _, size in reversed(rows)], -1)
    names = [name for name, _ in reversed(rows)]
    wanted = [names.index(name) for name in reversed(order)]
    rest = [i for i in range(len(names)) if i not in wanted]
    return grid.permute(*rest, *wanted, len(names)).reshape(-1, found.shape[1])
