"""What a loss has prepared is never stale, however memory was changed, and never poisons training."""

import copy

import pytest
import torch

from openreml_nn import InputError, LaplaceLoss, REMLLoss
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.families import NegativeBinomial, Poisson
from tests.strategies import kinship, pedigree

N, Q = 24, 6


def parts():
    """Every kind of constant: codes, covariates, a dense design, a kernel, an inverse."""
    return {
        "slope": CovariancePropagation(
            z=DummyMatrix.from_codes(torch.arange(N) % 4, 4, torch.randn(N, 1)), g=ScalarMatrix(4)
        ),
        "dense": CovariancePropagation(z=torch.randn(N, 3), g=ScalarMatrix(3)),
        "kernel": CovariancePropagation(
            z=DummyMatrix.from_codes(torch.arange(N) % Q, Q), g=KnownMatrix(kinship(Q))
        ),
        "animal": CovariancePropagation(
            z=DummyMatrix.from_codes(torch.arange(N) // 4, Q),
            g=KnownInverseMatrix(pedigree(Q).inverse),
        ),
    }


def model(*names):
    found = parts()
    return Sum({**{name: found[name] for name in names}, "residual": ScalarMatrix(N)}).double()


def outside(tensor, function):
    """A change that no version counter sees."""
    version = tensor._version
    function(tensor.numpy())
    assert tensor._version == version


CHANGES = {
    "y": lambda V, y, X, rows: outside(y, lambda a: a.__imul__(2)),
    "y by data": lambda V, y, X, rows: y.data.mul_(2),
    "X": lambda V, y, X, rows: outside(X, lambda a: a[:, 1].__imul__(a[:, 1])),
    "rows": lambda V, y, X, rows: outside(rows, lambda a: a.sort()),
    "codes": lambda V, y, X, rows: outside(
        V.operands["kernel"].operands["z"].codes, lambda a: a.sort()
    ),
    "covariates": lambda V, y, X, rows: outside(
        V.operands["slope"].operands["z"].covariates, lambda a: a.__imul__(3)
    ),
    "a dense design": lambda V, y, X, rows: outside(
        V.operands["dense"].operands["z"], lambda a: a.__imul__(3)
    ),
    "a kernel": lambda V, y, X, rows: outside(
        V.operands["kernel"].operands["g"].matrix, lambda a: a.__iadd__(a.T @ a)
    ),
    "an inverse": lambda V, y, X, rows: (
        V.operands["animal"].operands["g"].inverse.values().mul_(torch.tensor(2.0))
    ),
    "a state": lambda V, y, X, rows: V.load_state_dict(
        {name: value + 0.3 for name, value in V.state_dict().items()}
    ),
}


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_memory_is_seen(change, solver):
    V = model("slope", "dense", "kernel", "animal")
    rows = torch.randperm(N)
    y, X = torch.randn(N), torch.randn(N, 2)
    loss = REMLLoss(V, solver=solver)
    before = loss(y, X, rows).item()
    loss.evaluate(y, X, rows)
    CHANGES[change](V, y, X, rows)
    fresh = REMLLoss(V, solver=solver)
    assert fresh(y, X, rows).item() != before
    assert loss(y, X, rows).item() == fresh(y, X, rows).item()
    (one,) = torch.autograd.grad(loss(y, X, rows), [V.get_parameter("residual.sigma^2")])
    (other,) = torch.autograd.grad(fresh(y, X, rows), [V.get_parameter("residual.sigma^2")])
    assert one == other
    torch.testing.assert_close(
        loss.evaluate(y, X, rows).random[0].values, fresh.evaluate(y, X, rows).random[0].values
    )


def test_a_kernel_alone_is_seen_to_change():
    V = Sum(a=KnownMatrix(kinship(N)), residual=ScalarMatrix(N)).double()
    y, X = torch.randn(N), torch.ones(N, 1)
    loss = REMLLoss(V)
    before = loss(y, X).item()
    assert loss.plan.solver == "spectral"
    outside(V.operands["a"].matrix, lambda a: a.__imul__(2))
    assert loss(y, X).item() == REMLLoss(V)(y, X).item() != before


def test_what_is_known_by_its_inverse_follows_it():
    g = KnownInverseMatrix(torch.eye(3)).double()
    before = g()
    outside(g.inverse, lambda a: a.__imul__(2))
    torch.testing.assert_close(g(), before / 2)


def test_an_evaluation_keeps_what_it_was_made_of():
    V = model("slope")
    y, X = torch.randn(N), torch.ones(N, 1)
    loss = REMLLoss(V)
    expected = REMLLoss(copy.deepcopy(V)).evaluate(y.clone(), X).random[0].values
    evaluation = loss.evaluate(y, X)
    outside(y, lambda a: a.fill(0.0))
    torch.testing.assert_close(evaluation.random[0].values, expected)


def test_a_prepared_problem_serves_equal_data_elsewhere():
    V = model("slope")
    y, X = torch.randn(N), torch.ones(N, 1)
    loss = REMLLoss(V)
    first = loss.objective(y, X).problem
    assert loss.objective(y.clone(), X.clone()).problem is first
    assert loss.objective(2 * y, X).problem is not first


@pytest.mark.parametrize("solver", ["dense", "blocked", "auto"])
@pytest.mark.parametrize("names", [("slope",), ("kernel", "animal"), ()])
def test_evaluations_in_inference_mode_do_not_poison_training(names, solver):
    V = model(*names)
    y, X = torch.randn(N), torch.ones(N, 1)
    loss = REMLLoss(V, solver=solver)
    with torch.inference_mode():
        quiet = loss(y, X)
        effects = [e.variances for e in loss.evaluate(y, X).random]
        inner = torch.randn(N)  # data of inference mode themselves
        loss(inner, X)
    loss(inner, X).backward()
    V.zero_grad()
    value = loss(y, X)
    assert value.item() == quiet.item()
    value.backward()
    expected = torch.autograd.grad(REMLLoss(V, solver=solver)(y, X), list(V.parameters()))
    torch.testing.assert_close([p.grad for p in V.parameters()], list(expected), rtol=0, atol=0)
    torch.autograd.grad(loss(y, X), list(V.parameters()), create_graph=True)
    torch.testing.assert_close(effects, [e.variances for e in loss.evaluate(y, X).random])


@pytest.mark.parametrize("solver", ["dense", "blocked", "sparse", "auto"])
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_a_look_at_the_likelihood_leaves_a_trained_design_its_gradient(quiet, solver):
    Z = torch.nn.Parameter(torch.randn(N, 2).double())
    V = Sum(load=CovariancePropagation(z=Z, g=ScalarMatrix(2)), residual=ScalarMatrix(N)).double()
    y, X = torch.randn(N).double(), torch.ones(N, 1).double()
    loss = REMLLoss(V, solver=solver)
    with quiet():
        loss(y, X)
    found = torch.autograd.grad(loss(y, X), list(V.parameters()))
    expected = torch.autograd.grad(REMLLoss(V, solver="dense")(y, X), list(V.parameters()))
    torch.testing.assert_close(found, expected)


def test_the_density_of_counts_follows_memory_and_family():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(5, (N,), generator=g).double()
    V = parts()["slope"].double()
    loss, eta = LaplaceLoss(V, Poisson()), torch.zeros(N).double()
    loss(y, eta)
    outside(y, lambda a: a.__iadd__(2))
    assert loss(y, eta).item() == pytest.approx(LaplaceLoss(V, Poisson())(y, eta).item(), rel=1e-9)
    loss.family = NegativeBinomial().double()
    fresh = LaplaceLoss(V, loss.family)
    assert loss(y, eta).item() == pytest.approx(fresh(y, eta).item(), rel=1e-9)
    outside(y, lambda a: a.__imul__(-1))
    with pytest.raises(InputError, match="`y` is -"):
        loss(y, eta)


def test_counts_of_inference_mode_have_a_density():
    V, eta = parts()["slope"].double(), torch.zeros(N).double()
    loss = LaplaceLoss(V, Poisson())
    with torch.inference_mode():
        found = loss(torch.ones(N).double(), eta)
    assert found.item() == pytest.approx(loss(torch.ones(N).double(), eta).item(), rel=1e-9)


@pytest.mark.parametrize("solver", ["blocked", "sparse", "auto"])
def test_a_trained_design_beside_relatives_has_the_gradient_of_dense(solver):
    Z = torch.nn.Parameter(torch.randn(N, 2))
    load = CovariancePropagation(z=Z, g=ScalarMatrix(2))
    V = Sum(load=load, animal=parts()["animal"], residual=ScalarMatrix(N)).double()
    y, X = torch.randn(N).double(), torch.ones(N, 1).double()
    # Loss and tree anew: nothing of the kernel is computed before.
    found = torch.autograd.grad(REMLLoss(V, solver=solver)(y, X), list(V.parameters()))
    expected = torch.autograd.grad(REMLLoss(V, solver="dense")(y, X), list(V.parameters()))
    torch.testing.assert_close(found, expected)
