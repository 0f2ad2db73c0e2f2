"""Heritability and reliability against dense algebra and published figures."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, fit_reml, fit_stream, lmm
from openreml_nn.covariance import (
    CovariancePropagation,
    KnownInverseMatrix,
    Pedigree,
    ScalarMatrix,
    Sum,
)
from openreml_nn.datasets import john_alpha, penicillin, sleepstudy, table_path
from openreml_nn.inference import bootstrap, heritability, reliability, variance_shares
from openreml_nn.inference.refit import Refit
from tests.inference.dense import covariance, projection


@pytest.fixture(scope="module")
def trial():
    return lmm("yield ~ rep + (1 | gen) + (1 | rep:block)", john_alpha())


@pytest.fixture(scope="module")
def animals():
    """Four founders, a son of an inbred mating among their offspring, records of some animals."""
    names = [f"a{i}" for i in range(14)]
    sires = [None] * 4 + ["a0", "a0", "a2", "a2", "a4", "a4", "a8", "a8", "a6", "a10"]
    dams = [None] * 4 + ["a1", "a1", "a3", "a3", "a5", "a6", "a9", "a9", "a7", "a11"]
    pedigree = Pedigree.of(names, sires, dams)
    rng = np.random.default_rng(0)
    label = [names[i] for i in rng.integers(2, 14, 60)]
    y = torch.tensor(rng.standard_normal(14)[[names.index(x) for x in label]] * 2)
    y = y + torch.tensor(rng.standard_normal(60))
    X = torch.stack([torch.ones(60).double(), torch.tensor(rng.standard_normal(60))], 1)
    V = Sum(
        animal=CovariancePropagation(pedigree.design(label), KnownInverseMatrix(pedigree.inverse)),
        residual=ScalarMatrix(60),
    ).double()
    return fit_reml(V, y, X)


def dense(result, which):
    """G of a term and the covariance C of the errors of its BLUPs."""
    term = result.source.covariance.terms(result.source.rows)[which].detach()
    P = projection(result)
    G, Z = term.covariance.whole(term.design.shape[1]), term.design.dense(P)
    return G, G - G @ Z.mT @ P @ Z @ G


def test_cullis_heritability_of_a_trial_is_the_published_one(trial):
    # Schmidt, Hartung, Bennewitz and Piepho, Genetics 212 (2019) 991, for this model.
    assert float(heritability(trial, "gen", "cullis")) == pytest.approx(0.809, abs=5e-4)


@pytest.mark.parametrize("fit", ["trial", "animals"])
def test_heritabilities_follow_from_dense_matrices(fit, request):
    result = request.getfixturevalue(fit)
    group = {"trial": "gen", "animals": "animal"}[fit]
    G, C = dense(result, 0)
    m = len(G)
    pairs = [(i, j) for i in range(m) for j in range(i)]

    def mean(M):
        return np.mean([float(M[i, i] + M[j, j] - 2 * M[i, j]) for i, j in pairs])

    assert heritability(result, group, "cullis").estimate == pytest.approx(1 - mean(C) / mean(G))
    D = torch.eye(m).double() - torch.linalg.solve(G, C)
    values = torch.linalg.eigvals(D).real
    zero = int((values.abs() < 1e-7).sum())
    expected = float(D.diagonal().sum()) / (m - zero)
    assert heritability(result, group, "generalised").estimate == pytest.approx(expected, rel=1e-8)
    table = variance_shares(result).query("group == @group").iloc[0]
    plain = heritability(result, group)
    assert plain == (pytest.approx(table["share"]), pytest.approx(table["std_error"]))
    assert heritability(result, group, method="plain") == plain


def test_definitions_agree_for_unrelated_levels_and_an_intercept():
    result = lmm("yield ~ 1 + (1 | gen)", john_alpha().iloc[:60])
    cullis, generalised = (heritability(result, method=m) for m in ("cullis", "generalised"))
    assert cullis.estimate == pytest.approx(generalised.estimate, rel=1e-10)
    assert np.isnan(cullis.std_error)


def test_genetic_effects_of_a_formula_are_those_of_a_tree():
    """A pedigree, a relationship matrix and a residual by formula have the same definitions."""
    names = [f"a{i}" for i in range(20)]
    parents = [(None, None) if i < 6 else (names[i % 5], names[i - 1]) for i in range(20)]
    table = pd.DataFrame(parents, columns=["sire", "dam"]).assign(animal=names)
    rng = np.random.default_rng(3)
    at = rng.integers(0, 20, 120)
    y = 2 * rng.standard_normal(20)[at] + rng.standard_normal(120)
    data = pd.DataFrame({"y": y, "animal": np.array(names)[at], "x": rng.standard_normal(120)})
    result = lmm("y ~ x + (1 | ped(animal))", data, pedigree=table[["animal", "sire", "dam"]])
    relationship = torch.linalg.inv(
        Pedigree.of(names, *zip(*parents, strict=True)).inverse.to_dense()
    )
    frame = pd.DataFrame(relationship.numpy(), index=names, columns=names)
    other = lmm("y ~ x + (1 | vm(animal, A))", data, kernels={"A": frame})
    for method in ("plain", "cullis", "generalised"):
        found, expected = (float(heritability(r, "animal", method)) for r in (result, other))
        assert found == pytest.approx(expected, rel=1e-5)
    one, two = (reliability(r).set_index("level")["reliability"] for r in (result, other))
    np.testing.assert_allclose(one, two.loc[one.index], rtol=1e-5)
    G, C = dense(result, 0)
    np.testing.assert_allclose(one, 1 - C.diagonal() / G.diagonal(), rtol=1e-7)


def test_one_group_needs_no_name_and_a_variance_of_zero_is_no_heritability():
    table = pd.DataFrame({"y": np.tile([1.0, 2.0, 3.0, 4.0], 5), "g": np.repeat(range(5), 4)})
    result = lmm("y ~ 1 + (1 | g)", table)
    assert result.singular == ("g",)
    for method in ("plain", "cullis", "generalised"):
        assert float(heritability(result, method=method)) == pytest.approx(0, abs=1e-12)
    assert (reliability(result)["reliability"] == 0).all()


@pytest.mark.parametrize("solver", ["dense", "blocked"])
def test_reliability_follows_from_dense_matrices(solver):
    for formula, table in (
        ("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin()),
        ("Reaction ~ Days + (Days | Subject)", sleepstudy()),
    ):
        result = lmm(formula, table, solver=solver)
        found = reliability(result)
        expected = []
        for which, effects in enumerate(result.random):
            G, C = dense(result, which)
            k = effects.values.shape[1]
            share = (1 - C.diagonal() / G.diagonal()).reshape(-1, k)
            expected += share.mT.flatten().tolist()
        np.testing.assert_allclose(found["reliability"], expected, rtol=1e-8)
        np.testing.assert_allclose(found["accuracy"] ** 2, found["reliability"])
    assert found["effect"].unique().tolist() == ["(Intercept)", "Days"]
    assert found["level"].iloc[0] == "308"


def test_reliability_counts_inbreeding(animals):
    G, C = dense(animals, 0)
    assert float(G.diagonal().max() / G.diagonal().min()) > 1.2
    np.testing.assert_allclose(
        reliability(animals, "animal")["reliability"], 1 - C.diagonal() / G.diagonal(), rtol=1e-8
    )


def test_a_refit_solves_by_any_solver(trial, animals):
    rng = torch.Generator().manual_seed(0)
    for result in (
        trial,
        animals,
        lmm("Reaction ~ Days", sleepstudy(), residual="ar1(Days | Subject)"),
    ):
        B = torch.randn(result.rows, result.rows + 7, generator=rng, dtype=torch.float64)
        B[:, 3] = B[:, 1] - 2 * B[:, 2]
        B[:, 5] = 0
        refit = Refit(result)
        V, P = covariance(result), projection(result)
        torch.testing.assert_close(refit.solve(B), torch.linalg.solve(V, B), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(refit.project(B), P @ B, rtol=1e-8, atol=1e-8)


def test_a_bootstrap_takes_a_heritability():
    result = lmm("yield ~ 1 + (1 | gen)", john_alpha())
    drawn = bootstrap(
        result,
        3,
        statistic=lambda r: {"h2": float(heritability(r, method="cullis"))},
        progress=False,
    )
    assert drawn.samples.shape == (3, 1)
    assert drawn.samples["h2"].between(0, 1).all()


def test_what_has_no_heritability_is_refused(trial):
    slopes = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    split = lmm("Reaction ~ Days + (Days || Subject)", sleepstudy())
    streamed = fit_stream("yield ~ 1 + (1 | gen)", table_path("john_alpha"), progress=False)
    for call, message in (
        (lambda: heritability(trial, "block"), r"`group` is 'block': expected one of \['gen', "),
        (lambda: heritability(trial), r"`group` is None: expected one of \['gen', 'rep:block'\]"),
        (lambda: heritability(trial, "gen", "piepho"), "`method` is 'piepho': expected 'plain'"),
        (lambda: heritability(slopes), r"has the effects .*: expected one of them"),
        (lambda: heritability(split, "Subject"), "which has 2 terms: expected one"),
        (lambda: heritability(streamed), "read in chunks"),
        (lambda: reliability(streamed), "read in chunks"),
        (lambda: reliability(lmm("yield ~ gen", john_alpha())), "`result` has no random effects"),
        (lambda: reliability(trial, "block"), "`group` is 'block': expected 'gen' or 'rep:block'"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(TypeError, match="`group` is 3"):
        heritability(trial, 3)
    with pytest.raises(TypeError, match="`result` is None"):
        reliability(None)
