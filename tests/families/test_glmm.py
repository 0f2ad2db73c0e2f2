"""Generalised linear mixed models by formula: against R, against other ways, and what is refused."""

import json
import warnings
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from openreml_nn import InputError, MixedModel, NumericalError, RandomEffect, glmm, lmm
from openreml_nn.covariance import Pedigree
from openreml_nn.datasets import sleepstudy
from openreml_nn.families import Binomial, Family, Gaussian, NegativeBinomial, Poisson

HERE = Path(__file__).parents[1] / "reference" / "glmm"
REFERENCE = json.loads((HERE / "reference.json").read_text())
#: glmer's own standard errors by the Hessian of the deviance; those of REFERENCE hold the covariance.
ERRORS = {
    (found["id"], found["nAGQ"]): found["hessian"]
    for found in json.loads((HERE / "errors.json").read_text())
}
NAMES = {
    "nbinom2": "negative_binomial",
    "nbinom1": "negative_binomial_1",
    "cumulative": "ordinal",
}
TEXT = [
    "period",
    "herd",
    "ID",
    "trt",
    "livch",
    "YEAR",
    "BROOD",
    "INDEX",
    "LOCATION",
    "site",
    "judge",
]


def data(name):
    return pd.read_csv(HERE / f"{name}.csv", dtype=dict.fromkeys(TEXT, str))


def fit(case):
    return glmm(
        case["formula"],
        data(case["data"]),
        family=NAMES.get(case["family"], case["family"]),
        link=None if case["link"] == "log" else case["link"],
        method="reml" if case.get("reml") else "ml",
        quadrature=case.get("nAGQ") or 1,
    )


@pytest.fixture(scope="module")
def counts():
    return glmm("count ~ mined + (1 | site)", data("salamanders"), family="negative_binomial")


@pytest.fixture(scope="module")
def binary():
    return glmm("resp ~ trt + late + (1 | ID)", data("bacteria"), family="binomial")


@pytest.mark.parametrize(
    "case", REFERENCE, ids=lambda c: f"{c['id']}-{c['engine']}-{c.get('nAGQ')}-{c.get('reml')}"
)
def test_a_fit_is_that_of_r(case):
    result = fit(case)
    assert result.converged
    constants_left_out = (
        case["engine"] == "glmer"
        and case["nAGQ"] > 1
        and case["data"]
        in (
            "cbpp",
            "epil",
        )
    )
    if not constants_left_out:
        assert result.log_likelihood == pytest.approx(case["logLik"], rel=1e-7)
    own = {e.name: (e.value, e.std_error) for e in result.family_parameters}
    fixed = zip(result.fixed.names, result.fixed.estimate, result.fixed.std_error, strict=True)
    own |= {name: (float(b), float(s)) for name, b, s in fixed}
    errors = ERRORS[case["id"], case["nAGQ"]] if case["engine"] == "glmer" else case["se"]
    for name, estimate in case["fixed"].items():
        assert abs(own[name][0] - estimate) < 0.001 * errors[name]
        assert own[name][1] == pytest.approx(errors[name], rel=3e-4)
    components = {c.group: c for c in result.components}
    for term in case["random"]:
        expected = torch.tensor(term["cov"])
        torch.testing.assert_close(
            components[term["group"]].covariance, expected, rtol=1e-3, atol=1e-6
        )
    if case["family"].startswith("nbinom"):
        assert result.family_parameters[0].value == pytest.approx(case["dispersion"], rel=1e-3)
    levels = set(case.get("blup_levels", ()))
    (at,) = [i for i, c in enumerate(result.components) if levels and levels <= set(c.levels)] or [
        -1
    ]
    if at >= 0:
        place = {level: i for i, level in enumerate(result.components[at].levels)}
        found = [float(result.random[at].values[place[x], 0]) for x in case["blup_levels"]]
        assert found == pytest.approx(case["blup5"], abs=1e-3)


