"""Relationships by markers, alone and beside a pedigree, against their definitions."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, REMLLoss, lmm
from openreml_nn.covariance import (
    CovariancePropagation,
    KnownInverseMatrix,
    Pedigree,
    ScalarMatrix,
    Sum,
    epistatic_relationship,
    genomic_relationship,
    marker_codes,
    marker_effects,
    single_step_relationship,
)
from openreml_nn.report import blup_table

METHODS = ("vanraden1", "vanraden2", "vitezica", "su")


def calls(n=9, m=30, seed=1, missing=0.1):
    rng = np.random.default_rng(seed)
    x = rng.binomial(2, rng.uniform(0.2, 0.8, m), (n, m)).astype(float)
    x[0], x[1] = 0.0, 2.0  # every marker varies
    x[rng.random((n, m)) < missing] = np.nan
    x[0, :2], x[1, :2] = 0, 2
    table = pd.DataFrame(x, [f"i{i}" for i in range(n)], [f"m{j}" for j in range(m)])
    return table.loc[:, (table.min() < table.max())]


def defined(markers, method):
    """K marker by marker, call by call."""
    K = np.zeros((len(markers),) * 2)
    total = 0.0
    for name in markers:
        x = markers[name].to_numpy()
        p = np.nanmean(x) / 2
        q = 1 - p
        if method == "vitezica":
            code = [{0: -2 * p * p, 1: 2 * p * q, 2: -2 * q * q}.get(v, 0.0) for v in x]
            size = (2 * p * q) ** 2
        elif method == "su":
            code = [0.0 if np.isnan(v) else (v == 1) - 2 * p * q for v in x]
            size = 2 * p * q * (1 - 2 * p * q)
        else:
            code = [0.0 if np.isnan(v) else v - 2 * p for v in x]
            size = 2 * p * q
        if method == "vanraden2":
            code, size = np.array(code) / np.sqrt(size), 1.0
        K += np.outer(code, code)
        total += size
    return K / total


@pytest.mark.parametrize("method", METHODS)
def test_relationships_are_as_they_are_defined(method):
    markers = calls()
    K = genomic_relationship(markers, method)
    np.testing.assert_allclose(K, defined(markers, method), atol=1e-13)
    assert list(K.index) == list(K.columns) == list(markers.index)
    W = marker_codes(markers, method)
    np.testing.assert_allclose(W @ W.T, K, atol=1e-13)
    # The other allele is counted, the rows and the markers come in another order.
    np.testing.assert_allclose(genomic_relationship(2 - markers, method), K, atol=1e-13)
    turned = genomic_relationship(markers.iloc[::-1, ::-1], method)
    np.testing.assert_allclose(turned.loc[K.index, K.columns], K, atol=1e-13)


def test_the_type_of_calls_changes_nothing():
    markers = calls()
    K = genomic_relationship(markers)
    for other in (
        markers.astype("Int64"),
        markers.astype(object).where(markers.notna(), None),
        markers.astype(np.float32),
    ):
        np.testing.assert_array_equal(genomic_relationship(other), K)
    whole = calls(missing=0.0)
    np.testing.assert_array_equal(
        genomic_relationship(whole.astype(np.int8)), genomic_relationship(whole)
    )


def test_more_markers_than_are_coded_at_a_time():
    markers = calls(n=5, m=9000)
    W = marker_codes(markers)
    np.testing.assert_allclose(genomic_relationship(markers), W @ W.T, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_markers_that_do_not_vary_are_named_and_left_out(method):
    markers = calls()
    alike = markers.assign(all_two=2.0, never=np.nan)
    with pytest.warns(UserWarning, match=r"2 of \d+ markers do not vary .*: 'all_two', 'never'"):
        K = genomic_relationship(alike, method)
    np.testing.assert_allclose(K, genomic_relationship(markers, method), atol=1e-13)
    with pytest.raises(InputError, match="no marker that varies"):
        genomic_relationship(markers[[]].assign(m=1.0) * 2, method)


def test_frequencies_of_the_base_are_those_of_new_individuals():
    markers = calls()
    p = markers.mean() / 2
    W = marker_codes(markers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = marker_codes(markers.iloc[:1], frequencies=p)  # one animal, whose markers are alike
    np.testing.assert_allclose(some, W.iloc[:1], atol=1e-15)
    half = pd.Series(0.5, markers.columns)
    np.testing.assert_allclose(
        marker_codes(markers, frequencies=half), markers.fillna(1.0).sub(1.0) / np.sqrt(0.5 * len(half)),
        atol=1e-14,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 25), (25, 8), (12, 12)])
def test_effects_of_markers_are_the_shortest_that_give_the_values(shape):
    W = marker_codes(calls(*shape, seed=3))
    u = pd.Series(W @ np.random.default_rng(0).normal(size=W.shape[1]), W.index)
    effects = marker_effects(W, u.iloc[::-1])
    np.testing.assert_allclose(effects, np.linalg.pinv(W.to_numpy()) @ u, atol=1e-9)
    np.testing.assert_allclose(W @ effects, u, atol=1e-9)


def test_gblup_and_rr_blup_are_one_model():
    markers = calls(n=40, m=15, seed=5)
    rng = np.random.default_rng(2)
    W = marker_codes(markers)
    table = pd.DataFrame({"line": markers.index}).assign(
        y=W.to_numpy() @ rng.normal(size=W.shape[1]) + rng.normal(size=40), all="all"
    )
    gblup = lmm("y ~ 1 + (1 | vm(line, K))", table, kernels={"K": genomic_relationship(markers)})
    ridge = lmm(
        f"y ~ 1 + idv(0 + {' + '.join(W)} | all)", table.join(W, on="line"), max_iterations=50
    )
    assert ridge.log_likelihood == pytest.approx(gblup.log_likelihood, abs=1e-8)
    u = blup_table(gblup).set_index("level")["blup"]
    a = blup_table(ridge).set_index("effect")["blup"]
    np.testing.assert_allclose(W @ a.loc[W.columns], u.loc[W.index], atol=1e-5)
    np.testing.assert_allclose(marker_effects(W, u), a.loc[W.columns], atol=1e-5)


def test_epistatic_relationships_take_names_in_any_order():
    G, D = (genomic_relationship(calls(), method) for method in ("vanraden1", "vitezica"))
    product = epistatic_relationship(G, D.iloc[::-1, ::-1])
    expected = G.to_numpy() * D.to_numpy()
    np.testing.assert_allclose(product, expected / expected.diagonal().mean(), atol=1e-13)
    assert np.diag(product).mean() == pytest.approx(1.0)
    np.testing.assert_allclose(epistatic_relationship(G, D, scaled=False), expected, atol=1e-13)
    with pytest.raises(InputError, match="'i0' stands in one only"):
        epistatic_relationship(G, D.iloc[1:, 1:])


MARKERS = calls()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: genomic_relationship(MARKERS + 1), "`markers` is 3 of 'i1' at 'm0': expected 0, 1, 2"),
        (lambda: genomic_relationship(MARKERS - 1), "`markers` is -1 of 'i0' at 'm0'"),
        (lambda: genomic_relationship(MARKERS * 0.5, "su"), "`markers` is 0.5 of .*: expected 0, 1, 2 or NaN"),
        (lambda: genomic_relationship(MARKERS.assign(m0="AG")), "holds what is no number"),
        (lambda: genomic_relationship(MARKERS.set_axis(["a"] * 9)), "the individual 'a' twice"),
        (lambda: genomic_relationship(MARKERS.rename(columns={"m1": "m0"})), "the marker 'm0' twice"),
        (lambda: genomic_relationship(MARKERS.T.assign(i3=np.nan).T), "no call of 'i3'"),
        (lambda: genomic_relationship(MARKERS, "vanraden"), "`method` is 'vanraden': expected 'vanraden1'"),
        (lambda: genomic_relationship(MARKERS, frequencies={"m0": 0.5}), "no marker 'm1'"),
        (lambda: genomic_relationship(MARKERS, frequencies=dict.fromkeys(MARKERS, 0.0)),
         "`frequencies` is 0 at 'm0', of which calls have"),
        (lambda: genomic_relationship(MARKERS, frequencies=dict.fromkeys(MARKERS, 1.5)), "`frequencies` is 1.5"),
        (lambda: marker_effects(marker_codes(MARKERS), pd.Series({"i0": 1.0})), "no finite value of 'i1'"),
        (lambda: epistatic_relationship(MARKERS, MARKERS), "expected a square one"),
    ],
)  # fmt: skip
def test_what_is_no_marker_is_named(make, match):
    with pytest.raises(InputError, match=match):
        make()


# ---------------------------------------------------------------------- beside a pedigree


def family(n=30, seed=4):
    """Three sires and their daughters, which are the dams of others."""
    rng = np.random.default_rng(seed)
    sire = [0] * 6 + rng.integers(1, 4, n - 6).tolist()
    dam = [0] * 6 + [int(rng.integers(4, i)) for i in range(7, n + 1)]
    pedigree = Pedigree.of(range(1, n + 1), sire, dam)
    markers = calls(12, 60, seed, missing=0.0)
    return pedigree, markers.set_axis(
        [str(i) for i in (30, 7, 9, 25, 12, 3, 14, 18, 29, 21, 22, 1)]
    )


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("scales", [(0.95, 0.05, 1.0, 1.0), (0.8, 0.3, 1.5, 0.6)])
def test_single_step_is_as_it_is_defined(scales, tuned):
    alpha, beta, tau, omega = scales
    pedigree, markers = family()
    G = genomic_relationship(markers)
    found = single_step_relationship(
        pedigree, G, alpha=alpha, beta=beta, tau=tau, omega=omega, tuned=tuned
    )
    A = np.linalg.inv(pedigree.inverse.to_dense().numpy())
    at = [pedigree.levels.index(name) for name in G.index]
    A22 = A[np.ix_(at, at)]
    K = alpha * G.to_numpy() + beta * A22
    if tuned:
        b, a = np.linalg.solve(
            [[np.diag(K).mean(), 1], [K.mean(), 1]], [np.diag(A22).mean(), A22.mean()]
        )
        K = a + b * K
    expected = np.linalg.inv(A)
    expected[np.ix_(at, at)] += tau * np.linalg.inv(K) - omega * np.linalg.inv(A22)
    np.testing.assert_allclose(found.inverse.to_dense(), expected, rtol=1e-9, atol=1e-9)
    assert found.levels == pedigree.levels


def test_single_step_inverse_is_that_of_the_relationships_of_all():
    """Legarra, Aguilar and Misztal (2009): those without markers follow from those with them."""
    pedigree, markers = family()
    G = genomic_relationship(markers)
    found = single_step_relationship(pedigree, G)
    H = np.linalg.inv(found.inverse.to_dense().numpy())
    A = pedigree.relationship()
    names, others = list(G.index), [name for name in A.index if name not in G.index]
    A11, A12, A22 = A.loc[others, others], A.loc[others, names], A.loc[names, names]
    K = 0.95 * G + 0.05 * A22
    P = A12.to_numpy() @ np.linalg.inv(A22)
    H = pd.DataFrame(H, found.levels, found.levels)
    np.testing.assert_allclose(H.loc[names, names], K, atol=1e-10)
    np.testing.assert_allclose(H.loc[others, names], P @ K, atol=1e-10)
    np.testing.assert_allclose(
        H.loc[others, others], A11 + P @ (K - A22).to_numpy() @ P.T, atol=1e-10
    )


def test_genotypes_that_say_what_the_pedigree_says_change_nothing():
    pedigree, _ = family()
    A22 = pedigree.relationship(["3", "9", "30"])
    found = single_step_relationship(pedigree, A22, tuned=True)
    np.testing.assert_allclose(found.inverse.to_dense(), pedigree.inverse.to_dense(), atol=1e-12)


def test_single_step_takes_the_sparse_solver():
    pedigree, markers = family()
    H = single_step_relationship(pedigree, genomic_relationship(markers))
    rng = np.random.default_rng(1)
    rows = rng.choice(pedigree.levels, 80).tolist()
    V = Sum(
        animal=CovariancePropagation(z=H.design(rows), g=KnownInverseMatrix(H.inverse)),
        residual=ScalarMatrix(80),
    ).double()
    y, X = torch.tensor(rng.normal(size=80)), torch.ones(80, 1, dtype=torch.float64)
    losses, gradients = [], []
    for solver in ("dense", "sparse"):
        V.zero_grad()
        loss = REMLLoss(V, "reml", solver)(y, X)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([float(p.grad) for p in V.parameters()])
    assert losses[1] == pytest.approx(losses[0], abs=1e-10)
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-9)


def test_two_animals_with_the_same_calls_are_refused_among_many():
    """The last pivot of a singular matrix is rounding, above zero as often as below."""
    names = [f"a{i}" for i in range(1001)]
    markers = np.random.default_rng(3).standard_normal((1001, 1500))
    markers[7] = markers[3]
    G = pd.DataFrame(markers @ markers.T / 1500, names, names)
    pedigree = Pedigree.of(names, [None] * 1001, [None] * 1001)
    with pytest.raises(InputError, match="one of two animals with the same calls"):
        single_step_relationship(pedigree, G, alpha=1.0, beta=0.0)


def test_what_single_step_cannot_take_is_named():
    pedigree, markers = family()
    G = genomic_relationship(markers)
    with pytest.raises(InputError, match="not positive definite: expected a larger `beta`"):
        single_step_relationship(pedigree, G, alpha=1.0, beta=0.0)
    with pytest.raises(InputError, match="'stranger', which is not in the pedigree"):
        single_step_relationship(
            pedigree, G.rename(index={"9": "stranger"}, columns={"9": "stranger"})
        )
    with pytest.raises(InputError, match="`tau` is -1"):
        single_step_relationship(pedigree, G, tau=-1)
    with pytest.raises(TypeError, match="`pedigree` is"):
        single_step_relationship(G, G)
    with pytest.raises(InputError, match="`genomic` is not symmetric"):
        single_step_relationship(pedigree, G + np.triu(np.ones(G.shape), 1))
