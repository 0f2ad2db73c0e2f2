"""What families draw, and their distribution functions, against their own densities and moments."""

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

from openreml_nn.families import (
    FAMILIES,
    Beta,
    Binomial,
    Family,
    Gamma,
    Gaussian,
    NegativeBinomial,
    NegativeBinomial1,
    Ordinal,
    Poisson,
    StudentT,
    Tweedie,
    named_family,
)

ROWS = 40_000
#: Each with a linear predictor, and where its distribution function is compared with its density.
WHOLE = [
    (Binomial("cloglog"), -0.3),
    (Poisson(), 0.7),
    (NegativeBinomial(), 0.7),
    (NegativeBinomial1(), 0.7),
    (Ordinal(4), 0.3),
]
CONTINUOUS = [(Gaussian(), 0.4), (StudentT(), 0.4), (Gamma(), 0.5), (Beta(), 0.3), (Tweedie(), 0.2)]


def named(cases):
    return [pytest.param(f.double(), eta, id=f.name) for f, eta in cases]


@torch.no_grad()
@pytest.mark.parametrize(("family", "eta"), named(WHOLE + CONTINUOUS))
def test_draws_have_mean_variance_and_uniform_quantiles(family, eta):
    eta = torch.full((ROWS,), eta, dtype=torch.float64)
    y = family.draw(torch.zeros(ROWS, dtype=torch.float64), eta, np.random.default_rng(1))
    family.check(y)
    mean, variance = family.mean(eta)[0], family.variance(eta)[0]
    assert abs(float(y.mean() - mean)) < 5 * float(variance / ROWS) ** 0.5
    fourth = ((y - mean) ** 4).mean()
    assert abs(float(y.var() - variance)) < 5 * float((fourth - variance**2) / ROWS) ** 0.5
    low, high = family.cumulative(y, eta)
    assert bool(((low >= 0) & (low <= high) & (high <= 1)).all())
    u = low + (high - low) * torch.rand(ROWS, generator=torch.Generator().manual_seed(2)).double()
    grid = (torch.arange(ROWS) + 0.5) / ROWS
    assert float((u.sort().values - grid).abs().max()) < 1.95 / ROWS**0.5  # Kolmogorov, 0.1%


@pytest.mark.parametrize(("family", "eta"), named(WHOLE))
def test_jumps_of_the_distribution_function_are_the_density(family, eta):
    top = {"binomial": 2, "ordinal": 4}.get(family.name, 12)
    y = torch.arange(top, dtype=torch.float64)
    eta = torch.full((top,), eta, dtype=torch.float64)
    low, high = family.cumulative(y, eta)
    torch.testing.assert_close(high - low, family.log_density(y, eta).exp(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("family", "eta"), named(CONTINUOUS))
def test_the_slope_of_the_distribution_function_is_the_density(family, eta):
    y = torch.tensor([0.15, 0.4, 0.8], dtype=torch.float64)
    eta = torch.full((3,), eta, dtype=torch.float64)
    h = 1e-5
    slope = (family.cumulative(y + h, eta)[1] - family.cumulative(y - h, eta)[1]) / (2 * h)
    torch.testing.assert_close(slope, family.log_density(y, eta).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_named_family_predicts_simulates_and_is_judged(name):
    made = type(named_family(name, levels=3))
    for method in ("mean", "variance", "deviance", "draw", "cumulative"):
        assert getattr(made, method) is not getattr(Family, method), method


def test_trials_are_those_of_the_rows():
    like = torch.tensor([[3.0, 4.0], [0.0, 1.0], [10.0, 0.0]], dtype=torch.float64)
    found = Binomial().draw(like, torch.zeros(3).double(), np.random.default_rng(0))
    torch.testing.assert_close(found.sum(1), like.sum(1))
    low, high = Binomial().cumulative(like, torch.zeros(3).double())
    density = Binomial().log_density(like, torch.zeros(3).double()).exp()
    torch.testing.assert_close(high - low, density, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("family", "eta"), named([*WHOLE[1:4], *CONTINUOUS]))
def test_a_unit_deviance_has_the_slope_of_its_variance_function(family, eta):
    """d/dmu of 2 int (y - t) / V(t) dt is -2 (y - mu) / V(mu), V the variance over its dispersion."""
    mean = torch.tensor([0.3, 0.5, 0.6], dtype=torch.float64)
    y = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    p = family.natural("p", mean) if family.name == "tweedie" else None
    own = {
        "gaussian": lambda m: torch.ones_like(m),
        "gamma": lambda m: m**2,
        "beta": lambda m: m * (1 - m),
        "tweedie": lambda m: m**p,
        "negative_binomial": lambda m: m + m * m / family.natural("theta", m),
        "student_t": lambda m: (
            family.natural("sigma^2", m)
            * (family.natural("nu", m) + (y - m) ** 2 / family.natural("sigma^2", m))
            / (family.natural("nu", m) + 1)
        ),
    }.get(family.name, lambda m: m)
    slope = jacobian(lambda m: family.deviance(y, m).sum(), mean)
    torch.testing.assert_close(slope, -2 * (y - mean) / own(mean), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(family.deviance(y, y).detach(), torch.zeros(3).double())


def test_the_deviance_of_a_category_is_of_the_predictor_that_has_the_mean():
    family = Ordinal(4, "probit").double()
    eta = torch.tensor([-1.0, 0.4, 2.0], dtype=torch.float64)
    y = torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64)
    found = family.deviance(y, family.mean(eta))
    torch.testing.assert_close(found, -2 * family.log_density(y, eta), rtol=1e-8, atol=0)
