"""Singular fits, cells that cannot be estimated, nested factors: against lmerTest, pbkrtest, lme4's
confint and emmeans (``tests/reference/corners.R``), and against their own definitions."""

import json
import warnings
from functools import cache
from math import acos
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize

from openreml_nn import Result, fit_reml, lmm, restricted_log_likelihood
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    Pedigree,
    ScalarMatrix,
    Sum,
)
from openreml_nn.datasets import sleepstudy
from openreml_nn.inference import (
    anova,
    bootstrap,
    coefficients,
    diagnose,
    emmeans,
    profile,
    r2,
    variance_shares,
    wald_test,
)
from openreml_nn.inference.constrained import Ascent, Natural
from openreml_nn.inference.refit import Refit
from openreml_nn.result.tables import blup_table

FOLDER = Path(__file__).parents[1] / "reference"
REFERENCE = json.loads((FOLDER / "corners.json").read_text(encoding="utf-8"))
SETS = pd.read_csv(FOLDER / "singular.csv")
CELLS = pd.read_csv(FOLDER / "cells.csv")
GAP = CELLS[~((CELLS["a"] == "q") & (CELLS["b"] == "w"))]


@cache
def fitted(number: int, formula: str, method: str = "reml") -> Result:
    table = SETS[SETS["set"] == number]
    return lmm(formula, table, categorical=["a", "b"], method=method)


def fit_of(row):
    return fitted(row["set"], row["formula"], row["method"])


def name_of(row):
    return f"{row['set']}-{row['formula'].split('+')[1].strip()}-{row['method']}"


# ---------------------------------------------------------------------- degrees of freedom


@pytest.mark.parametrize("row", REFERENCE["fits"], ids=name_of)
def test_singular_fits_have_lmertests_degrees_of_freedom(row):
    result = fit_of(row)
    assert result.log_likelihood == pytest.approx(row["log_likelihood"], abs=1e-7)
    assert bool(result.singular) == row["singular"]
    found = coefficients(result)
    # As near as lme4's optimizer comes to the optimum.
    np.testing.assert_allclose(found["std_error"], row["std_error"], rtol=1e-4)
    np.testing.assert_allclose(found["df"], row["df"], rtol=1e-3)
    if row["method"] == "reml":
        other = coefficients(result, "kenward-roger")
        np.testing.assert_allclose(other["std_error"], row["kenward_roger"]["std_error"], rtol=1e-4)
        np.testing.assert_allclose(other["df"], row["kenward_roger"]["df"], rtol=1e-4)


@pytest.mark.parametrize("formula", ["y ~ x + (1 | a/b)", "y ~ x + (x | a)", "y ~ x + (x || a)"])
@pytest.mark.parametrize("method", ["reml", "ml"])
def test_a_term_at_the_boundary_is_as_if_it_were_left_out(formula, method):
    # Where a whole term has no variance, the smaller model has the same degrees of freedom.
    checked = 0
    for number in range(6):
        result = fitted(number, formula, method)
        gone = [c for c in result.components if c.singular and len(c.vanished) == len(c.effects)]
        if formula.endswith("(x | a)") or len(gone) != 1:
            continue
        kept = {
            ("y ~ x + (1 | a/b)", "a"): "y ~ x + (1 | a:b)",
            ("y ~ x + (1 | a/b)", "a:b"): "y ~ x + (1 | a)",
            ("y ~ x + (x || a)", "a"): {
                ("x",): "y ~ x + (1 | a)",
                ("(Intercept)",): "y ~ x + (0 + x | a)",
            },
        }[formula, gone[0].group]
        kept = kept if isinstance(kept, str) else kept[gone[0].effects]
        smaller = coefficients(fitted(number, kept, method))
        np.testing.assert_allclose(coefficients(result)["df"], smaller["df"], rtol=1e-5)
        checked += 1
    assert checked > 0 or formula.endswith("(x | a)")


