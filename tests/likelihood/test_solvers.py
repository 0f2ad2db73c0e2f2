"""Solvers as objects: options, forecasts, and which is taken."""

import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from openreml_nn import InputError, REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    KnownMatrix,
    ScalarMatrix,
    Sum,
    ar1_field,
    stratified,
)
from openreml_nn.likelihood import (
    Auto,
    Blocked,
    Cost,
    Dense,
    Grid,
    Krylov,
    Solver,
    Sparse,
    Spectral,
)
from openreml_nn.likelihood.plan import Plan, check_solver
from openreml_nn.likelihood.solvers import SOLVERS
from tests.strategies import kinship

N, Q = 24, 6


def grouped(residual=None):
    z = DummyMatrix.from_codes(torch.arange(N) % Q, Q)
    g = CovariancePropagation(z=z, g=ScalarMatrix(Q))
    return Sum(g=g, residual=residual or ScalarMatrix(N)).double()


#: For each solver a covariance that it fits, and one that it does not.
FITS = {
    "dense": (lambda: Sum(a=KnownMatrix(kinship(N)), b=ar1_field(4, 6)), None),
    "blocked": (grouped, lambda: ar1_field(4, 6)),
    "spectral": (lambda: Sum(a=KnownMatrix(kinship(N)), residual=ScalarMatrix(N)), grouped),
    "grid": (lambda: Sum(a=ar1_field(4, 6), residual=ScalarMatrix(N)), grouped),
    "sparse": (grouped, lambda: KnownMatrix(kinship(N))),
    "krylov": (grouped, lambda: grouped(stratified([i % 2 for i in range(N)]))),
}


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, generator=generator), torch.randn(N, 2, generator=generator)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_forecasts_where_it_fits_and_refuses_in_words_where_not(name):
    fits, misfits = FITS[name]
    y, X = data()
    solver, V = SOLVERS[name](), fits().double()
    cost = solver.forecast(V.terms(), 2, torch.float64)
    assert cost.operations > 0 and cost.bytes > 0 and cost.reason and cost.steps
    assert solver.obstacle(V.terms()) is None
    by_name, by_object = REMLLoss(V, solver=name), REMLLoss(V, solver=solver)
    assert by_name(y, X).item() == by_object(y, X).item()
    assert by_name.plan == by_object.plan
    assert by_name.plan.solver == name
    assert by_name.plan.exact == cost.exact == (name != "krylov")
    if misfits is None:
        return
    V = misfits().double()
    assert solver.forecast(V.terms(), 2, torch.float64) is None
    with pytest.raises(InputError, match=f"the ({name}|blocked) solver needs"):
        REMLLoss(V, solver=solver)(y, X)
    with pytest.raises(InputError, match="solver needs"):
        assert REMLLoss(V, solver=name).plan


@pytest.mark.parametrize("name", SOLVERS)
def test_the_plan_is_the_exact_solver_of_least_cost(name):
    terms = FITS[name][0]().double().terms()
    plan = Plan.of(terms, 2, "auto", torch.float64)
    costs = [solver().forecast(terms, 2, torch.float64) for solver in SOLVERS.values()]
    least = min(cost.operations for cost in costs if cost is not None and cost.exact)
    assert plan.exact and plan.cost.operations == least
    assert plan.reason and plan.reason in str(plan)


def test_what_holds_more_than_the_memory_is_left_for_what_holds_less():
    terms = Sum(a=KnownMatrix(kinship(N)), residual=ScalarMatrix(N)).double().terms()
    found = {name: make().forecast(terms, 2, torch.float64) for name, make in SOLVERS.items()}
    costs = sorted(
        (cost.operations, cost.bytes, name)
        for name, cost in found.items()
        if cost is not None and cost.exact
    )
    for _, held, name in costs:
        smaller = [other for _, size, other in costs if size < held]
        # Of those that fit, the cheapest; where none does, the cheapest of all.
        cheapest = next((other for other in smaller), costs[0][2])
        assert Plan.of(terms, 2, Auto(memory=held - 1), torch.float64).solver == cheapest, name


def test_a_solver_of_ones_own_is_taken_as_it_is():
    @dataclass(frozen=True)
    class Mine(Solver):
        name: ClassVar[str] = "mine"
        cost: float = 7.0

        def forecast(self, terms, p, dtype):
            return Cost(self.cost, 1.0, True, "because")

        def problem(self, fixed, terms, method):
            return Dense().problem(fixed, terms, method)

    y, X = data()
    V = grouped()
    loss = REMLLoss(V, solver=Mine())
    torch.testing.assert_close(loss(y, X), REMLLoss(V, solver="dense")(y, X))
    assert loss.plan.solver == "mine" and loss.plan.cost.operations == 7.0


def test_options_of_a_solver_reach_the_fit_and_its_result():
    y, X = data()
    found = fit_reml(grouped(), y, X, solver=Krylov(probes=5, seed=3))
    assert found.plan.choice == Krylov(probes=5, seed=3)
    assert found.plan.solver == "krylov" and not found.plan.exact


def test_another_solver_is_taken_when_the_loss_is_given_one():
    y, X = data()
    V = Sum(
        a=CovariancePropagation(
            z=DummyMatrix.from_codes(torch.arange(N) % 7, 7), g=ScalarMatrix(7)
        ),
        b=CovariancePropagation(
            z=DummyMatrix.from_codes(torch.arange(N) % 9, 9), g=ScalarMatrix(9)
        ),
        residual=ScalarMatrix(N),
    ).double()
    loss = REMLLoss(V, solver=Krylov(probes=2, seed=1))
    before = loss(y, X).item()
    loss.solver = Krylov(probes=2, seed=2)
    assert loss(y, X).item() != before
    loss.solver = "dense"
    assert loss(y, X).item() == REMLLoss(V, solver="dense")(y, X).item()
    assert loss.plan.solver == "dense"


@pytest.mark.parametrize("solver", [Krylov(probes=4), Blocked(pair_cost=0), Auto(memory=5), Grid()])
def test_solvers_are_values(solver):
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert check_solver(solver) is solver
    assert type(solver)() == type(solver)()


def test_what_a_solver_by_name_has_analysed_is_not_shared():
    """Two fits at once, in two threads, would take each other's analysis."""
    assert check_solver("sparse") is not check_solver("sparse")
    terms = Sum(one=ScalarMatrix(4), two=ScalarMatrix(4)).terms()
    plans = [Plan.of(terms, 0, "auto", torch.float64) for _ in range(2)]
    assert plans[0].choice is not plans[1].choice


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Krylov(probes=0), InputError, "`probes` is 0"),
        (lambda: Krylov(probes=True), TypeError, "`probes` is True"),
        (lambda: Krylov(tolerance=2.0), InputError, "`tolerance` is 2.0"),
        (lambda: Krylov(seed=-1), InputError, "`seed` is -1"),
        (lambda: Blocked(pair_cost=-1), InputError, "`pair_cost` is -1"),
        (lambda: Auto(memory=0), InputError, "`memory` is 0"),
        (lambda: Auto(operations=0), InputError, "`operations` is 0"),
        (lambda: Sparse(memory=-1), InputError, "`memory` is -1"),
        (lambda: check_solver("fast"), InputError, "`solver` is 'fast': expected 'auto', "),
        (lambda: check_solver(Spectral), TypeError, "`solver` is the class Spectral"),
    ],
)
def test_wrong_options_are_refused_by_name(make, error, match):
    with pytest.raises(error, match=match):
        make()
