"""The likelihood to second order about the diagonal of its system, from which a fit of dear factors begins."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import glmm
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.families import Binomial
from openreml_nn.likelihood import Blocked, LaplaceLoss, Sparse
from openreml_nn.likelihood.laplace_sparse import SparseSpace

N, USERS, ITEMS = 1500, 250, 240


def crossed(n=N, users=USERS, items=ITEMS):
    rng = np.random.default_rng(3)
    user, item = rng.integers(0, users, n), rng.integers(0, items, n)
    x = rng.standard_normal(n)
    a = 0.3 * x - 0.2 + rng.standard_normal(users)[user] + 0.8 * rng.standard_normal(items)[item]
    y = (rng.random(n) < 1 / (1 + np.exp(-a))).astype(float)
    return pd.DataFrame({"y": y, "x": x, "user": user, "item": item})


def term(codes, levels, covariance, values=None):
    names = [str(i) for i in range(levels)]
    codes = torch.tensor(np.asarray(codes))
    return CovariancePropagation(z=DummyMatrix.from_codes(codes, names, values), g=covariance)


@pytest.fixture(scope="module")
def table():
    return crossed()


def test_determinant_variances_and_solves_are_those_of_the_expansion():
    t = crossed(60, 12, 7)
    x = torch.tensor(np.stack([np.ones(60), t["x"]], 1))
    slopes = KroneckerProduct(levels=IdentityMatrix(12), effects=UnstructuredMatrix(2))
    covariance = Sum(user=term(t["user"], 12, slopes, x), item=term(t["item"], 7, ScalarMatrix(7)))
    covariance = covariance.double()
    with torch.no_grad():
        for parameter in covariance.parameters():
            parameter.add_(0.2)
    terms = [part.detach() for part in covariance.terms()]
    space = SparseSpace(terms, Sparse())
    point = space.at(terms)
    w = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    none = w.new_zeros(60, 0)
    near = point.nearby(w, none, point.factor(w, none))

    eye = torch.eye(space.size, dtype=torch.float64)
    ZL = torch.stack([point.predictor(column) for column in eye], 1)

    def system(w):
        return eye + ZL.mT @ (w[:, None] * ZL)

    def half_log_det(w):
        H = system(w)
        D = H.diagonal()
        S = (H - torch.diag(D)) / D[:, None]
        return (D.log().sum() - (S @ S).trace() / 2) / 2

    w.requires_grad_()
    value = half_log_det(w)
    (slope,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(near.half_log_det(), value.detach())
    torch.testing.assert_close(near.half_variances(), slope)
    # The factor of other weights solves nearly.
    near = point.nearby(w.detach(), none, point.factor(0.7 * w.detach(), none))
    b = torch.ones(space.size, 1, dtype=torch.float64)
    u, _ = near.solve(b, b[:0])
    lost = system(w).detach() @ u - b
    assert 0 < float(lost.norm()) < 0.01 * float(b.norm())


def test_its_gradient_is_that_of_its_value(table):
    y, x = (torch.tensor(table[name].to_numpy()) for name in ("y", "x"))
    covariance = Sum(
        user=term(table["user"], USERS, ScalarMatrix(USERS)),
        item=term(table["item"], ITEMS, ScalarMatrix(ITEMS)),
    ).double()
    loss = LaplaceLoss(covariance, Binomial())
    assert loss.nearby() is None  # where the effects stand is not known yet
    eta = (0.3 * x).requires_grad_()
    exact = loss(y, eta)
    near = loss.nearby()
    value = near(y, eta)
    assert float((value - exact).detach().abs()) < 0.02 * float(exact.detach())
    parameters = [p for p in covariance.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(value, [eta, *parameters])
    step = 0.05
    with torch.no_grad():
        moved = near(y, eta + step * x) - near(y, eta - step * x)
        assert float(moved) / (2 * step) == pytest.approx(float(slopes[0] @ x), rel=0.02, abs=0.1)
        for p, slope in zip(parameters, slopes[1:], strict=True):
            p.add_(step)
            up = near(y, eta)
            p.sub_(2 * step)
            down = near(y, eta)
            p.add_(step)
            assert float(up - down) / (2 * step) == pytest.approx(float(slope), rel=0.02, abs=0.1)


@pytest.mark.parametrize("method", ["ml", "reml"])
def test_a_fit_that_begins_there_is_that_of_another_solver(table, method):
    def fit(**options):
        return glmm(
            "y ~ x + (1 | user) + (1 | item)",
            table,
            method=method,
            categorical=("user", "item"),
            **options,
        )

    found, other = fit(), fit(solver=Blocked())
    assert found.plan.solver == "sparse" and found.converged
    assert len(found.history) < len(other.history)
    assert found.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
    torch.testing.assert_close(found.fixed.std_error, other.fixed.std_error, rtol=1e-4, atol=0)
    for one, two in zip(found.parameters, other.parameters, strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-4)
        assert one.std_error == pytest.approx(two.std_error, rel=1e-3)


def test_where_there_is_no_optimum_near_by_a_fit_begins_as_others_do():
    # The second factor has no variance: the likelihood near by has its optimum at the bound.
    table = crossed()
    table["item"] = np.random.default_rng(0).permutation(table["item"])
    found, other = (
        glmm("y ~ x + (1 | user) + (1 | item)", table, categorical=("user", "item"), solver=solver)
        for solver in ("auto", "blocked")
    )
    assert found.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
    assert found.singular == other.singular
