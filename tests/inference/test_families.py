"""Inference from fits of responses that are not Gaussian: asymptotic, or refused."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from openreml_nn import InputError, glmm, lmm
from openreml_nn.datasets import visits
from openreml_nn.families import Family, Gaussian, NegativeBinomial
from openreml_nn.inference import (
    anova,
    bootstrap,
    bootstrap_test,
    coefficients,
    dispersion,
    emmeans,
    likelihood_ratio_test,
    profile,
    quantile_residuals,
    r2,
    reliability,
    scan,
    simulate,
    variance_shares,
    wald_test,
    zero_count,
)
from openreml_nn.inference.curves import curve_through, points_of
from openreml_nn.inference.laplace_refit import LaplaceRefit

GLMM = Path(__file__).parents[1] / "reference" / "glmm"
#: Marginal and conditional R2 by tests/reference/explained.R.
LATENT, DELTA = (0.057587788, 0.271506913), (0.028190529, 0.132908797)
TICKS = {
    "lognormal": (0.62185247, 0.94359768),
    "trigamma": (0.61555293, 0.93403877),
    "delta": (0.61894135, 0.93918034),
}
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


def test_reliability_is_that_of_the_conditional_variances_of_lme4(cbpp):
    found = reliability(cbpp[0], "herd").set_index("level")["reliability"]
    expected = json.loads((GLMM / "reliability.json").read_text())
    # Of two fits within 1e-8 of one maximum; the variance of either is known to 1e-5.
    np.testing.assert_allclose(found[expected["levels"]], expected["reliability"], atol=2e-5)


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


def test_fits_by_reml_are_compared_by_maximum_likelihood(fits):
    formulas = [f"y ~ {x} + (1 | g)" for x in ("1", "x")]
    restricted = [glmm(f, TABLE, family="poisson", method="reml") for f in formulas]
    one, other = anova(*fits), anova(*restricted)
    assert list(one["npar"]) == list(other["npar"])
    np.testing.assert_allclose(other["log_likelihood"], one["log_likelihood"], rtol=1e-8)
    with pytest.raises(InputError, match="restricted likelihoods of different fixed effects"):
        anova(*restricted, refit=False)


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
    with pytest.raises(InputError, match=r"other offsets, 0 and 0.693147 in row 2"):
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


@pytest.mark.filterwarnings("error")
def test_a_profile_beside_a_parameter_without_end_is_that_of_its_limit():
    """Counts without overdispersion, whose theta has no finite estimate."""
    table = TABLE[:60].assign(y=np.random.default_rng(3).binomial(8, 0.4, 60), one=1.0)
    fit = glmm("y ~ 1 + (1 | g)", table, family="negative_binomial")
    (found,) = profile(fit, ["(Intercept)"], progress=False).intervals().itertuples()
    for end in (found.low, found.high):
        held = glmm("y ~ 0 + offset(end * one) + (1 | g)", table.assign(end=end), family="poisson")
        fall = 2 * (fit.log_likelihood - held.log_likelihood)
        assert fall == pytest.approx(stats.chi2.ppf(0.95, 1), rel=2e-3)


@pytest.mark.parametrize("estimate", [1e3, 1e7, 1e10])
def test_a_curve_that_is_flat_and_falls_at_once_ends_where_it_falls(estimate):
    """By a fall that is known: zeta is 8 / value, as of an overdispersion without end."""
    at = math.log(estimate)
    found = points_of(0.0, at, 1e4, lambda: lambda u: -32 * math.exp(-2 * u), at - 25, at + 25)
    points = {math.exp(u): zeta for u, zeta in found.items()}
    low, high = curve_through(estimate, points, 0.0, math.inf, True).interval(0.95)
    assert low == pytest.approx(8 / stats.norm.ppf(0.975), rel=1e-2)
    assert high == math.inf


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
    with pytest.warns(RuntimeWarning, match="of 8 samples could not be fitted"):
        found = bootstrap(fit, 8, seed=1, progress=False)
    assert 0 < found.failures < 8 and len(found.samples) == 8 - found.failures
    assert found.samples["x"].abs().max() < 50


def test_a_test_by_simulation_has_the_p_value_of_the_statistics(fits):
    samples = 5
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


@pytest.fixture(scope="module")
def ticks():
    table = pd.read_csv(GLMM / "grouseticks.csv").astype({"YEAR": str, "BROOD": str})
    return glmm("TICKS ~ YEAR + h + (1 | BROOD)", table, family="poisson")


def test_shares_of_a_binary_response_are_those_by_hand():
    """By tests/reference/explained.R."""
    table = pd.read_csv(GLMM / "bacteria.csv")
    fit = glmm("resp ~ trt + (1 | ID)", table, family="binomial")
    np.testing.assert_allclose(r2(fit), LATENT, rtol=2e-3)
    np.testing.assert_allclose(r2(fit, "delta"), DELTA, rtol=2e-3)
    shares = variance_shares(fit)
    variance = float(fit.components[0].covariance)
    assert list(shares["group"]) == ["ID", "Residual"]
    np.testing.assert_allclose(shares["variance"], [variance, np.pi**2 / 3])
    icc = variance / (variance + np.pi**2 / 3)
    assert shares["share"][0] == pytest.approx(icc)
    sigma2 = next(p for p in fit.parameters if p.name.endswith("sigma^2"))
    slope = np.pi**2 / 3 / (variance + np.pi**2 / 3) ** 2
    assert shares["std_error"][0] == pytest.approx(slope * sigma2.std_error, rel=1e-4)
    for kind in ("lognormal", "trigamma"):
        with pytest.raises(InputError, match=rf"`observation` is '{kind}' and the family 'binom"):
            r2(fit, kind)


def test_shares_of_counts_are_those_by_hand(ticks):
    """By tests/reference/explained.R."""
    for kind, expected in TICKS.items():
        np.testing.assert_allclose(r2(ticks, kind), expected, rtol=1e-3)
    assert r2(ticks) == r2(ticks, "lognormal")


def test_an_effect_of_each_row_counts_with_the_observation():
    rng = np.random.default_rng(2)
    mean = np.exp(1 + 0.4 * TABLE.x + 0.7 * rng.standard_normal(200) + 0.1 * (TABLE.g - 10))
    table = TABLE.assign(row=TABLE.index, y=rng.poisson(mean))
    fit = glmm("y ~ x + (1 | g) + (1 | row)", table, family="poisson")
    shares = variance_shares(fit).set_index("group")
    fixed = float((fit.source.X @ fit.fixed.estimate).var())
    total = fixed + shares["variance"].sum()
    assert shares["variance"]["row"] > 1e-3
    expected = fixed / total, (fixed + shares["variance"]["g"]) / total
    np.testing.assert_allclose(r2(fit), expected)


def test_an_option_of_families_is_refused_of_a_gaussian_response():
    linear = lmm("y ~ x + (1 | g)", TABLE)
    for call in (r2, variance_shares):
        with pytest.raises(InputError, match="`observation` is 'latent' and the response Gaussian"):
            call(linear, "latent")


def test_a_gaussian_family_has_the_shares_of_the_linear_model():
    linear = lmm("y ~ x + (1 | g)", TABLE, method="ml")
    family = glmm("y ~ x + (1 | g)", TABLE, family=Gaussian())
    # Both within a thousandth of a standard error of the maximum.
    np.testing.assert_allclose(r2(family), r2(linear), rtol=1e-4)
    one, other = variance_shares(family), variance_shares(linear)
    np.testing.assert_allclose(one["share"], other["share"], rtol=1e-4)


def test_scatter_and_zeros_are_those_of_lme4(ticks):
    """By tests/reference/explained.R."""
    found, zeros = dispersion(ticks), zero_count(ticks)
    assert found.statistic == pytest.approx(689.3076729, rel=2e-4)
    assert (found.df, zeros.observed) == (398, 126)
    assert found.ratio == pytest.approx(1.7319288, rel=2e-4) and found.p < 1e-10
    assert zeros.expected == pytest.approx(109.3132950, rel=2e-4)
    assert zeros.ratio == zeros.observed / zeros.expected
    by_density = ticks.model.family.log_density(
        torch.zeros(403, dtype=torch.float64), ticks.fitted.log()
    )
    assert zeros.expected == pytest.approx(float(by_density.exp().sum()), rel=1e-6)


def test_scatter_of_trials_counts_them(cbpp):
    fit, table = cbpp
    p, n = fit.fitted.numpy(), table["size"].to_numpy()
    expected = ((table["incidence"] - n * p) ** 2 / (n * p * (1 - p))).sum()
    assert dispersion(fit).statistic == pytest.approx(expected, rel=1e-6)
    zeros = zero_count(fit)
    assert zeros.expected == pytest.approx(float(((1 - p) ** n).sum()), rel=1e-6)
    assert zeros.observed == (table["incidence"] == 0).sum()


def test_quantile_residuals_are_normal_where_the_model_holds():
    table = visits(4000, 40, seed=3).assign(x=lambda t: np.sin(2 * t.age))
    fit = glmm("visits ~ x + severity:distance + (1 | doctor)", table, family="poisson")
    found = quantile_residuals(fit, seed=1)
    assert stats.kstest(found.numpy(), "norm").pvalue > 0.01
    assert bool((found == quantile_residuals(fit, seed=1)).all())
    assert not bool((found == quantile_residuals(fit, seed=2)).all())
    wrong = glmm("visits ~ 1 + (1 | doctor)", table, family="poisson")
    assert stats.kstest(quantile_residuals(wrong).numpy(), "norm").pvalue < 1e-3


def test_quantile_residuals_of_a_gaussian_family_are_standardised():
    fit = glmm("y ~ x + (1 | g)", TABLE, family=Gaussian())
    expected = fit.residuals / fit.residual_variance**0.5
    torch.testing.assert_close(quantile_residuals(fit), expected, rtol=1e-6, atol=1e-8)


def test_checks_are_of_families():
    linear = lmm("y ~ x + (1 | g)", TABLE)
    for call in (dispersion, zero_count, quantile_residuals):
        with pytest.raises(InputError, match="`result` is of a linear mixed model: expected a fit"):
            call(linear)
    gamma = glmm("z ~ 1 + (1 | g)", TABLE.assign(z=TABLE.y + 0.5), family="gamma")
    with pytest.raises(InputError, match="family 'gamma', in which no response is exactly 0"):
        zero_count(gamma)


def test_zero_inflation_has_what_other_families_have():
    rng = np.random.default_rng(7)
    table = pd.DataFrame({"g": np.arange(600) % 30, "x": rng.standard_normal(600)})
    mean = np.exp(1 + 0.3 * table.x + 0.4 * rng.standard_normal(30)[table.g])
    table["y"] = rng.poisson(mean) * (rng.random(600) > 0.3)
    plain = glmm("y ~ x + (1 | g)", table, family="poisson")
    fit = glmm("y ~ x + (1 | g)", table, family="poisson", zi="~ 1")
    assert zero_count(plain).ratio > 1.3 and zero_count(fit).ratio == pytest.approx(1, abs=0.05)
    assert dispersion(plain).ratio > 1.5 and dispersion(fit).ratio == pytest.approx(1, abs=0.2)
    assert stats.kstest(quantile_residuals(fit).numpy(), "norm").pvalue > 0.01
    responses = simulate(fit, 2, seed=3)
    assert responses.shape == (600, 2) and 0.25 < float((responses == 0).double().mean()) < 0.5
    found = bootstrap(fit, 2, seed=3, progress=False)
    again = glmm(
        "y ~ x + (1 | g)", table.assign(y=responses[:, 1].numpy()), family="poisson", zi="~ 1"
    )
    sample = found.samples.iloc[1]
    np.testing.assert_allclose(sample[["(Intercept)", "x"]], again.fixed.estimate, atol=1e-4)
    (zi,) = again.family_parameters
    assert sample[zi.name] == pytest.approx(zi.value, abs=1e-3)
    ends = profile(fit, [zi.name], progress=False).intervals()
    half = 1.96 * fit.family_parameters[0].std_error
    assert float(ends["high"][0] - ends["low"][0]) == pytest.approx(2 * half, rel=0.05)


@pytest.mark.parametrize("method", ["ml", "reml"])
def test_a_scan_is_the_score_test(method):
    fit = glmm("y ~ x + (1 | g)", TABLE, family="poisson", method=method)
    markers = np.random.default_rng(5).integers(0, 3, (200, 3)).astype(float)
    found = scan(fit, np.column_stack([markers, np.ones(200), 2 * TABLE["x"] - 1]))
    # By the derivative of the likelihood, and a dense V of the working model at the mode.
    refit = LaplaceRefit(fit)
    with torch.no_grad():
        at = refit.loss.evaluate(refit.y, refit.offset, refit.X)
        Z = torch.eye(20).double()[TABLE["g"].tolist()]
        errors = at.residual.covariance.matrix
        V = torch.diag(errors) + fit.components[0].covariance * Z @ Z.mT
        V_X = torch.linalg.solve(V, refit.X)
        P = torch.linalg.inv(V) - V_X @ torch.linalg.inv(refit.X.mT @ V_X) @ V_X.mT
    for j in range(3):
        m = torch.from_numpy(markers[:, j])
        b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        loss = refit.loss(refit.y, refit.offset + m * b, refit.X)
        (slope,) = torch.autograd.grad(loss, b)
        information = m @ P @ m
        z = float(-slope / information.sqrt())
        assert found["statistic"][j] == pytest.approx(z, rel=1e-6)
        assert found["estimate"][j] == pytest.approx(float(-slope / information), rel=1e-6)
        assert found["p"][j] == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-6)
    assert found["statistic"][3:].isna().all()
    if method == "ml":
        more = glmm("y ~ x + m + (1 | g)", TABLE.assign(m=markers[:, 0]), family="poisson")
        ratio = 2 * (more.log_likelihood - fit.log_likelihood)
        assert found["statistic"][0] ** 2 == pytest.approx(ratio, rel=0.1)
