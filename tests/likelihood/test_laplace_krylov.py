"""Responses that are not Gaussian by products alone: exact where every sign is a probe, and as accurate as
it says where not; gradients are those of the estimate."""

from functools import cache

import pytest
import torch

from openreml_nn.covariance import (
    CovariancePropagation,
    ExponentialMatrix,
    KnownInverseMatrix,
    Pedigree,
    Sum,
)
from openreml_nn.covariance.matrix import Recorded
from openreml_nn.covariance.transform import TransformIdentity
from openreml_nn.estimation.marginal import fit_laplace
from openreml_nn.families import Binomial, Poisson
from openreml_nn.likelihood import Auto, Krylov, LaplaceLoss
from openreml_nn.likelihood.laplace_choice import space_of
from openreml_nn.support.errors import InputError
from tests.likelihood.test_krylov import crossed
from tests.likelihood.test_laplace import (
    TREES,
    N,
    difference,
    grouped,
    intercepts,
    normal,
    setting,
    slopes,
)
from tests.strategies import distances

#: All 2^q patterns of up to 7 effects, over which a random sign's expectation is the mean.
EVERY_SIGN = Krylov(probes=2**7, probe_tolerance=1e-13)
#: So few that nothing is near its expectation.
THREE_SIGNS = Krylov(probes=3, probe_tolerance=1e-11)

TREES = {
    **{name: TREES[name] for name in ("slopes", "crossed", "one factor twice", "rows", "animals")},
    "two others": lambda: Sum(a=intercepts(9, 1), b=intercepts(4, 2), c=intercepts(3, 3)),
    "crossed slopes": lambda: Sum(a=slopes(6, 2, 1), b=slopes(3, 2, 2)),
}


@pytest.fixture(autouse=True)
def _trees(monkeypatch):
    monkeypatch.setattr("tests.likelihood.test_laplace.TREES", TREES)


def everything(loss, y, eta, X):
    """The value, its gradients, and all that an evaluation says."""
    eta = eta.clone().requires_grad_()
    value = loss(y, eta, X)
    gradients = torch.autograd.grad(value, [*loss.parameters(), eta])
    found = loss.evaluate(y, eta.detach(), X)
    random = [x for effects in found.random for x in (effects.values, effects.variances)]
    own = [found.coefficients, found.coefficient_covariance, found.predictor]
    return [value.detach(), *gradients, *own, *random]


CASES = [(tree, "logit", "ml") for tree in TREES] + [(tree, "poisson", "reml") for tree in TREES]
CASES += [("crossed slopes", "beta", "ml"), ("crossed", "student_t", "ml")]


@pytest.mark.parametrize(("tree", "family", "method"), CASES)
def test_with_every_sign_it_equals_the_blocked_solver(tree, family, method):
    covariance, own, y, eta = setting(tree, family)
    X = normal(N, 2, seed=11) if method == "reml" else None
    losses = [LaplaceLoss(covariance, own, method, solver=x) for x in ("blocked", EVERY_SIGN)]
    exact, found = (everything(loss, y, eta, X) for loss in losses)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)
    assert losses[1].evaluate(y, eta, X).error == 0


@pytest.mark.parametrize("coefficients", [0, 2])
def test_slopes_of_relatives_at_a_variance_of_zero_are_those_of_the_blocked_solver(coefficients):
    found = []
    for solver in ("blocked", EVERY_SIGN):
        pedigree = Pedigree.of(["a", "b", "c"], [None, None, "a"], [None, None, "b"])
        at_zero = {"fixed": False, "default": torch.zeros(1), "trans": TransformIdentity()}
        relatives = KnownInverseMatrix(pedigree.inverse, {"sigma^2": at_zero})
        random = CovariancePropagation(z=grouped(3, 2), g=relatives)
        V = Sum(a=intercepts(9, 1), b=random, c=intercepts(3, 3)).double()
        loss = LaplaceLoss(V, Poisson(), "reml" if coefficients else "ml", solver=solver)
        X = normal(N, coefficients, seed=11) if coefficients else None
        found.append(everything(loss, torch.arange(N) % 4, 0.5 * normal(N, seed=5), X))
    assert float(found[0][2].abs()) > 1
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("tree", "family", "method"), CASES[1::2])
def test_gradients_are_those_of_the_estimate(tree, family, method):
    covariance, own, y, eta = setting(tree, family)
    X = normal(N, 2, seed=11) if method == "reml" else None
    loss = LaplaceLoss(covariance, own, method, solver=THREE_SIGNS)
    at = eta.clone().requires_grad_()
    tensors = [*loss.parameters(), at]
    gradients = torch.autograd.grad(loss(y, at, X), tensors)

    def value():
        with torch.no_grad():
            return loss(y, eta, X)

    for tensor, gradient in zip([*loss.parameters(), eta[:3]], gradients, strict=True):
        expected = difference(value, tensor)
        torch.testing.assert_close(gradient[: len(expected)], expected, rtol=1e-6, atol=1e-7)


@cache
def counts(n=400, users=50, items=30):
    """Crossed factors without a residual, and counts of them."""
    V, y, X = crossed(n, users, items)
    V = Sum(user=V.user, item=V.item)
    return V, torch.poisson((y / 2).exp(), generator=torch.Generator().manual_seed(1)).double(), X


