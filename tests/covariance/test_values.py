"""Values by formulas written independently in NumPy and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import torch

from openreml_nn import covariance as cov
from openreml_nn.likelihood import NotPositiveDefiniteError
from tests.strategies import kinship, pedigree

N = 5


def sigmoid(x, low, high):
    return low + (high - low) / (1 + np.exp(-x))


def at(count, seed=1):
    return np.random.default_rng(seed).normal(scale=0.7, size=count)


def lags(n):
    return np.abs(np.subtract.outer(np.arange(n), np.arange(n)))


def scaled(sd, correlation):
    return np.diag(sd) @ correlation @ np.diag(sd)


def antedependence(x):
    sd, rho = np.exp(x[:N]), sigmoid(x[N:], -1, 1)
    R = np.eye(N)
    for i in range(N):
        for j in range(i + 1, N):
            R[i, j] = R[j, i] = np.prod(rho[i:j])
    return scaled(sd, R)


def triangle(x, n, m):
    L = np.zeros((n, m))
    L[np.tril_indices(n, 0, m)] = x
    return L


POINTS = np.random.default_rng(2).normal(size=(N, 2))
DISTANCE = scipy.spatial.distance.cdist(POINTS, POINTS)


def matern(nu):
    def formula(x):
        s = np.sqrt(2 * nu) * DISTANCE / np.exp(x[1])
        with np.errstate(invalid="ignore"):
            r = 2 ** (1 - nu) / scipy.special.gamma(nu) * s**nu * scipy.special.kv(nu, s)
        return np.exp(2 * x[0]) * np.where(s == 0, 1.0, r)

    return formula


def unconstrained(x):
    L = triangle(x, N, N)
    V = L + np.tril(L, -1).T
    np.fill_diagonal(V, np.exp(2 * np.diag(L)))
    return V


def unstructured(x):
    L = triangle(x, N, N)
    np.fill_diagonal(L, np.exp(np.diag(L)))
    return L @ L.T


def compound(x):
    R = np.full((N, N), sigmoid(x[1], -1 / (N - 1), 1))
    np.fill_diagonal(R, 1)
    return np.exp(2 * x[0]) * R


D = torch.from_numpy(DISTANCE)
VALUES = {
    "identity": (lambda: cov.IdentityMatrix(N), lambda x: np.eye(N)),
    "scalar": (lambda: cov.ScalarMatrix(N), lambda x: np.exp(2 * x[0]) * np.eye(N)),
    "diagonal": (lambda: cov.DiagonalMatrix(N), lambda x: np.diag(np.exp(2 * x))),
    "equal": (lambda: cov.EqualEntryMatrix(N, 3), lambda x: np.full((N, 3), np.exp(2 * x[0]))),
    "equicorrelation": (
        lambda: cov.EquicorrelationMatrix(N),
        lambda x: compound(np.array([0.0, x[0]])),
    ),
    "compound symmetric": (lambda: cov.CompoundSymmetricMatrix(N), compound),
    "ar1": (
        lambda: cov.AR1Matrix(N),
        lambda x: np.exp(2 * x[0]) * scipy.linalg.toeplitz(sigmoid(x[1], -1, 1) ** np.arange(N)),
    ),
    "toeplitz": (
        lambda: cov.ToeplitzMatrix(N),
        lambda x: (
            np.exp(2 * x[0]) * scipy.linalg.toeplitz(np.concatenate([[1.0], sigmoid(x[1:], -1, 1)]))
        ),
    ),
    "banded": (
        lambda: cov.ToeplitzMatrix(N, bands=3),
        lambda x: (
            np.exp(2 * x[0])
            * scipy.linalg.toeplitz(np.concatenate([[1.0], sigmoid(x[1:], -1, 1), [0.0, 0.0]]))
        ),
    ),
    "antedependence": (lambda: cov.AntedependenceMatrix(N), antedependence),
    "lower": (lambda: cov.LowerTriangularMatrix(N, 3), lambda x: triangle(x, N, 3)),
    "unconstrained": (lambda: cov.UnconstrainedMatrix(N), unconstrained),
    "unstructured": (lambda: cov.UnstructuredMatrix(N), unstructured),
    "exponential": (
        lambda: cov.ExponentialMatrix(D),
        lambda x: np.exp(2 * x[0]) * np.exp(-DISTANCE / np.exp(x[1])),
    ),
    "gaussian": (
        lambda: cov.GaussianMatrix(D),
        lambda x: np.exp(2 * x[0]) * np.exp(-(DISTANCE**2) / (2 * np.exp(2 * x[1]))),
    ),
    "matern 1/2": (lambda: cov.MaternMatrix(D, nu=0.5), matern(0.5)),
    "matern 3/2": (lambda: cov.MaternMatrix(D, nu=1.5), matern(1.5)),
    "matern 5/2": (lambda: cov.MaternMatrix(D, nu=2.5), matern(2.5)),
    "known": (
        lambda: cov.KnownMatrix(kinship(N)),
        lambda x: np.exp(2 * x[0]) * kinship(N).numpy(),
    ),
    "known inverse": (
        lambda: cov.KnownInverseMatrix(pedigree(N).inverse),
        lambda x: np.exp(2 * x[0]) * np.linalg.inv(pedigree(N).inverse.to_dense().numpy()),
    ),
    "factor analytic": (
        lambda: cov.factor_analytic(N, 2),
        lambda x: triangle(x[:9], N, 2) @ triangle(x[:9], N, 2).T + np.diag(np.exp(2 * x[9:])),
    ),
    "heterogeneous ar1": (
        lambda: cov.heterogeneous_ar1(N),
        lambda x: scaled(np.exp(x[:N]), sigmoid(x[N], -1, 1) ** lags(N)),
    ),
    "heterogeneous compound symmetry": (
        lambda: cov.heterogeneous_compound_symmetry(N),
        lambda x: scaled(np.exp(x[:N]), compound(np.array([0.0, x[N]]))),
    ),
    "field": (
        lambda: cov.ar1_field(2, 3),
        lambda x: (
            np.exp(2 * x[0])
            * np.kron(sigmoid(x[1], -1, 1) ** lags(2), sigmoid(x[2], -1, 1) ** lags(3))
        ),
    ),
}


@pytest.mark.parametrize("kind", VALUES)
def test_value(kind):
    make, formula = VALUES[kind]
    matrix = make().double()
    x = at(matrix.num_free_params)
    for signed in (x, -x):
        found = matrix(torch.from_numpy(signed))
        np.testing.assert_allclose(found, formula(signed), rtol=1e-12, atol=1e-13)


A = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
B = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LOWER = np.tril(np.ones((3, 3)))
OPERATORS = {
    "sum": (lambda m: cov.Sum(m, A, B), LOWER + A.numpy() + B.numpy()),
    "product": (lambda m: cov.Product(m, A, B), LOWER @ A.numpy() @ B.numpy()),
    "hadamard": (lambda m: cov.HadamardProduct(m, A, B), LOWER * A.numpy() * B.numpy()),
    "kronecker": (lambda m: cov.KroneckerProduct(A, m, B), np.kron(np.kron(A, LOWER), B)),
    "transpose": (cov.Transpose, LOWER.T),
    "gram xtx": (cov.Gram, LOWER.T @ LOWER),
    "gram xxt": (lambda m: cov.Gram(m, gram_type="xxt"), LOWER @ LOWER.T),
    "inverse": (
        lambda m: cov.Inverse(cov.Gram(m, gram_type="xxt")),
        np.linalg.inv(LOWER @ LOWER.T),
    ),
    "block diagonal": (
        lambda m: cov.BlockDiagonal(A, m, B),
        scipy.linalg.block_diag(A, LOWER, B),
    ),
    "augment": (lambda m: cov.Augment(m, A, B), np.hstack([LOWER, A, B])),
    "stack": (lambda m: cov.Stack(m, A, B), np.vstack([LOWER, A, B])),
    "propagation": (lambda m: cov.CovariancePropagation(z=A, g=m), A.numpy() @ LOWER @ A.numpy().T),
    "plus": (lambda m: m + A + B, LOWER + A.numpy() + B.numpy()),
    "plus from the left": (lambda m: A + m, LOWER + A.numpy()),
    "times": (lambda m: A * m * B, LOWER * A.numpy() * B.numpy()),
    "at": (lambda m: A @ m @ B, A.numpy() @ LOWER @ B.numpy()),
    "T": (lambda m: m.T, LOWER.T),
    "kron": (lambda m: cov.kron(m, A), np.kron(LOWER, A)),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_operator(kind):
    make, expected = OPERATORS[kind]
    made = make(cov.LowerTriangularMatrix(3, 3).double())
    np.testing.assert_allclose(made().detach(), expected, rtol=1e-12, atol=1e-13)
    assert made.shape == expected.shape


def test_a_chain_of_one_operator_is_one_operator():
    a, b, c = cov.ScalarMatrix(2), cov.DiagonalMatrix(2), cov.IdentityMatrix(2)
    V = a + b + c
    assert type(V) is cov.Sum
    assert list(V.operands) == ["op_0", "op_1", "op_2"]
    named = cov.Sum(first=a, second=b) + c
    assert list(named.operands) == ["op_0", "op_1"]
    assert named.param_names == [
        "op_0/first/sigma^2",
        "op_0/second/sigma^2_0",
        "op_0/second/sigma^2_1",
    ]
    with pytest.raises(TypeError):
        a + 1.0


def test_defaults_are_those_of_the_table():
    np.testing.assert_allclose(cov.LowerTriangularMatrix(2, 2)().detach(), [[1, 0], [1, 1]])
    np.testing.assert_allclose(cov.UnstructuredMatrix(2)().detach(), np.eye(2))
    np.testing.assert_allclose(cov.UnconstrainedMatrix(2)().detach(), np.eye(2))
    np.testing.assert_allclose(cov.AR1Matrix(2)().detach(), np.eye(2))
    np.testing.assert_allclose(
        cov.EquicorrelationMatrix(4)().detach(), np.eye(4) * 2 / 3 + 1 / 3, rtol=1e-6
    )


def test_the_fields_scale_of_a_matern_is_the_exponentials():
    x = torch.tensor([0.3, -0.2])
    torch.testing.assert_close(
        cov.MaternMatrix(D, nu=0.5)(x), cov.ExponentialMatrix(D)(x), rtol=1e-14, atol=0
    )


def test_specifications_are_matched_by_name():
    from openreml_nn.covariance.params import free_specs
    from openreml_nn.covariance.transform import TransformIdentity

    swapped = {
        "rho": {"fixed": True, "default": torch.tensor([0.5]), "trans": TransformIdentity()},
        "sigma^2": {"fixed": False, "default": torch.tensor([2.0]), "trans": TransformIdentity()},
    }
    V = cov.AR1Matrix(2, swapped)
    assert V.param_names == ["sigma^2", "rho"]
    np.testing.assert_allclose(V().detach(), [[2.0, 1.0], [1.0, 2.0]])
    one = cov.AR1Matrix(2, {"rho": swapped["rho"]})
    np.testing.assert_allclose(one().detach(), [[1.0, 0.5], [0.5, 1.0]])
    with pytest.raises(ValueError, match="param_specs"):
        cov.AR1Matrix(2, free_specs(["rho", "tau"]))
    with pytest.raises(TypeError, match="param_specs"):
        cov.AR1Matrix(2, [1])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: cov.ToeplitzMatrix(3, bands=4), ValueError, "bands"),
        (lambda: cov.ToeplitzMatrix(3, bands=0), ValueError, "bands"),
        (lambda: cov.MaternMatrix(D, nu=1.0), ValueError, "nu"),
        (lambda: cov.ExponentialMatrix(D[:3]), ValueError, "shape"),
        (lambda: cov.ExponentialMatrix(D + 1), ValueError, "diagonal"),
        (lambda: cov.ExponentialMatrix(-D), ValueError, "negative"),
        (lambda: cov.ExponentialMatrix(D.triu()), ValueError, "not symmetric"),
        (lambda: cov.KnownMatrix(A), ValueError, "not symmetric"),
        (lambda: cov.KnownMatrix(A * torch.nan), ValueError, "not finite"),
        (lambda: cov.KnownMatrix(torch.eye(2).long()), TypeError, "floating-point"),
        (lambda: cov.KnownInverseMatrix(A[:2]), ValueError, "inverse"),
        (lambda: cov.KnownInverseMatrix(-torch.eye(2))(), NotPositiveDefiniteError, "not positive"),
        (lambda: cov.factor_analytic(3, 4), ValueError, "`k` is 4"),
        (lambda: cov.SimpleMatrix(0, torch.diag), ValueError, "num_free_params"),
        (lambda: cov.SimpleMatrix(2, None), TypeError, "call"),
        (lambda: cov.SimpleMatrix(2, lambda x: x), ValueError, "2-D"),
        (lambda: cov.Product(cov.ScalarMatrix(2), torch.zeros(3, 2)), ValueError, "columns"),
        (lambda: cov.Product(cov.ScalarMatrix(2)), ValueError, "got 1 operands"),
        (lambda: cov.HadamardProduct(cov.ScalarMatrix(2), torch.eye(3)), ValueError, "shapes"),
        (lambda: cov.Augment(cov.ScalarMatrix(2), torch.eye(3)), ValueError, "rows"),
        (lambda: cov.Stack(cov.ScalarMatrix(2), torch.eye(3)), ValueError, "columns"),
        (lambda: cov.Transpose(cov.ScalarMatrix(2), torch.eye(2)), ValueError, "got 2 operands"),
        (lambda: cov.Inverse(cov.EqualEntryMatrix(2, 3)), ValueError, "square"),
        (lambda: cov.Inverse(cov.EqualEntryMatrix(2))(), NotPositiveDefiniteError, "not positive"),
        (lambda: cov.Inverse(cov.LowerTriangularMatrix(2, 2))(), ValueError, "not symmetric"),
        (lambda: cov.Gram(cov.ScalarMatrix(2), gram_type="xx"), ValueError, "gram_type"),
        (lambda: cov.Sum(), ValueError, "got 0 operands"),
        (lambda: cov.ScalarMatrix(0), ValueError, "1 or more"),
        (lambda: cov.ScalarMatrix(2.5), TypeError, "whole number"),
    ],
)
def test_wrong_input_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