def test_modes_of_an_ordinal_response_are_those_at_the_estimates_of_clmm():
    expected = json.loads((HERE / "modes.json").read_text())
    (case,) = (c for c in REFERENCE if c["id"] == "wine" and c["nAGQ"] == 1)
    result = fit(case)
    assert list(result.components[0].levels) == expected["levels"]
    found = result.random[0]
    assert found.values[:, 0].tolist() == pytest.approx(expected["modes"], abs=1e-3)
    assert found.variances[:, 0, 0].tolist() == pytest.approx(expected["variances"], rel=1e-3)


def test_categories_of_text_have_no_order_but_their_spelling():
    table = data("wine")
    words = table.assign(rating=table["rating"].map(dict(enumerate("abcde", 1))))
    with pytest.warns(
        RuntimeWarning, match=r"'rating' is text, .* 'a' < 'b' < 'c'.*such as '1_a'$"
    ):
        spelt = glmm("rating ~ temp + contact + (1 | judge)", words, family="ordinal")
    ordered = words.assign(rating=pd.Categorical(words["rating"], list("edcba"), ordered=True))
    turned = glmm("rating ~ temp + contact + (1 | judge)", ordered, family="ordinal")
    assert turned.log_likelihood == pytest.approx(spelt.log_likelihood, rel=1e-9)
    torch.testing.assert_close(turned.fixed.estimate, -spelt.fixed.estimate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ml", "reml"])
def test_gaussian_responses_are_a_linear_mixed_model(method):
    formula, table = "Reaction ~ Days + (Days | Subject)", sleepstudy()
    one, other = (
        glmm(formula, table, family="gaussian", method=method),
        lmm(formula, table, method=method),
    )
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
    torch.testing.assert_close(one.fixed.estimate, other.fixed.estimate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        one.components[0].covariance, other.components[0].covariance, rtol=1e-3, atol=1e-3
    )
    assert one.family_parameters[0].value == pytest.approx(other.residual_variance, rel=1e-4)
    torch.testing.assert_close(one.random[0].values, other.random[0].values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.fitted, other.fitted, rtol=1e-4, atol=1e-3)
    if method == "reml":
        # Coefficients are known less well where the variances are estimated too.
        assert (one.fixed.std_error >= 0.999 * other.fixed.std_error).all()
        columns = ["mean", "population_mean"]
        torch.testing.assert_close(
            torch.tensor(one.predict(table)[columns].to_numpy()),
            torch.tensor(other.predict(table)[columns].to_numpy()),
            rtol=1e-4,
            atol=1e-2,
        )


def test_trials_are_as_many_rows_of_zeros_and_ones():
    table = data("cbpp")
    one = glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", table, family="binomial")
    rows = []
    for row in table.itertuples():
        rows += [(row.herd, row.period, int(i < row.incidence)) for i in range(row.size)]
    long = pd.DataFrame(rows, columns=["herd", "period", "sick"])
    other = glmm("sick ~ period + (1 | herd)", long, family="binomial")
    torch.testing.assert_close(one.fixed.estimate, other.fixed.estimate, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.fixed.std_error, other.fixed.std_error, rtol=1e-4, atol=1e-5)


def test_units_and_offsets_move_the_intercept_only():
    table = data("epil").assign(exposure=7.0, positive=lambda t: t.y + 0.5)
    formula = "{} ~ lbase + (1 | subject)"
    one = glmm(formula.format("y"), table, family="poisson")
    other = glmm("y ~ lbase + offset(log(exposure)) + (1 | subject)", table, family="poisson")
    moved = one.fixed.estimate - other.fixed.estimate
    torch.testing.assert_close(moved, torch.tensor([log(7), 0.0]), rtol=1e-4, atol=1e-4)
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
    torch.testing.assert_close(one.fitted, other.fitted, rtol=1e-3, atol=1e-3)
    large = table.assign(positive=1000 * table.positive)
    one, other = (glmm(formula.format("positive"), x, family="gamma") for x in (table, large))
    moved = other.fixed.estimate - one.fixed.estimate
    torch.testing.assert_close(moved, torch.tensor([log(1000), 0.0]), rtol=1e-4, atol=1e-4)
    assert other.family_parameters[0].value == pytest.approx(
        one.family_parameters[0].value, rel=1e-4
    )


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_gaussian_fits_follow_the_units(scale):
    formula, table = "Reaction ~ Days + (Days | Subject)", sleepstudy()
    one = glmm(formula, table, family="gaussian")
    other = glmm(formula, table.assign(Reaction=scale * table.Reaction), family="gaussian")
    torch.testing.assert_close(
        other.fixed.estimate, scale * one.fixed.estimate, rtol=1e-4, atol=1e-4 * scale
    )
    torch.testing.assert_close(
        other.components[0].covariance,
        scale**2 * one.components[0].covariance,
        rtol=1e-2,
        atol=1e-2 * scale**2,
    )


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0), (1e3, 0), (1, 50)])
def test_units_of_a_slope_change_nothing(scale, shift):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=800), rng.integers(0, 40, 800)
    b = rng.normal(size=(40, 2)) @ np.array([[0.7, 0.2], [0, 0.4]])
    table = pd.DataFrame({"y": rng.poisson(np.exp(0.3 + 0.5 * x + b[g, 0] + b[g, 1] * x)), "g": g})
    one = glmm("y ~ x + (x | g)", table.assign(x=x), family="poisson")
    other = glmm("y ~ x + (x | g)", table.assign(x=scale * x + shift), family="poisson")
    assert other.converged
    assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-9)
    slopes = [r.components[0].covariance[1, 1].item() for r in (one, other)]
    assert slopes[1] * scale**2 == pytest.approx(slopes[0], rel=1e-3)


