"""Influence on fits of families is that of fits without the rows, variances held or not."""

import numpy as np
import pandas as pd
import pytest

from openreml_nn import glmm, lmm
from openreml_nn.families import Gaussian
from openreml_nn.inference import influence

RNG = np.random.default_rng(5)
G = np.repeat(np.arange(8), 6)
X = RNG.normal(size=48)
MEAN = 0.3 + 0.5 * X + 0.6 * RNG.normal(size=8)[G]
TABLE = pd.DataFrame(
    {
        "g": [f"g{i}" for i in G],
        "x": X,
        "count": RNG.poisson(np.exp(MEAN)),
        "score": MEAN + 0.5 * RNG.normal(size=48),
        "grade": np.digitize(MEAN + RNG.logistic(size=48), [-0.5, 1]),
    }
)
MEASURES = ["cook", "mdffits", "covtrace", "covratio", "dfbeta_(Intercept)", "dfbeta_x"]


@pytest.mark.parametrize("method", ["ml", "reml"])
@pytest.mark.parametrize("by", [None, "g"])
def test_a_gaussian_family_has_the_influence_of_the_linear_model(method, by):
    linear = lmm("score ~ x + (1 | g)", TABLE, method=method)
    family = glmm("score ~ x + (1 | g)", TABLE, family=Gaussian(), method=method)
    one, other = (influence(fit, by, progress=False) for fit in (family, linear))
    assert one.case.tolist() == other.case.tolist()
    # Both fits are within a thousandth of a standard error of one maximum.
    np.testing.assert_allclose(one[MEASURES], other[MEASURES], rtol=5e-3, atol=5e-4)
    assert one.leverage.isna().all()


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        ("count ~ x + (1 | g)", {"family": "poisson"}),
        ("count ~ x + (1 | g)", {"family": "poisson", "method": "reml"}),
        ("count ~ 1 + (1 | g)", {"family": "poisson", "zi": "~ 1"}),
        ("grade ~ x + (1 | g)", {"family": "ordinal"}),
    ],
)
def test_a_refit_without_a_group_is_that_of_its_rows(formula, options):
    result = glmm(formula, TABLE, **options)
    found = influence(result, "g", refit=True, progress=False).set_index("case")
    assert found.index.tolist() == [f"g{i}" for i in range(8)]
    assert found["rows"].eq(6).all()
    for case in ("g0", "g5"):
        without = glmm(formula, TABLE[TABLE.g != case], **options)
        change = (result.fixed.estimate - without.fixed.estimate).numpy()
        own = found.loc[case, [f"dfbeta_{name}" for name in result.fixed.names]].to_numpy(float)
        error = without.fixed.std_error.numpy()
        np.testing.assert_allclose(own / error, change / error, atol=2e-3)
        phi = result.fixed.covariance.numpy()
        cook = change @ np.linalg.solve(phi, change) / len(change)
        assert found.cook[case] == pytest.approx(cook, rel=2e-2, abs=1e-4)
        ratio = np.linalg.det(without.fixed.covariance.numpy()) / np.linalg.det(phi)
        assert found.covratio[case] == pytest.approx(ratio, rel=1e-2)


@pytest.mark.parametrize("method", ["ml", "reml"])
def test_held_variances_are_those_of_a_constrained_fit(method):
    options = {"family": "negative_binomial", "method": method}
    table = TABLE.assign(count=RNG.poisson(np.exp(MEAN) * RNG.gamma(2, 0.5, size=48)))
    formula = "count ~ x + (1 | g)"
    result = glmm(formula, table, **options)
    held = {p.name: p.value for p in (*result.parameters, *result.family_parameters)}
    found = influence(result, "g", progress=False).set_index("case")
    every = glmm(formula, table, constraints=held, **options)
    phi = every.fixed.covariance.numpy()
    for case in ("g1", "g6"):
        without = glmm(formula, table[table.g != case], constraints=held, **options)
        change = (result.fixed.estimate - without.fixed.estimate).numpy()
        own = found.loc[case, ["dfbeta_(Intercept)", "dfbeta_x"]].to_numpy(float)
        error = without.fixed.std_error.numpy()
        np.testing.assert_allclose(own / error, change / error, atol=2e-3)
        ratio = np.linalg.det(without.fixed.covariance.numpy()) / np.linalg.det(phi)
        assert found.covratio[case] == pytest.approx(ratio, rel=1e-3)


def test_what_the_other_rows_do_not_determine_is_missing():
    table = TABLE.assign(only=(TABLE.g == "g3").astype(float))
    result = glmm("count ~ only + (1 | g)", table, family="poisson")
    for refit in (False, True):
        found = influence(result, "g", refit=refit, progress=False).set_index("case")
        assert np.isnan(found.cook["g3"])
        assert found.cook.drop("g3").notna().all()
