"""The documented example, and one-hot designs against matrix multiplication."""

from math import e

import torch
from hypothesis import given
from hypothesis import strategies as st

from openreml_nn.covariance import CovariancePropagation, DiagonalMatrix, DummyMatrix
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
