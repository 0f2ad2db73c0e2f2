"""Correlations, factors and indices of several effects of a level."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, lmm
from openreml_nn.covariance import Pedigree
from openreml_nn.datasets import sleepstudy
from openreml_nn.inference import (
    blup_differences,
    effect_correlations,
    factor_loadings,
    reliability,
    selection_index,
)


@pytest.fixture(scope="module")
def trial():
    """Sixty lines in five environments, twice in each."""
    rng = np.random.default_rng(0)
    loadings = np.array([[1, 0.8, 0.9, 0.5, 0.2], [0, 0.4, -0.3, 0.6, 0.8]]).T
    G = loadings @ loadings.T + 0.2 * np.eye(5)
    u = rng.multivariate_normal(np.zeros(5), G, 60)
    line, env, _ = (x.ravel() for x in np.indices((60, 5, 2)))
    y = u[line, env] + env + 0.5 * rng.standard_normal(600)
    return pd.DataFrame({"y": y, "line": [f"l{i}" for i in line], "env": [f"e{j}" for j in env]})


@pytest.fixture(scope="module")
def factored(trial):
    return lmm("y ~ env + fa(0 + env | line, 2)", trial)


def test_loadings_are_a_rotation_that_keeps_the_covariance(factored):
    found = factor_loadings(factored, "line")
    turned = found[["factor_1", "factor_2"]].to_numpy()
    G = factored.components[0].covariance.numpy()
    np.testing.assert_allclose(turned @ turned.T + np.diag(found["specific"]), G, atol=1e-10)
    inner = turned.T @ turned
    assert abs(inner[0, 1]) < 1e-10
    assert inner[0, 0] > inner[1, 1]
    assert (turned.sum(0) >= 0).all()
    np.testing.assert_allclose(found["explained"], 1 - found["specific"] / G.diagonal())
    specific = [p.value for p in factored.parameters if "/specific/" in p.name]
    np.testing.assert_allclose(found["specific"], specific, rtol=1e-10)


def test_loadings_do_not_depend_on_the_order_of_the_environments(trial, factored):
    """The triangular form has another first row, the principal axes are the same."""
    other = trial.assign(env=pd.Categorical(trial["env"], [f"e{j}" for j in (3, 1, 4, 0, 2)]))
    one, two = (
        factor_loadings(r, "line").set_index("effect")
        for r in (factored, lmm("y ~ env + fa(0 + env | line, 2)", other))
    )
    np.testing.assert_allclose(two.loc[one.index], one, rtol=1e-3, atol=1e-3)


def test_correlations_of_a_parameter_have_its_standard_error(trial):
    """Of a correlation that is itself a parameter, the delta method is the identity."""
    result = lmm("y ~ env + cs(0 + env | line)", trial)
    (rho,) = (p for p in result.parameters if p.name.endswith("rho"))
    found = effect_correlations(result, "line")
    assert len(found) == 10
    np.testing.assert_allclose(found["correlation"], rho.value, rtol=1e-10)
    np.testing.assert_allclose(found["std_error"], rho.std_error, rtol=1e-6)


@pytest.mark.parametrize("structure", ["idv", "diag"])
def test_correlations_that_no_parameter_moves_are_zero_without_an_error(trial, structure):
    found = effect_correlations(lmm(f"y ~ env + {structure}(0 + env | line)", trial), "line")
    assert len(found) == 10
    assert (found["correlation"] == 0).all()
    assert found["std_error"].isna().all()


def test_correlations_follow_from_finite_differences_of_the_parameters():
    """Of the unstructured covariance of two effects: r of the Cholesky factor's entries."""
    result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    found = effect_correlations(result, "Subject").iloc[0]
    assert found["correlation"] == pytest.approx(0.0655513, rel=1e-4)
    # lme4 and merDeriv, or simulation: the correlation is known to about a third.
    assert found["std_error"] == pytest.approx(0.325, rel=0.02)
    scaled = sleepstudy().assign(
        Days=lambda t: t["Days"] / 10, Reaction=lambda t: 5 * t["Reaction"]
    )
    again = effect_correlations(lmm("Reaction ~ Days + (Days | Subject)", scaled), "Subject").iloc[
        0
    ]
    assert again["std_error"] == pytest.approx(found["std_error"], rel=1e-5)


def test_a_correlation_at_its_bound_has_no_standard_error():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.standard_normal(300), "g": np.arange(300) // 10})
    b = rng.standard_normal(30)[table["g"]]
    table["y"] = b + 0.5 * b * table["x"] + 0.5 * rng.standard_normal(300)
    found = effect_correlations(lmm("y ~ x + (x | g)", table), "g").iloc[0]
    assert found["correlation"] == pytest.approx(1, abs=1e-9)
    assert np.isnan(found["std_error"])


