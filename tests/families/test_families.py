"""Densities against scipy and mpmath, derivatives against autograd, at ordinary and extreme points."""

import copy

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

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
from openreml_nn.families.special import (
    bernoulli_divergence,
    digamma_rest,
    exp_rest,
    log_gamma,
    log_gamma_rest,
    log_rising,
    mills,
    polygamma_rising,
    trigamma_tetragamma,
)
from openreml_nn.support.errors import InputError

DOUBLE = torch.float64
ETA = torch.tensor([-3.0, -0.7, 0.0, 0.4, 2.5], dtype=DOUBLE)
COUNTS = torch.tensor([0.0, 1.0, 3.0, 2.0, 17.0], dtype=DOUBLE)
BINARY = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=DOUBLE)
TRIALS = torch.tensor([[0, 3], [2, 5], [4, 0], [1, 1], [7, 2]], dtype=DOUBLE)
POSITIVE = torch.tensor([0.2, 1.0, 0.7, 3.0, 9.0], dtype=DOUBLE)
SHARES = torch.tensor([0.02, 0.4, 0.5, 0.93, 0.999], dtype=DOUBLE)
CATEGORIES = torch.tensor([0.0, 1.0, 2.0, 3.0, 2.0], dtype=DOUBLE)


def setting(family, **values):
    family = family.double()
    for name, value in values.items():
        family.set_value(name.replace("sigma2", "sigma^2"), value, natural=True)
    return family


CASES = {
    "gaussian": (setting(Gaussian(), sigma2=2.3), ETA.flip(0) * 2),
    "student_t": (setting(StudentT(), sigma2=0.6, nu=3.5), ETA.flip(0) * 2),
    "logit": (Binomial(), BINARY),
    "probit": (Binomial("probit"), TRIALS),
    "cloglog": (Binomial("cloglog"), TRIALS),
    "trials": (Binomial(), TRIALS),
    "poisson": (Poisson(), COUNTS),
    "negative_binomial": (setting(NegativeBinomial(), theta=1.7), COUNTS),
    "negative_binomial_1": (setting(NegativeBinomial1(), phi=0.8), COUNTS),
    "gamma": (setting(Gamma(), phi=0.4), POSITIVE),
    "tweedie": (setting(Tweedie(), phi=0.7, p=1.4), torch.cat([COUNTS[:1], POSITIVE[1:]])),
    "beta": (setting(Beta(), phi=4.2), SHARES),
    "ordinal": (setting(Ordinal(4), threshold_1=-1.0, gap_2=0.8, gap_3=2.0), CATEGORIES),
    "ordered_probit": (
        setting(Ordinal(4, "probit"), threshold_1=-1.0, gap_2=0.8, gap_3=2.0),
        CATEGORIES,
    ),
}


def cumulative(distribution):
    edges = np.array([-np.inf, -1.0, -0.2, 1.8, np.inf])
    y = CATEGORIES.long().numpy()
    eta = ETA.numpy()
    return np.log(distribution.cdf(edges[y + 1] - eta) - distribution.cdf(edges[y] - eta))


def by_scipy(name):
    eta, mu, p = ETA.numpy(), np.exp(ETA.numpy()), 1 / (1 + np.exp(-ETA.numpy()))
    k, (s, f) = COUNTS.numpy(), TRIALS.numpy().T
    cloglog = 1 - np.exp(-mu)
    return {
        "gaussian": lambda: stats.norm(eta, 2.3**0.5).logpdf(2 * eta[::-1]),
        "student_t": lambda: stats.t(3.5, eta, 0.6**0.5).logpdf(2 * eta[::-1]),
        "logit": lambda: stats.bernoulli(p).logpmf(BINARY.numpy()),
        "probit": lambda: stats.binom(s + f, stats.norm.cdf(eta)).logpmf(s),
        "cloglog": lambda: stats.binom(s + f, cloglog).logpmf(s),
        "trials": lambda: stats.binom(s + f, p).logpmf(s),
        "poisson": lambda: stats.poisson(mu).logpmf(k),
        "negative_binomial": lambda: stats.nbinom(1.7, 1.7 / (1.7 + mu)).logpmf(k),
        "negative_binomial_1": lambda: stats.nbinom(mu / 0.8, 1 / 1.8).logpmf(k),
        "gamma": lambda: stats.gamma(2.5, scale=mu * 0.4).logpdf(POSITIVE.numpy()),
        "beta": lambda: stats.beta(4.2 * p, 4.2 * (1 - p)).logpdf(SHARES.numpy()),
        "ordinal": lambda: cumulative(stats.logistic),
        "ordered_probit": lambda: cumulative(stats.norm),
    }[name]()


