"""Inference against lmerTest, pbkrtest, lme4 and emmeans, and against its own definitions."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from openreml_nn import datasets, fit_reml, fit_stream, lmm
from openreml_nn.datasets import oats, penicillin, sleepstudy, table_path
from openreml_nn.inference import (
    anova,
    batched,
    bootstrap,
    bootstrap_test,
    coefficients,
    diagnose,
    emmeans,
    heritability,
    likelihood_ratio_test,
    profile,
    r2,
    simulate,
    variance_shares,
    wald_test,
)
from openreml_nn.inference.refit import Refit
from openreml_nn.model.structures import linear_model
from openreml_nn.table import Encoder

FILE = Path(__file__).parents[1] / "reference" / "inference.json"
REFERENCE = json.loads(FILE.read_text(encoding="utf-8"))
LOST = {
    "oats_unbalanced": [1, 5, 9, 20, 33, 50, 51],
    "sleepstudy_unbalanced": [*range(1, 9), *range(15, 20), 33, 47, *range(101, 105)],
}
FORMULAS = {name: datasets.FORMULAS[name] for name in ("sleepstudy", "oats", "penicillin")}


@cache
def fitted(name, **options):
    plain = name.removesuffix("_unbalanced")
    table = getattr(datasets, plain)()
    if name in LOST:
        table = table.drop(index=[i - 1 for i in LOST[name]])
    return lmm(FORMULAS[plain], table, **options)


@cache
def slopes(effects, **options):
    return lmm(f"Reaction ~ Days + ({effects} | Subject)", sleepstudy(), **options)


# ---------------------------------------------------------------------- degrees of freedom


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger"])
@pytest.mark.parametrize("name", REFERENCE["coefficients"])
def test_coefficients_equal_lmertest_and_pbkrtest(name, ddf):
    found = coefficients(fitted(name), ddf)
    rows = REFERENCE["coefficients"][name][ddf.replace("-", "_")]
    assert found["name"].tolist() == [row["name"] for row in rows]
    for column in ("estimate", "std_error", "df", "statistic"):
        # lme4's estimates are those of its optimizer's tolerance.
        expected = [row[column] for row in rows]
        np.testing.assert_allclose(found[column], expected, rtol=5e-4)
    np.testing.assert_allclose(found["p"], [row["p"] for row in rows], rtol=5e-3)


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger"])
@pytest.mark.parametrize("row", REFERENCE["joint"], ids=lambda row: row["names"][0])
def test_joint_tests_equal_lmertest_and_pbkrtest(row, ddf):
    found = wald_test(fitted("oats"), row["names"], ddf)
    expected = row[ddf.replace("-", "_")]
    assert found.statistic == pytest.approx(expected["F"], rel=1e-4)
    assert found.num_df == expected["num_df"]
    assert found.den_df == pytest.approx(expected["den_df"], rel=1e-4)
    assert found.p == pytest.approx(expected["p"], rel=1e-4)


def test_a_test_of_one_coefficient_is_its_t_test():
    result = fitted("oats_unbalanced")
    for ddf in ("satterthwaite", "kenward-roger", "asymptotic"):
        one = coefficients(result, ddf).iloc[2]
        test = wald_test(result, [one["name"]], ddf)
        assert test.statistic == pytest.approx(one["statistic"] ** 2, rel=1e-8)
        assert test.p == pytest.approx(one["p"], rel=1e-6)


def test_asymptotic_intervals_are_normal():
    result = fitted("sleepstudy")
    found = coefficients(result, "asymptotic", 0.9)
    half = stats.norm.ppf(0.95) * result.fixed.std_error.numpy()
    np.testing.assert_allclose(found["high"] - found["estimate"], half)


def test_tests_that_cannot_be(tmp_path):
    result = fitted("sleepstudy")
    with pytest.raises(ValueError, match="`ddf` is 'exact'"):
        coefficients(result, "exact")
    with pytest.raises(ValueError, match="`level` is 95"):
        coefficients(result, level=95)
    with pytest.raises(ValueError, match="`contrasts` is 'Nights'"):
        wald_test(result, ["Nights"])
    with pytest.raises(ValueError, match="full row rank"):
        wald_test(result, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    with pytest.raises(ValueError, match="method='reml'"):
        coefficients(fitted("sleepstudy", method="ml"), "kenward-roger")
    auto = lmm("Reaction ~ Days", sleepstudy(), residual="ar1(Days | Subject)")
    with pytest.raises(ValueError, match="use ddf='satterthwaite'"):
        coefficients(auto, "kenward-roger")
    assert 10 < coefficients(auto)["df"].min() < 180
    streamed = fit_stream(FORMULAS["sleepstudy"], table_path("sleepstudy"), progress=False)
    with pytest.raises(ValueError, match="read in chunks"):
        coefficients(streamed)


# ---------------------------------------------------------------------- likelihood ratios


@pytest.mark.parametrize("which", ["slopes", "days"])
def test_anova_equals_lme4(which):
    fits = {
        "slopes": [slopes("1"), slopes("Days")],
        "days": [lmm(f"Reaction ~ {x} + (Days | Subject)", sleepstudy()) for x in ("1", "Days")],
    }[which]
    found = anova(*reversed(fits))
    for row, (_, own) in zip(REFERENCE["anova"][which], found.iterrows(), strict=True):
        assert own["npar"] == row["npar"]
        assert own["log_likelihood"] == pytest.approx(row["logLik"], rel=1e-8)
        assert own["aic"] == pytest.approx(row["AIC"], rel=1e-8)
        assert own["bic"] == pytest.approx(row["BIC"], rel=1e-8)
    assert own["statistic"] == pytest.approx(row["Chisq"], rel=1e-5)
    assert own["df"] == row["Df"]
    assert own["p_naive"] == pytest.approx(row["Pr(>Chisq)"], rel=1e-4)
    if which == "days":
        assert own["p"] == own["p_naive"]
    else:
        x = own["statistic"]
        assert own["p"] == pytest.approx((stats.chi2.sf(x, 1) + stats.chi2.sf(x, 2)) / 2)


def test_the_mixture_counts_variances_and_covariances():
    none = lmm("Reaction ~ Days", sleepstudy())
    one, two, three = slopes("1"), slopes("Days"), slopes("Days + I(Days**2)")
    assert likelihood_ratio_test(none, one).mixture == {0: 0.5, 1: 0.5}
    assert likelihood_ratio_test(one, two).mixture == {1: 0.5, 2: 0.5}
    assert likelihood_ratio_test(two, three).mixture == {2: 0.5, 3: 0.5}
    independent = lmm("Reaction ~ Days + (Days || Subject)", sleepstudy())
    assert likelihood_ratio_test(one, independent).mixture == {0: 0.5, 1: 0.5}
    assert likelihood_ratio_test(none, independent).mixture == {0: 0.25, 1: 0.5, 2: 0.25}
    assert likelihood_ratio_test(independent, two).mixture == {1: 1.0}


def one_way_statistic(F, groups, size):
    """The statistic of a variance between groups of one size, by the F of an analysis of variance."""
    between, within = groups - 1, groups * (size - 1)
    total = between + within
    pooled = (between * F + within) / total
    return np.where(F > 1, total * np.log(pooled) - between * np.log(F), 0.0)


def test_p_values_of_variances_are_uniform_where_the_variance_is_zero():
    rng, groups, size = np.random.default_rng(0), 60, 4
    tests = []
    for effect in (0.0, 0.0, 0.4, 0.4, 0.8):
        y = rng.standard_normal((groups, size)) + effect * rng.standard_normal((groups, 1))
        table = pd.DataFrame({"y": y.ravel(), "g": np.arange(y.size) // size})
        tests.append(likelihood_ratio_test(lmm("y ~ 1", table), lmm("y ~ 1 + (1 | g)", table)))
        expected = float(one_way_statistic(stats.f_oneway(*y).statistic, groups, size))
        assert tests[-1].statistic == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert min(test.statistic for test in tests) == 0 and max(t.statistic for t in tests) > 5
    # Without a variance F has its own distribution: the chance of a p below each level is exact.
    # With ever more groups it is the level's, and by the naive p half of it.
    for level in (0.01, 0.05, 0.1, 0.2):
        for groups, room in ((60, 0.09), (1000, 0.025)):
            F = np.linspace(1, 3, 200_001)
            statistic = one_way_statistic(F, groups, size)
            (mixture,) = {tuple(test.mixture.items()) for test in tests}
            p = sum(w * (stats.chi2.sf(statistic, k) if k else 0) for k, w in mixture)
            chance, naive = (
                stats.f.sf(F[found < level][0], groups - 1, groups * (size - 1))
                for found in (p, stats.chi2.sf(statistic, tests[0].df))
            )
            assert chance == pytest.approx(level, rel=room)
            assert naive == pytest.approx(level / 2, rel=room)
    for test in tests:
        if test.statistic > 0:
            assert test.p == pytest.approx(stats.chi2.sf(test.statistic, 1) / 2, rel=1e-10)
            assert test.p_naive == pytest.approx(stats.chi2.sf(test.statistic, 1), rel=1e-10)
        else:
            assert test.p == test.p_naive == 1


@pytest.mark.parametrize(
    ("small", "large", "message"),
    [
        (lambda: slopes("1", method="ml"), lambda: slopes("Days"), "'ml' and 'reml'"),
        (
            lambda: lmm("Reaction ~ 1 + (Days | Subject)", sleepstudy()),
            lambda: slopes("Days"),
            "restricted likelihoods of different fixed effects",
        ),
        (lambda: slopes("Days"), lambda: slopes("1"), "6 and 4 parameters"),
        (
            lambda: lmm("Reaction ~ Days + (1 | Subject)", sleepstudy().iloc[:170]),
            lambda: slopes("Days"),
            "170 rows and `large` 180 rows",
        ),
    ],
)
def test_models_that_do_not_compare(small, large, message):
    with pytest.raises(ValueError, match=message):
        likelihood_ratio_test(small(), large())


# ---------------------------------------------------------------------- profiles


def test_a_profile_that_is_approximate_names_its_parameter(recwarn):
    profile(slopes("1"), ["sd_(Intercept)|Subject", "Days"], progress=False)
    assert not recwarn.list
    with pytest.warns(RuntimeWarning) as warned:
        profile(slopes("1"), ["sd_(Intercept)|Subject", "sigma"], max_iterations=1)
    told = [str(w.message) for w in warned]
    assert len(told) == 2
    for name, message in zip(["'sd_(Intercept)|Subject'", "'sigma'"], told, strict=True):
        assert message.startswith(f"the profile of {name} is approximate at ")
        assert "points, such as" in message
    with pytest.raises(ValueError, match="`max_iterations` is 0"):
        profile(slopes("1"), max_iterations=0)


@cache
def all_intervals(name):
    return profile(fitted(name), progress=False).intervals()


@pytest.mark.parametrize("name", ["sleepstudy", "penicillin"])
def test_profile_intervals_equal_lme4s_confint(name):
    found = all_intervals(name)
    rows = REFERENCE["confint"][name]
    if name == "sleepstudy":  # lme4 has the correlation before the second deviation
        rows = [rows[i] for i in (0, 2, 1, 3, 4, 5)]
    np.testing.assert_allclose(found["low"], [row["low"] for row in rows], rtol=3e-4)
    np.testing.assert_allclose(found["high"], [row["high"] for row in rows], rtol=3e-4)


def test_a_profile_of_a_fixed_effect_is_the_dense_one():
    result = fitted("sleepstudy")
    curve = profile(result, ["Days"]).curves["Days"]
    assert curve.zeta[np.argmin(abs(curve.values - curve.estimate))] == 0
    assert (np.diff(curve.zeta) > 0).all()
    # At a point, against a fit with the effect taken off the response.
    table = sleepstudy()
    value = float(curve.values[2])
    table["Reaction"] = table["Reaction"] - value * table["Days"]
    held = lmm("Reaction ~ 1 + (Days | Subject)", table, method="ml")
    free = fitted("sleepstudy", method="ml")
    expected = -((2 * (free.log_likelihood - held.log_likelihood)) ** 0.5)
    assert curve.zeta[2] == pytest.approx(expected, rel=1e-6)


def test_a_profile_of_a_standard_deviation_holds_it_and_maximises_all_else():
    result = fitted("penicillin")
    curve = profile(result, ["sd_(Intercept)|plate"]).curves["sd_(Intercept)|plate"]
    best = fitted("penicillin", method="ml").log_likelihood
    encoded = Encoder(FORMULAS["penicillin"]).fit(penicillin())
    for at in (1, len(curve.values) - 2):
        V = linear_model(encoded).covariance(encoded.batch())
        V.operands["plate"].operands["g"].fix("sigma^2", float(np.log(curve.values[at])))
        held = fit_reml(V, encoded.y, encoded.X, method="ml")
        expected = (2 * (best - held.log_likelihood)) ** 0.5
        assert abs(curve.zeta[at]) == pytest.approx(expected, rel=1e-6)


def test_a_variance_that_may_be_zero_has_an_interval_from_zero():
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"y": rng.standard_normal(100), "g": np.arange(100) // 5})
    table["y"] += 0.2 * rng.standard_normal(20)[table["g"]]
    found = profile(lmm("y ~ 1 + (1 | g)", table)).intervals().set_index("name")
    assert found.loc["sd_(Intercept)|g", "low"] == 0
    assert found.loc["sd_(Intercept)|g", "high"] > 0


def test_profiles_that_cannot_be():
    with pytest.raises(ValueError, match="`names` has 'Nights'"):
        profile(fitted("sleepstudy"), ["Nights"])
    with pytest.raises(ValueError, match=r"`level` is 0\.999"):
        profile(fitted("penicillin"), ["sigma"]).intervals(0.999)


# ---------------------------------------------------------------------- simulation


def test_simulated_responses_have_the_covariance_of_the_model():
    result = fitted("sleepstudy")
    y = simulate(result, 20_000)
    V = result.source.covariance().detach()
    mean = result.source.X @ result.fixed.estimate
    error = (V.diagonal() / 20_000).sqrt()
    assert float(((y.mean(1) - mean) / error).abs().max()) < 5
    scale = (V.diagonal()[:, None] * V.diagonal()).sqrt()
    assert float(((torch.cov(y) - V) / scale).abs().max()) < 0.05
    assert torch.equal(y[:, :2], simulate(result, 20_000)[:, :2])
    assert not torch.equal(y[:, 0], simulate(result, 1, seed=1)[:, 0])


def test_simulated_responses_have_the_offset_that_a_fit_leaves_out():
    table = sleepstudy().assign(z=np.linspace(0, 500, 180))
    formula = "Reaction ~ Days + offset(z) + (1 | Subject)"
    with_offset = lmm(formula, table)
    without = lmm("I(Reaction - z) ~ Days + (1 | Subject)", table)
    drawn = simulate(with_offset, 2, seed=3)
    expected = simulate(without, 2, seed=3) + torch.tensor(table["z"].to_numpy())[:, None]
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-4)
    again = lmm(formula, table.assign(Reaction=drawn[:, 0].numpy()))
    assert float(again.fixed.estimate[1]) == pytest.approx(
        float(with_offset.fixed.estimate[1]), rel=1
    )
    numbers = bootstrap(with_offset, 3, progress=False).samples
    other = bootstrap(without, 3, progress=False).samples
    np.testing.assert_allclose(numbers, other, rtol=1e-4)


def test_the_bootstrap_agrees_with_standard_errors():
    result = fitted("penicillin")
    found = bootstrap(result, 200, progress=False).intervals().set_index("name")
    error = float(result.fixed.std_error[0])
    assert found.loc["(Intercept)", "std_error"] == pytest.approx(error, rel=0.2)
    profiled = all_intervals("penicillin").set_index("name")
    for name in ("sd_(Intercept)|plate", "sigma"):
        for end in ("low", "high"):
            assert found.loc[name, end] == pytest.approx(profiled.loc[name, end], rel=0.1)
    own = bootstrap(result, 3, statistic=lambda r: {"aic": r.aic}, progress=False)
    assert own.samples["aic"].nunique() == 3
    assert own.estimate["aic"] == result.aic


def test_the_bootstrap_does_not_move_the_fit():
    result = fitted("sleepstudy")
    before = result.source.covariance.build_params().clone()
    bootstrap(result, 2, progress=False)
    profile(result, ["sigma"])
    coefficients(result)
    assert torch.equal(result.source.covariance.build_params(), before)


def test_a_test_by_simulation():
    assert bootstrap_test(slopes("1"), slopes("Days"), 9, progress=False) == 1 / 10
    rng = np.random.default_rng(1)
    table = pd.DataFrame({"y": rng.standard_normal(60), "g": np.arange(60) // 6})
    fits = [lmm("y ~ 1", table), lmm("y ~ 1 + (1 | g)", table)]
    p = bootstrap_test(*fits, 99, progress=False)
    assert p == pytest.approx(likelihood_ratio_test(*fits).p, abs=0.15)
    with pytest.raises(ValueError, match="`n` is 0"):
        simulate(fits[0], 0)
    with pytest.raises(ValueError, match="`level` is 2"):
        bootstrap(fits[0], 1, progress=False).intervals(2)


# ---------------------------------------------------------------------- marginal means


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger"])
def test_marginal_means_equal_emmeans(ddf):
    found = emmeans(fitted("oats"), "Variety", ddf=ddf)
    rows = REFERENCE["emmeans"][ddf.replace("-", "_")]
    columns = {"name": "Variety", "estimate": "emmean", "std_error": "SE", "df": "df"}
    columns |= {"low": "lower.CL", "high": "upper.CL"}
    for own, other in columns.items():
        expected = [row[other] for row in rows]
        if own == "name":
            assert found.table[own].tolist() == expected
        else:
            np.testing.assert_allclose(found.table[own], expected, rtol=1e-4)


def test_pairwise_differences_equal_emmeans():
    means = emmeans(fitted("oats"), "Variety", ddf="kenward-roger")
    rows = REFERENCE["emmeans"]["pairs"]
    found = means.pairs()
    assert found["name"].tolist() == [row["contrast"] for row in rows]
    for own, other in {
        "estimate": "estimate",
        "std_error": "SE",
        "df": "df",
        "p": "p.value",
    }.items():
        np.testing.assert_allclose(found[own], [row[other] for row in rows], rtol=1e-4)
    plain = means.pairs("none")["p"]
    np.testing.assert_allclose(means.pairs("bonferroni")["p"], np.minimum(1, 3 * plain))


def test_marginal_means_at_a_value_are_predictions():
    result = fitted("oats")
    found = emmeans(result, "Variety", at={"nitro": 0.2}).table["estimate"]
    beta = result.fixed.estimate
    assert found[0] == pytest.approx(float(beta[0] + 0.2 * beta[1]))
    two = lmm("yield ~ factor(nitro) + Variety + (1 | Block)", oats(), categorical=["nitro"])
    assert len(emmeans(two, ["Variety", "nitro"]).table) == 12


def test_marginal_means_that_cannot_be():
    result = fitted("oats")
    for call, message in [
        (lambda: emmeans(result, "Block"), "expected some of \\['Variety'\\]"),
        (lambda: emmeans(result, "Variety", at={"rain": 1.0}), "`at` has 'rain'"),
        (lambda: emmeans(result, "Variety").pairs("holm"), "`adjust` is 'holm'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------------- shares


def test_shares_of_variance():
    result = fitted("penicillin")
    table = variance_shares(result).set_index("group")
    components = {c.group: float(c.covariance[0, 0]) for c in result.components}
    for group, value in components.items():
        assert table.loc[group, "variance"] == pytest.approx(value)
        assert table.loc[group, "share"] == pytest.approx(value / sum(components.values()))
    assert heritability(result, "plate") == tuple(table.loc["plate", ["share", "std_error"]])
    with pytest.raises(ValueError, match="`group` is 'sire'"):
        heritability(result, "sire")


def test_the_variance_of_random_slopes_is_the_mean_over_the_rows():
    result = fitted("sleepstudy")
    V = result.source.covariance().detach()
    table = variance_shares(result).set_index("group")
    random = float(V.diagonal().mean()) - result.residual_variance
    assert table.loc["Subject", "variance"] == pytest.approx(random)
    found = r2(result)
    # As MuMIn 1.47.1's r.squaredGLMM prints them.
    assert found.marginal == pytest.approx(0.2786511, abs=2e-5)
    assert found.conditional == pytest.approx(0.7992199, abs=2e-5)


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
def test_shares_of_every_structure_are_the_diagonals_of_v():
    from openreml_nn.covariance import (
        CovariancePropagation,
        DummyMatrix,
        GaussianMatrix,
        ScalarMatrix,
        Sum,
    )

    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((60, 2)))
    place = torch.tensor(rng.uniform(0, 1, (12, 2)))
    distance = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")
    y = torch.tensor(rng.standard_normal(60))
    dense = DummyMatrix(torch.arange(60) % 12, covariates=x[:, 0])
    fits = [
        lmm("Reaction ~ Days", sleepstudy(), residual=text)
        for text in ("ar1(Days | Subject)", "us(Days | Subject)", "diag(Days)")
    ]
    V = Sum(site=CovariancePropagation(dense, GaussianMatrix(distance)), residual=ScalarMatrix(60))
    fits.append(fit_reml(V, y, torch.ones(60, 1)))
    Z = Sum(slopes=CovariancePropagation(x, ScalarMatrix(2)), residual=ScalarMatrix(60))
    fits.append(fit_reml(Z, y, torch.ones(60, 1)))
    for result in fits:
        V = result.source.covariance().detach()
        table = variance_shares(result)
        assert table["variance"].sum() == pytest.approx(float(V.diagonal().mean()))
        assert table["share"].sum() == pytest.approx(1)


# ---------------------------------------------------------------------- words


def test_a_singular_fit_is_explained():
    from tests.estimation.test_reference import table_of

    result = lmm("Yield ~ 1 + (1 | Batch)", table_of("dyestuff2"))
    (said,) = diagnose(result)
    assert "the variance of Batch is zero" in said
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.standard_normal(300), "g": np.arange(300) // 10})
    b = rng.standard_normal(30)[table["g"]]
    table["y"] = b + 0.5 * b * table["x"] + 0.5 * rng.standard_normal(300)
    together = lmm("y ~ x + (x | g)", table)
    assert any(
        "the correlation of (Intercept) and x between levels of g is 1.000" in s
        for s in diagnose(together)
    )


def test_other_troubles_are_explained():
    with pytest.warns(RuntimeWarning, match="did not converge"):
        result = fitted("sleepstudy", max_iterations=1)
    assert any("has not converged" in s and "Allow more iterations" in s for s in diagnose(result))
    stalled = replace(result, history=(replace(result.history[0], step=0.0),))
    (said,) = (s for s in diagnose(stalled) if "has not converged" in s)
    assert "more iterations change nothing" in said
    few = lmm("diameter ~ 1 + (1 | sample)", penicillin().query("sample in ['A', 'B', 'C']"))
    assert any("3 levels" in s for s in diagnose(few))


@pytest.mark.parametrize(
    ("formula", "table", "residual"),
    [
        ("Reaction ~ Days + (Days | Subject)", sleepstudy, None),
        ("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin, None),
        ("yield ~ nitro + Variety + (1 | Block/Variety)", oats, None),
        ("Reaction ~ Days + (1 | Subject)", sleepstudy, "ar1(Days | Subject)"),
    ],
)
def test_fits_in_a_batch_are_those_one_by_one(formula, table, residual, monkeypatch):
    result = lmm(formula, table(), residual=residual)
    refit, responses = Refit(result), simulate(result, 10, seed=2)
    many = batched.maximise(refit, responses)
    assert float(many.found.double().mean()) > 0.8
    for b in many.found.nonzero()[:, 0].tolist():
        refit.reset()
        alone = refit.fit(y=responses[:, b])
        assert float(many.log_likelihood[b]) == pytest.approx(alone.log_likelihood, abs=1e-8)
    together = bootstrap(result, samples=10, seed=2, progress=False)
    # As a model of a size that does not fit a batch.
    monkeypatch.setattr(batched, "_MOST", 0)
    assert not batched.maximise(refit, responses).found.any()
    alone = bootstrap(result, samples=10, seed=2, progress=False)
    pd.testing.assert_frame_equal(together.samples, alone.samples, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "residual", ["power(Weight)", "exp(fitted)", "power(Weight):ar1(Days | Subject)"]
)
def test_variances_by_a_covariate_are_no_single_standard_deviation(residual):
    """They are told by their mean over the rows; what is profiled and drawn is the rest."""
    rows = sleepstudy()[:50].assign(Weight=lambda t: 1 + t["Days"] / 4)
    fit = lmm("Reaction ~ Days + (1 | Subject)", rows, residual=residual)
    with torch.no_grad():
        variances = fit.source.covariance.operands["residual"]().diagonal()
    assert fit.residual_variance == pytest.approx(float(variances.mean()), rel=1e-9)
    shares = variance_shares(fit)
    assert shares.iloc[-1]["variance"] == pytest.approx(float(variances.mean()), rel=1e-9)
    names = ["Days"] if "ar1" in residual else ["sd_(Intercept)|Subject", "Days"]
    table = profile(fit, names, progress=False).intervals()
    assert list(table["name"]) == names
    draws = bootstrap(fit, samples=3, seed=1, progress=False)
    assert "Days" in str(draws.intervals())