def test_an_index_of_one_effect_is_its_blup(factored):
    found = selection_index(factored, "line", {"enve2": 1.0}).set_index("level")
    expected = reliability(factored, "line")
    expected = expected[expected["effect"].str.endswith("e2")].set_index("level").loc[found.index]
    np.testing.assert_allclose(found["index"], expected["blup"], rtol=1e-10)
    np.testing.assert_allclose(found["std_error"], expected["std_error"], rtol=1e-10)
    np.testing.assert_allclose(found["reliability"], expected["reliability"], rtol=1e-8)
    assert found["index"].is_monotonic_decreasing


def test_an_index_of_relatives_counts_inbreeding_and_covariances():
    """Against the same objective as one effect of the tree: w'b for b ~ N(0, Sigma x A)."""
    names = [f"a{i}" for i in range(12)]
    sires = [None] * 4 + ["a0", "a0", "a2", "a2", "a4", "a4", "a6", "a8"]
    dams = [None] * 4 + ["a1", "a1", "a3", "a3", "a5", "a7", "a5", "a9"]
    pedigree = pd.DataFrame({"animal": names, "sire": sires, "dam": dams})
    rng = np.random.default_rng(1)
    animal, trait, _ = (x.ravel() for x in np.indices((12, 2, 4)))
    u = rng.standard_normal((12, 2))
    y = u[animal, trait] + trait + 0.7 * rng.standard_normal(len(animal))
    table = pd.DataFrame(
        {"y": y, "animal": [names[i] for i in animal], "trait": np.array(["m", "f"])[trait]}
    )
    result = lmm("y ~ trait + us(0 + trait | ped(animal))", table, pedigree=pedigree)
    w = dict(zip(result.components[0].effects, (2.0, -1.0), strict=True))
    found = selection_index(result, "animal", w).set_index("level")
    A = torch.linalg.inv(Pedigree.of(names, sires, dams).inverse.to_dense()).numpy()
    assert A.diagonal().max() > 1.1
    G = result.components[0].covariance.numpy()
    own = np.array([2.0, -1.0])
    Z = np.zeros((len(table), 24))
    column = [list(result.components[0].effects).index(f"trait{t}") for t in table["trait"]]
    Z[np.arange(len(table)), 2 * animal + column] = 1
    V = Z @ np.kron(A, G) @ Z.T + result.residual_variance * np.eye(len(table))
    X = np.stack([np.ones(len(table)), table["trait"] == "m"], 1).astype(float)
    W = np.linalg.inv(V)
    P = W - W @ X @ np.linalg.solve(X.T @ W @ X, X.T @ W)
    C = np.kron(A, own @ G).reshape(12, 24) @ Z.T  # covariances of the objective with the rows
    prior = A.diagonal() * (own @ G @ own)
    expected = (C @ P @ y, (C @ P @ C.T).diagonal() / prior)
    np.testing.assert_allclose(found.loc[names, "index"], expected[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.loc[names, "reliability"], expected[1], rtol=1e-6)


def test_differences_have_the_errors_of_the_dense_joint_covariance(trial, factored):
    """Of varieties over environments, against the covariance of all prediction errors."""
    found = blup_differences(factored, "line")
    assert len(found) == 60 * 59 // 2
    G = factored.components[0].covariance.numpy()
    lines = list(factored.components[0].levels)
    at = np.array([lines.index(x) for x in trial["line"]])
    env = trial["env"].str[1].astype(int).to_numpy()
    Z = np.zeros((600, 300))
    Z[np.arange(600), 5 * at + env] = 1
    W = np.linalg.inv(Z @ np.kron(np.eye(60), G) @ Z.T + factored.residual_variance * np.eye(600))
    X = np.eye(5)[env]
    P = W - W @ X @ np.linalg.solve(X.T @ W @ X, X.T @ W)
    T = np.kron(np.eye(60), np.full((1, 5), 0.2))  # means over the environments
    GZ = np.kron(np.eye(60), G) @ Z.T
    C = T @ (np.kron(np.eye(60), G) - GZ @ P @ GZ.T) @ T.T
    i, j = (np.array([lines.index(x) for x in found[name]]) for name in ("level1", "level2"))
    np.testing.assert_allclose(found["std_error"] ** 2, C[i, i] + C[j, j] - 2 * C[i, j], rtol=1e-7)
    blup = T @ GZ @ P @ trial["y"].to_numpy()
    np.testing.assert_allclose(found["difference"], blup[i] - blup[j], rtol=1e-6, atol=1e-8)


def test_what_cannot_be_had_is_refused(factored):
    simple = lmm("Reaction ~ Days + (1 | Subject)", sleepstudy())
    nested = lmm("Reaction ~ Days + (Days || Subject)", sleepstudy())
    with pytest.raises(InputError, match="has 2 terms: expected one"):
        blup_differences(nested, "Subject")
    for function in (effect_correlations, factor_loadings):
        with pytest.raises(InputError, match="expected one term of several effects"):
            function(simple, "Subject")
    with pytest.raises(InputError, match="have no factors: expected a term fa"):
        factor_loadings(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy()), "Subject")
    with pytest.raises(InputError, match="`weights` is 'nothing'"):
        selection_index(factored, "line", {"nothing": 1.0})
    with pytest.raises(InputError, match="not all zero"):
        selection_index(factored, "line", {"enve1": 0.0})
