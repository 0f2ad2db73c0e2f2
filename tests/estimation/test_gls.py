"""Estimates and predictions at a given covariance, against other ways to the same numbers."""

import math

import pytest
import torch

from openreml_nn import (
    InputError,
    REMLLoss,
    blue,
    blup,
    fit_reml,
    loglik,
    marginal_predict,
    marginal_residual,
    predict,
    residual,
    restricted_log_likelihood,
)
from openreml_nn.covariance import (
    Augment,
    BlockDiagonal,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    kron,
)
from openreml_nn.likelihood import NotPositiveDefiniteError

N, Q, P = 24, 4, 3


def spd(n):
    A = torch.randn(n, n)
    return A @ A.mT / n + torch.eye(n)


@pytest.fixture
def data():
    y, X, Z, G = torch.randn(N) + 3, torch.randn(N, P), torch.randn(N, Q), spd(Q)
    X[:, 0] = 1
    R = torch.diag(torch.rand(N) + 0.5)
    return y, X, Z, G, Z @ G @ Z.mT + R, R


@pytest.fixture
def tree():
    """A random intercept and slope for each of six subjects, and a diagonal residual."""
    subject = torch.arange(N) % 6
    covariates = torch.stack([torch.ones(N), torch.linspace(-1, 1, N)], 1)
    Z = DummyMatrix(subject, covariates=covariates)
    G = kron(IdentityMatrix(6), UnstructuredMatrix(2))
    V = Sum(g=CovariancePropagation(Z, G), e=DiagonalMatrix(N))
    return Z, G, V


def test_formulas(data):
    y, X, Z, G, V, _ = data
    inverse = torch.linalg.inv(V)
    beta = torch.linalg.inv(X.mT @ inverse @ X) @ X.mT @ inverse @ y
    b = G @ Z.mT @ inverse @ (y - X @ beta)
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(blue(y, X, V), beta, **close)
    torch.testing.assert_close(marginal_predict(y, X, V), X @ beta, **close)
    torch.testing.assert_close(marginal_residual(y, X, V), y - X @ beta, **close)
    torch.testing.assert_close(blup(y, X, Z, G, V), b, **close)
    torch.testing.assert_close(predict(y, X, Z, G, V), X @ beta + Z @ b, **close)
    torch.testing.assert_close(residual(y, X, Z, G, V), y - X @ beta - Z @ b, **close)


def test_hendersons_equations_have_the_same_solution(data):
    y, X, Z, G, V, R = data
    W = torch.cat([X, Z], 1)
    R_inverse = torch.linalg.inv(R)
    C = W.mT @ R_inverse @ W
    C[P:, P:] += torch.linalg.inv(G)
    solution = torch.linalg.solve(C, W.mT @ R_inverse @ y)
    torch.testing.assert_close(blue(y, X, V), solution[:P])
    torch.testing.assert_close(blup(y, X, Z, G, V), solution[P:])


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_the_log_likelihood_is_that_of_the_loss(tree, method):
    _, _, V = tree
    y, X = torch.randn(N), torch.randn(N, 2)
    theta = torch.randn(V.num_free_params) / 3
    found = loglik(y, X, V, theta, method=method)
    expected = restricted_log_likelihood(y, X, V(theta), method)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    loss = REMLLoss(V, method, reduction="sum")
    torch.testing.assert_close(loglik(y, X, V, method=method), -loss(y, X), rtol=1e-10, atol=0)


def test_a_fit_has_the_same_estimates_and_predictions():
    group = torch.arange(N) % Q
    y = torch.randn(N) + torch.randn(Q)[group]
    X = torch.stack([torch.ones(N), torch.randn(N)], 1)
    Z, G = DummyMatrix(group), ScalarMatrix(Q)
    V = Sum(g=CovariancePropagation(Z, G), e=ScalarMatrix(N))
    result = fit_reml(V, y, X)
    torch.testing.assert_close(blue(y, X, V), result.fixed.estimate)
    torch.testing.assert_close(blup(y, X, Z, G, V), result.random[0].values[:, 0])
    torch.testing.assert_close(predict(y, X, Z, G, V), result.fitted)
    torch.testing.assert_close(residual(y, X, Z, G, V), result.residuals)
    assert float(loglik(y, X, V).detach()) == pytest.approx(float(result.log_likelihood), rel=1e-12)


