"""Conditional AIC of families: differences of fits are those of lme4, the information is that of dense matrices; and
differences of effects have the errors of the working linear model."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, glmm, lmm
from openreml_nn.families import Gaussian
from openreml_nn.inference import blup_differences, bootstrap, conditional_aic, influence

HERE = Path(__file__).parent.parent / "reference"
TABLE = pd.read_csv(HERE / "conditional.csv", dtype={"g": str})
LEME4 = json.loads((HERE / "conditional.json").read_text())
LEVELS = pd.get_dummies(TABLE.g).to_numpy(float)
DESIGN = np.stack([np.ones(len(TABLE)), TABLE.x], 1)


def dense(result):
    """C'WC, the whole system, and the number of the fixed effects, of an intercept of each level."""
    family, y = result.model.family, result.source.y
    with torch.no_grad():
        W = -family.derivatives(y, _predictor(result))[1].numpy()
    C = np.hstack([DESIGN[:, -len(result.fixed.names) :], LEVELS])
    square = C.T @ (W[:, None] * C)
    S = np.zeros_like(square)
    p = len(result.fixed.names)
    S[p:, p:] = np.eye(LEVELS.shape[1]) / float(result.components[0].covariance)
    return square, square + S, p


def _predictor(result):
    modes = result.random[0].values[:, 0]
    X = torch.tensor(DESIGN[:, -len(result.fixed.names) :])
    return X @ result.fixed.estimate + torch.tensor(LEVELS) @ modes


@pytest.mark.parametrize(
    ("formula", "family", "rows"),
    [
        ("n ~ x + (1 | g)", "poisson", TABLE),
        ("b ~ 1 + (1 | g)", "binomial", TABLE[:16]),
        ("cbind(b, none) ~ 1 + (1 | g)", "binomial", TABLE[:16].assign(none=1 - TABLE.b)[::-1]),
    ],
)
def test_differences_are_those_of_lme4(formula, family, rows):
    found = conditional_aic(glmm(formula, rows, family=family), progress=False)
    assert found.correction == "differences"
    assert found.df == pytest.approx(LEME4[family]["df"], abs=2e-6)
    assert found.log_likelihood == pytest.approx(LEME4[family]["log_likelihood"], abs=1e-4)
    assert found.aic == pytest.approx(-2 * found.log_likelihood + 2 * found.df, abs=1e-9)


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        ("n ~ x + (1 | g)", {"family": "poisson"}),
        ("n ~ x + (1 | g)", {"family": "poisson", "method": "reml", "solver": "dense"}),
        ("n ~ x + (1 | g)", {"family": "negative_binomial"}),
        ("b ~ x + (1 | g)", {"family": "binomial", "link": "cloglog", "quadrature": 5}),
        ("grade ~ x + (1 | g)", {"family": "ordinal"}),
        ("time ~ x + (1 | g)", {"family": "gamma", "solver": "blocked"}),
    ],
)
def test_the_information_is_that_of_dense_matrices(formula, options):
    table = TABLE.assign(grade=np.minimum(TABLE.n, 2), time=TABLE.n + 0.5 + 0.1 * TABLE.x**2)
    result = glmm(formula, table, **options)
    square, whole, _ = dense(result)
    own = sum(p.numel() for p in result.model.family.parameters())
    found = conditional_aic(result, "information")
    assert found.df == pytest.approx(np.trace(np.linalg.solve(whole, square)) + own, abs=1e-7)
    with torch.no_grad():
        density = result.model.family.log_density(result.source.y, _predictor(result)).sum()
    assert found.log_likelihood == pytest.approx(float(density), abs=1e-8)
    if options["family"] not in ("poisson", "binomial"):
        assert conditional_aic(result) == found
        with pytest.raises(InputError, match=f"`result` is of the family '{options['family']}'"):
            conditional_aic(result, "differences")


def test_a_gaussian_family_has_the_leverages_of_the_linear_model():
    family = glmm("x ~ n + (1 | g)", TABLE, family=Gaussian())
    linear = lmm(
        "x ~ n + (1 | g)",
        TABLE,
        method="ml",
        residual_variance=family.family_parameters[0].value,
        constraints={"g/sigma^2": float(family.components[0].covariance)},
    )
    found = conditional_aic(family)
    assert found.df == pytest.approx(influence(linear)["leverage"].sum() + 1, abs=1e-6)
    assert found.log_likelihood == pytest.approx(conditional_aic(linear).log_likelihood, abs=1e-5)
    one, other = blup_differences(family, "g"), blup_differences(linear, "g")
    np.testing.assert_allclose(one.difference, other.difference, atol=1e-5)
    np.testing.assert_allclose(one.std_error, other.std_error, rtol=1e-7)


def test_weights_and_trials_have_the_information_alone():
    weighted = glmm("n ~ x + (1 | g)", TABLE.assign(w=2.0), family="poisson", weights="w")
    twice = glmm("n ~ x + (1 | g)", pd.concat([TABLE, TABLE]), family="poisson")
    found, again = conditional_aic(weighted), conditional_aic(twice, "information")
    np.testing.assert_allclose(found[:3], again[:3], rtol=1e-5)
    with pytest.raises(InputError, match="`result` has prior weights"):
        conditional_aic(weighted, "differences")
    trials = glmm("cbind(n, b + 1) ~ x + (1 | g)", TABLE.assign(b=1 - TABLE.b), family="binomial")
    assert conditional_aic(trials).correction == "information"
    with pytest.raises(InputError, match="`result` has several trials in a row"):
        conditional_aic(trials, "differences")
    with pytest.raises(InputError, match="`correction` is 'slopes'"):
        conditional_aic(trials, "slopes")


@pytest.mark.parametrize("family", ["poisson", "negative_binomial"])
def test_differences_have_the_errors_of_the_dense_system(family):
    result = glmm("n ~ x + (1 | g)", TABLE, family=family)
    _, whole, p = dense(result)
    C = np.linalg.inv(whole)[p:, p:]
    found = blup_differences(result, "g")
    levels = list(result.components[0].levels)
    i, j = (np.array([levels.index(x) for x in found[name]]) for name in ("level1", "level2"))
    np.testing.assert_allclose(found.std_error**2, C[i, i] + C[j, j] - 2 * C[i, j], rtol=1e-8)
    modes = result.random[0].values[:, 0].numpy()
    np.testing.assert_allclose(found.difference, modes[i] - modes[j], rtol=1e-12)


def test_a_variance_of_zero_leaves_the_coefficients_and_samples_leave_it():
    y = np.random.default_rng(1).poisson(2, 50)
    table = pd.DataFrame({"g": np.repeat(np.arange(10), 5), "y": y})
    result = glmm("y ~ 1 + (1 | g)", table, family="poisson")
    assert result.singular
    assert conditional_aic(result, "information").df == pytest.approx(1, abs=1e-9)
    samples = bootstrap(result, 6, seed=1, progress=False).samples
    deviations = samples["sd_(Intercept)|g"]
    assert (deviations > 0.05).any() and (deviations < 0.01).any()


def test_samples_of_a_fit_whose_variance_is_held_keep_it():
    result = glmm("n ~ 1 + (1 | g)", TABLE, family="poisson", constraints={"g/sigma^2": 0.25})
    samples = bootstrap(result, 2, seed=1, progress=False).samples
    assert samples["sd_(Intercept)|g"].tolist() == pytest.approx([0.5, 0.5])
    assert samples["(Intercept)"].nunique() == 2
