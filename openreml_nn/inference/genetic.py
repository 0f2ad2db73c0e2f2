"""Heritability and the reliability of BLUPs."""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Component, Result
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.refit import Refit, family_of, source_of
from openreml_nn.inference.shares import effect_share, variance_shares
from openreml_nn.support.checks import check_choice, check_instance
from openreml_nn.support.errors import InputError
from openreml_nn.support.spectrum import eigenvalues
from openreml_nn.terms.covariance import DiagonalCovariance, RepeatedCovariance
from openreml_nn.terms.term import Term

__all__ = ["Heritability", "heritability", "moments", "prior_variances", "reliability"]

METHODS = ("plain", "cullis", "generalised")
#: Effects beyond which the dense covariance of their errors is refused.
_MOST_EFFECTS = 10_000
#: Columns of G that are formed at a time.
_COLUMNS = 256
#: An eigenvalue with this little of the largest is zero.
_ZERO = 1e-8


class Heritability(NamedTuple):
    """A heritability; ``float()`` of it is the estimate.

    Attributes:
        estimate: between 0 and 1.
        std_error: its standard error by the delta method; NaN for heritabilities of means.
    """

    estimate: float
    std_error: float

    def __float__(self) -> float:
        return self.estimate


def heritability(
    result: Result, group: str | None = None, method: str = "plain", effect: str | None = None
) -> Heritability:
    r"""Heritability of a genetic effect, by one of three definitions.

    ``"plain"``: its share in the variance of a row, :math:`\sigma_g^2 / \sum_t \sigma_t^2`, with a
    standard error by the delta method; of a response that is not Gaussian on the link scale. See
    :func:`variance_shares`.

    ``"cullis"``: :math:`1 - \bar v_\Delta / (2\sigma_g^2)`, in which :math:`\bar v_\Delta` is the mean
    variance of the error of a difference between two BLUPs. For related levels
    :math:`2\sigma_g^2` is the mean variance of such a difference itself.

    ``"generalised"``: :math:`\operatorname{tr}(D) / (m - s)` with :math:`D = I - G^{-1}C` for the
    covariance G (m, m) of the effects and C of their errors, of which s eigenvalues are zero.

    The last two are of means over the design, and equal where levels are unrelated and the fixed
    effects are an intercept. They have no standard error, which is NaN: ``bootstrap(result,
    statistic=lambda r: {"h2": float(heritability(r, method="cullis"))})`` yields one. With a variance of
    zero all are 0.

    Args:
        result: a fit.
        group: the grouping factor of the genetic effect; may be left out where there is one only.
        method: ``"plain"``, ``"cullis"`` or ``"generalised"``.
        effect: which one, where a level has several, as with ``us(ped(animal) + ped(dam))`` the direct
            effect ``"animal"`` and the maternal ``"dam"``; with ``"plain"`` alone. The variance of a
            row, to which it is compared, is that of all of them with their covariances.

    Raises:
        InputError: if there is no such group or effect, several terms of the group, or several effects
            of which none is said; if the method is unknown, or another than ``"plain"`` and the
            response not Gaussian; if the rows were streamed, or there are more than 10,000 levels (not
            ``"plain"``).
        TypeError: if an argument is of another kind.

    Reference:
        Cullis, Smith and Coombes, Journal of Agricultural, Biological and Environmental Statistics
        11 (2006) 381; Oakey, Verbyla, Pitchford, Cullis and Kuchel, Theoretical and Applied
        Genetics 113 (2006) 809, eq. 9.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import john_alpha
    >>> result = lmm("yield ~ rep + (1 | gen) + (1 | rep:block)", john_alpha())
    >>> f"{float(heritability(result, 'gen', 'cullis')):.4f}"
    '0.8091'
    """
    source_of(result)
    check_choice("method", method, METHODS)
    component = _component(result, group, effect)
    if effect is not None and method != "plain":
        raise InputError(f"`effect` is {effect!r} with method {method!r}: expected 'plain'")
    if len(component.effects) > 1 and effect is not None:
        if family_of(result) is not None:
            raise InputError(f"`effect` is {effect!r} and the response not Gaussian: leave it out")
        at = next(i for i, c in enumerate(result.components) if c is component)
        return Heritability(*effect_share(result, at, component.effects.index(effect)))
    if method == "plain":
        table = variance_shares(result)
        (row,) = (i for i, c in enumerate(result.components) if c is component)
        return Heritability(float(table["share"].iloc[row]), float(table["std_error"].iloc[row]))
    refit = Refit(result)
    with torch.no_grad():
        (term,) = (t for t in refit.objective().terms() if t.name == component.name)
        G, information = moments(refit, term)
        if not bool(G.any()):
            return Heritability(0.0, nan)
        if method == "cullis":
            errors = G - G @ information @ G
            return Heritability(1 - _mean_difference(errors) / _mean_difference(G), nan)
        root = term.covariance.root().whole(len(G))
        values = eigenvalues(root.mT @ information @ root, "the information of levels")
        kept = values > _ZERO * values.max()
        return Heritability(float(values[kept].sum() / kept.sum()), nan)