@pytest.mark.parametrize("name", [name for name in CASES if name != "tweedie"])
def test_a_density_is_that_of_scipy(name):
    family, y = CASES[name]
    with torch.no_grad():
        found = family.log_density(y, ETA).numpy()
    np.testing.assert_allclose(found, by_scipy(name), rtol=1e-12, atol=1e-13)


def test_the_tweedie_density_is_that_of_a_sum_of_gammas():
    family, y = CASES["tweedie"]
    phi, p = 0.7, 1.4
    found = family.log_density(y, ETA).detach()
    for value, eta, own in zip(y.tolist(), ETA.tolist(), found.tolist(), strict=True):
        mu = np.exp(eta)
        rate = mu ** (2 - p) / (phi * (2 - p))
        shape, scale = (2 - p) / (p - 1), phi * (p - 1) * mu ** (p - 1)
        j = np.arange(1, 200)
        parts = stats.poisson(rate).pmf(j) * stats.gamma(j * shape, scale=scale).pdf(value)
        expected = -rate if value == 0 else np.log(parts.sum())
        assert own == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_what_a_density_has_beside_its_kernel_is_of_the_response_alone(name):
    family, y = copy.deepcopy(CASES[name])
    with torch.no_grad():
        beside = family.log_density(y, ETA) - family.kernel(y, ETA)
        for parameter in family.parameters():
            parameter.add_(0.3)
        again = family.log_density(y, ETA / 2) - family.kernel(y, ETA / 2)
    torch.testing.assert_close(beside, again, rtol=1e-12, atol=1e-12)