def test_slopes_of_the_covariance_equal_differences():
    from openreml_nn.estimation.curvature import Curvature
    from openreml_nn.inference.refit import Refit
    from openreml_nn.inference.satterthwaite import Satterthwaite

    for residual, formula in ((None, "Reaction ~ Days + (Days | Subject)"),
                              ("ar1(Days | Subject)", "Reaction ~ Days + (1 | Subject)")):  # fmt: skip
        result = lmm(formula, sleepstudy(), residual=residual)
        how = Satterthwaite.of(result)
        objective = Refit(result).objective()
        curvature = Curvature([objective])

        def phi(u, objective=objective, curvature=curvature):
            terms = objective.terms(curvature.at.natural(0, u))
            with torch.no_grad():
                factor = objective.problem.evaluate(terms).gamma_factor
            T = objective.problem.fixed.T
            return T @ torch.cholesky_inverse(factor) @ T.mT

        for j in range(len(curvature.u)):
            h = torch.zeros_like(curvature.u)
            h[j] = 1e-4 * max(float(curvature.u[j].abs()), 1.0)
            difference = (phi(curvature.u + h) - phi(curvature.u - h)) / (2 * h[j])
            torch.testing.assert_close(how.slopes[j], difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", ["dense", "blocked", "spectral", "grid"])
def test_degrees_of_freedom_are_those_of_every_solver(solver):
    generator = torch.Generator().manual_seed(1)
    n = 48
    X = torch.stack([torch.ones(n), torch.linspace(0, 1, n)], 1)
    root = torch.randn(n, n, generator=generator)
    kernel = root @ root.mT / n
    if solver == "grid":
        from openreml_nn.covariance import AR1Matrix, KroneckerProduct

        field = KroneckerProduct(rows=AR1Matrix(6), columns=AR1Matrix(8))
        make = lambda: Sum(field=field, residual=ScalarMatrix(n))  # noqa: E731
        sides = [
            rho ** (torch.arange(m)[:, None] - torch.arange(m)).abs()
            for m, rho in ((6, 0.6), (8, 0.5))
        ]
        y = torch.linalg.cholesky(torch.kron(*sides)) @ torch.randn(n, generator=generator)
        y = y + 0.5 * torch.randn(n, generator=generator)
    elif solver == "spectral":
        make = lambda: Sum(  # noqa: E731
            kernel=CovariancePropagation(DummyMatrix(list(range(n))), KnownMatrix(kernel)),
            residual=ScalarMatrix(n),
        )
        y = 2 * root @ torch.randn(n, generator=generator) + torch.randn(n, generator=generator)
    else:
        labels = [i % 6 for i in range(n)]
        make = lambda: Sum(  # noqa: E731
            group=CovariancePropagation(DummyMatrix(labels), ScalarMatrix(6)),
            residual=ScalarMatrix(n),
        )
        y = torch.randn(6, generator=generator)[torch.tensor(labels)]
        y = 2 * y + torch.randn(n, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = coefficients(fit_reml(make(), y, X, solver=solver))
        dense = coefficients(fit_reml(make(), y, X, solver="dense"))
    np.testing.assert_allclose(found["df"], dense["df"], rtol=1e-4)
    assert found["df"].between(1, n).all()


def test_joint_degrees_of_freedom_are_fai_and_cornelius():
    from openreml_nn.inference.satterthwaite import joint_df

    # 2 E / (E - q) with E the sum of df / (df - 2), by hand for 4 and 10.
    assert joint_df([4.0, 10.0]) == pytest.approx(2 * 3.25 / (3.25 - 2))
    assert joint_df([4.0, 4.0]) == 4.0
    assert joint_df([1.5, 10.0]) == 2.0
    assert joint_df([float("inf")] * 2) == float("inf")


def test_kenward_roger_says_that_variances_cannot_be_told_apart():
    table = SETS[SETS["set"] == 1].assign(c=lambda t: t["a"] + 10)
    with pytest.warns(RuntimeWarning, match="cannot tell apart"):
        result = lmm("y ~ x + (1 | a) + (1 | c)", table)
    with pytest.raises(ValueError, match=r"`ddf` is 'kenward-roger'.*apart"):
        coefficients(result, "kenward-roger")
    assert (coefficients(result)["df"] > 0).all()


# ---------------------------------------------------------------------- profiles


def test_profiles_of_singular_fits_equal_confint():
    for row in REFERENCE["fits"]:
        # lme4 has none where a correlation is one.
        if row.get("confint") is None or "(x | a)" in row["formula"]:
            continue
        if row["set"] > 0:
            continue
        found = profile(fit_of(row)).intervals().set_index("name")
        for expected in row["confint"]:
            name = expected["name"].replace("b:a", "a:b")
            for end in ("low", "high"):
                assert found.loc[name, end] == pytest.approx(expected[end], rel=2e-3, abs=2e-4)


def test_profiles_at_a_correlation_of_one():
    result = fitted(2, "y ~ x + (x | a)", "ml")
    assert result.components[0].correlation[1, 0] == pytest.approx(1.0)
    found = profile(result, ["sd_x|a", "cor_x.(Intercept)|a", "x"])
    intervals = found.intervals().set_index("name")
    assert tuple(intervals.loc["cor_x.(Intercept)|a", ["low", "high"]]) == (-1.0, 1.0)
    # lme4's confint has these of the fixed effect, and none of the others.
    (row,) = [r for r in REFERENCE["fits"] if name_of(r) == "2-(x | a)-ml"]
    expected = {e["name"]: e for e in row["confint"]}["x"]
    assert intervals.loc["x", "low"] == pytest.approx(expected["low"], abs=1e-4)
    assert intervals.loc["x", "high"] == pytest.approx(expected["high"], abs=1e-4)
    assert intervals.loc["sd_x|a", "low"] == 0
    assert (intervals["low"] <= intervals["estimate"]).all()
    assert (intervals["estimate"] <= intervals["high"]).all()


def test_a_profile_at_a_correlation_of_one_is_at_least_what_a_search_finds():
    result = fitted(0, "y ~ x + (x | a)", "ml")
    curve = profile(result, ["sd_(Intercept)|a"]).curves["sd_(Intercept)|a"]
    at = int(np.argmin(abs(curve.values - 0.55)))
    held, reached = curve.values[at], result.log_likelihood - curve.zeta[at] ** 2 / 2
    y, X = result.source.y, result.source.X
    table = SETS[SETS["set"] == 0]
    Z = torch.tensor(pd.get_dummies(table["a"]).to_numpy(float))
    x = X[:, 1]
    best = -np.inf
    for sd in np.linspace(0.02, 0.3, 15):
        for correlation in (-1, -0.985, -0.9, 0, 0.9, 1):
            for sigma in (0.88, 0.9, 0.92):
                c = correlation * sd * held
                g = held**2 + c * (x[:, None] + x) + sd**2 * x[:, None] * x
                V = (Z @ Z.mT) * g + sigma**2 * torch.eye(60)
                best = max(best, float(restricted_log_likelihood(y, X, V, "ml")))
    # lme4's profile stays 0.3 below, where the correlation is one.
    assert best - 1e-6 <= reached < best + 0.05


@pytest.mark.parametrize("correlation", [0.5, -0.99])
def test_a_correlation_of_the_other_sign_leaves_no_slopes(correlation):
    """Where a correlation is held far from the data's, the slope's standard deviation is zero: a
    negative one would be a correlation of the other sign."""
    rng = np.random.default_rng(2)
    a, x = np.repeat(np.arange(10), 5), np.tile(np.linspace(-1, 1, 5), 10)
    b = rng.standard_normal(10)
    slopes = 0.3 * (-0.9 * b + 0.19**0.5 * rng.standard_normal(10))
    y = b[a] + slopes[a] * x + 0.5 * rng.standard_normal(50)
    result = lmm("y ~ x + (x | a)", pd.DataFrame({"y": y, "x": x, "a": a.astype(str)}), method="ml")
    natural = Natural(Refit(result).objective(method="ml"))
    held = natural.held(0, 1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reached = Ascent(natural, natural.start).hold(held, acos(correlation))

    X, same = torch.stack([torch.ones(50), torch.tensor(x)], 1), torch.tensor(a[:, None] == a)
    x = X[:, 1]

    def deviance(sds):
        c = correlation * sds[0] * sds[1]
        g = sds[0] ** 2 + c * (x[:, None] + x) + sds[1] ** 2 * x[:, None] * x
        V = same * g + sds[2] ** 2 * torch.eye(50)
        return -2 * restricted_log_likelihood(torch.tensor(y), X, V, "ml").item()

    found = minimize(deviance, [1, 0.1, 0.5], bounds=[(0, None), (0, None), (1e-3, None)])
    assert reached == pytest.approx(-found.fun / 2, abs=1e-5)


def test_a_profile_of_three_effects_ends_where_the_likelihood_does():
    result = fitted(4, "y ~ x + (x | a)", "ml")
    names = ["sd_x|a", "cor_x.(Intercept)|a"]
    for curve in profile(result, names).curves.values():
        assert (np.diff(curve.zeta) > 0).all()
        assert curve.zeta[np.argmin(abs(curve.values - curve.estimate))] == 0
        low, high = curve.interval(0.95)
        assert low <= curve.estimate <= high


# ---------------------------------------------------------------------- everything answers


@pytest.mark.parametrize("formula", ["y ~ x + (1 | a/b)", "y ~ x + (x | a)", "y ~ x + (x || a)"])
def test_everything_answers_for_a_singular_fit(formula):
    for number in (0, 4):
        result = fitted(number, formula)
        assert result.singular
        assert any("singular" in said for said in diagnose(result))
        summary = result.summary()
        assert "singular fit: the " in summary
        shares = variance_shares(result)
        assert shares["share"].sum() == pytest.approx(1)
        assert ((shares["share"] > 0) | shares["std_error"].isna()).all()
        assert 0 < r2(result).marginal <= r2(result).conditional < 1
        assert np.isfinite(wald_test(result, ["x"]).den_df)
    table = bootstrap(fitted(0, formula), 2, progress=False).intervals()
    assert len(table) == len(profile(fitted(0, formula), []).curves) + len(table)


def test_the_summary_says_what_is_singular():
    # The variance of a factor, of one of its effects, and a correlation.
    words = {
        (0, "y ~ x + (1 | a/b)"): "the variance of a is zero",
        (4, "y ~ x + (x || a)"): "the variance of x between levels of a is zero",
        (
            4,
            "y ~ x + (x | a)",
        ): "the correlation of (Intercept) and x between levels of a is -1.000",
    }
    for (number, formula), what in words.items():
        result = fitted(number, formula)
        assert f"singular fit: {what}" in result.summary()
        (said,) = diagnose(result)
        assert what in said


@pytest.mark.parametrize(("ratio", "singular"), [(0.5e-4, True), (2e-4, False), (0.3, False)])
def test_an_effect_is_singular_below_a_ten_thousandth_of_the_residual(ratio, singular):
    labels = [i % 5 for i in range(40)]
    V = Sum(
        group=CovariancePropagation(z=DummyMatrix(labels), g=ScalarMatrix(5)),
        residual=ScalarMatrix(40),
    )
    V.fix("group/g/sigma^2", float(np.log(2 * ratio)))
    V.fix("residual/sigma^2", float(np.log(2)))
    result = fit_reml(V, torch.randn(40), torch.ones(40, 1))
    assert result.singular == (("group",) if singular else ())


# ---------------------------------------------------------------------- marginal means


def compared(table, reference):
    """Rows of emmeans against R's, whose names may hold the nesting factor too."""
    found = table.set_index("name")
    assert len(found) == len(reference["level"])
    for i, level in enumerate(reference["level"]):
        parts = level.split(", ")
        (name,) = [n for n in {level, parts[0], ", ".join(reversed(parts))} if n in found.index]
        for column in ("estimate", "std_error", "df"):
            expected = reference[column][i]
            if expected is None:
                assert np.isnan(found.loc[name, column])
                assert found.loc[name, "note"] == "not estimable"
            else:
                assert found.loc[name, column] == pytest.approx(expected, rel=1e-5)
                assert found.loc[name, "note"] == ""


@pytest.fixture(scope="module")
def gap():
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        return lmm("y ~ a * b + (1 | g)", GAP)


def test_cells_that_cannot_be_estimated_are_emmeans_nonest(gap):
    reference = REFERENCE["means"]["gap"]
    compared(emmeans(gap, ["a", "b"]).table, reference["cells"])
    compared(emmeans(gap, "a").table, reference["a"])
    means = emmeans(gap, "b")
    compared(means.table, reference["b"])
    pairs = means.pairs()
    assert pairs["name"].tolist() == reference["pairs"]["name"]
    assert pairs["note"].tolist() == ["", "not estimable", "not estimable"]
    # The studentised range is R's own approximation.
    assert pairs["p"][0] == pytest.approx(reference["pairs"]["p"][0], rel=1e-3)


@pytest.mark.filterwarnings("ignore:the fixed-effect model matrix")
def test_what_can_be_estimated_does_not_depend_on_the_order_of_levels(gap):
    for first in ("u", "v", "w"):
        table = GAP.assign(b=GAP["b"].replace({first: f"0{first}"}))
        again = lmm("y ~ a * b + (1 | g)", table)
        for factors in ("a", "b", ["a", "b"]):
            one = emmeans(gap, factors).table.set_index("name")
            other = emmeans(again, factors).table
            other["name"] = other["name"].str.replace("0", "")
            other = other.set_index("name").loc[one.index]
            assert one["note"].tolist() == other["note"].tolist()
            np.testing.assert_allclose(one["estimate"], other["estimate"], rtol=1e-8)
            np.testing.assert_allclose(one["std_error"], other["std_error"], rtol=1e-6)


def test_rows_that_cannot_be_estimated_have_no_prediction(gap):
    grid = pd.DataFrame([(a, b) for a in "pq" for b in "uvw"], columns=["a", "b"])
    rows = torch.tensor(gap.encoder.fixed_matrix(grid))
    known = gap.fixed.estimable(rows)
    assert known.tolist() == [True] * 5 + [False]
    found = gap.fixed.predict(rows)
    assert torch.equal(found.isnan(), ~known)
    # All rows of the fit are, whatever the units.
    assert bool(gap.fixed.estimable(gap.source.X).all())
    torch.testing.assert_close(
        gap.fixed.predict(gap.source.X),
        gap.source.X[:, list(gap.fixed.columns)] @ gap.fixed.estimate,
    )


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_what_can_be_estimated_does_not_depend_on_units(unit):
    x = torch.randn(12)
    X = torch.stack([torch.ones(12), unit * x, unit * 2 * x, x**2], 1)
    y = torch.randn(12)
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        result = fit_reml(ScalarMatrix(12), y, X)
    rows = torch.tensor([[1.0, unit, 2 * unit, 0.0], [1.0, unit, unit, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert result.fixed.estimable(rows).tolist() == [True, False, True]


def test_nested_factors_are_averaged_where_they_are():
    reference = REFERENCE["means"]["nested"]
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        result = lmm("y ~ type + variety + season + (1 | g)", CELLS)
    for factors in ("type", "variety", "season", ["type", "variety"]):
        key = factors if isinstance(factors, str) else "both"
        compared(emmeans(result, factors).table, reference[key])


def test_factors_that_the_formula_nests():
    reference = REFERENCE["means"]["within"]
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        result = lmm("y ~ type + type:variety + season + (1 | g)", CELLS)
    for factor in ("type", "season"):
        compared(emmeans(result, factor).table, reference[factor])
    # Levels that are counted anew in each are told apart by it.
    table = CELLS.assign(variety=CELLS["variety"].str[1])
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        again = lmm("y ~ type/variety + season + (1 | g)", table)
    names = emmeans(again, "variety").table["name"].tolist()
    assert sorted(names) == ["1, new", "1, old", "2, new", "2, old", "3, new"]


def test_a_marginal_mean_is_over_all_cells():
    result = lmm("y ~ a * b + (1 | g)", CELLS)
    cells = emmeans(result, ["a", "b"]).table.set_index("name")["estimate"]
    means = emmeans(result, "a").table.set_index("name")["estimate"]
    for a in "pq":
        assert means[a] == pytest.approx(np.mean([cells[f"{a}, {b}"] for b in "uvw"]))
        assert means[a] != pytest.approx(cells[f"{a}, u"])


# ---------------------------------------------------------------------- names of levels


def test_blups_carry_the_names_of_the_pedigree():
    pedigree = Pedigree.of(list("zyxwvu"), list("aaaccc"), list("bbbdde"))
    records = list("zyxwvu") * 3
    V = Sum(
        animal=CovariancePropagation(
            pedigree.design(records), KnownInverseMatrix(pedigree.inverse)
        ),
        residual=ScalarMatrix(18),
    )
    y = torch.tensor([float(ord(c)) for c in records]) + torch.randn(18)
    table = blup_table(fit_reml(V, y, torch.ones(18, 1)))
    assert table["level"].tolist() == list(pedigree.levels)
    by = table.set_index("level")["blup"]
    assert by["z"] > by["u"]


def test_blups_carry_the_labels_of_interactions_and_kernels():
    a, b = ["p", "p", "q", "q"] * 6, ["u", "v"] * 12
    place = DummyMatrix(["s10", "s9", "s1"] * 8, levels=["s9", "s10", "s1"], lex_order=False)
    V = Sum(
        cell=CovariancePropagation(z=DummyMatrix(a, b), g=ScalarMatrix(4)),
        place=CovariancePropagation(z=place, g=KnownMatrix(torch.eye(3) + 0.5)),
        residual=ScalarMatrix(24),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = blup_table(fit_reml(V, torch.randn(24), torch.ones(24, 1)))
    levels = table.groupby("group", sort=False)["level"].apply(list)
    assert levels["cell"] == ["p:u", "p:v", "q:u", "q:v"]
    assert levels["place"] == ["s9", "s10", "s1"]


def test_zeros_have_no_sign():
    V = Sum(
        group=CovariancePropagation(z=DummyMatrix([i // 3 for i in range(12)]), g=ScalarMatrix(4)),
        residual=ScalarMatrix(12),
    )
    result = fit_reml(V, torch.tensor([1.0, 2.0, 3.0] * 4), torch.ones(12, 1))
    assert not np.signbit(blup_table(result)["blup"]).any()
    assert "-0" not in result.summary().split("Fixed effects")[0]


# ---------------------------------------------------------------------- likelihood ratios


def test_without_refitting_anova_is_ranova():
    fits = [lmm(f"Reaction ~ Days + ({e} | Subject)", sleepstudy()) for e in ("1", "Days")]
    row = anova(*fits, refit=False).iloc[1]
    assert row["statistic"] == pytest.approx(REFERENCE["ranova"]["statistic"], rel=1e-6)
    assert row["p_naive"] == pytest.approx(REFERENCE["ranova"]["p"], rel=1e-5)
    assert anova(*fits).iloc[1]["statistic"] == pytest.approx(42.139, abs=1e-3)


# ---------------------------------------------------------------------- careless calls


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda r: coefficients(r.fixed), "`result`"),
        (lambda r: coefficients(r, ddf=1), "`ddf`"),
        (lambda r: coefficients(r, level="95%"), "`level`"),
        (lambda r: coefficients(r, level=float("nan")), "`level`"),
        (lambda r: wald_test(r, "x"), "`contrasts`"),
        (lambda r: wald_test(r, []), "`contrasts`"),
        (lambda r: wald_test(r, torch.full((1, 2), float("nan"))), "`contrasts`"),
        (lambda r: profile(r, "x"), "`names`"),
        (lambda r: profile(None), "`result`"),
        (lambda r: bootstrap(r, -1), "`samples`"),
        (lambda r: bootstrap(r, 2, seed=1.5), "`seed`"),
        (lambda r: bootstrap(r, 2, statistic=3), "`statistic`"),
        (lambda r: anova([r, r]), r"`results\[0\]` is \[Result"),
        (lambda r: anova(r, SETS), r"`results\[1\]`"),
        (lambda r: anova(r, r, refit="no"), "`refit`"),
        (lambda r: emmeans(r, 3), "`factors`"),
        (lambda r: variance_shares({}), "`result`"),
        (lambda r: r2(1), "`result`"),
        (lambda r: diagnose("fit"), "`result`"),
    ],
)
def test_wrong_arguments_are_named(call, argument):
    with pytest.raises((ValueError, TypeError), match=argument):
        call(fitted(0, "y ~ x + (x | a)"))


def test_a_field_beside_independent_errors_is_residual_variance():
    rng = np.random.default_rng(0)
    row, col = (x.ravel() for x in np.meshgrid(range(6), range(6), indexing="ij"))
    table = pd.DataFrame({"row": row, "col": col, "g": rng.integers(0, 6, 36).astype(str)})
    lags = 0.7 ** abs(np.subtract.outer(range(6), range(6)))
    field = np.linalg.cholesky(np.kron(lags, lags)) @ rng.normal(size=36)
    table["y"] = 2 * field + rng.normal(size=6)[table["g"].astype(int)] + rng.normal(size=36)
    result = lmm("y ~ 1 + (1 | g)", table, residual="ar1(row):ar1(col) + units")
    g, field, units = (float(c.covariance.mean()) for c in result.components)
    assert r2(result).conditional == pytest.approx(g / (g + field + units), rel=1e-9)
