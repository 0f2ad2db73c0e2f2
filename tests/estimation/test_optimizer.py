"""An optimizer optimises what it was handed, and nothing else."""

import pytest
import torch
from torch import nn

from openreml_nn import AIREML, REMLLoss, fit_reml
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.estimation.curvature import Curvature

Y, X = torch.tensor([1.0, 2.0, 4.0, 5.0]).double(), torch.ones(4, 1).double()


#: Relative to sigma^2: the score norm that rounding lets one see, sqrt(eps n), in standard errors.
RESOLUTION = (torch.finfo(torch.float64).eps * 4) ** 0.5 * (2 / 3) ** 0.5


def run(closure_of, steps=20):
    V = ScalarMatrix(4).double()
    loss = REMLLoss(V)
    optimizer = AIREML(loss.parameters(), tolerance=1e-8)
    closure = closure_of(V, loss, optimizer)
    for _ in range(steps):
        optimizer.step(closure)
    assert optimizer.last.converged
    return V.build_params().item()


def plain(V, loss, optimizer):
    return lambda: loss(Y, X)


def with_backward(V, loss, optimizer):
    def closure():
        optimizer.zero_grad()
        value = loss(Y, X)
        value.backward()
        return value

    return closure


def detached(V, loss, optimizer):
    inner = with_backward(V, loss, optimizer)
    return lambda: inner().detach()


def with_monitors(V, loss, optimizer):
    monitor = REMLLoss(V)

    def closure():
        with torch.no_grad():
            monitor(100 * Y, X)
        monitor(50 * Y, X)  # recorded, but not in the value
        return loss(Y, X)

    return closure


def detached_with_monitors(V, loss, optimizer):
    inner = with_monitors(V, loss, optimizer)

    def closure():
        optimizer.zero_grad()
        value = inner()
        value.backward()
        return value.detach()

    return closure


@pytest.mark.parametrize(
    "closure", [plain, with_backward, detached, with_monitors, detached_with_monitors]
)
def test_only_the_value_of_the_closure_counts(closure):
    assert run(closure) == pytest.approx(10 / 3, rel=RESOLUTION)


def test_a_model_that_is_trained_within_the_closure_does_not_count():
    other = REMLLoss(ScalarMatrix(4).double())
    adam = torch.optim.Adam(other.parameters(), lr=0.1)

    def closure_of(V, loss, optimizer):
        def closure():
            adam.zero_grad()
            other(50 * Y, X).backward()
            adam.step()
            return loss(Y, X)

        return closure

    assert run(closure_of) == pytest.approx(10 / 3, rel=1e-6)


def test_a_loss_that_is_returned_counts_beside_one_whose_backward_ran():
    # Both responses have the same variance, of which 1 and 9 are the estimates.
    def closure_of(V, loss, optimizer):
        other = REMLLoss(V)

        def closure():
            optimizer.zero_grad()
            other(3 * Y, X).backward()
            return loss(Y, X)

        return closure

    assert run(closure_of) == pytest.approx(5 * 10 / 3, rel=1e-6)


def test_losses_count_with_their_weights():
    # The maximum of w l(y) + l(2 y), in sigma^2: a mean of 10/3 and 40/3 with these weights.
    for weight in (1.0, 0.25):

        def closure(V, loss, optimizer, weight=weight):
            other = REMLLoss(V)
            return lambda: weight * loss(Y, X) + other(2 * Y, X)

        expected = (weight * 10 / 3 + 40 / 3) / (weight + 1)
        # The last step is within 1e-6 standard errors.
        assert run(closure) == pytest.approx(expected, rel=1e-7)


def test_the_curvature_counts_likelihoods_with_their_weights():
    objective = REMLLoss(ScalarMatrix(len(Y)).double()).objective(Y, X)
    one, three = Curvature([objective]), Curvature([objective, objective], weights=[1.0, 2.0])
    for name in ("score", "information", "hessian"):
        torch.testing.assert_close(getattr(three, name), 3 * getattr(one, name))


@pytest.mark.parametrize("backward", [False, True])
def test_a_penalty_is_refused(backward):
    def closure(V, loss, optimizer):
        def evaluate():
            optimizer.zero_grad()
            value = loss(Y, X) + 0.1 * next(V.parameters()).square().sum()
            if backward:
                value.backward()
                return value.detach()
            return value

        return evaluate

    with pytest.raises(RuntimeError, match="beside the likelihood"):
        run(closure)


def test_a_part_of_the_value_that_is_not_of_the_parameters_is_welcome():
    weight = nn.Parameter(torch.ones(1).double())

    def closure(V, loss, optimizer):
        return lambda: loss(Y, X) + weight.square().sum() + 3

    assert run(closure) == pytest.approx(10 / 3, rel=RESOLUTION)


def test_what_it_was_not_handed_is_constant():
    labels = [i // 4 for i in range(24)]
    torch.manual_seed(0)
    y, ones = torch.randn(24).double(), torch.ones(24, 1).double()
    g = CovariancePropagation(z=DummyMatrix(labels), g=ScalarMatrix(6))
    V = Sum(g=g, e=ScalarMatrix(24)).double()
    loss = REMLLoss(V)
    optimizer = AIREML(V.operands["e"].parameters())
    for _ in range(20):
        optimizer.step(lambda: loss(y, ones))
    assert optimizer.last.converged
    stored = {name: p.item() for name, p in V.named_parameters()}
    assert stored["g.g.sigma^2"] == 0.0
    assert stored["e.sigma^2"] != 0.0


def test_a_frozen_parameter_is_not_estimated_and_said_to_be_fixed():
    torch.manual_seed(0)
    y, ones = 2 * torch.randn(40).double(), torch.ones(40, 1).double()
    g = CovariancePropagation(z=DummyMatrix([i % 8 for i in range(40)]), g=ScalarMatrix(8))
    V = Sum(g=g, e=ScalarMatrix(40)).double()
    V.e.requires_grad_(False)
    result = fit_reml(V, y, ones)
    assert result.converged
    assert V.e._parameters["sigma^2"].item() == 0.0
    assert {p.name: p.fixed for p in result.parameters} == {
        "g/g/sigma^2": False,
        "e/sigma^2": True,
    }
    assert result.num_params == 1