def test_several_random_effects_are_one(data):
    y, X, Z, G, _, R = data
    group = DummyMatrix(torch.arange(N) % 5)
    H = ScalarMatrix(5)
    both, joint = Augment(Z, group), BlockDiagonal(G, H)
    V = Sum(CovariancePropagation(both, joint), R)
    b = blup(y, X, both, joint, V)
    torch.testing.assert_close(b[:Q], blup(y, X, Z, G, V))
    torch.testing.assert_close(b[Q:], blup(y, X, group, H, V))


def test_trees_at_other_parameters(tree):
    Z, G, V = tree
    y, X = torch.randn(N), torch.randn(N, 2)
    theta = torch.randn(V.num_free_params) / 3
    inside = theta[: G.num_free_params]
    names = dict(zip(V.free_param_names, theta.split(1), strict=True))
    before = V()
    for point in (theta, names):
        torch.testing.assert_close(blue(y, X, V, point), blue(y, X, V(theta)))
        for function in (blup, predict, residual):
            found = function(y, X, Z, G, V, point)
            torch.testing.assert_close(found, function(y, X, Z(), G(inside), V(theta)))
    torch.testing.assert_close(V(), before, rtol=0, atol=0)
    assert all(p.is_leaf for p in V.parameters())
    # As if they were the tree's own.
    torch.nn.utils.vector_to_parameters(theta, V.parameters())
    torch.testing.assert_close(blup(y, X, Z, G, V), blup(y, X, Z(), G(inside), V(theta)))


def test_fixed_parameters_stay_where_they_are(tree):
    Z, G, V = tree
    y, X = torch.randn(N), torch.randn(N, 2)
    V.fix(V.param_names[0], 0.4)
    theta = torch.randn(V.num_free_params) / 3
    found = blup(y, X, Z, G, V, theta)
    whole = G(theta[: G.num_free_params])
    torch.testing.assert_close(found, blup(y, X, Z(), whole, V(theta)))


def test_derivatives(data):
    y, X, Z, G, V, _ = (t[:8, ...] if len(t) == N else t for t in data)
    V = V[:, :8].contiguous()
    leaves = [t.clone().requires_grad_() for t in (y, X, Z, G, V)]

    def symmetric(function, *which):
        def of(*tensors):
            *rest, S = tensors
            return function(*rest, (S + S.mT) / 2)

        return of, [leaves[i] for i in which]

    for function, which in (
        (blue, (0, 1, 4)),
        (marginal_predict, (0, 1, 4)),
        (marginal_residual, (0, 1, 4)),
        (loglik, (0, 1, 4)),
    ):
        of, inputs = symmetric(function, *which)
        assert torch.autograd.gradcheck(of, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(of, inputs, fast_mode=True)
    for function in (blup, predict, residual):

        def both(y, X, Z, G, V, function=function):
            return function(y, X, Z, (G + G.mT) / 2, (V + V.mT) / 2)

        assert torch.autograd.gradcheck(both, leaves, fast_mode=True)


def test_derivatives_by_the_parameters(tree):
    Z, G, V = tree
    y, X = torch.randn(N), torch.randn(N, 2)
    theta = torch.randn(V.num_free_params) / 3

    def fitted(theta):
        return predict(y, X, Z, G, V, theta)

    assert torch.autograd.gradcheck(fitted, (theta.clone().requires_grad_(),))
    expected = torch.autograd.functional.jacobian(fitted, theta)
    torch.testing.assert_close(torch.func.jacrev(fitted)(theta), expected)
    torch.testing.assert_close(torch.func.jacfwd(fitted)(theta), expected)
    predict(y, X, Z, G, V).sum().backward()
    assert all(p.grad is not None for p in V.parameters())


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e6])
def test_nothing_depends_on_the_unit_of_the_response(data, unit):
    # A constant on the diagonal of V would.
    y, X, Z, G, V, _ = data
    close = {"rtol": 1e-9, "atol": 0}
    scaled = unit * y, X, Z, unit**2 * G, unit**2 * V
    torch.testing.assert_close(blup(*scaled), unit * blup(y, X, Z, G, V), **close)
    torch.testing.assert_close(blue(unit * y, X, unit**2 * V), unit * blue(y, X, V), **close)
    found = loglik(unit * y, X, unit**2 * V) + (N - P) * math.log(unit)
    torch.testing.assert_close(found, loglik(y, X, V), **close)


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("q", [1, 2])
def test_shapes_are_kept(data, p, q):
    y, X, Z, _, V, _ = data
    X, Z, G = X[:, :p], Z[:, :q], torch.eye(q)
    assert blue(y, X, V).shape == (p,)
    assert blup(y, X, Z, G, V).shape == (q,)
    for function in (predict, residual):
        assert function(y, X, Z, G, V).shape == (N,)
    assert loglik(y, X, V).shape == ()


