"""What is wrong with a fit, in plain words."""

from __future__ import annotations

from openreml_nn.estimation import Component, Result
from openreml_nn.estimation.marginal import endless
from openreml_nn.estimation.separation import separated_levels, told_apart
from openreml_nn.estimation.starts import SHORTEST
from openreml_nn.families import Binomial
from openreml_nn.inference.refit import check_fit
from openreml_nn.inference.response import family_at
from openreml_nn.result.summary import singularity, uncertainty

__all__ = ["diagnose"]

#: A standard deviation of effects on the scale of a link that leaves nearly every level one category.
_LARGE = 10.0


def diagnose(result: Result) -> list[str]:
    """Sentences on convergence, singularity and what the data cannot tell, each with advice.

    Returns:
        An empty list if nothing is wrong.

    Raises:
        TypeError: if ``result`` is no result.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> diagnose(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy()))
    []
    """
    check_fit(result)
    found: list[str] = []
    if not result.converged:
        advice = "Allow more iterations, or rescale covariates of very different size."
        if result.history and result.history[-1].step < SHORTEST:
            advice = (
                "Its steps ended there, so that more iterations change nothing: leave out a term, hold a "
                "parameter by `constraints`, or begin elsewhere by `starts`."
            )
        found.append(
            f"The fit has not converged: after {result.iterations} iterations the estimates are "
            f"{result.score_norm:.2g} standard errors from the optimum. {advice}"
        )
        found += [f"The parameter {text}." for text in endless(result.family_parameters)]
    found += _separated(result)
    for c in result.components:
        if c.singular:
            found.append(_singular(c))
    if result.indistinct:
        found.append(
            f"The data cannot tell apart {', '.join(result.indistinct)}: other values of them fit "
            "as well. Leave one of them out, or fix it."
        )
    if result.condition > 1e8:
        found.append(
            f"The curvature is nearly flat in some direction (condition {result.condition:.1g}): "
            "standard errors of the variances are unreliable. A profile or a bootstrap tells more."
        )
    for c in result.components:
        levels = len(c.levels)
        if 0 < levels < 5:
            found.append(
                f"{c.group} has {levels} levels: its variance is known to within a factor of "
                "several. Consider it as a fixed effect."
            )
    if result.log_likelihood_error > 0.1:
        known = uncertainty(result)
        advice = (
            "Places that all but coincide are the cause as a rule: give them one place."
            if result.plan.exact
            else "Use solver='blocked' for an exact one."
        )
        found.append(
            f"{known[0].upper()}{known[1:]}: differences of that size mean nothing. {advice}"
        )
    return found


def _separated(result: Result) -> list[str]:
    """Sentences on variances that have no finite estimate, or one that few levels tell."""
    if result.family is None or result.source is None or result.model is None:
        return []
    family, source = family_at(result), result.source
    terms, found = source.covariance.terms(), []
    for own in separated_levels(family, source.y, terms):
        c = next(c for c in result.components if c.name == own.name)
        variance = float(c.covariance.reshape(len(c.effects), -1).diagonal().max())
        if own.alike == own.levels:
            what = f"all {own.levels} levels of {c.group} have responses of one category alone"
            found.append(
                f"The variance of {c.group} is {variance:.3g}, but has no finite estimate: {what}. It "
                "is where the fit stopped. Leave the term out, or hold its variance by `constraints`."
            )
        elif variance > _LARGE**2:
            parted, why = own.alike, "have responses of one category alone"
            if len(c.effects) > 1 and isinstance(family.base, Binomial):
                term = next(term for term in terms if term.name == own.name)
                parted = told_apart(family, source.y, term)
                why = "have responses that their effects tell apart without error"
            found.append(
                f"The variance of {c.group} is {variance:.3g} on the scale of the link, because "
                f"{parted} of {own.levels} levels {why}: it rests on the few others, and the "
                "likelihood may have several maxima. A profile tells how far it is known."
            )
    return found


def _singular(component: Component) -> str:
    if len(component.vanished) == len(component.effects):
        group, slopes = component.group, [e for e in component.effects if e != "(Intercept)"]
        found = f"rows of one level of {group} are no more alike than others, given all else"
        if len(slopes) == len(component.effects):
            found = f"levels of {group} do not differ in the effect of {', '.join(slopes)}"
        advice = f"{found}. Leaving the term out gives the same fit"
    elif component.vanished:
        advice = "leaving the effect out of the term gives the same fit"
    else:
        advice = "fewer effects, or uncorrelated ones ('||'), describe the data as well"
    what = singularity(component)
    return f"The fit is singular: {what}. That is an estimate, not a failure: {advice}."
