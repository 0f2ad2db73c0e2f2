"""Each transform with its inverse and derivative."""

import pytest
import torch

from openreml_nn.covariance.transform import (
    TransformChain,
    TransformExp,
    TransformExpPow2,
    TransformIdentity,
    TransformPow,
    TransformScaleShift,
    TransformSigmoid,
)

TRANSFORMS = [
    (TransformIdentity(), lambda x: x),
    (TransformExp(), torch.exp),
    (TransformExpPow2(), lambda x: torch.exp(x) ** 2),
    (TransformPow(2.0), lambda x: x * x),
    (TransformPow(0.5), torch.sqrt),
    (TransformScaleShift(2.0, -1.0), lambda x: 2 * x - 1),
    (TransformSigmoid(), lambda x: 1 / (1 + torch.exp(-x))),
    (
        TransformChain([TransformSigmoid(), TransformScaleShift(2.0, -1.0)]),
        lambda x: torch.tanh(x / 2),
    ),
]


@pytest.mark.parametrize(("trans", "formula"), TRANSFORMS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
def test_value_inverse_and_derivative(trans, formula, shape):
    x = torch.rand(shape) + 0.1
    torch.testing.assert_close(trans(x), formula(x))
    torch.testing.assert_close(trans.inverse(trans(x)), x)
    slope = trans.grad(x)
    assert slope.shape == x.shape
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(trans(leaf).sum(), leaf)
    torch.testing.assert_close(slope, expected)
    coordinate = trans.coordinate(x)
    torch.testing.assert_close(trans.from_coordinate(coordinate), x)
    torch.testing.assert_close(trans.at_coordinate(coordinate), trans(x))


def test_a_variance_of_zero_is_an_ordinary_point_in_the_coordinate():
    trans = TransformExpPow2()
    u = torch.zeros(1, requires_grad=True)
    value = trans.at_coordinate(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert value.item() == 0.0
    assert slope.item() == 0.0


def test_wrong_transforms_are_refused():
    with pytest.raises(ValueError, match="`a` is 0"):
        TransformScaleShift(0.0)
    with pytest.raises(TypeError, match="Transform instances"):
        TransformChain([torch.exp])
