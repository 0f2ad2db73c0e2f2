"""The documented example, and one-hot designs against matrix multiplication."""

from math import e

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KnownMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    factor_analytic,
    heterogeneous_ar1,
)
from openreml_nn.terms.covariance import RepeatedCovariance
from tests.strategies import dummies, points, trees


def test_documented_example():
    V = CovariancePropagation(z=DummyMatrix(["a", "b", "c", "a"]), g=DiagonalMatrix(3))
    at = torch.tensor([0.0, 0.5, 1.0])
    expected = torch.zeros(4, 4)
    expected[0, 0] = expected[0, 3] = expected[3, 0] = expected[3, 3] = 1.0
    expected[1, 1], expected[2, 2] = e, e**2
    torch.testing.assert_close(V(at), expected, rtol=1e-15, atol=0)
    jacobian, names = V.grad(at)
    assert names == ["g/sigma^2_0", "g/sigma^2_1", "g/sigma^2_2"]
    slices = torch.zeros(3, 4, 4)
    for i in (0, 3):
        for j in (0, 3):
            slices[0, i, j] = 2.0
    slices[1, 1, 1], slices[2, 2, 2] = 2 * e, 2 * e**2
    torch.testing.assert_close(jacobian, slices, rtol=1e-15, atol=0)
    torch.testing.assert_close(V.auto_grad(at)[0], slices)


@given(st.data())
def test_one_hot_equals_multiplication(data):
    n, q = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    z, g = data.draw(dummies(n, q)), data.draw(trees(q, 1)).double()
    V = CovariancePropagation(z=z, g=g)
    at = data.draw(points(V))
    dense = CovariancePropagation(z=z(torch.zeros(0)), g=g)
    torch.testing.assert_close(V(at), dense(at), rtol=1e-12, atol=1e-12)
    weight = torch.randn(n, n)
    torch.testing.assert_close(
        V.manual_vjp(weight, at), dense.manual_vjp(weight, at), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "inner", [lambda: factor_analytic(3, 1), lambda: heterogeneous_ar1(3), lambda: AR1Matrix(3)]
)
def test_levels_of_any_small_covariance_stay_independent(inner):
    z = DummyMatrix.from_codes(torch.arange(8) % 4, 4, torch.randn(8, 3))
    (term,) = CovariancePropagation(z=z, g=KroneckerProduct(IdentityMatrix(4), inner())).terms()
    assert isinstance(term.covariance, RepeatedCovariance)
    assert term.covariance.matrix.shape == (3, 3)


@pytest.mark.parametrize("g", [lambda: factor_analytic(4, 2), lambda: heterogeneous_ar1(4)])
def test_a_random_effect_is_one_term_in_its_own_levels(g):
    z = DummyMatrix.from_codes(torch.arange(8) % 4, 4)
    V = CovariancePropagation(z=z, g=g()).double()
    (term,) = V.terms()
    assert term.design.codes is z.codes
    torch.testing.assert_close(term.dense(), V())
    torch.testing.assert_close(term.covariance.whole(4), V.operands["g"]())


def test_a_large_sum_keeps_the_structure_of_its_parts():
    n = 300
    V = CovariancePropagation(
        z=DummyMatrix.from_codes(torch.arange(n), n),
        g=Sum(kernel=KnownMatrix(torch.eye(n)), own=ScalarMatrix(n)),
    )
    assert [term.name for term in V.terms()] == ["kernel", "own"]