def test_a_pedigree_and_its_matrix_are_one_model():
    n, rng = 30, np.random.default_rng(1)
    names = [f"a{i}" for i in range(n)]
    parents = [(None, None)] * 10 + [(f"a{i % 5}", f"a{5 + i % 5}") for i in range(n - 10)]
    pedigree = pd.DataFrame(parents, columns=["sire", "dam"])
    pedigree.insert(0, "animal", names)
    table = pd.DataFrame({"animal": names * 8, "y": rng.binomial(1, 0.4, 8 * n)})
    one = glmm("y ~ 1 + (1 | ped(animal))", table, family="binomial", pedigree=pedigree)
    own = Pedigree.of(names, *zip(*parents, strict=True))
    A = torch.linalg.inv(own.inverse.to_dense())
    K = pd.DataFrame(A.numpy(), index=own.names, columns=own.names)
    other = glmm("y ~ 1 + (1 | vm(animal, A))", table, family="binomial", kernels={"A": K})
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-8)
    torch.testing.assert_close(one.fixed.estimate, other.fixed.estimate, rtol=1e-4, atol=1e-5)


def test_a_variance_of_zero_is_said_to_be():
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"g": np.repeat(np.arange(20), 30).astype(str), "y": rng.poisson(3, 600)})
    result = glmm("y ~ 1 + (1 | g)", table, family="poisson")
    assert result.converged
    assert float(result.components[0].covariance) == 0
    assert result.singular == ("g",)
    assert "the variance of g is zero" in result.summary()
    alone = (
        -Poisson()
        .log_density(
            torch.tensor(table.y.to_numpy(copy=True)).double(), result.fixed.estimate.expand(600)
        )
        .sum()
    )
    assert result.log_likelihood == pytest.approx(-float(alone), rel=1e-10)


