"""Adaptive quadrature against numerical integration, Laplace's approximation and differences."""

from math import log, pi

import pytest
import torch

from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalMatrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.covariance.matrix import Recorded
from openreml_nn.families import Binomial, Gaussian, NegativeBinomial, Ordinal, Poisson
from openreml_nn.likelihood import Blocked, LaplaceLoss
from openreml_nn.likelihood.laplace_mode import Rows, find_mode
from openreml_nn.likelihood.laplace_quadrature import by_quadrature
from openreml_nn.likelihood.laplace_system import BlockedSpace
from openreml_nn.support.errors import InputError
from tests.likelihood.test_laplace import N, codes, difference, grouped, intercepts, normal, slopes

ETA = 0.5 * normal(N, seed=5).double()
BINARY = (normal(N, seed=9) < ETA).double()
COUNTS = torch.poisson(ETA.exp(), generator=torch.Generator().manual_seed(3))
CASES = {
    "binary": (Binomial, BINARY),
    "trials": (lambda: Binomial("probit"), torch.stack([BINARY, codes(4, 2).double() + 1], 1)),
    "counts": (NegativeBinomial, COUNTS),
    "ordinal": (lambda: Ordinal(3), BINARY + (COUNTS > 1).double()),
}


def integral(family, y, eta, group, sd):
    """By a fine grid over the effect of each level."""
    u = torch.linspace(-9, 9, 4001)
    total = 0.0
    with torch.no_grad():
        for level in group.unique():
            rows = (group == level).nonzero()[:, 0]
            a = (eta[rows, None] + sd * u).reshape(-1)
            own = y[rows].repeat_interleave(len(u), 0)
            density = family.log_density(own, a).reshape(-1, len(u)).sum(0)
            total += torch.logsumexp(density - u * u / 2 - 0.5 * log(2 * pi), 0) + log(18 / 4000)
    return float(total)


@pytest.mark.parametrize("name", CASES)
def test_many_points_are_the_integral(name):
    make, y = CASES[name]
    family, covariance = make(), intercepts()
    covariance.set_value("g/sigma^2", 1.7, natural=True)
    expected = -integral(family, y, ETA, codes(7, 1), 1.7**0.5)
    errors = [
        abs(LaplaceLoss(covariance, family, quadrature=points)(y, ETA).item() - expected)
        for points in (1, 7, 25)
    ]
    assert errors[2] < 1e-6 * abs(expected)
    assert errors[2] < errors[1] < errors[0]


def test_two_effects_of_a_level_are_integrated_together():
    covariance = slopes(3, 2)
    family, eta = Poisson(), ETA
    found = LaplaceLoss(covariance, family, quadrature=25)(COUNTS, eta).item()
    side = torch.linspace(-8, 8, 321)
    nodes = torch.cartesian_prod(side, side).mT
    weights = torch.exp(-(nodes * nodes).sum(0) / 2) / (2 * pi) * 0.05**2
    values = normal(N, 2, seed=1)
    total = 0.0
    for level in range(3):
        rows = (codes(3, 1) == level).nonzero()[:, 0]
        a = eta[rows, None] + values[rows] @ nodes
        y = COUNTS[rows, None].expand_as(a)
        density = family.log_density(y.reshape(-1), a.reshape(-1)).reshape(a.shape).sum(0)
        total += torch.log((weights * density.exp()).sum()).item()
    assert found == pytest.approx(-total, rel=1e-7)


def test_one_point_and_gaussian_responses_are_laplace():
    covariance = slopes(5, 2)
    family = Gaussian()
    one = LaplaceLoss(covariance, family)(ETA + 1, ETA).item()
    assert LaplaceLoss(covariance, family, quadrature=4)(ETA + 1, ETA).item() == pytest.approx(
        one, rel=1e-12
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tree", ["intercepts", "slopes", "strata", "twice"])
def test_gradients_are_those_of_finite_differences(name, tree):
    make, y = CASES[name]
    family = make()
    covariance = {
        "intercepts": lambda: intercepts(),
        "slopes": lambda: slopes(6, 2),
        "strata": lambda: CovariancePropagation(z=grouped(5, 2), g=DiagonalMatrix(5)),
        "twice": lambda: Sum(a=intercepts(6, 1), b=slopes(6, 1, 1)),
    }[tree]()
    eta = ETA.clone().requires_grad_()
    loss = LaplaceLoss(covariance, family, quadrature=3)
    loss(y, eta).backward()

    def value():
        with torch.no_grad():
            return loss(y, eta)

    for tensor in [*covariance.parameters(), *family.parameters()]:
        torch.testing.assert_close(tensor.grad, difference(value, tensor), rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(eta.grad[:3], difference(value, eta.data[:3]), rtol=2e-6, atol=2e-7)


def test_the_slope_at_a_variance_of_zero_is_the_limit():
    covariance, found = intercepts(), []
    loss = LaplaceLoss(covariance, Binomial(), quadrature=9)
    for variance in (0.0, 1e-7):
        natural = torch.full((1,), variance, requires_grad=True)
        with covariance.given(Recorded(natural, natural=True)):
            loss(BINARY, ETA).backward()
        found.append(natural.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_nodes_in_parts_are_the_same():
    covariance, found = slopes(6, 2), []
    parameters = list(covariance.parameters())
    rows = Rows(Binomial(), BINARY, ETA, ETA.new_zeros(N, 0))
    terms = covariance.terms()
    layout = BlockedSpace([term.detach() for term in terms], Blocked(pair_cost=1000.0))
    mode = find_mode(rows, layout.at(terms))
    for held in (2**22, 5 * N):
        covariances = [term.covariance for term in terms]
        value = by_quadrature(mode, rows, layout.designs, covariances, 5, held)
        found.append([value.detach(), *torch.autograd.grad(value, parameters, retain_graph=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_coefficients_are_those_of_maximum_likelihood():
    covariance = intercepts()
    X = torch.stack([torch.ones(N), normal(N, seed=11)], 1)
    loss = LaplaceLoss(covariance, Binomial(), quadrature=7)
    beta = loss.evaluate(BINARY, 0 * ETA, X).coefficients.requires_grad_()
    (slope,) = torch.autograd.grad(loss(BINARY, X @ beta), beta)
    assert slope.abs().max() < 1e-7


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (Sum(a=intercepts(7, 1), b=intercepts(4, 2)), "more than one grouping factor"),
        (slopes(6, 4), "a level has 4 effects, more than 3"),
        (ScalarMatrix(N) + intercepts(), "more than one grouping factor"),
    ],
)
def test_what_has_no_quadrature_is_refused(covariance, message):
    with pytest.raises(InputError, match=message):
        LaplaceLoss(covariance, Binomial(), quadrature=3)(BINARY, ETA)
