"""One known kernel: the spectral solver against the dense one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from openreml_nn import REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.likelihood import Blocked, NotPositiveDefiniteError
from tests.likelihood.models import Model
from tests.likelihood.test_loss import FEWER, METHODS, _compare_solvers
from tests.strategies import kinship, pedigree


def model(n, seed, kernel=None):
    generator = torch.Generator().manual_seed(seed)
    K = KnownMatrix(kinship(n)) if kernel is None else kernel
    V = Sum(animal=K, residual=ScalarMatrix(n)).double()
    with torch.no_grad():
        for p in V.parameters():
            p.copy_(0.5 * torch.randn(1, generator=generator))
    return Model(V, torch.randn(n, generator=generator), torch.randn(n, 2, generator=generator))


@pytest.mark.parametrize("kind", ["kinship", "pedigree", "semi-definite"])
@FEWER
@given(st.integers(8, 20), st.integers(0, 1000), st.sampled_from(METHODS))
def test_spectral_equals_dense(kind, n, seed, method):
    kernel = {
        "kinship": lambda: KnownMatrix(kinship(n)),
        "pedigree": lambda: KnownInverseMatrix(pedigree(n).inverse),
        "semi-definite": lambda: KnownMatrix(torch.ones(n, n)),
    }[kind]()
    _compare_solvers(model(n, seed, kernel), method, ("dense", "spectral"))


@pytest.mark.parametrize("sparse", [True, False])
@FEWER
@given(st.integers(0, 1000), st.sampled_from(METHODS))
def test_repeated_records_of_a_kernel_in_the_blocked_solver(sparse, seed, method):
    generator = torch.Generator().manual_seed(seed)
    n, q = 24, 5
    animal = torch.randint(0, q, (n,), generator=generator).tolist()
    litter = torch.randint(0, 7, (n,), generator=generator).tolist()
    m = model(n, seed)
    m.covariance = Sum(
        animal=CovariancePropagation(
            z=DummyMatrix(animal, levels=list(range(q))), g=KnownMatrix(kinship(q))
        ),
        litter=CovariancePropagation(
            z=DummyMatrix(litter, levels=list(range(7))), g=ScalarMatrix(7)
        ),
        residual=ScalarMatrix(n),
    ).double()
    _compare_solvers(m, method, ("dense", Blocked(pair_cost=0 if sparse else 1e9)))


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_in_theta_y_and_x(method):
    m = model(9, 1)
    loss = REMLLoss(m.covariance, method)
    names = [name for name, _ in loss.named_parameters()]
    at = [0.3 * torch.randn(1, requires_grad=True) for _ in names]

    def value(y, X, *theta):
        return torch.func.functional_call(loss, dict(zip(names, theta, strict=True)), (y, X))

    m.y.requires_grad_()
    m.X.requires_grad_()
    assert gradcheck(value, (m.y, m.X, *at), fast_mode=True)
    assert gradgradcheck(value, (m.y, m.X, *at), fast_mode=True)
    loss(m.y, m.X)
    assert loss.plan.solver == "spectral"


def test_a_fit_is_the_dense_fit():
    m = model(40, 3)
    K = m.covariance.operands["animal"].matrix
    m.y = 2 * torch.linalg.cholesky(K) @ torch.randn(40) + torch.randn(40)
    dense = fit_reml(m.covariance, m.y, m.X, solver="dense")
    found = fit_reml(m.covariance, m.y, m.X)
    assert found.plan.solver == "spectral"
    assert found.converged
    assert found.log_likelihood == pytest.approx(dense.log_likelihood, rel=1e-10)
    torch.testing.assert_close(found.random[0].values, dense.random[0].values, rtol=1e-4, atol=1e-6)


def test_a_kernel_that_is_not_positive_semi_definite_is_an_error():
    K = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -0.5]))
    V = Sum(animal=KnownMatrix(K), residual=ScalarMatrix(5)).double()
    with pytest.raises(NotPositiveDefiniteError, match=r"'animal'.*eigenvalue is -0\.5"):
        REMLLoss(V)(torch.randn(5), torch.ones(5, 1))


@pytest.mark.parametrize("solver", ["spectral", "dense"])
def test_in_place_changes_of_the_kernel_are_seen(solver):
    m = model(12, 5)
    loss = REMLLoss(m.covariance, solver=solver)
    before = loss(m.y, m.X).item()
    m.covariance.operands["animal"].matrix.mul_(2.0)
    after = loss(m.y, m.X).item()
    assert after != before
    assert after == REMLLoss(m.covariance, solver=solver)(m.y, m.X).item()


def test_other_trees_are_refused():
    V = Sum(a=ScalarMatrix(5)).double()
    with pytest.raises(ValueError, match="one known kernel"):
        REMLLoss(V, solver="spectral")(torch.randn(5), torch.ones(5, 1))


def traits(n, k, seed, residual="unstructured", rows=None):
    """Records of k traits on each of n relatives, trait by trait."""
    generator = torch.Generator().manual_seed(seed)
    K = KnownMatrix(kinship(n))
    K.fix("sigma^2", 0.0)
    R = {
        "unstructured": lambda: KroneckerProduct(UnstructuredMatrix(k), IdentityMatrix(n)),
        "diagonal": lambda: KroneckerProduct(DiagonalMatrix(k), IdentityMatrix(n)),
        "scalar": lambda: ScalarMatrix(n * k),
    }[residual]()
    V = Sum(animal=KroneckerProduct(UnstructuredMatrix(k), K), residual=R).double()
    with torch.no_grad():
        for p in V.parameters():
            p.copy_(0.5 * torch.randn(1, generator=generator))
    y = torch.randn(n * k, generator=generator)
    return Model(V, y, torch.randn(n * k, 2, generator=generator))


@pytest.mark.parametrize("residual", ["unstructured", "diagonal", "scalar"])
@pytest.mark.parametrize("solver", ["blocked", "spectral"])
@FEWER
@given(st.integers(6, 12), st.integers(0, 1000), st.sampled_from(METHODS))
def test_several_traits_of_relatives_equal_dense(solver, residual, n, seed, method):
    _compare_solvers(traits(n, 2, seed, residual), method, ("dense", solver))


@pytest.mark.parametrize(
    "tree",
    [
        lambda: KroneckerProduct(IdentityMatrix(3), KnownMatrix(kinship(4))),
        lambda: KroneckerProduct(IdentityMatrix(70), KnownMatrix(kinship(2))),
        lambda: KroneckerProduct(KnownMatrix(kinship(4)), UnstructuredMatrix(2)),
        lambda: KroneckerProduct(UnstructuredMatrix(2), KnownMatrix(kinship(4))),
        lambda: KroneckerProduct(DiagonalMatrix(2), IdentityMatrix(3)),
        lambda: KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(3)),
        lambda: KroneckerProduct(KnownMatrix(kinship(3)), KnownMatrix(kinship(2))),
        lambda: KroneckerProduct(IdentityMatrix(2), DiagonalMatrix(70)),
        lambda: KroneckerProduct(ScalarMatrix(2), UnstructuredMatrix(2), IdentityMatrix(3)),
        lambda: KroneckerProduct(UnstructuredMatrix(2), IdentityMatrix(3), IdentityMatrix(2)),
    ],
)
@pytest.mark.parametrize("some", [False, True])
def test_kronecker_products_lower_to_what_they_are(tree, some):
    V = tree().double()
    with torch.no_grad():
        for p in V.parameters():
            p.copy_(0.5 * torch.randn(1))
    rows = torch.randperm(V.shape[0])[:4] if some else torch.arange(V.shape[0])
    (term,) = V.terms(rows if some else None)
    torch.testing.assert_close(term.dense(), V()[rows][:, rows])