def test_predictions_are_expectations_on_the_scale_of_the_response(binary, counts):
    table = pd.DataFrame({"trt": ["drug", "placebo"], "late": 1, "ID": ["X01", "new"]})
    with pytest.warns(RuntimeWarning, match="did not see"):
        found = binary.predict(table)
    assert list(found.columns) == ["mean", "variance", "population_mean", "low", "high"]
    sd = float(binary.components[0].std_dev)
    grid = torch.linspace(-8, 8, 20001)
    weight = torch.exp(-grid * grid / 2) / (2 * np.pi) ** 0.5 * (grid[1] - grid[0])
    b = dict(zip(binary.fixed.names, binary.fixed.estimate.tolist(), strict=True))
    eta = b["(Intercept)"] + b["late"] + b["trtplacebo"]
    marginal = (weight * torch.sigmoid(eta + sd * grid)).sum().item()
    assert found.population_mean.iloc[1] == pytest.approx(marginal, rel=1e-6)
    # A new level's mean is that of the population, but for what is unknown of the coefficients.
    assert found["mean"].iloc[1] == pytest.approx(marginal, abs=0.03)
    assert found.variance.iloc[1] == pytest.approx(
        found["mean"].iloc[1] * (1 - found["mean"].iloc[1]), rel=1e-6
    )
    assert ((found.low < found["mean"]) & (found["mean"] < found.high)).all()
    site = pd.DataFrame({"mined": ["no", "no"], "site": ["R-1", "new"]})
    with pytest.warns(RuntimeWarning, match="did not see"):
        found = counts.predict(site)
    variance = float(counts.components[0].covariance)
    expected = np.exp(float(counts.fixed.estimate[0]) + variance / 2)
    assert found.population_mean.tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert found.variance.iloc[0] < found.variance.iloc[1]


def test_categories_of_two_and_a_file_are_taken(tmp_path, binary):
    table = data("bacteria")
    table["resp"] = np.where(table.resp == 1, "yes", "no")
    table.to_csv(tmp_path / "bacteria.csv", index=False)
    found = glmm("resp ~ trt + late + (1 | ID)", tmp_path / "bacteria.csv", family=Binomial())
    assert found.log_likelihood == pytest.approx(binary.log_likelihood, rel=1e-12)


