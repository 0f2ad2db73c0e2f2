"""Kenward and Roger's correction is that of dense matrices wherever V is linear in its parameters."""

import numpy as np
import pandas as pd
import pytest

from openreml_nn import InputError, lmm
from openreml_nn.inference import anova, coefficients

RNG = np.random.default_rng(2)
Q, EACH = 12, 5
G = np.repeat(np.arange(Q), EACH)
NAMES = [f"g{i}" for i in range(Q)]
ROOT = RNG.normal(size=(Q, 2 * Q)) / (2 * Q) ** 0.5
K = ROOT @ ROOT.T + 0.3 * np.eye(Q)
X = RNG.normal(size=Q * EACH)
B = np.linalg.cholesky(K) @ RNG.normal(size=(Q, 2)) @ np.array([[1.5, 0.6], [0.0, 1.1]])
SITE = np.tile(["a", "b", "b", "a", "b"], Q)
TABLE = pd.DataFrame(
    {
        "g": np.array(NAMES)[G],
        "x": X,
        "site": SITE,
        "w": RNG.uniform(0.5, 2, Q * EACH),
        "y": 1 + X + B[G, 0] + B[G, 1] * X + RNG.normal(size=Q * EACH) * (1 + (SITE == "b")),
    }
)
PEDIGREE = pd.DataFrame(
    {
        "animal": NAMES,
        "sire": [None, None, *["g0"] * 5, *["g1"] * 5],
        "dam": [None] * 7 + ["g2"] * 5,
    }
)
Z = np.eye(Q)[G]
KERNELS = {"kernels": {"K": pd.DataFrame(K, NAMES, NAMES)}}


def relationship():
    """A by the recursion over the animals in order."""
    A, at = np.zeros((Q, Q)), {name: i for i, name in enumerate(NAMES)}
    for i, (sire, dam) in enumerate(zip(PEDIGREE.sire, PEDIGREE.dam, strict=True)):
        parents = [at[p] for p in (sire, dam) if p in at]
        A[i, :i] = A[:i, i] = sum((A[p, :i] for p in parents), np.zeros(i)) / 2
        A[i, i] = 1 + (A[parents[0], parents[1]] / 2 if len(parents) == 2 else 0)
    return A


def slopes_of(K):
    """Of the variances and the covariance of an intercept and a slope of related levels."""
    one, two = Z, Z * X[:, None]
    return [one @ K @ one.T, one @ K @ two.T + two @ K @ one.T, two @ K @ two.T]


def by_hand(V, slopes, columns):
    """Standard errors and degrees of freedom of the coefficients, one at a time."""
    inverse = np.linalg.inv(V)
    phi = np.linalg.inv(columns.T @ inverse @ columns)
    P = inverse - inverse @ columns @ phi @ columns.T @ inverse
    W = np.linalg.inv([[np.trace(P @ a @ P @ b) / 2 for b in slopes] for a in slopes])
    V_X = inverse @ columns
    own = [V_X.T @ a @ V_X for a in slopes]
    gain = sum(
        W[i, j] * (V_X.T @ a @ inverse @ b @ V_X - own[i] @ phi @ own[j])
        for i, a in enumerate(slopes)
        for j, b in enumerate(slopes)
    )
    spread = phi + 2 * phi @ gain @ phi
    moves = np.array([(phi @ a @ phi).diagonal() for a in own])
    df = 2 * phi.diagonal() ** 2 / np.einsum("ip,ij,jp->p", moves, W, moves)
    return spread.diagonal() ** 0.5, df


def variances(result):
    return [c.covariance.numpy() for c in result.components]


NOISE = [np.diag(1.0 * (site == SITE)) for site in "ab"]


@pytest.mark.parametrize(
    ("formula", "options", "slopes"),
    [
        ("y ~ x + (1 | vm(g, K))", KERNELS, [Z @ K @ Z.T, np.eye(60)]),
        ("y ~ x + us(1 + x | vm(g, K))", KERNELS, [*slopes_of(K), np.eye(60)]),
        ("y ~ x + diag(1 + x | vm(g, K))", KERNELS, [*slopes_of(K)[::2], np.eye(60)]),
        (
            "y ~ x + (1 | ped(g)) + (1 | g)",
            {"pedigree": PEDIGREE},
            [Z @ relationship() @ Z.T, Z @ Z.T, np.eye(60)],
        ),
        (
            "y ~ x + (x | g)",
            {"residual": "diag(site)"},
            [*slopes_of(np.eye(Q)), *NOISE],
        ),
        ("y ~ x + (1 | g)", {"weights": "w"}, [Z @ Z.T, np.diag(1 / TABLE.w)]),
    ],
)
def test_it_is_that_of_dense_matrices(formula, options, slopes):
    result = lmm(formula, TABLE, **options)
    found = coefficients(result, "kenward-roger")
    entries = []
    for matrix in variances(result):
        kept = np.tril_indices(len(matrix)) if matrix.ndim == 2 else np.arange(len(matrix))
        values = matrix[kept]
        entries += [v for v in values if v != 0 or len(values) == 1]
    V = sum(value * slope for value, slope in zip(entries, slopes, strict=True))
    columns = np.stack([np.ones(60), X], 1)
    std_error, df = by_hand(V, slopes, columns)
    np.testing.assert_allclose(found.std_error, std_error, rtol=1e-8)
    np.testing.assert_allclose(found.df, df, rtol=1e-8)


def test_unrelated_levels_of_a_kernel_are_those_of_a_group():
    kernels = {"K": pd.DataFrame(np.eye(Q), NAMES, NAMES)}
    fits = [
        lmm("y ~ x + (x | g)", TABLE),
        lmm("y ~ x + us(1 + x | vm(g, K))", TABLE, kernels=kernels),
    ]
    one, other = (anova(fit, ddf="kenward-roger") for fit in fits)
    numbers = ["den_df", "statistic", "p"]
    np.testing.assert_allclose(one[numbers], other[numbers], rtol=1e-4)


def test_what_is_not_linear_is_refused_by_its_term():
    said = "linear in variances and covariances, which term 'residual' is not"
    time = TABLE.assign(time=np.tile(np.arange(EACH), Q))
    for residual in ("ar1(time | g)", "exp(x)"):
        result = lmm("y ~ x + (1 | g)", time, residual=residual)
        with pytest.raises(InputError, match=said):
            coefficients(result, "kenward-roger")
