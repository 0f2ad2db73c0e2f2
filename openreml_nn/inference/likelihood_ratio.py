"""Likelihood-ratio tests between nested models."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.inference.refit import Refit, family_of, source_of
from openreml_nn.support.errors import InputError
from openreml_nn.terms.design import Design, IdentityDesign, IndexedDesign
from openreml_nn.terms.term import residual_terms

__all__ = ["LikelihoodRatio", "check_same_data", "likelihood_ratio_test", "parameters_of"]


@dataclass(frozen=True)
class LikelihoodRatio:
    r"""A likelihood-ratio test.

    Attributes:
        statistic: twice the difference of the log-likelihoods.
        df: parameters by which the models differ.
        p: probability of a larger statistic under the smaller model. Where variances are
            tested, it is under the mixture below.
        p_naive: the same under :math:`\chi^2` with ``df``, too large for variances; as lme4's
            anova prints it, and of fits by REML (``refit=False``) lmerTest's ranova.
        mixture: weights of :math:`\chi^2` distributions by their degrees of freedom.
    """

    statistic: float
    df: int
    p: float
    p_naive: float
    mixture: dict[int, float]


def likelihood_ratio_test(small: Result, large: Result) -> LikelihoodRatio:
    r"""Test of a model against a larger one that contains it.

    A variance that is zero under the smaller model lies on the boundary, so that the statistic has
    not a :math:`\chi^2` distribution but a mixture: with one such variance and c other
    parameters, covariances among them, :math:`\tfrac12\chi^2_c + \tfrac12\chi^2_{c+1}`. For
    several variances the weights are binomial, which is exact where their estimates are independent.

    Args:
        small: the smaller fit.
        large: the larger one, of the same response by the same method.

    Raises:
        InputError: if the fits are not of the same rows, responses, weights and method, the
            larger one has no more parameters, its fixed effects do not contain those of the
            smaller one, or the fits are by REML and their fixed effects differ.
        TypeError: if an argument is no fit.

    Reference:
        Self and Liang, Journal of the American Statistical Association 82 (1987) 605; Stram and
        Lee, Biometrics 50 (1994) 1171.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> one, two = (lmm(f"Reaction ~ Days + ({r} | Subject)", sleepstudy()) for r in ("1", "Days"))
    >>> test = likelihood_ratio_test(one, two)
    >>> f"{test.statistic:.2f}", test.df, test.mixture
    ('42.84', 2, {1: 0.5, 2: 0.5})
    """
    from scipy import stats

    for name, fit in (("small", small), ("large", large)):
        source_of(fit, name)
    check_same_data(("small", "large"), (small, large))
    if small.method != large.method:
        raise InputError(
            f"the fits are by {small.method!r} and {large.method!r}: fit both by one method"
        )
    _check_nested(small, large)
    df = parameters_of(large) - parameters_of(small)
    if df < 1:
        raise InputError(
            f"the models have {parameters_of(small)} and {parameters_of(large)} parameters: the second must have "
            "more"
        )
    statistic = max(0.0, 2 * (large.log_likelihood - small.log_likelihood))
    boundary = min(_variances(large) - _variances(small), df)
    boundary = max(boundary, 0)
    mixture = {df - boundary + j: comb(boundary, j) / 2**boundary for j in range(boundary + 1)}
    p = sum(w * _tail(statistic, k) for k, w in mixture.items())
    return LikelihoodRatio(statistic, df, p, float(stats.chi2.sf(statistic, df)), mixture)


def parameters_of(result: Result) -> int:
    """Number of estimated parameters."""
    return len(result.fixed.names) + result.num_params


def _variances(result: Result) -> int:
    """Variances of random effects."""
    return sum(len(c.effects) for c in result.components if not c.is_residual)


def _tail(statistic: float, df: int) -> float:
    from scipy import stats

    return float(stats.chi2.sf(statistic, df)) if df else float(statistic <= 0)


def check_same_data(names: tuple[str, str], fits: tuple[Result, Result]) -> None:
    """Refuse fits of other rows, responses or weights, in which likelihoods do not compare."""
    a, b = names
    (y, z) = (source_of(fit).y.detach() for fit in fits)
    if len(y) != len(z):
        raise InputError(
            f"`{a}` has {len(y)} rows and `{b}` {len(z)} rows: expected fits of the same rows "
            "(missing values may have removed some)"
        )
    if y.shape != z.shape or not torch.equal(y, z.to(y)):
        told = ""
        if y.shape == z.shape:
            at = tuple((y != z.to(y)).nonzero()[0].tolist())
            told = f", {float(y[at]):.6g} and {float(z[at]):.6g} in row {at[0] + 1}"
        raise InputError(
            f"`{a}` and `{b}` have other responses{told}: expected fits of the same data (one "
            "response, one offset, one order)"
        )
    offsets = [_offset(fit) for fit in fits]
    if not torch.equal(offsets[0], offsets[1].to(offsets[0])):
        row = int((offsets[0] != offsets[1].to(offsets[0])).nonzero()[0])
        raise InputError(
            f"`{a}` and `{b}` have other offsets, {float(offsets[0][row]):.6g} and "
            f"{float(offsets[1][row]):.6g} in row {row + 1}: expected fits of the same data"
        )
    families = [family_of(fit) for fit in fits]
    if families[0] != families[1]:
        this, that = ("'gaussian' by lmm()" if name is None else repr(name) for name in families)
        raise InputError(
            f"`{a}` is of the family {this} and `{b}` of {that}: expected fits of one family"
        )
    if families[0] is not None:
        one, other = (_factors(fit) for fit in fits)
        if not torch.equal(one, other.to(one)):
            row = int((one != other.to(one)).nonzero()[0])
            raise InputError(
                f"`{a}` and `{b}` have other weights, {float(one[row]):.6g} and "
                f"{float(other[row]):.6g} in row {row + 1}: expected fits with the same"
            )
        return
    one, other = (_weights(fit) for fit in fits)
    ratio = one / other.to(one)
    row = int((ratio / ratio[0] - 1).abs().argmax())
    if abs(float(ratio[row] / ratio[0]) - 1) > 1e-8:
        raise InputError(
            f"`{a}` and `{b}` have other weights, in row {row + 1} {float(one[row] / one[0]):.6g} and "
            f"{float(other[row] / other[0]):.6g} times that of row 1: expected fits with the same"
        )


def _offset(result: Result) -> Tensor:
    """The offset of the linear predictor (n,); that of a Gaussian response is taken from it."""
    source = source_of(result)
    X = source.X.detach()
    return X.new_zeros(len(X)) if source.offset is None else source.offset.detach()


def _factors(result: Result) -> Tensor:
    """The factors of the rows' log-densities (n,), of a response that is not Gaussian."""
    source = source_of(result)
    X = source.X.detach()
    return X.new_ones(len(X)) if source.weights is None else source.weights.detach()