def test_a_result_says_its_family(counts, tmp_path):
    text = counts.summary()
    assert text.startswith("Generalised linear mixed model fit by maximum likelihood (Laplace)")
    assert "negative_binomial" in text
    assert "theta" in text
    assert "z value" in text
    counts.to_json(tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["model"]["family"] == "negative_binomial"
    assert found["model"]["link"] == "log"
    assert found["model"]["quadrature"] == 1
    assert found["family_parameters"] == {"theta": counts.family_parameters[0].value}
    assert found["residual"]["variance"] is None


def test_standard_errors_are_those_of_the_likelihoods_curvature(binary):
    """A profile of one coefficient by finite differences of the maximised likelihood."""
    table, step = data("bacteria"), 0.05
    values = []
    for sign in (-1, 1):
        held = table.assign(shift=sign * step * table.late)
        moved = glmm("resp ~ trt + late + offset(shift) + (1 | ID)", held, family="binomial")
        values.append(moved.log_likelihood)
    # An offset in a column of X changes its coefficient and nothing else.
    assert values == pytest.approx([binary.log_likelihood] * 2, rel=1e-9)


def test_an_own_family_is_fitted():
    class Own(Family):
        link = "log"

        def log_density(self, y, eta):
            return y * eta - eta.exp() - torch.lgamma(y + 1)

    table = data("epil")
    one = glmm("y ~ lbase + (1 | subject)", table, family=Own())
    other = glmm("y ~ lbase + (1 | subject)", table, family="poisson")
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
    torch.testing.assert_close(one.fixed.estimate, other.fixed.estimate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("formula", "family", "change", "message"),
    [
        ("y ~ 1 + (1 | g)", "poisson", {"y": 0.5}, "response 'y' is 0.5 in row 1: expected whole"),
        (
            "y ~ 1 + (1 | g)",
            "binomial",
            {"y": 2},
            "is 2 in row 1: expected 0 or 1 of family 'binomial', the def",
        ),
        ("y ~ 1 + (1 | g)", "binomial", {"y": 2.5}, "is 2.5 in row 1: expected 0 or 1 of family"),
        ("y ~ 1 + (1 | g)", "binomial", {"y": 1}, "is 1 in every row: expected both"),
        ("y ~ 1 + (1 | g)", "poisson", {"y": 4}, "response 'y' is 4 in every row"),
        ("cbind(y) ~ 1 + (1 | g)", "binomial", {}, "has 1 arguments: expected two"),
        ("cbind(y, n) ~ 1 + (1 | g)", "poisson", {}, "is for family 'binomial'"),
        ("cbind(y, n) ~ 1 + (1 | g)", "binomial", {"n": -1}, "expected whole numbers of successes"),
        ("y ~ 1 + (1 | g)", "normal", {}, "`family` is 'normal': expected"),
        ("c ~ 1 + (1 | g)", "binomial", {}, "has 3 categories"),
    ],
)
def test_what_cannot_be_fitted_is_refused(formula, family, change, message):
    table = pd.DataFrame(
        {"y": [0, 1, 1, 0, 0, 1], "n": 2, "g": list("aabbcc"), "c": list("xyzxyz")}
    )
    with pytest.raises(InputError, match=message):
        glmm(formula, table.assign(**change), family=family)


def test_a_bad_response_is_named_by_its_row_of_the_table():
    table = data("epil").head(40).astype({"y": float})
    table.loc[2, "lbase"], table.loc[7, "y"] = np.nan, 1.5
    with pytest.raises(InputError, match=r"'y' is 1\.5 in row 8: expected"), pytest.warns():
        glmm("y ~ lbase + (1 | subject)", table, family="poisson")
    table = data("cbpp").assign(incidence=lambda t: t.incidence + 40 * (t.index == 4))
    with pytest.raises(
        InputError, match=r"is \[4.*, -.*\] in row 5: expected whole numbers of succ"
    ):
        glmm("cbind(incidence, size - incidence) ~ 1 + (1 | herd)", table, family="binomial")
    table = data("epil").assign(exposure=lambda t: 1.0 * (t.index != 3))
    with pytest.raises(InputError, match=r"'log\(exposure\)' is -inf in row 4"):
        glmm("y ~ 1 + offset(log(exposure)) + (1 | subject)", table, family="poisson")


@pytest.mark.parametrize("option", ["residual", "chunk_rows", "residual_variance"])
def test_options_of_gaussian_responses_are_refused(option):
    with pytest.raises(InputError, match=f"`{option}` is .*glmm\\(\\) takes none, as"):
        glmm("y ~ 1 + (1 | subject)", data("epil"), family="poisson", **{option: "V4"})


def test_inference_that_needs_no_gaussian_response(counts):
    from openreml_nn.inference import anova, coefficients, likelihood_ratio_test

    found = coefficients(counts, ddf="asymptotic")
    torch.testing.assert_close(
        torch.tensor(found.std_error.to_numpy(copy=True)), counts.fixed.std_error
    )
    small = glmm("count ~ 1 + (1 | site)", data("salamanders"), family="negative_binomial")
    ratio = likelihood_ratio_test(small, counts)
    assert ratio.statistic == pytest.approx(2 * (counts.log_likelihood - small.log_likelihood))
    assert anova(counts).name.tolist() == ["mined"]


def test_separated_data_are_named():
    x = np.tile([0, 1], 60)
    table = pd.DataFrame({"x": x, "y": x, "g": np.repeat(np.arange(12), 10).astype(str)})
    with pytest.raises(NumericalError, match="separated"):
        glmm("y ~ x + (1 | g)", table, family="binomial")


def test_a_network_with_a_family_is_trained_and_predicts():
    torch.manual_seed(0)
    n, q = 600, 30
    x, codes = torch.randn(n, 2), torch.arange(n) % q
    b = 0.8 * torch.randn(q)
    y = torch.bernoulli(torch.sigmoid(torch.sin(2 * x[:, 0]) + x[:, 1] + b[codes]))
    network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    model = MixedModel(network, {"g": RandomEffect(q)}, family=Binomial())
    batch = {"x": x, "y": y, "groups": {"g": codes}}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    first = float(model.loss(batch).detach())
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    assert float(model.loss(batch).detach()) < first - 0.05
    model.update(batch)
    assert torch.corrcoef(torch.stack([model.random["g"].blup[:, 0], b]))[0, 1] > 0.6
    found = model.predict(batch)
    assert ((found.mean > 0) & (found.mean < 1)).all()
    torch.testing.assert_close(found.variance, found.mean * (1 - found.mean))
    unknown = model.predict({"x": x[:3], "groups": {"g": torch.full((3,), -1)}})
    torch.testing.assert_close(unknown.mean, unknown.population_mean)


def test_a_linear_model_with_a_family_is_glmm():
    table = data("epil")
    result = glmm("y ~ lbase + (1 | subject)", table, family="negative_binomial")
    family = NegativeBinomial()
    q = len(result.components[0].levels)
    model = MixedModel(
        nn.Identity(), {"subject": RandomEffect(q)}, head="gls", family=family
    ).double()
    with torch.no_grad():
        model.random["subject"].g.set_value(
            "sigma^2", float(result.components[0].covariance), natural=True
        )
        family.set_value("theta", result.family_parameters[0].value, natural=True)
    batch = result.encoder.transform(table).batch()
    assert float(model.loss(batch).detach()) == pytest.approx(
        -result.log_likelihood / len(table), rel=1e-10
    )
    model.update(batch)
    torch.testing.assert_close(model.beta, result.fixed.estimate, rtol=1e-4, atol=1e-5)
    one, other = model.predict(batch).mean, result.predict(table)["mean"].to_numpy(copy=True)
    torch.testing.assert_close(one, torch.from_numpy(other), rtol=1e-2, atol=1e-3)


def test_a_family_takes_the_residuals_place():
    effect = {"g": RandomEffect(3)}
    with pytest.raises(InputError, match="beside a family"):
        MixedModel(nn.Identity(), effect, nn.Linear(1, 1), family=Gaussian())
    with pytest.raises(TypeError, match="`family` is 'binomial': expected a Family, or None"):
        MixedModel(nn.Identity(), effect, family="binomial")
    with pytest.raises(InputError, match="`quadrature` is 5 without a family"):
        MixedModel(nn.Identity(), effect, quadrature=5)


def test_the_family_is_binomial_unless_it_is_said() -> None:
    """The response decides nothing: a count without a family is refused as a binary response."""
    formula = "resp ~ trt + late + (1 | ID)"
    with_names = glmm(formula, data("bacteria"), family="binomial", link="probit")
    by_position = glmm(formula, data("bacteria"), "binomial", "probit")
    assert by_position.log_likelihood == with_names.log_likelihood
    logit = glmm(formula, data("bacteria"))
    assert logit.log_likelihood == glmm(formula, data("bacteria"), "binomial").log_likelihood
    with pytest.raises(InputError, match="count"):
        glmm("count ~ mined + (1 | site)", data("salamanders"))


def test_a_fit_has_converged_where_its_own_curvature_says_so():
    """From a far start the curvature of the last steps was a hundred times too large on a likelihood
    this flat, and a fit 1e-5 below its optimum called itself converged."""
    from openreml_nn.datasets import sleepstudy

    table = sleepstudy().assign(count=lambda t: t.Reaction // 50)
    formula = "count ~ Days + (1 | Subject)"
    best = glmm(formula, table, "poisson")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        far = glmm(formula, table, "poisson", starts={"Subject/sigma^2": 0.3})
    assert best.converged
    assert best.score_norm < 1e-3
    assert far.converged == (far.score_norm < 1e-3)
    if far.converged:
        assert far.log_likelihood == pytest.approx(best.log_likelihood, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "seed", "mean"),
    [("poisson", 6, 0.5), ("negative_binomial", 2, 3.0)],
)
def test_a_fit_from_a_far_start_is_that_from_the_datas_own(family, seed, mean):
    # The likelihood is flat on the way, and bends the other way in places.
    rng = np.random.default_rng(seed)
    g, x, e = np.repeat(np.arange(12), 10), rng.normal(size=120), np.exp(3 * rng.normal(size=120))
    table = pd.DataFrame({"y": rng.poisson(mean * e), "x": x, "g": g, "e": e})
    near, far = (
        glmm("y ~ x + offset(log(e)) + (1 | g)", table, family=family, starts=starts)
        for starts in (None, {"g/sigma^2": 25.0})
    )
    assert near.converged and far.converged
    assert max(len(near.history), len(far.history)) < 40
    assert far.log_likelihood == pytest.approx(near.log_likelihood, abs=1e-5)