def reliability(result: Result, group: str | None = None) -> pd.DataFrame:
    r"""Reliability of each BLUP, :math:`1 - \mathrm{PEV}_i / G_{ii}`, and accuracy, its square root.

    The reliability is the squared correlation of a BLUP with what it predicts. :math:`G_{ii}`
    is the effect's own variance, inbreeding included. With a variance of zero it is 0.

    Of a response that is not Gaussian both are on the scale of the link, and the error's variance is
    that of the effect given the data, the coefficients held.

    Args:
        result: a fit.
        group: a grouping factor; all by default.

    Returns:
        A data frame with the columns group, effect, level, blup, std_error (of its error),
        reliability, accuracy.

    Raises:
        InputError: if there is no such group, no random effect, or the rows were streamed.
        TypeError: if an argument is of another kind.

    Reference:
        Mrode, Linear Models for the Prediction of Animal Breeding Values (2014), section 3.3.3.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import penicillin
    >>> result = lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin())
    >>> reliability(result, "sample")[["level", "blup", "reliability"]].round(4).head(2)
      level    blup  reliability
    0     A  2.1871       0.8305
    1     B -1.0105       0.8305
    """
    source = source_of(result)
    if not result.random:
        raise InputError("`result` has no random effects, and so no BLUPs")
    groups = [c.group for c in result.components if not c.is_residual]
    if group is not None:
        check_instance("group", group, str)
        check_choice("group", group, groups)
    by_name = {c.name: c for c in result.components}
    with torch.no_grad():
        is_linear = family_of(result) is None
        found = Refit(result).objective().terms() if is_linear else source.covariance.terms()
        terms = {term.name: term for term in found}
    tables = []
    for effects in result.random:
        component = by_name[effects.name]
        if group is not None and component.group != group:
            continue
        errors = effects.variances.diagonal(dim1=1, dim2=2)  # (q, k)
        prior = prior_variances(terms[effects.name], errors.numel()).reshape(errors.shape)
        share = torch.where(prior > 0, 1 - errors / prior, 0)
        for j, effect in enumerate(component.effects):
            columns = {
                "blup": effects.values[:, j],
                "std_error": errors[:, j].clamp(min=0).sqrt(),
                "reliability": share[:, j],
                "accuracy": share[:, j].clamp(min=0).sqrt(),
            }
            numbers = {name: column.numpy(force=True) for name, column in columns.items()}
            labels = {"group": component.group, "effect": effect, "level": list(component.levels)}
            tables.append(pd.DataFrame({**labels, **numbers}))
    return pd.concat(tables, ignore_index=True)


def _component(result: Result, group: str | None, effect: str | None = None) -> Component:
    """The one component of a group, of one effect, or which has that one."""
    # What is correlated beside a nugget is the rows' and no group's.
    random = [c for c in result.components if not c.is_residual and c.name != "residual"]
    groups = list(dict.fromkeys(c.group for c in random))
    if group is None:
        if len(random) != 1:
            raise InputError(f"`group` is None: expected one of {groups}")
        return _with_one_effect(random[0], effect)
    check_instance("group", group, str)
    found = [c for c in random if c.group == group]
    if not found:
        raise InputError(f"`group` is {group!r}: expected one of {groups}")
    if len(found) != 1:
        raise InputError(f"`group` is {group!r}, which has {len(found)} terms: expected one")
    return _with_one_effect(found[0], effect)


def _with_one_effect(component: Component, effect: str | None) -> Component:
    if effect is not None and effect not in component.effects:
        raise InputError(f"`effect` is {effect!r}: expected one of {list(component.effects)}")
    if len(component.effects) != 1 and effect is None:
        raise InputError(
            f"`group` is {component.group!r}, of which each level has the effects "
            f"{list(component.effects)}: expected one of them as `effect`"
        )
    return component


def moments(refit: Refit | LaplaceRefit, term: Term) -> tuple[Tensor, Tensor]:
    """G and Z'PZ (q, q) of a term."""
    q = term.design.shape[1]
    if q > _MOST_EFFECTS:
        raise InputError(
            f"`group` has {q} levels: the covariance of their errors is a dense matrix, expected at "
            f"most {_MOST_EFFECTS}: use method='plain'"
        )
    eye = torch.eye(q, dtype=refit.X.dtype, device=refit.X.device)
    parts = [
        term.design.t_matmul(refit.project(term.design.matmul(part)))
        for part in eye.split(_COLUMNS, 1)
    ]
    information = torch.cat(parts, 1)
    return term.covariance.whole(q).to(eye), (information + information.mT) / 2


def _mean_difference(covariance: Tensor) -> float:
    """Mean variance of the difference of two, over all pairs."""
    m = len(covariance)
    return float(2 * (covariance.diagonal().sum() - covariance.sum() / m) / (m - 1))


def prior_variances(term: Term, size: int) -> Tensor:
    """The diagonal of G."""
    g = term.covariance
    if isinstance(g, RepeatedCovariance):
        return g.matrix.diagonal().repeat(size // len(g.matrix))
    if isinstance(g, DiagonalCovariance):
        return g.matrix
    found = []
    for start in range(0, size, _COLUMNS):
        count = min(_COLUMNS, size - start)
        part = g.matrix.new_zeros(size, count)
        part[start : start + count] = torch.eye(count, dtype=part.dtype, device=part.device)
        found.append((part * g.multiply(part)).sum(0))
    return torch.cat(found)
