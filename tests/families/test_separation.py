"""Responses whose likelihood has no maximum are told in words: by the fixed effects, by groups."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, NumericalError, glmm
from openreml_nn.estimation.separation import separated_levels, separation_of, told_exactly
from openreml_nn.families import Beta, Binomial, Gamma, NegativeBinomial, Ordinal, Poisson
from openreml_nn.inference import diagnose

RNG = np.random.default_rng(0)
G = np.repeat(np.arange(20), 8)
X = RNG.normal(size=160)
TABLE = pd.DataFrame(
    {
        "g": G,
        "x": X,
        "parted": (X > 0).astype(int) + (X > 0.7),
        "binary": G % 2,
        "ordered": G % 3,
        "share": 1 / (1 + np.exp(-0.3 * X - 0.5 * RNG.normal(size=20)[G])),
    }
)


def test_ordered_responses_that_a_covariate_separates_are_refused_in_words():
    said = "the data are separated: a combination of the fixed effects tells responses apart"
    with pytest.raises(NumericalError, match=said):
        glmm("parted ~ x + (1 | g)", TABLE, family="ordinal")


@pytest.mark.parametrize("options", [{}, {"link": "probit"}, {"quadrature": 9}])
def test_binary_responses_that_groups_separate_are_refused_by_the_group(options):
    said = "each of the 20 levels of g has responses of one category alone, so that the variance"
    with pytest.raises(NumericalError, match=said):
        glmm("binary ~ x + (1 | g)", TABLE, **options)


def test_a_variance_without_a_finite_estimate_is_diagnosed():
    result = glmm("ordered ~ x + (1 | g)", TABLE, family="ordinal")
    assert float(result.components[0].covariance) > 1000
    (text,) = diagnose(result)
    assert text.startswith("The variance of g is ")
    assert "has no finite estimate: all 20 levels of g have responses of one category" in text


def test_a_variance_that_few_levels_tell_is_diagnosed():
    y = TABLE.binary.copy()
    y[[0, 9]] = 1 - y[[0, 9]]
    result = glmm("y ~ 1 + (1 | g)", TABLE.assign(y=y), quadrature=15)
    (text,) = diagnose(result)
    assert "because 18 of 20 levels have responses of one category alone" in text


def test_levels_of_one_category_are_counted_by_term():
    result = glmm("y ~ x + (1 | g)", TABLE.assign(y=RNG.integers(0, 2, 160)))
    terms = result.source.covariance.terms()
    binary = torch.as_tensor(TABLE.binary.to_numpy(float))
    for family in (Binomial(), Ordinal(2)):
        (found,) = separated_levels(family, binary, terms)
        assert (found.name, found.alike, found.levels) == ("g", 20, 20)
    trials = torch.stack([binary, 1 - binary], 1)
    trials[0] = 1
    (found,) = separated_levels(Binomial(), trials, terms)
    assert found.alike == 19
    half = torch.full_like(trials, 2.0)
    assert separated_levels(Binomial(), half, terms)[0].alike == 0
    assert separated_levels(Poisson(), binary, terms) == []


def test_a_model_without_random_effects_is_refused_in_one_line():
    for family in ("binomial", "ordinal", "poisson"):
        with pytest.raises(
            InputError, match="has no random effect: expected one at least"
        ) as found:
            glmm("binary ~ x", TABLE, family=family)
        assert "\n" not in str(found.value)


def test_a_precision_at_its_end_is_said():
    said = r"did not converge .*; phi is \S+, at the end of its range, up to which the likelihood"
    with pytest.warns(RuntimeWarning, match=said):
        result = glmm("share ~ x + (1 | g)", TABLE, family="beta", max_iterations=7)
    assert any(text.startswith("The parameter phi is ") for text in diagnose(result))


def test_responses_that_the_predictor_tells_without_error_have_no_maximum():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"g": np.repeat(np.arange(4), 6), "x": rng.normal(size=24)})
    table["y"] = np.exp(0.3 + 0.5 * table.x + rng.normal(size=4)[table.g])
    told = "has no maximum: the linear predictor tells the responses without error"
    with pytest.raises(NumericalError, match=told):
        glmm("y ~ x + (1 | g)", table, "gamma")
    with pytest.raises(NumericalError, match=told):
        glmm("log(y) ~ x + (1 | g)", table, "gaussian")


def test_responses_far_from_zero_beside_their_spread_are_fitted():
    rng = np.random.default_rng(1)
    table = pd.DataFrame({"g": np.repeat(np.arange(12), 6), "x": rng.normal(size=72)})
    own = 1e-3 * (table.x + rng.normal(size=12)[table.g] + rng.normal(size=72))
    near, far = (
        glmm("y ~ x + (1 | g)", table.assign(y=own + shift), "gaussian") for shift in (0, 1e6)
    )
    assert far.converged
    assert far.residual_variance == pytest.approx(near.residual_variance, rel=1e-4)


@pytest.mark.parametrize("family", [Beta(), Gamma(), NegativeBinomial()])
def test_a_precision_without_end_is_said_of_responses_that_have_a_spread_of_their_own(family):
    like, name = torch.zeros(1, dtype=torch.float64), next(iter(family.own_trans))
    for value, gone in ((1e13, True), (1e-13, True), (1e11, False), (1e-11, False)):
        family.double().set_value(name, value, natural=True)
        said = told_exactly(family, like, 1e12)
        assert (f"phi is {value:.2g}" in said) == (gone and name == "phi")


def test_options_of_a_residual_are_refused_with_the_reason():
    with pytest.raises(InputError, match="as the family has the residual's place"):
        glmm("binary ~ x + (1 | g)", TABLE, residual_variance=1.0)


def near_saturated(seed, root):
    """Binary rows that slopes with a large variance all but tell apart, few of a level."""
    rng = np.random.default_rng(seed)
    k = rng.integers(8, 16)
    blk = np.repeat(np.arange(k), rng.integers(4, 7, size=k))
    a, x = rng.normal(size=(2, len(blk)))
    b = rng.normal(size=(k, 2)) @ np.array(root).T
    eta = x + b[blk, 0] + b[blk, 1] * a
    y = (rng.random(len(blk)) < 1 / (1 + np.exp(-eta))).astype(int)
    return pd.DataFrame({"y": y, "x": x, "a": a, "blk": blk})


def test_near_saturated_responses_with_slopes_are_fitted():
    # Coefficients grow with the variances: a curvature of which only that by the variances was taken
    # anew did not arrive in 200 steps.
    result = glmm("y ~ x + (a | blk)", near_saturated(118, [[20.0, 0.0], [16.0, 12.0]]))
    assert result.converged and len(result.history) < 60
    assert result.log_likelihood == pytest.approx(-11.601803, abs=1e-5)
    (text,) = [t for t in diagnose(result) if t.startswith("The variance of blk")]
    assert "of 11 levels have responses that their effects tell apart without error" in text


def test_responses_that_only_all_effects_together_tell_apart_are_said_so():
    table = near_saturated(11, [[6.0, 0.0], [4.0, 4.0]])
    with pytest.raises(
        NumericalError, match="a combination of the fixed effects with the random ones tells"
    ):
        glmm("y ~ x + (a | blk)", table)
    x = torch.tensor(table.x.to_numpy())
    X = torch.stack([torch.ones_like(x), x], 1)
    for end, family in ((0.1, Binomial()), (0.1, Ordinal(2))):
        assert "of the fixed effects tells" in separation_of(family, (x > end).double(), [], X)
    assert "with the random ones" in separation_of(
        Binomial(), ((x > 0.1) ^ (x > 1)).double(), [], X
    )
