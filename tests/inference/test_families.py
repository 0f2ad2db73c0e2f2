"""Inference from fits of responses that are not Gaussian: asymptotic, or refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from openreml_nn import InputError, glmm, lmm
from openreml_nn.families import Family, NegativeBinomial
from openreml_nn.inference import (
    anova,
    bootstrap,
    bootstrap_test,
    coefficients,
    emmeans,
    influence,
    likelihood_ratio_test,
    profile,
    r2,
    scan,
    simulate,
    variance_shares,
    wald_test,
)

GLMM = Path(__file__).parents[1] / "reference" / "glmm"
RNG = np.random.default_rng(0)
TABLE = pd.DataFrame({"g": np.arange(200) % 20, "x": RNG.standard_normal(200)})
TABLE["y"] = RNG.poisson(np.exp(0.3 + 0.4 * TABLE["x"] + 0.5 * RNG.standard_normal(20)[TABLE["g"]]))


@pytest.fixture(scope="module")
def fits():
    return [glmm(f"y ~ {x} + (1 | g)", TABLE, family="poisson") for x in ("1", "x")]


@pytest.fixture(scope="module")
def cbpp():
    table = pd.read_csv(GLMM / "cbpp.csv").astype({"period": str})
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    return glmm(formula, table, family="binomial"), table


def test_coefficients_have_normal_tests(fits):
    found = coefficients(fits[1])
    z = fits[1].fixed.estimate / fits[1].fixed.std_error
    np.testing.assert_allclose(found["statistic"], z)
    np.testing.assert_allclose(found["p"], 2 * stats.norm.sf(abs(z)))
    assert wald_test(fits[1], ["x"]).statistic == pytest.approx(float(z[1]) ** 2)
    for call in (coefficients, lambda r, ddf: wald_test(r, ["x"], ddf)):
        with pytest.raises(
            InputError, match=r"`ddf` is 'satterthwaite' and .* 'poisson': .*asympt"
        ):
            call(fits[1], ddf="satterthwaite")
    terms = anova(fits[1])
    assert terms["statistic"][0] == pytest.approx(float(z[1]) ** 2)
    assert terms["den_df"][0] == np.inf


def test_likelihood_ratios_are_of_one_family(fits):
    test = likelihood_ratio_test(*fits)
    expected = 2 * (fits[1].log_likelihood - fits[0].log_likelihood)
    assert (test.statistic, test.df) == (pytest.approx(expected), 1)
    assert anova(*fits)["statistic"].iloc[1] == pytest.approx(expected)
    linear = lmm("y ~ x + (1 | g)", TABLE, method="ml")
    with pytest.raises(
        InputError, match="`small` is of the family 'poisson' and `large` of 'gauss"
    ):
        likelihood_ratio_test(fits[0], linear)


def test_likelihood_ratios_are_of_one_offset(fits):
    table = TABLE.assign(z=1 + TABLE.index % 3)
    other = glmm("y ~ x + offset(log(z)) + (1 | g)", table, family="poisson")
    with pytest.raises(InputError, match=r"other offsets, 0 and 0.693147 in row 1"):
        likelihood_ratio_test(fits[0], other)


def test_means_are_on_both_scales(cbpp):
    link, response = (emmeans(cbpp[0], "period", scale=s) for s in ("link", "response"))
    assert (link.quantity, response.quantity) == ("emmean", "prob")
    eta, p = link.table["estimate"], 1 / (1 + np.exp(-link.table["estimate"]))
    np.testing.assert_allclose(eta[1], cbpp[0].fixed.estimate[:2].sum())
    np.testing.assert_allclose(response.table["estimate"], p)
    np.testing.assert_allclose(
        response.table["std_error"], p * (1 - p) * link.table["std_error"], rtol=1e-12
    )
    for end in ("low", "high"):
        np.testing.assert_allclose(response.table[end], 1 / (1 + np.exp(-link.table[end])))
    assert list(response.table["p"]) == list(link.table["p"])
    differences, ratios = link.pairs(), response.pairs()
    assert ratios["name"][0] == "p1 / p2"
    np.testing.assert_allclose(np.log(ratios["estimate"]), differences["estimate"])
    np.testing.assert_allclose(np.log(ratios["high"]), differences["high"])
    assert list(ratios["p"]) == list(differences["p"])


def test_a_scale_without_effect_is_refused():
    linear = lmm("y ~ f + (1 | g)", TABLE.assign(f=TABLE.index % 3), categorical=["f"])
    with pytest.raises(InputError, match="`scale` is 'response' and the response Gaussian"):
        emmeans(linear, "f", scale="response")


def test_profiles_are_those_of_lme4(cbpp):
    """By tests/reference/profiles.R."""
    expected = {
        "sd_(Intercept)|herd": (0.3460732, 1.09997465),
        "periodp2": (-1.6167833, -0.40776307),
        "periodp4": (-2.5007506, -0.80075532),
    }
    found = profile(cbpp[0], list(expected), progress=False).intervals().set_index("name")
    np.testing.assert_allclose(found[["low", "high"]], list(expected.values()), atol=1e-3)


def test_profiles_of_a_subset_are_those_of_lme4():
    """By tests/reference/profiles.R."""
    table = pd.read_csv(GLMM / "contraception.csv")
    table = table[table.district.isin(table.district.unique()[:20])]
    fit = glmm("y ~ urban + age + (1 | district)", table, family="binomial")
    expected = {
        "sd_(Intercept)|district": (0.197585421, 0.722260999),
        "(Intercept)": (-1.225470255, -0.648429268),
        "urbanuY": (0.886620521, 1.697639307),
        "age": (-0.015796674, 0.020890319),
    }
    found = profile(fit, progress=False).intervals().set_index("name")
    assert list(found.index) == list(expected)
    np.testing.assert_allclose(found[["low", "high"]], list(expected.values()), atol=1e-3)


def test_ends_of_a_profile_are_fits_with_the_parameter_held():
    counts = TABLE.assign(y=lambda t: t.y + 3 * (t.index % 7 == 0))
    fit = glmm("y ~ x + (1 | g)", counts, family="negative_binomial")
    found = profile(fit, ["sd_(Intercept)|g", "x", "theta"], progress=False).intervals()
    sd, x, theta = (found[found.name == n].iloc[0] for n in found["name"])
    family = NegativeBinomial()
    family.fix("theta", float(theta["low"]), natural=True)
    moved = counts.assign(known=float(x["low"]) * counts.x)
    variance = {"g/g/sigma^2": float(sd["high"]) ** 2}
    held = [
        glmm("y ~ x + (1 | g)", counts, family="negative_binomial", constraints=variance),
        glmm("y ~ offset(known) + (1 | g)", moved, family="negative_binomial"),
        glmm("y ~ x + (1 | g)", counts, family=family),
    ]
    fall = [2 * (fit.log_likelihood - h.log_likelihood) for h in held]
    np.testing.assert_allclose(fall, stats.chi2.ppf(0.95, 1), rtol=2e-3)


def test_a_bootstrap_fits_what_is_simulated(fits, cbpp):
    assert simulate(cbpp[0], 2).shape == (56, 2, 2)
    responses = simulate(fits[1], 3, seed=4)
    found = bootstrap(fits[1], 3, seed=4, progress=False)
    assert found.failures == 0 and list(found.estimate.index) == [
        "sd_(Intercept)|g", "(Intercept)", "x"
    ]  # fmt: skip
    for b in range(2):
        table = TABLE.assign(y=responses[:, b].numpy())
        again = glmm("y ~ x + (1 | g)", table, family="poisson")
        sd = float(again.components[0].covariance) ** 0.5
        expected = [sd, *again.fixed.estimate.tolist()]
        np.testing.assert_allclose(found.samples.iloc[b], expected, atol=1e-4)
    own = bootstrap(fits[1], 3, 4, lambda r: {"beta": float(r.fixed.estimate[1])}, progress=False)
    np.testing.assert_allclose(own.samples["beta"], found.samples["x"], atol=1e-6)


def test_samples_that_are_separated_are_counted():
    table = pd.DataFrame({"g": np.arange(24) % 4, "x": np.arange(24) // 12})
    table["y"] = ((table.index % 12) < np.where(table.x, 10, 1)).astype(float)
    fit = glmm("y ~ x + (1 | g)", table, family="binomial")
    with pytest.warns(RuntimeWarning, match="of 20 samples could not be fitted"):
        found = bootstrap(fit, 20, seed=1, progress=False)
    assert found.failures > 0 and len(found.samples) == 20 - found.failures
    assert found.samples["x"].abs().max() < 50


def test_a_test_by_simulation_has_the_p_value_of_the_statistics(fits):
    samples = 19
    p = bootstrap_test(*fits, samples=samples, seed=3, progress=False)
    responses, reached = simulate(fits[0], samples, seed=3), 0
    observed = likelihood_ratio_test(*fits).statistic
    for y in responses[:, :2].unbind(1):
        pair = [
            glmm(f"y ~ {x} + (1 | g)", TABLE.assign(y=y.numpy()), family="poisson").log_likelihood
            for x in ("1", "x")
        ]
        reached += 2 * (pair[1] - pair[0]) >= observed
    assert reached == 0 and p == 1 / (1 + samples)
    assert 0.1 < bootstrap_test(*_null(), samples=9, progress=False) <= 1


def _null():
    table = TABLE.assign(z=np.random.default_rng(5).standard_normal(200))
    return [glmm(f"y ~ {z} + (1 | g)", table, family="poisson") for z in ("x", "x + z")]


def test_a_family_without_draws_is_refused(fits):
    class Plain(type(fits[1].model.family)):
        name = ""
        draw = Family.draw

    fit = glmm("y ~ x + (1 | g)", TABLE, family=Plain())
    for call in (simulate, bootstrap):
        with pytest.raises(InputError, match="family Plain, which has no draw"):
            call(fit)


@pytest.mark.parametrize("call", [influence, r2, variance_shares])
def test_what_takes_a_gaussian_response_says_so(fits, call):
    with pytest.raises(InputError, match="`result` has a response of the family 'poisson'"):
        call(fits[1])
    with pytest.raises(InputError, match="`result` has a response of the family 'poisson'"):
        scan(fits[1], np.ones((200, 1)))