def _weights(result: Result) -> Tensor:
    """Known weights of the rows (n,), of which only the ratios mean anything."""
    with torch.no_grad():
        terms = Refit(result).objective().terms()
    residual = [terms[i].design for i in residual_terms(terms)]
    y = source_of(result).y.detach()
    total = sum((_squares(design, y) for design in residual), torch.zeros_like(y))
    return torch.ones_like(y) if bool((total <= 0).any()) else len(residual) / total


def _squares(design: Design, like: Tensor) -> Tensor:
    """Sums of squares of the rows of a design (n,)."""
    if isinstance(design, IdentityDesign):
        return torch.ones_like(like)
    if isinstance(design, IndexedDesign):
        values = design.values
        return torch.ones_like(like) if values is None else values.detach().to(like).square().sum(1)
    return design.dense(like).square().sum(1)


def _check_nested(small: Result, large: Result) -> None:
    """Refuse fixed effects of the smaller model that are not among those of the larger one.

    Raises:
        InputError: if they are not.
    """
    X, W = (
        source_of(fit).X.detach()[:, list(fit.fixed.columns)].double() for fit in (small, large)
    )
    both = [name for name in small.fixed.names if name in large.fixed.names]
    for name in both:
        pair = X[:, small.fixed.names.index(name)], W[:, large.fixed.names.index(name)].to(X)
        if not torch.allclose(*pair, rtol=1e-9, atol=0) and set(large.fixed.names) == set(both):
            raise InputError(
                f"`small` and `large` have other values of the fixed effect {name!r}: expected fits "
                "of the same data"
            )
    same = len(both) == len(small.fixed.names) == len(large.fixed.names)
    if small.method == "reml" and not same:
        raise InputError(
            "restricted likelihoods of different fixed effects do not compare: fit both with "
            "method='ml'"
        )
    size = torch.linalg.vector_norm(X, dim=0)
    Q = torch.linalg.qr(W).Q
    left = torch.linalg.vector_norm(X - Q @ (Q.mT @ X), dim=0)
    outside = [n for n, a, b in zip(small.fixed.names, left, size, strict=True) if a > 1e-7 * b]
    if outside:
        raise InputError(
            f"the models are not nested: the smaller one has other fixed effects, {outside[0]!r} is "
            "none of the larger one nor a combination of them"
        )
