"""Laplace's approximation against a dense formula, its gradients against finite differences."""

import copy
from functools import cache
from math import log, pi

import pytest
import torch
from torch import nn

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KroneckerProduct,
    Pedigree,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.covariance.matrix import Recorded
from openreml_nn.families import (
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
)
from openreml_nn.likelihood import Blocked, LaplaceLoss, REMLLoss
from openreml_nn.support.errors import InputError, NumericalError
from tests.strategies import distances

N = 40


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def codes(levels, seed):
    return torch.randint(levels, (N,), generator=generator(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def grouped(levels=7, seed=1, values=None):
    return DummyMatrix.from_codes(codes(levels, seed), [str(i) for i in range(levels)], values)


def slopes(levels, k, seed=1):
    return CovariancePropagation(
        z=grouped(levels, seed, normal(N, k, seed=seed)),
        g=KroneckerProduct(levels=IdentityMatrix(levels), effects=UnstructuredMatrix(k)),
    )


def intercepts(levels=7, seed=1):
    return CovariancePropagation(z=grouped(levels, seed), g=ScalarMatrix(levels))


def nested():
    outer = codes(3, 5)
    inner = outer * 4 + codes(4, 6)
    names = [str(i) for i in range(12)]
    return Sum(
        inner=CovariancePropagation(z=DummyMatrix.from_codes(inner, names), g=ScalarMatrix(12)),
        outer=CovariancePropagation(z=DummyMatrix.from_codes(outer, names[:3]), g=ScalarMatrix(3)),
    )


def animals():
    pedigree = Pedigree.of(
        ["a", "b", "c", "d", "e", "f"],
        [None, None, "a", "a", "c", "c"],
        [None, None, "b", "b", "d", "b"],
    )
    return CovariancePropagation(
        z=grouped(6, 3),
        g=KroneckerProduct(levels=KnownInverseMatrix(pedigree.inverse), effects=ScalarMatrix(1)),
    )


TREES = {
    "intercepts": lambda: intercepts(),
    "slopes": lambda: slopes(6, 2),
    "strata": lambda: CovariancePropagation(z=grouped(5, 2), g=DiagonalMatrix(5)),
    "crossed": lambda: Sum(a=intercepts(9, 1), b=intercepts(4, 2)),
    "crossed slopes": lambda: Sum(a=slopes(6, 2, 1), b=slopes(4, 2, 2), c=intercepts(3, 3)),
    "one factor twice": lambda: Sum(a=intercepts(6, 1), b=slopes(6, 2, 1), c=intercepts(4, 2)),
    "nested": nested,
    "rows": lambda: Sum(a=intercepts(6, 1), own=ScalarMatrix(N)),
    "kernel": lambda: CovariancePropagation(z=grouped(6, 3), g=ExponentialMatrix(distances(6))),
    "animals": lambda: Sum(a=animals(), b=intercepts(4, 2)),
    "occasions": lambda: Sum(
        a=CovariancePropagation(z=grouped(6, 3), g=AR1Matrix(6)),
        b=intercepts(4, 2),
    ),
    "cells": lambda: CovariancePropagation(
        z=grouped(12, 3),
        g=KroneckerProduct(levels=IdentityMatrix(4), effects=UnstructuredMatrix(3)),
    ),
    "independent slopes": lambda: CovariancePropagation(
        z=grouped(6, 2, normal(N, 2, seed=2)), g=ScalarMatrix(12)
    ),
    "dense": lambda: CovariancePropagation(z=normal(N, 3, seed=4), g=UnstructuredMatrix(3)),
}

#: A family, and how its responses are drawn from the predictor.
FAMILIES = {
    "logit": (Binomial, lambda eta: (normal(N, seed=9) < eta).double()),
    "probit": (lambda: Binomial("probit"), lambda eta: (normal(N, seed=9) < eta).double()),
    "trials": (
        lambda: Binomial("cloglog"),
        lambda eta: torch.stack([codes(4, 8), codes(3, 7) + 1], 1).double(),
    ),
    "poisson": (Poisson, lambda eta: torch.poisson(eta.exp(), generator=generator(3))),
    "negative_binomial": (
        NegativeBinomial,
        lambda eta: torch.poisson((eta + normal(N, seed=2) / 2).exp(), generator=generator(3)),
    ),
    "negative_binomial_1": (
        NegativeBinomial1,
        lambda eta: torch.poisson((eta + normal(N, seed=2) / 2).exp(), generator=generator(3)),
    ),
    "gamma": (Gamma, lambda eta: (eta + normal(N, seed=2) / 2).exp()),
    "beta": (Beta, lambda eta: torch.sigmoid(eta + normal(N, seed=2) / 2)),
    "gaussian": (Gaussian, lambda eta: eta + normal(N, seed=2)),
    "student_t": (StudentT, lambda eta: eta + normal(N, seed=2)),
    "ordinal": (
        lambda: Ordinal(3),
        lambda eta: (eta > -0.5).double() + (eta + normal(N, seed=2) > 0.5).double(),
    ),
    "tweedie": (Tweedie, lambda eta: (eta.exp() - 1).clamp(min=0)),
}


def setting(tree, family, seed=0):
    """A tree and a family away from their defaults, and data."""
    covariance, (make, draw) = TREES[tree](), FAMILIES[family]
    own = make()
    for i, parameter in enumerate([*covariance.parameters(), *own.parameters()]):
        with torch.no_grad():
            parameter.add_(0.3 * normal(1, seed=10 + i + seed) - 0.1)
    eta = 0.5 * normal(N, seed=5)
    return covariance, own, draw(eta + 0.4 * normal(N, seed=6)), eta


def reference(covariance, family, y, eta, X=None):
    """By V's symmetric root, Newton's method and a dense determinant."""
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(covariance())
        M = vectors * values.clamp(min=0).sqrt()
        p = 0 if X is None else X.shape[1]
        M = M if X is None else torch.cat([M, X], 1)
        prior = torch.cat([torch.ones(len(values)), torch.zeros(p)])
        u = torch.zeros(M.shape[1])

        def height(u):
            return prior @ (u * u) / 2 - family.log_density(y, eta + M @ u).sum()

        for _ in range(100):
            first, second, _ = Family.derivatives(family, y, eta + M @ u)
            H = torch.diag(prior) - M.mT @ (second[:, None] * M)
            lifted = H if torch.linalg.eigvalsh(H)[0] > 0 else (
                torch.diag(prior) + M.mT @ (second.abs()[:, None] * M)
            )  # fmt: skip
            move = torch.linalg.solve(lifted, prior * u - M.mT @ first)
            scale = 1.0
            while height(u - scale * move) > height(u) + 1e-9:
                scale /= 2
            u = u - scale * move
            if move.abs().max() < 1e-12:
                break
        assert move.abs().max() < 1e-9
        return height(u) + torch.logdet(H) / 2 - p / 2 * log(2 * pi)


def difference(function, tensor, step=1e-5):
    """Central differences by each entry."""
    found = torch.zeros_like(tensor)
    flat, at = found.reshape(-1), tensor.data.reshape(-1)
    for i in range(len(at)):
        kept = at[i].item()
        at[i] = kept + step
        above = float(function())
        at[i] = kept - step
        flat[i] = (above - float(function())) / (2 * step)
        at[i] = kept
    return found


CASES = [(tree, "logit") for tree in TREES] + [("crossed slopes", family) for family in FAMILIES]
CASES += [("slopes", "negative_binomial"), ("rows", "poisson"), ("kernel", "beta")]


SOLVED = [(tree, family, Blocked(pair_cost=0)) for tree, family in CASES]
SOLVED += [(tree, "logit", solver) for tree in TREES for solver in ("dense", "auto")]
#: What meets is sparse in all but these.
SPARSE = [tree for tree in TREES if tree not in ("kernel", "dense")]
SOLVED += [(tree, "logit", "sparse") for tree in SPARSE]
SOLVED += [("crossed slopes", family, "sparse") for family in FAMILIES]


@cache
def references(tree, family):
    """Of a setting the dense formulas' values, without coefficients and with those of a matrix."""
    covariance, own, y, eta = setting(tree, family)
    X = torch.stack([torch.ones(N), normal(N, seed=11)], 1)
    if family == "ordinal":
        X = X[:, 1:]
    values = [reference(covariance, own, y, eta, x).item() for x in (None, X)]
    return *values, X


@pytest.mark.parametrize(("tree", "family", "solver"), SOLVED)
def test_the_value_is_that_of_the_dense_formula(tree, family, solver):
    covariance, own, y, eta = setting(tree, family)
    expected, of_restricted, X = references(tree, family)
    loss = LaplaceLoss(covariance, own, solver=solver)
    assert loss(y, eta).item() == pytest.approx(expected, rel=1e-10)
    restricted = LaplaceLoss(covariance, own, "reml", solver=solver)
    assert restricted(y, eta, X).item() == pytest.approx(of_restricted, rel=1e-10)


BOTH = [(*case, "ml", solver) for case in CASES for solver in ("blocked", "dense")]
BOTH += [(tree, "logit", "ml", "sparse") for tree in SPARSE]
BOTH += [("crossed slopes", family, "ml", "sparse") for family in FAMILIES]
BOTH += [
    (*case, "reml", solver)
    for case in (
        ("crossed", "logit"),
        ("slopes", "beta"),
        ("animals", "poisson"),
        ("occasions", "logit"),
    )
    for solver in ("blocked", "sparse")
]
BOTH += [("kernel", "poisson", "reml", "auto")]


#: Families whose responses have a gradient too.
CONTINUOUS = ("gamma", "beta", "gaussian", "student_t")


@cache
def slopes_of_the_value(tree, family, method):
    """Differences by the parameters, six responses where they have a gradient, six predictors."""
    covariance, own, y, eta = setting(tree, family)
    X = normal(N, 1, seed=11) if method == "reml" else None
    loss = LaplaceLoss(covariance, own, method)

    def value():
        with torch.no_grad():
            return loss(y, eta, X)

    moved = [*covariance.parameters(), *own.parameters()]
    moved += [y[:6]] if family in CONTINUOUS else []
    return [difference(value, tensor) for tensor in (*moved, eta[:6])]


@pytest.mark.parametrize(("tree", "family", "method", "solver"), BOTH)
def test_gradients_are_those_of_finite_differences(tree, family, method, solver):
    covariance, own, y, eta = setting(tree, family)
    X = normal(N, 1, seed=11) if method == "reml" else None
    loss = LaplaceLoss(covariance, own, method, solver=solver)
    eta.requires_grad_()
    if family in CONTINUOUS:
        y.requires_grad_()
    loss(y, eta, X).backward()
    moved = [*covariance.parameters(), *own.parameters()]
    found = [tensor.grad for tensor in moved] + [t.grad[:6] for t in (y, eta) if t.requires_grad]
    for one, other in zip(found, slopes_of_the_value(tree, family, method), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("tree", TREES)
def test_two_ways_to_the_gradient_agree(tree):
    covariance, own, y, eta = setting(tree, "negative_binomial")
    known, found = normal(N, 2, seed=11), []
    for X in (known, known.clone().requires_grad_()):
        loss = LaplaceLoss(covariance, own, "reml")
        at = eta.clone().requires_grad_()
        value = loss(y, at, X)
        tensors = [at, *covariance.parameters(), *own.parameters()]
        found.append([value.detach(), *torch.autograd.grad(value, tensors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


EXACT = [(tree, solver) for tree in TREES for solver in ("blocked", "dense")]
EXACT += [(tree, "sparse") for tree in SPARSE]


@pytest.mark.parametrize(("tree", "solver"), EXACT)
@pytest.mark.parametrize("method", ["ml", "reml"])
def test_of_gaussian_responses_it_is_the_exact_likelihood(tree, solver, method):
    covariance, own, y, eta = setting(tree, "gaussian")
    X = torch.stack([torch.ones(N), normal(N, seed=11)], 1)
    residual = ScalarMatrix(N)
    residual.set_value("sigma^2", own.natural("sigma^2", y).item(), natural=True)
    exact = REMLLoss(Sum(random=covariance, residual=residual), method, reduction="sum")
    loss = LaplaceLoss(covariance, own, method, solver=solver)
    assert loss(y, eta, X).item() == pytest.approx(exact(y - eta, X).item(), rel=1e-10)
    parameters = list(covariance.parameters())
    one = torch.autograd.grad(loss(y, eta, X), [*parameters, *own.parameters()])
    other = torch.autograd.grad(exact(y - eta, X), [*parameters, *residual.parameters()])
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", ["logit", "negative_binomial"])
def test_coefficients_are_those_of_maximum_likelihood(family):
    covariance, own, y, eta = setting("crossed", family)
    X = torch.stack([torch.ones(N), normal(N, seed=11)], 1)
    loss = LaplaceLoss(covariance, own)
    found = loss.evaluate(y, eta, X)
    beta = found.coefficients.clone().requires_grad_()
    at_optimum = loss(y, eta + X @ beta)
    assert at_optimum.item() == pytest.approx(-found.log_likelihood.item(), rel=1e-12)
    (slope,) = torch.autograd.grad(at_optimum, beta)
    assert slope.abs().max() < 1e-7
    X.requires_grad_()
    loss(y, eta, X).backward()
    parameter = next(covariance.parameters())
    value = lambda: loss(y, eta, X.detach())  # noqa: E731
    torch.testing.assert_close(X.grad[:2], difference(value, X.data[:2]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parameter.grad, difference(value, parameter), rtol=1e-5, atol=1e-7)


def test_a_trainable_design_has_its_gradient():
    class Loadings(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(normal(N, 2, seed=3))

    loadings = Loadings()
    covariance = Sum(
        factor=CovariancePropagation(z=loadings.weight, g=UnstructuredMatrix(2)),
        a=intercepts(5, 2),
    )
    _, own, y, eta = setting("crossed", "logit")
    loss = LaplaceLoss(covariance, own)
    loss(y, eta).backward()
    with torch.no_grad():
        found = difference(lambda: loss(y, eta), loadings.weight.data[:5])
    torch.testing.assert_close(loadings.weight.grad[:5], found, rtol=1e-6, atol=1e-8)


def test_a_network_of_the_random_effects_has_its_gradient():
    network = nn.Linear(2, 2)
    x = normal(N, 2, seed=4)
    z = DummyMatrix.from_codes(codes(6, 1), [str(i) for i in range(6)], network(x))
    G = KroneckerProduct(levels=IdentityMatrix(6), effects=UnstructuredMatrix(2))
    _, own, y, eta = setting("crossed", "poisson")

    def value():
        z = DummyMatrix.from_codes(codes(6, 1), [str(i) for i in range(6)], network(x))
        return LaplaceLoss(CovariancePropagation(z=z, g=G), own)(y, eta)

    value().backward()
    assert z.shape == (N, 12)
    with torch.no_grad():
        found = difference(value, network.weight)
    torch.testing.assert_close(network.weight.grad, found, rtol=1e-6, atol=1e-8)


def test_zero_variances_are_ordinary_points():
    _, own, y, eta = setting("crossed", "logit")
    a, b = intercepts(9, 1), intercepts(4, 2)
    both = LaplaceLoss(Sum(a=a, b=b), own)
    a.set_value("g/sigma^2", 0.0, natural=True)
    assert both(y, eta).item() == pytest.approx(LaplaceLoss(b, own)(y, eta).item(), rel=1e-12)
    b.set_value("g/sigma^2", 0.0, natural=True)
    alone = -own.log_density(y, eta).sum().item()
    assert both(y, eta).item() == pytest.approx(alone, rel=1e-12)
    # The slope there is the limit of that of small variances.
    slopes = []
    for variance in (0.0, 1e-9):
        natural = torch.full((2,), variance, requires_grad=True)
        with both.covariance.given(Recorded(natural, natural=True)):
            both(y, eta).backward()
        slopes.append(natural.grad)
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)


def test_rows_and_the_order_of_levels_change_nothing():
    covariance, own, y, eta = setting("crossed slopes", "poisson")
    loss = LaplaceLoss(covariance, own)
    whole = loss(y, eta).item()
    order = torch.randperm(N, generator=generator(4))
    assert loss(y[order], eta[order], rows=order).item() == pytest.approx(whole, rel=1e-12)
    part = order[:25]
    some = LaplaceLoss(covariance, own)(y[part], eta[part], rows=part).item()
    V = covariance().detach()[part][:, part]

    class Known:
        def __call__(self):
            return V

    assert some == pytest.approx(reference(Known(), own, y[part], eta[part]).item(), rel=1e-10)


def test_a_warm_start_does_not_change_the_value():
    covariance, own, y, eta = setting("crossed", "negative_binomial")
    loss = LaplaceLoss(covariance, own)
    first = loss(y, eta).item()
    with torch.no_grad():
        for parameter in covariance.parameters():
            parameter.add_(1.5)
    moved = loss(y, eta).item()
    assert moved == pytest.approx(LaplaceLoss(covariance, own)(y, eta).item(), rel=1e-13)
    assert moved != pytest.approx(first)
    assert copy.deepcopy(loss)(y, eta).item() == pytest.approx(moved, rel=1e-13)


def test_single_precision_has_its_digits():
    covariance, own, y, eta = setting("crossed", "logit")
    exact = LaplaceLoss(covariance, own)(y, eta)
    exact.backward()
    slopes = [p.grad.clone() for p in covariance.parameters()]
    single = copy.deepcopy(covariance).float()
    for p in single.parameters():
        p.grad = None
    value = LaplaceLoss(single, own)(y.float(), eta.float())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    value.backward()
    for p, slope in zip(single.parameters(), slopes, strict=True):
        torch.testing.assert_close(p.grad.double(), slope, rtol=1e-3, atol=1e-4)


def test_the_loss_trains_by_any_optimizer_and_backward_twice_is_refused():
    covariance, own, y, eta = setting("intercepts", "logit")
    loss = LaplaceLoss(covariance, own)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(y, eta)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    (slope,) = torch.autograd.grad(loss(y, eta), next(covariance.parameters()), create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        slope.sum().backward()


def test_modes_and_their_variances_are_those_of_the_dense_formula():
    covariance, own, y, eta = setting("crossed slopes", "logit")
    found = LaplaceLoss(covariance, own).evaluate(y, eta)
    terms = covariance.terms()
    Z = torch.cat([t.design.dense(eta) for t in terms], 1)
    G = torch.block_diag(*[t.covariance.whole(t.design.shape[1]) for t in terms]).detach()
    b = torch.cat([r.values.reshape(-1) for r in found.random])
    first, second, _ = own.derivatives(y, eta + Z @ b)
    torch.testing.assert_close(b, G @ Z.mT @ first, rtol=1e-8, atol=1e-10)
    whole = torch.linalg.inv(torch.linalg.inv(G) - Z.mT @ (second[:, None] * Z))
    at = 0
    for own_effects in found.random:
        q, k = own_effects.values.shape
        for level in range(q):
            block = whole[at : at + k, at : at + k]
            torch.testing.assert_close(own_effects.variances[level], block)
            at += k


def test_what_cannot_be_done_is_refused():
    covariance, own, y, eta = setting("intercepts", "logit")
    with pytest.raises(InputError, match=r"`method` is 'map': expected 'ml' or 'reml'"):
        LaplaceLoss(covariance, own, "map")
    with pytest.raises(
        InputError, match=r"`solver` is 'spectral', which is for Gaussian responses: expected"
    ):
        LaplaceLoss(covariance, own, solver="spectral")
    with pytest.raises(InputError, match=r"`quadrature` is 5 but `method` is 'reml'"):
        LaplaceLoss(covariance, own, "reml", quadrature=5)
    with pytest.raises(TypeError, match=r"`family` is 'binomial': expected a Family"):
        LaplaceLoss(covariance, "binomial")
    loss = LaplaceLoss(covariance, own)
    with pytest.raises(InputError, match=r"`y` is 3 in row 0: expected 0 or 1"):
        loss(y + 2, eta)
    with pytest.raises(InputError, match=r"`X` is None: method 'reml'"):
        LaplaceLoss(covariance, own, "reml")(y, eta)
    with pytest.raises(InputError, match=r"`y` has 39 rows but `eta` has 40"):
        loss(y[1:], eta)
    with pytest.raises(InputError, match=r"`eta` has 39 rows but the covariance has 40: pass"):
        loss(y[1:], eta[1:])
    with pytest.raises(InputError, match=r"torch\.func"):
        torch.func.grad(lambda eta: loss(y, eta))(eta)


def test_separated_data_are_named():
    y = (torch.arange(N) >= 20).double()
    X = torch.stack([torch.ones(N), y], 1)
    with pytest.raises(NumericalError, match="separated"):
        LaplaceLoss(intercepts(), Binomial(), "reml")(y, torch.zeros(N), X)
