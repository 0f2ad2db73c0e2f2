"""One record of a function gives the gradient, the Hessian and the Jacobian."""

import torch

from openreml_nn.estimation.derivatives import expand, jacobian


def test_expand_equals_autograd_of_the_weighted_sum():
    torch.manual_seed(0)
    u = torch.randn(3).double()
    weights = [torch.randn(2, 2).double(), torch.randn(4).double(), torch.randn(1).double()]

    def function(x):
        outer = torch.outer(x[:2], x[1:]).exp()
        return (
            outer,
            torch.stack([x[0] ** 3, x[0] * x[2], x[1], x.sin().sum()]),
            torch.ones(1).double(),
        )

    def total(x):
        return sum((f * w).sum() for f, w in zip(function(x), weights, strict=True))

    gradient, hessian, slopes = expand(function, weights, u)
    x = u.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(total(x), x)[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(total, u))
    torch.testing.assert_close(slopes, jacobian(function, u))
    by_autograd = torch.autograd.functional.jacobian(function, u)
    for slope, wanted in zip(slopes, by_autograd, strict=True):
        torch.testing.assert_close(slope, wanted.movedim(-1, 0))