def test_a_density_in_anothers_place_has_not_its_formulas():
    class Scaled(Poisson):
        def log_density(self, y, eta):
            return 2 * super().log_density(y, eta)

    closed = Scaled().derivatives(COUNTS, ETA)
    for one, other in zip(closed, Poisson().derivatives(COUNTS, ETA), strict=True):
        torch.testing.assert_close(one, 2 * other)
    assert Poisson.has_kernel and not Scaled.has_kernel


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_autograd(name):
    family, y = CASES[name]
    closed = [part.detach() for part in family.derivatives(y, ETA)]
    with torch.no_grad():
        plain = Family.derivatives(family, y, ETA)
    for one, other in zip(closed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert not other.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_recorded_derivatives_have_gradients_in_the_parameters_and_the_predictor(name):
    family, y = CASES[name]
    eta = ETA.clone().requires_grad_()
    first, second, third = family.derivatives(y, eta)
    (slope,) = torch.autograd.grad(first.sum(), eta, retain_graph=True)
    torch.testing.assert_close(slope, second.detach(), rtol=1e-9, atol=1e-11)
    if second.requires_grad:
        (bend,) = torch.autograd.grad(second.sum(), eta, retain_graph=True, allow_unused=True)
        bend = torch.zeros_like(eta) if bend is None else bend
        torch.testing.assert_close(bend, third.detach(), rtol=1e-9, atol=1e-11)
    for parameter in family.parameters():
        (own,) = torch.autograd.grad(first.sum(), parameter, retain_graph=True)
        value, step = parameter.item(), 1e-5
        sides = []
        with torch.no_grad():
            for moved in (value + step, value - step):
                parameter.fill_(moved)
                sides.append(float(family.derivatives(y, ETA)[0].sum()))
            parameter.fill_(value)
        assert own.item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("link", ["logit", "probit", "cloglog"])
@pytest.mark.parametrize("eta", [-500.0, -60.0, -30.0, -9.0, -3.2, 3.0, 5.5, 6.0])
def test_a_binary_response_far_out_has_all_its_digits(link, eta):
    # A second derivative is as small as exp(-500); as many digits of erfc take mpmath seconds.
    mp.mp.dps = 60 if link == "probit" else 400
    x = mp.mpf(eta)
    p, q = {
        "logit": (lambda x: 1 / (1 + mp.exp(-x)), lambda x: 1 / (1 + mp.exp(x))),
        "probit": (lambda x: mp.erfc(-x / mp.sqrt(2)) / 2, lambda x: mp.erfc(x / mp.sqrt(2)) / 2),
        "cloglog": (lambda x: -mp.expm1(-mp.exp(x)), lambda x: mp.exp(-mp.exp(x))),
    }[link]

    def log_of(own, other):
        return lambda x: mp.log1p(-other(x)) if other(x) < 0.5 else mp.log(own(x))

    at = torch.tensor([eta], dtype=DOUBLE)
    family = Binomial(link)
    for y, log in ((1.0, log_of(p, q)), (0.0, log_of(q, p))):
        response = torch.tensor([y], dtype=DOUBLE)
        found = [family.log_density(response, at), *family.derivatives(response, at)]
        for order, own in enumerate(found):
            expected = float(mp.diff(log, x, order))
            assert own.item() == pytest.approx(
                expected, rel=2e-11, abs=1e-11 * (order == 3) + 1e-250
            )


@pytest.mark.parametrize("eta", [-1e5, 800.0])
@pytest.mark.parametrize("link", ["logit", "probit", "cloglog"])
def test_what_is_certain_has_no_loss_however_far_out(eta, link):
    y = torch.tensor([float(eta > 0)], dtype=DOUBLE)
    at = torch.tensor([eta], dtype=DOUBLE)
    assert Binomial(link).log_density(y, at).item() == pytest.approx(0, abs=1e-300)
    assert all(torch.isfinite(part).all() for part in Binomial(link).derivatives(y, at))


def test_the_negative_binomials_become_poisson_without_losing_digits():
    exact = Poisson().log_density(COUNTS, ETA)
    for family, name, value in (
        (NegativeBinomial(), "theta", 1e12),
        (NegativeBinomial1(), "phi", 1e-12),
    ):
        setting(family, **{name: value})
        torch.testing.assert_close(family.log_density(COUNTS, ETA).detach(), exact)
        derivatives = zip(
            family.derivatives(COUNTS, ETA), Poisson().derivatives(COUNTS, ETA), strict=True
        )
        for one, other in derivatives:
            torch.testing.assert_close(one.detach(), other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("s", [1e-3, 0.7, 49.0, 51.0, 1e4, 1e9])
@pytest.mark.parametrize("y", [0.0, 0.5, 1.0, 40.0, 3000.0])
def test_a_difference_of_log_gammas_has_its_digits(s, y):
    mp.mp.dps = 60
    at = torch.tensor([s], dtype=DOUBLE, requires_grad=True)
    value = log_rising(torch.tensor([y], dtype=DOUBLE), at)
    (slope,) = torch.autograd.grad(value.sum(), at)
    total, part = mp.mpf(s) + mp.mpf(y), mp.mpf(s)
    assert value.item() == pytest.approx(float(mp.loggamma(total) - mp.loggamma(part)), rel=1e-12)
    expected = float(mp.digamma(total) - mp.digamma(part))
    assert slope.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("s", [0.7, 49.0, 51.0, 1e4, 1e9])
def test_differences_of_polygammas_have_their_digits(s):
    mp.mp.dps = 60
    for y in (0.0, 1.0, 3000.0):
        found = polygamma_rising(torch.tensor(y, dtype=DOUBLE), torch.tensor([s], dtype=DOUBLE))
        for order, part in enumerate(found):
            expected = mp.polygamma(order, mp.mpf(s) + mp.mpf(y)) - mp.polygamma(order, mp.mpf(s))
            assert part.item() == pytest.approx(float(expected), rel=1e-11)


@pytest.mark.parametrize("z", [1e-6, 0.1, 1.0, 5.0, 8.9, 9.1, 60.0, 1e8])
def test_derivatives_of_the_digamma_function_have_all_their_digits(z):
    # torch's first one has nine of them.
    for order, found in enumerate(trigamma_tetragamma(torch.tensor([z], dtype=DOUBLE)), 1):
        assert found.item() == pytest.approx(float(mp.polygamma(order, mp.mpf(z))), rel=1e-14)


def test_derivatives_of_the_digamma_function_have_derivatives():
    z = torch.tensor([0.3, 2.0, 7.0, 40.0], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(trigamma_tetragamma, z)
    assert torch.autograd.gradgradcheck(trigamma_tetragamma, z)
    assert torch.autograd.gradgradcheck(log_gamma, z)
    rows = z.detach().reshape(2, 2)
    for found, expected in zip(
        torch.vmap(trigamma_tetragamma)(rows), trigamma_tetragamma(rows), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("z", [1e-3, 0.7, 49.0, 51.0, 1e4, 1e14])
def test_what_stirlings_formula_leaves_has_its_digits(z):
    mp.mp.dps = 60
    at, v = torch.tensor([z], dtype=DOUBLE, requires_grad=True), mp.mpf(z)
    value, slope = log_gamma_rest(at), digamma_rest(at)
    expected = mp.loggamma(v) - (v - 0.5) * mp.log(v) + v - mp.log(2 * mp.pi) / 2
    assert value.item() == pytest.approx(float(expected), rel=1e-13, abs=3e-14 * (z < 50))
    expected = mp.digamma(v) - mp.log(v)
    assert slope.item() == pytest.approx(float(expected), rel=1e-12)
    (own,) = torch.autograd.grad(value.sum(), at)
    expected += 1 / (2 * v)
    assert own.item() == pytest.approx(float(expected), rel=1e-12, abs=1e-14 * (z < 50))


@pytest.mark.parametrize("x", [-800.0, -0.3, -0.00999, 1e-9, 0.00999, 0.0101, 0.999, 1.001, 700.0])
def test_small_differences_of_exponentials_and_of_odds_have_their_digits(x):
    mp.mp.dps = 60
    at, d = torch.tensor([x], dtype=DOUBLE), mp.mpf(x)
    assert exp_rest(at).item() == pytest.approx(float(mp.exp(d) - 1 - d), rel=1e-13)
    for eta in (0.0, -9.0, 9.0):
        other = at + eta  # rounded
        e, o = mp.mpf(eta), mp.mpf(other.item())
        found = bernoulli_divergence(torch.full_like(at, eta), other).item()
        p, q = 1 / (1 + mp.exp(-e)), 1 / (1 + mp.exp(e))
        r, s = 1 / (1 + mp.exp(-o)), 1 / (1 + mp.exp(o))
        assert found == pytest.approx(float(p * mp.log(p / r) + q * mp.log(q / s)), rel=1e-12)


@pytest.mark.parametrize("precision", [1.0, 1e4, 1e9, 1e14])
@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_a_density_has_its_digits_however_large_the_precision_is(name, precision):
    """Rounding of the linear predictor itself, over the response's standard deviation, is what is left."""
    mp.mp.dps = 60
    family = Beta().double() if name == "beta" else Gamma().double()
    setting(family, phi=precision if name == "beta" else 1 / precision)
    phi = mp.mpf(family.natural("phi", ETA).item())
    z = torch.tensor([1.3, -0.4, 0.0, 2.5, -1.0], dtype=DOUBLE)
    own = ETA + z / (precision + 1) ** 0.5
    y = torch.sigmoid(own) if name == "beta" else own.exp()

    def exact(y, eta, k):
        if name == "gamma":
            a, z = 1 / k, mp.log(y) - eta
            return a * mp.log(a) - mp.loggamma(a) + a * (z - mp.exp(z)) - mp.log(y)
        p = 1 / (1 + mp.exp(-eta))
        a, b = k * p, k * (1 - p)
        top = mp.loggamma(k) - mp.loggamma(a) - mp.loggamma(b)
        return top + (a - 1) * mp.log(y) + (b - 1) * mp.log(1 - y)

    value = family.log_density(y, ETA)
    (slope,) = torch.autograd.grad(value.sum(), family.stored("phi"))
    with torch.no_grad():
        first, second, _ = family.derivatives(y, ETA)
    close, total = 1e-13 + 1e-16 * precision**0.5, 0.0
    for i, (at, eta) in enumerate(zip(y.tolist(), ETA.tolist(), strict=True)):
        at, eta = mp.mpf(at), mp.mpf(eta)
        assert value[i].item() == pytest.approx(float(exact(at, eta, phi)), rel=close, abs=close)
        total += mp.diff(lambda t, y=at, e=eta: exact(y, e, phi * mp.exp(t)), 0)
        bend = float(mp.diff(lambda t, y=at: exact(y, t, phi), eta, 2))
        assert second[i].item() == pytest.approx(bend, rel=1e-8)
        expected = float(mp.diff(lambda t, y=at: exact(y, t, phi), eta))
        assert abs(first[i].item() - expected) < close * abs(bend) ** 0.5
    assert slope.item() == pytest.approx(float(total), rel=close, abs=10 * close)


@pytest.mark.parametrize("x", [-1e6, -300.0, -51.0, -49.0, -20.0, -2.0, 0.0, 3.0, 36.0])
def test_the_inverse_mills_ratio_and_its_derivatives(x):
    mp.mp.dps = 80
    v = mp.mpf(x)
    r = mp.npdf(v) / (mp.erfc(-v / mp.sqrt(2)) / 2)
    d = v + r
    expected = [float(r), float(-r * d), float(r * (d * (d + r) - 1))]
    found = [part.item() for part in mills(torch.tensor([x], dtype=DOUBLE))]
    assert found[:2] == pytest.approx(expected[:2], rel=1e-12, abs=1e-300)
    assert found[2] == pytest.approx(expected[2], rel=1e-10, abs=1e-11)


def test_probabilities_of_categories_add_up_and_agree_with_the_density():
    family, _ = CASES["ordinal"]
    p = family.probabilities(ETA)
    for j in range(4):
        own = family.log_density(torch.full_like(ETA, j), ETA)
        torch.testing.assert_close(p[:, j].log(), own)
    torch.testing.assert_close(p.sum(1), torch.ones_like(ETA))


@pytest.mark.parametrize("name", CASES)
def test_mean_and_variance_are_those_of_the_density(name):
    family, y = CASES[name]
    eta = torch.tensor([0.4], dtype=DOUBLE)
    if name in ("probit", "cloglog", "trials"):
        y = BINARY
    with torch.no_grad():
        if name in ("logit", "probit", "cloglog", "trials", "poisson") or "binomial" in name:
            grid = torch.arange(0.0, 400.0 if y is COUNTS else 2.0, dtype=DOUBLE)
            weight = family.log_density(grid, eta.expand_as(grid)).exp()
        elif "ord" in name:
            grid = torch.arange(0.0, 4.0, dtype=DOUBLE)
            weight = family.log_density(grid, eta.expand_as(grid)).exp()
        else:
            low, high = {"beta": (1e-9, 1 - 1e-9), "gamma": (1e-9, 60.0)}.get(name, (-4e3, 4e3))
            low = 1e-9 if name == "tweedie" else low
            high = 60.0 if name == "tweedie" else high
            points = 50_001 if name == "tweedie" else 400_001
            grid = torch.linspace(low, high, points, dtype=DOUBLE)
            weight = family.log_density(grid, eta.expand_as(grid)).exp() * (grid[1] - grid[0])
        mean = (weight * grid).sum()
        variance = (weight * grid**2).sum() - mean**2
        assert family.mean(eta).item() == pytest.approx(mean.item(), rel=1e-4)
        assert family.variance(eta).item() == pytest.approx(variance.item(), rel=2e-3)


@pytest.mark.parametrize(
    ("family", "y", "message"),
    [
        (Poisson(), [1.0, 2.5], r"`y` is 2.5 in row 1: expected whole numbers of 0 or more"),
        (Binomial(), [0.0, 1.0, 2.0], r"`y` is 2 in row 2: expected 0 or 1"),
        (Binomial(), [[1.0, -1.0]], r"in row 0: expected whole numbers of successes and failures"),
        (Binomial(), [[1.0, 1.0], [0.0, 0.0]], r"in row 1: expected at least one trial"),
        (Gamma(), [1.0, 0.0], r"`y` is 0 in row 1: expected positive numbers"),
        (Beta(), [0.5, 1.0], r"in row 1: expected numbers between 0 and 1"),
        (Ordinal(3), [0.0, 3.0], r"in row 1: expected a category, 0 to 2"),
        (Tweedie(), [0.0, -1.0], r"in row 1: expected numbers of 0 or more"),
        (Gaussian(), [0.0, float("nan")], r"in row 1: expected finite numbers"),
    ],
)
def test_a_response_that_a_family_cannot_have_is_refused(family, y, message):
    with pytest.raises(InputError, match=message):
        family.check(torch.tensor(y, dtype=DOUBLE))


def test_families_have_names():
    for name in FAMILIES:
        assert named_family(name, levels=4).name == name
    with pytest.raises(InputError, match=r"`family` is 'normal': expected"):
        named_family("normal")
    with pytest.raises(InputError, match=r"`link` is 'probit': expected 'log'"):
        named_family("poisson", "probit")
    with pytest.raises(InputError, match=r"`link` is 'probit' but `family` has the link 'logit'"):
        named_family(Binomial(), "probit")


@pytest.mark.parametrize("name", CASES)
def test_a_start_is_near_the_data(name):
    family, y = CASES[name]
    kept = {key: value.clone() for key, value in family.state_dict().items()}
    eta = family.start(y)
    assert eta.shape == ETA.shape
    assert torch.isfinite(family.log_density(y, eta)).all()
    family.load_state_dict(kept)


def test_an_own_family_needs_its_density_only():
    class Cauchy(Family):
        def log_density(self, y, eta):
            return -torch.log1p((y - eta) ** 2) - np.log(np.pi)

    y = torch.tensor([0.3, -2.0], dtype=DOUBLE)
    first, _, _ = Cauchy().derivatives(y, torch.zeros(2, dtype=DOUBLE))
    torch.testing.assert_close(first, 2 * y / (1 + y * y))