def test_it_is_as_accurate_as_it_says():
    V, y, X = counts()
    eta = 0.2 * X[:, 1].double()

    def found(solver):
        loss = LaplaceLoss(V, Poisson(), solver=solver)
        value = loss(y, eta)
        return value.detach(), torch.stack(torch.autograd.grad(value, list(V.parameters()))), loss

    exact, slope, _ = found("blocked")
    values, gradients, stated = [], [], []
    for seed in range(12):
        value, gradient, loss = found(Krylov(probes=8, seed=seed))
        values.append(value)
        gradients.append(gradient)
        stated += [loss.evaluate(y, eta).error] if seed < 3 else []
    spread = (torch.stack(values) - exact).square().mean().sqrt()
    assert 0.6 < float(spread) / (sum(stated) / len(stated)) < 1.6
    off = torch.stack(gradients) - slope
    assert bool((off.mean(0).abs() < 4 * off.std(0) / len(values) ** 0.5).all())
    # The gradient is known as well as the value: both to a fraction of a unit.
    assert float(off.std(0).max()) < 4 * float(spread)


def test_the_signs_are_those_of_the_seed():
    V, y, _ = counts()
    eta = torch.zeros(len(y))
    values = [LaplaceLoss(V, Poisson(), solver=Krylov(seed=s))(y, eta).item() for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("family", ["binary", "counts"])
def test_a_fit_is_near_the_exact_one(family):
    V, y, X = counts()
    if family == "binary":
        y, own = (y > 1).double(), Binomial()
    else:
        own = Poisson()
    results = []
    for solver in ("blocked", "krylov"):
        result, _ = fit_laplace(LaplaceLoss(V, own, solver=solver), y, X.double())
        results.append(result)
    exact, found = results
    assert found.converged
    assert found.score_norm < 1e-3
    assert not found.plan.exact
    assert 0 < found.log_likelihood_error < 0.5
    assert abs(found.log_likelihood - exact.log_likelihood) < 4 * found.log_likelihood_error
    for one, other in zip(exact.parameters, found.parameters, strict=True):
        assert abs(one.value - other.value) < 0.05 * one.std_error
        assert other.std_error == pytest.approx(one.std_error, rel=0.02)
    off = (exact.fixed.estimate - found.fixed.estimate).abs() / exact.fixed.std_error
    assert float(off.max()) < 0.02
    for one, other in zip(exact.random, found.random, strict=True):
        torch.testing.assert_close(other.values, one.values, rtol=0, atol=0.01)
        # Averages over 24 probes.
        off = other.variances / one.variances - 1
        assert float(off.abs().max()) < 0.15
        assert float(off.abs().mean()) < 0.03
    assert "the log-likelihood is estimated, with a standard error of" in found.summary()


def test_slopes_at_a_variance_of_zero_and_a_correlation_of_one_are_those_of_the_likelihood():
    _, own, y, eta = setting("crossed", "logit")
    flat, steep = intercepts(4, 2), slopes(3, 2, 2)
    tree = Sum(a=intercepts(9, 1), flat=flat, steep=steep)
    flat.set_value("g/sigma^2", 0.0, natural=True)
    found = []
    for solver in ("blocked", Krylov(probes=2**10, probe_tolerance=1e-13)):
        loss = LaplaceLoss(tree, own, solver=solver)
        # L with a second row that is twice the first.
        natural = torch.tensor([0.5, 0.0, 0.7, 1.4, 0.0]).double().requires_grad_()
        with tree.given(Recorded(natural, natural=True)):
            loss(y, eta).backward()
        found.append(natural.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)


def test_auto_takes_it_with_a_warning_only_where_exact_solvers_would_not_fit():
    V, y, _ = counts()
    eta = torch.zeros(len(y))
    loss = LaplaceLoss(V, Poisson())
    loss(y, eta)
    assert loss.plan.exact
    loss = LaplaceLoss(V, Poisson(), solver=Auto(memory=1000))
    with pytest.warns(RuntimeWarning, match="approximate: exact solvers would need"):
        loss(y, eta)
    assert (loss.plan.solver, loss.plan.exact) == ("krylov", False)
    assert "conjugate gradients, 30 columns" in str(loss.plan)
    assert "exact solvers would need" in str(loss.plan)
    # Of few columns it takes as long as an exact one, which is then kept.
    terms = [term.detach() for term in V.terms()]
    assert space_of(terms, Auto(operations=1.0), False).cost(0).exact


def test_what_it_cannot_do_is_said():
    V, y, _ = counts()
    eta = torch.zeros(len(y))
    with pytest.raises(InputError, match="neither quadrature nor gradients by a design"):
        LaplaceLoss(V, Poisson(), quadrature=3, solver="krylov")(y, eta)
    places = CovariancePropagation(z=grouped(6, 3), g=ExponentialMatrix(distances(6)))
    y = (normal(N, seed=9) < 0).double()
    with pytest.raises(InputError, match="grouping factors with independent levels"):
        LaplaceLoss(places, Binomial(), solver="krylov")(y, torch.zeros(N))
