"""What breeders read off effects of several traits or environments: correlations, factors, an index."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Component, Result
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.estimation.spread import Spread
from openreml_nn.inference.genetic import moments, prior_variances
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.refit import Refit, family_of, source_of
from openreml_nn.support.checks import check_choice, check_instance, check_mapping
from openreml_nn.support.errors import InputError

__all__ = ["blup_differences", "effect_correlations", "factor_loadings", "selection_index"]

#: A correlation this near to 1 is 1.
_ROUNDING = 1e-9
#: Levels beyond which pairs are not listed.
_MOST_LEVELS = 1_000


def effect_correlations(result: Result, group: str) -> pd.DataFrame:
    r"""Correlations among the effects of a level, :math:`r_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}`, such as
    genetic correlations among traits or environments, with standard errors by the delta method.

    Args:
        result: a fit.
        group: a grouping factor with one term of several effects.

    Returns:
        A data frame with the columns effect1, effect2, correlation, std_error; the latter is NaN
        where the fit is at a boundary, or the correlation follows from no parameter.

    Raises:
        InputError: if there is no such group, several terms of it or one effect; if the response is
            not Gaussian, the rows were streamed, or levels have covariances of their own.
        TypeError: if an argument is of another kind.

    Reference:
        Lynch and Walsh, Genetics and Analysis of Quantitative Traits (1998), appendix 1.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    >>> effect_correlations(result, "Subject").round(3)
           effect1 effect2  correlation  std_error
    0  (Intercept)    Days        0.066      0.325
    """
    source_of(result)
    component = _of_several(result, group)
    objective = Refit(result).objective()
    curvature = Curvature([objective])
    at, u = curvature.at, curvature.u

    def correlations(x: Tensor) -> tuple[Tensor]:
        (term,) = (t for t in objective.terms(at.natural(0, x)) if t.name == component.name)
        matrix = term.shown()
        scale = matrix.diagonal().sqrt()
        return (matrix / (scale[:, None] * scale),)

    (term,) = (t for t in objective.terms() if t.name == component.name)
    shown, expected = term.shown().detach(), component.covariance
    is_one_variance = len(shown) < len(expected)  # of all effects, which are not correlated
    if not is_one_variance and (
        shown.shape != expected.shape or not torch.allclose(shown.to(expected), expected, rtol=1e-6)
    ):
        raise InputError(
            f"`group` is {group!r}, whose covariance is not that of one level's effects in the fit's "
            "own terms: expected one covariance that all levels share"
        )
    k, value = len(component.effects), component.correlation
    error = torch.full((k, k), torch.nan, dtype=u.dtype)
    if len(u) and not is_one_variance:
        spread = Spread(curvature.information, bool(curvature.indistinct))
        slopes = jacobian(correlations, u)[0]
        # At a correlation of 1 or -1, a bound, the slopes are zero but for rounding.
        is_inside = (slopes != 0).any(0) & (value.abs().to(u) < 1 - _ROUNDING)
        error = torch.where(is_inside, spread.errors(slopes), torch.nan)
    rows = [(i, j) for i in range(k) for j in range(i)]
    return pd.DataFrame(
        {
            "effect1": [component.effects[j] for _, j in rows],
            "effect2": [component.effects[i] for i, _ in rows],
            "correlation": [float(value[i, j]) for i, j in rows],
            "std_error": [float(error[i, j]) for i, j in rows],
        }
    )


def factor_loadings(result: Result, group: str) -> pd.DataFrame:
    r"""Loadings of a factor-analytic term on its principal axes, and what the factors explain.

    The fit's :math:`\Lambda` is triangular, which is one of many rotations of the same covariance
    :math:`\Lambda\Lambda^\top + \Psi`. With :math:`\Lambda = U S W^\top` these are :math:`U S`: the
    columns are orthogonal, the first explains most, and each has a positive sum.

    Args:
        result: a fit with ``fa(… | group, k)``.
        group: its grouping factor.

    Returns:
        A data frame with the columns effect, ``factor_1`` … for each factor, specific (the variance
        :math:`\Psi_{ii}`) and explained, the share :math:`(\Lambda\Lambda^\top)_{ii} / G_{ii}` of the
        factors in the variance.

    Raises:
        InputError: if there is no such group, several terms of it, or its structure is not ``fa``.
        TypeError: if an argument is of another kind.

    Reference:
        Smith, Cullis and Thompson, Biometrics 57 (2001) 1138, section 5; Cullis, Smith, Beeck and
        Cowling, Genome 53 (2010) 1002.
    """
    component = _of_several(result, group)
    cells = {}
    for estimate in result.parameters:
        at = re.search(r"/loadings/x/L_(\d+)_(\d+)$", estimate.name)
        if at and estimate.name.startswith(component.name + "/"):
            cells[int(at[1]), int(at[2])] = estimate.value
    if not cells:
        raise InputError(
            f"`group` is {group!r}, whose effects have no factors: expected a term fa(… | {group}, k)"
        )
    loadings = np.zeros((len(component.effects), 1 + max(j for _, j in cells)))
    for place, value in cells.items():
        loadings[place] = value
    U, S, _ = np.linalg.svd(loadings, full_matrices=False)
    turned = U * S
    turned *= np.where(turned.sum(0) < 0, -1.0, 1.0)
    total = component.covariance.diagonal().numpy(force=True)
    common = (turned**2).sum(1)
    columns = {f"factor_{j + 1}": turned[:, j] for j in range(turned.shape[1])}
    table = {"effect": list(component.effects), **columns}
    return pd.DataFrame({**table, "specific": total - common, "explained": common / total})


def selection_index(result: Result, group: str, weights: Mapping[str, float]) -> pd.DataFrame:
    r"""The index :math:`I_i = w^\top \hat b_i` of the BLUPs of each level, with its reliability.

    It is the BLUP of the breeding objective :math:`w^\top b_i` with economic weights w. Its error has the
    variance :math:`w^\top C_i w` with the covariance :math:`C_i` of the level's prediction errors, and
    the reliability is :math:`1 - w^\top C_i w / (a_i\, w^\top G w)`, with :math:`a_i` the level's
    own variance factor (1 and its inbreeding).

    Args:
        result: a fit.
        group: a grouping factor with one term of several effects.
        weights: of effects by name; those that are not named have none.

    Returns:
        A data frame with the columns level, index, std_error (of its error), reliability, accuracy,
        in descending order of the index.

    Raises:
        InputError: if there is no such group, several terms of it or one effect; if an effect is
            unknown, a weight is not finite or all are zero; if the rows were streamed.
        TypeError: if an argument is of another kind.

    Reference:
        Hazel, Genetics 28 (1943) 476; Mrode, Linear Models for the Prediction of Animal Breeding
        Values (2014), section 5.4.
    """
    source_of(result)
    component = _of_several(result, group)
    G, w = component.covariance, _weights(component, weights)
    (effects,) = (e for e in result.random if e.name == component.name)
    with torch.no_grad():
        (term,) = (t for t in Refit(result).objective().terms() if t.name == component.name)
        q, k = effects.values.shape
        own = prior_variances(term, q * k).reshape(q, k)
    used = (G.diagonal() > 0).nonzero()[:, 0]
    factor = own[:, used[0]] / G.diagonal()[used[0]] if len(used) else own.new_ones(q)
    prior = factor * (w @ G @ w)
    error = torch.einsum("qij,i,j->q", effects.variances, w, w)
    share = torch.where(prior > 0, 1 - error / prior, 0)
    table = pd.DataFrame(
        {
            "level": list(component.levels),
            "index": (effects.values @ w).numpy(force=True),
            "std_error": error.clamp(min=0).sqrt().numpy(force=True),
            "reliability": share.numpy(force=True),
            "accuracy": share.clamp(min=0).sqrt().numpy(force=True),
        }
    )
    return table.sort_values("index", ascending=False, kind="stable", ignore_index=True)


def blup_differences(
    result: Result, group: str, weights: Mapping[str, float] | None = None
) -> pd.DataFrame:
    r"""Differences of the BLUPs of all pairs of levels, with the standard errors of differences (SED).

    The difference of the levels i and j is :math:`d = w^\top(\hat b_i - \hat b_j)`, and its error has the
    variance :math:`w^\top (C_{ii} + C_{jj} - C_{ij} - C_{ji}) w` with C the covariance of the
    prediction errors of all effects. With equal weights of the environments of
    ``fa(0 + env | geno, k)`` it is of varieties over environments. Of a response that is not Gaussian they
    are on the scale of the link, and C is that of the working linear model at the mode.

    Args:
        result: a fit.
        group: a grouping factor with one term.
        weights: of the effects by name; by default each has the same, and they add up to 1.

    Returns:
        A data frame with the columns level1, level2, difference, std_error.

    Raises:
        InputError: if there is no such group or several terms of it; if an effect is unknown, a
            weight is not finite or all are zero; if the rows were streamed, or there are more than
            1,000 levels.
        TypeError: if an argument is of another kind.

    Reference:
        Henderson, Biometrics 31 (1975) 423; Cullis, Smith and Coombes, Journal of Agricultural,
        Biological and Environmental Statistics 11 (2006) 381; Breslow and Clayton, Journal of the
        American Statistical Association 88 (1993) 9, section 2.2.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import penicillin
    >>> result = lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin())
    >>> blup_differences(result, "sample").round(4).head(2)
      level1 level2  difference  std_error
    0      A      B      3.1975     0.1585
    1      A      C      0.2492     0.1585
    """
    source_of(result)
    component = _of_one_term(result, group)
    q, k = len(component.levels), len(component.effects)
    if q > _MOST_LEVELS:
        raise InputError(
            f"`group` is {group!r} with {q} levels: expected at most {_MOST_LEVELS}, as all pairs are listed"
        )
    w = _weights(component, dict.fromkeys(component.effects, 1 / k) if weights is None else weights)
    (effects,) = (e for e in result.random if e.name == component.name)
    refit = Refit(result) if family_of(result) is None else LaplaceRefit(result)
    with torch.no_grad():
        terms = (
            refit.objective().terms()
            if isinstance(refit, Refit)
            else refit.loss.covariance.terms(None, refit.X.dtype)
        )
        (term,) = (t for t in terms if t.name == component.name)
        G, information = moments(refit, term)
        errors = (G - G @ information @ G).unflatten(0, (q, k)).unflatten(2, (q, k))
        errors = torch.einsum("iajb,a,b->ij", errors, w.to(G), w.to(G))
    own, index = errors.diagonal(), effects.values @ w
    square = own[:, None] + own - errors - errors.mT
    one, other = torch.triu_indices(q, q, 1)
    return pd.DataFrame(
        {
            "level1": [component.levels[i] for i in one],
            "level2": [component.levels[j] for j in other],
            "difference": (index[one] - index[other]).numpy(force=True),
            "std_error": square[one, other].clamp(min=0).sqrt().numpy(force=True),
        }
    )


def _weights(component: Component, weights: Mapping[str, float]) -> Tensor:
    """Weights of the effects (k,)."""
    check_mapping("weights", weights)
    for name, weight in weights.items():
        check_choice("weights", name, component.effects)
        check_instance(f"weights[{name!r}]", weight, (int, float))
    w = torch.tensor([float(weights.get(e, 0.0)) for e in component.effects])
    if not bool(w.isfinite().all()) or not bool(w.any()):
        raise InputError(f"`weights` is {dict(weights)}: expected finite numbers, not all zero")
    return w.to(component.covariance)


def _of_several(result: Result, group: str) -> Component:
    """The one component of a group, of several effects with a covariance."""
    component = _of_one_term(result, group)
    if len(component.effects) < 2 or component.covariance.dim() != 2:
        raise InputError(
            f"`group` is {group!r}, which has the effects {list(component.effects)}: expected one "
            "term of several effects"
        )
    return component


def _of_one_term(result: Result, group: str) -> Component:
    check_instance("result", result, Result)
    check_instance("group", group, str)
    # What is correlated beside a nugget is the rows' and no group's.
    random = [c for c in result.components if not c.is_residual and c.name != "residual"]
    check_choice("group", group, [c.group for c in random])
    found = [c for c in random if c.group == group]
    if len(found) != 1:
        raise InputError(f"`group` is {group!r}, which has {len(found)} terms: expected one")
    return found[0]