def test_an_aliased_column_has_no_estimate_but_fitted_values_have(data):
    y, X, Z, G, V, _ = data
    more = torch.cat([X, X[:, :1] - 2 * X[:, 1:2]], 1)
    with pytest.warns(RuntimeWarning, match="rank deficient: dropped column 3"):
        beta = blue(y, more, V)
    torch.testing.assert_close(beta[:3], blue(y, X, V))
    assert bool(beta[3].isnan())
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        fitted = predict(y, more, Z, G, V)
    torch.testing.assert_close(fitted, predict(y, X, Z, G, V))


def test_the_widest_precision_is_used(data):
    y, X, _, G, V, _ = data
    group = torch.arange(N) % Q
    torch.set_default_dtype(torch.float32)
    single = DummyMatrix(group)
    assert single().dtype == torch.float32
    found = blup(y, X, single, G, V)
    assert found.dtype == torch.float64
    expected = blup(y, X, single().double(), G, V)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert blue(y.float(), X.float(), V.float()).dtype == torch.float32


def test_what_does_not_fit_is_refused(data, tree):
    y, X, Z, G, V, _ = data
    design, _, whole = tree
    theta = torch.zeros(whole.num_free_params)
    skewed = V.clone()
    skewed[0, 1] += 1
    other = ScalarMatrix(Q)
    for function, error, message in (
        (lambda: blue(y, X, V[:3, :3]), InputError, r"`V` has shape \(3, 3\): expected \(24, 24\)"),
        (lambda: blue(y, X, -V), NotPositiveDefiniteError, "V is not positive definite"),
        (lambda: blue(y, X, skewed), InputError, "`V` is not symmetric"),
        (lambda: blue(y, X, V / 0), InputError, "`V` has an entry that is not finite"),
        (lambda: blup(y, X, Z / 0, G, V), InputError, "`Z` has an entry that is not finite"),
        (lambda: blue(y, X, V.long()), TypeError, "`V` is torch.int64: expected a floating"),
        (lambda: blue(y, X, "V"), TypeError, "`V` is a str: expected a tensor or a Matrix"),
        (lambda: blue(y, X, V, theta), InputError, "`theta` is given but `V` is a tensor"),
        (lambda: blue(y, X, whole, theta[:1]), ValueError, "`free_params` has shape"),
        (lambda: blue(y[:5], X, V), ValueError, "`y` has 5 rows but `X` has 24"),
        (lambda: blue(list(y), X, V), TypeError, "`y` is list: expected a floating-point tensor"),
        (
            lambda: blup(y, X, Z[:, :2], G, V),
            InputError,
            r"`G` has shape \(4, 4\): expected \(2, 2",
        ),
        (
            lambda: blup(y, X, Z[:9], G, V),
            InputError,
            r"`Z` has shape \(9, 4\): expected \(24, q\)",
        ),
        (lambda: blup(y, X, Z, skewed[:4, :4], V), InputError, "`G` is not symmetric"),
        (
            lambda: blup(y, X, Z, other, whole, theta),
            InputError,
            "`G` has parameters that are not in `V`.*pass its value",
        ),
        (lambda: predict(y, X, None, G, V), TypeError, "`Z` is a NoneType"),
        (lambda: loglik(y, X, V, method="exact"), InputError, "`method` is 'exact'"),
    ):
        with pytest.raises(error, match=message):
            function()
    assert design.num_params == 0
