"""Families by their names."""

from __future__ import annotations

from collections.abc import Callable

from openreml_nn.families.binomial import Binomial
from openreml_nn.families.counts import NegativeBinomial, NegativeBinomial1, Poisson
from openreml_nn.families.family import Family
from openreml_nn.families.gaussian import Gaussian, StudentT
from openreml_nn.families.ordinal import Ordinal
from openreml_nn.families.positive import Gamma, Tweedie
from openreml_nn.families.proportion import Beta
from openreml_nn.support.checks import check_choice, found
from openreml_nn.support.errors import InputError

__all__ = ["FAMILIES", "LINKS", "as_asked", "named_family"]

#: The class of each name in ``family=``.
FAMILIES: dict[str, Callable[..., Family]] = {
    "gaussian": Gaussian,
    "binomial": Binomial,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "negative_binomial_1": NegativeBinomial1,
    "gamma": Gamma,
    "beta": Beta,
    "ordinal": Ordinal,
    "student_t": StudentT,
    "tweedie": Tweedie,
}

#: The links of each, its own first.
LINKS: dict[str, tuple[str, ...]] = {
    "gaussian": ("identity",),
    "binomial": ("logit", "probit", "cloglog"),
    "poisson": ("log",),
    "negative_binomial": ("log",),
    "negative_binomial_1": ("log",),
    "gamma": ("log",),
    "beta": ("logit",),
    "ordinal": ("logit", "probit"),
    "student_t": ("identity",),
    "tweedie": ("log",),
}


def named_family(family: str | Family, link: str | None = None, levels: int = 2) -> Family:
    """The family of a name, or the one that was given.

    Args:
        family: a name of :data:`FAMILIES`, or a family.
        link: one of its links; its own by default.
        levels: categories of an ordinal response.

    Raises:
        TypeError: if ``family`` is neither.
        InputError: if there is no such family, it has no such link, or a link is given beside a
            family that has its own.

    >>> named_family("binomial", "probit")
    Binomial(link='probit')
    """
    if isinstance(family, Family):
        if link is not None and link != family.link:
            raise InputError(
                f"`link` is {found(link)} but `family` has the link {family.link!r}: leave it out"
            )
        return family
    if not isinstance(family, str):
        raise TypeError(f"`family` is {found(family)}: expected a name or a Family")
    check_choice("family", family, tuple(FAMILIES))
    links = LINKS[family]
    if link is not None:
        check_choice("link", link, links)
    link = links[0] if link is None else link
    if family == "ordinal":
        return Ordinal(levels, link)
    return FAMILIES[family](link) if len(links) > 1 else FAMILIES[family]()


def as_asked(
    family: str | Family | None, link: str | None = None
) -> tuple[str | Family | None, str | None]:
    """Family and link without those that say what is so without them: by name, a Gaussian response
    is the linear mixed model's, whose likelihood needs no approximation."""
    if isinstance(family, str) and family == "gaussian" and link in (None, "identity"):
        return None, None
    return family, link
