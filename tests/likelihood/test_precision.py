"""What sparse precisions are refused for, and how many digits they keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openreml_nn import InputError, NumericalError, REMLLoss
from openreml_nn.covariance import (
    AR1Matrix,
    CARMatrix,
    CovariancePropagation,
    DummyMatrix,
    ExponentialCorrelation,
    KnownInverseMatrix,
    Matrix,
    RandomWalkMatrix,
    ScalarMatrix,
    Sum,
    VecchiaMatrix,
)
from openreml_nn.likelihood import Sparse
from openreml_nn.likelihood.solvers import SOLVERS
from openreml_nn.terms.precision import PrecisionCovariance
from tests.strategies import path, places


def model(K: Matrix, n: int = 30) -> tuple[Sum, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = K.shape[0]
    codes = torch.randint(0, q, (n,), generator=generator)
    V = Sum(
        level=CovariancePropagation(z=DummyMatrix.from_codes(codes, q), g=K),
        error=ScalarMatrix(n),
    ).double()
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    return V, y, torch.ones(n, 1, dtype=torch.float64)


KINDS = {
    "neighbours": lambda q: VecchiaMatrix(places(q), ExponentialCorrelation(), 4),
    "conditional": lambda q: CARMatrix(path(q)),
    "walk": RandomWalkMatrix,
}


@pytest.mark.parametrize("kind", KINDS)
def test_fill_beyond_memory_is_refused_with_what_to_do(kind):
    V, y, X = model(KINDS[kind](40))
    with pytest.raises(InputError, match=r"a factor of 40 columns, .*allows more"):
        REMLLoss(V, solver=Sparse(memory=100))(y, X)


def test_a_precision_that_is_singular_is_named_and_the_null_space_helps():
    D = torch.eye(6, dtype=torch.float64).diff(dim=0)
    Q = D.mT @ D
    V, y, X = model(KnownInverseMatrix(Q))
    with pytest.raises(NumericalError, match=r"kernel of 'level' is not .*null=\.\.\."):
        REMLLoss(V, solver="sparse")(y, X)
    null = torch.full((6, 1), 6**-0.5, dtype=torch.float64)
    W, _, _ = model(KnownInverseMatrix(Q, null=null))
    walk, _, _ = model(RandomWalkMatrix(6))
    found = REMLLoss(W, solver="sparse")(y, X)
    assert float(found) == pytest.approx(float(REMLLoss(walk, solver="dense")(y, X)), abs=1e-11)


@pytest.mark.parametrize("solver", ["sparse", "dense", "blocked"])
def test_an_autoregression_of_areas_beyond_its_bounds_is_an_error(solver):
    K = CARMatrix(path(8))
    V, y, X = model(K)
    (level, _) = V.terms()
    bad = PrecisionCovariance(level.covariance.matrix.detach().clone(), K.precision)
    bad.matrix[1:][torch.from_numpy(K.precision.row != K.precision.column)] = -1.5
    problem = SOLVERS[solver]().problem(
        REMLLoss(V, solver=solver).objective(y, X).problem.fixed, V.terms(), "reml"
    )
    terms = [term.detach() for term in V.terms()]
    terms[0] = type(level)(level.design, bad, level.name)
    with pytest.raises(NumericalError, match="not positive definite"):
        problem.evaluate(terms)


def test_a_walk_in_continuous_time_is_a_chain_of_neighbours():
    """With exponential correlation each time depends on the nearest on either side alone."""
    times = torch.tensor([0.0, 0.4, 1.7, 2.0, 3.1, 4.9], dtype=torch.float64)[:, None]
    K = VecchiaMatrix(times, ExponentialCorrelation(), 3).double()
    expected = torch.exp(-(times - times.mT).abs())
    torch.testing.assert_close(K(), expected, rtol=0, atol=1e-12)
    even = VecchiaMatrix(torch.arange(9.0)[:, None].double(), ExponentialCorrelation(), 4).double()
    chain = (
        AR1Matrix(9).double().set_value("rho", float(torch.exp(torch.tensor(-1.0))), natural=True)
    )
    torch.testing.assert_close(even(), chain(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_takes_them_where_there_are_many(kind):
    V, _, _ = model(KINDS[kind](900), 1200)
    objective = REMLLoss(V)
    objective(torch.zeros(1200, dtype=torch.float64).normal_(), torch.ones(1200, 1).double())
    assert objective.plan.solver == "sparse"


@pytest.mark.parametrize("kind", ["neighbours", "conditional"])
def test_products_with_a_precision_equal_those_of_its_matrix(kind):
    g = KINDS[kind](12).double().structure()[0].covariance
    Q, x = g.precision, g.parts()[1].detach().numpy()
    u = np.random.default_rng(1).standard_normal((24, 3))
    by_level = u.reshape(12, -1)
    matrix = Q.matrix(Q.entries(x)).toarray()
    assert np.allclose(Q.times(x, by_level), matrix @ by_level)
    both = np.kron(matrix, np.eye(2))
    assert np.allclose(Q.inner(x, u, 2), u.T @ both @ u)
    pulled = Q.pull_square(x, by_level)
    for i in range(0, len(x), 7):
        step = np.zeros(len(x))
        step[i] = 1e-6
        more, less = (Q.matrix(Q.entries(x + s)).toarray() for s in (step, -step))
        change = np.einsum("im,ij,jm->", by_level, more - less, by_level) / 4e-6
        assert pulled[i] == pytest.approx(change, rel=1e-5, abs=1e-6)
