"""LevelSums by level of mini-batches give what all rows at once give."""

import copy

import pytest
import torch
from torch import nn

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.covariance import (
    AR1Matrix,
    GaussianCorrelation,
    KnownMatrix,
    KroneckerProduct,
    UnstructuredMatrix,
    VecchiaMatrix,
)
from openreml_nn.estimation.aireml import Curvature
from openreml_nn.lightning.sums import LevelSums
from openreml_nn.likelihood import Sparse
from openreml_nn.model import take
from tests.strategies import kinship


def rows(n=120, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(n, 2, dtype=torch.float64)
    user, item = torch.randint(0, 9, (n,)), torch.randint(0, 5, (n,))
    groups = {"user": user, "item": item, "shop": item % 3, "class": user * 2 + item % 2}
    y = x.sum(1) + torch.randn(9, dtype=x.dtype)[user] + torch.randn(n, dtype=x.dtype)
    return {"x": x, "y": y, "groups": groups}


def model(random, residual=None, **options):
    torch.manual_seed(1)
    found = MixedModel(nn.Linear(2, 1).double(), random, residual, **options)
    with torch.no_grad():
        for p in found.covariance_parameters():
            p.copy_(0.4 * torch.randn_like(p))
    return found


def crossed():
    return {"user": RandomEffect(9), "item": RandomEffect(5), "shop": RandomEffect(3)}


def weighted():
    return {
        **rows(),
        "weights": torch.rand(120, dtype=torch.float64) + 0.5,
        "offset": rows()["x"][:, 0],
    }


def sloped():
    data = rows()
    return {**data, "values": {"user": torch.stack([torch.ones(120).double(), data["x"][:, 0]], 1)}}


def unknown():
    data = rows()
    groups = data["groups"]
    for i, codes in enumerate(groups.values()):
        codes[i::7] = -1
    return data


CASES = {
    "one factor": (lambda: model({"user": RandomEffect(9)}), rows),
    "crossed": (lambda: model(crossed()), rows),
    "nested": (lambda: model({"user": RandomEffect(9), "class": RandomEffect(18)}), rows),
    "slopes": (
        lambda: model({"item": RandomEffect(5), "user": RandomEffect(9, effects=2)}),
        sloped,
    ),
    "weights": (lambda: model(crossed()), weighted),
    "residual network": (lambda: model(crossed(), nn.Linear(2, 1).double()), weighted),
    "features": (
        lambda: model({"user": RandomEffect(9, effects=2, features=nn.Linear(2, 2).double())}),
        rows,
    ),
    "unknown": (lambda: model(crossed()), unknown),
    "kernel": (lambda: model({"user": RandomEffect(9, KnownMatrix(kinship(9)).double())}), rows),
}


@pytest.mark.parametrize("name", CASES)
def test_likelihood_blups_and_variances_equal_those_of_all_rows(name):
    make, data = CASES[name][0], CASES[name][1]()
    one = make()
    other = copy.deepcopy(one)
    sums = LevelSums(one)
    for at in torch.randperm(120).split(17):
        part = take(data, at)
        sums.add(part, one(part))
    found = sums.gathered()
    objective = other.objective(data)
    value = float(found.objective.evaluate().log_likelihood)
    assert value == pytest.approx(float(objective.evaluate().log_likelihood), rel=1e-11)
    own = list(one.covariance_parameters())
    scores = found.objective.gradient(own)
    torch.testing.assert_close(
        scores, objective.gradient(list(other.covariance_parameters())), rtol=1e-8, atol=1e-9
    )
    found.update()
    other.update(data)
    new = rows(30, seed=2)
    new["values"] = {"user": torch.randn(30, 2).double()} if name == "slopes" else {}
    for codes in new["groups"].values():
        codes[::5] = -1
    if name == "kernel":
        new["groups"]["user"].clamp_(min=0)
    for a, b in zip(one.predict(new), other.predict(new), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_many_small_sums_are_one_sum():
    data, one = unknown(), model(crossed())
    whole, parts = LevelSums(one), LevelSums(one, waiting=1)
    whole.add(data, one(data))
    for at in torch.arange(120).split(13):
        part = take(data, at)
        parts.add(part, one(part))
    values = [float(s.gathered().objective.evaluate().log_likelihood) for s in (whole, parts)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_result_of_sums_has_the_numbers_of_all_rows():
    data, one = unknown(), model(crossed())
    sums = LevelSums(one)
    sums.add(data, one(data))
    result = sums.gathered().result([], None)
    assert [r.values.shape for r in result.random] == [(9, 1), (5, 1), (3, 1)]
    assert result.rows == 120
    assert result.plan.solver == "blocked"
    assert [p.name for p in result.parameters][-1] == "residual/sigma^2"


def test_what_sums_cannot_be():
    with pytest.raises(InputError, match=r"correlated within groups.*'full' or 'parts'"):
        LevelSums(model({"user": RandomEffect(9)}, AR1Matrix(4)))
    with pytest.raises(InputError, match="solver 'krylov' needs all rows at once"):
        LevelSums(model({"user": RandomEffect(9)}, solver="krylov"))
    with pytest.raises(InputError, match="yielded no rows"):
        LevelSums(model({"user": RandomEffect(9)})).gathered()
    related, data = CASES["kernel"][0](), rows()
    data["groups"]["user"][3] = -1
    sums = LevelSums(related)
    sums.add(data, related(data))
    with pytest.raises(InputError, match=r"code -1.*correlated"):
        sums.gathered()


def near(q=9):
    places = torch.rand(q, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return VecchiaMatrix(places, GaussianCorrelation(), neighbours=4).double()


SPARSE = {name: CASES[name] for name in ("crossed", "slopes", "weights", "unknown", "kernel")} | {
    "near": (lambda: model({"user": RandomEffect(9, near())}), rows),
    "near and crossed": (
        lambda: model({"item": RandomEffect(5), "user": RandomEffect(9, near())}),
        weighted,
    ),
    "near slopes": (
        lambda: model(
            {
                "user": RandomEffect(
                    9,
                    KroneckerProduct(levels=near(), effects=UnstructuredMatrix(2).double()),
                    effects=2,
                )
            }
        ),
        sloped,
    ),
    "features of the head": (
        lambda: model({"item": RandomEffect(5), "user": RandomEffect(9, near())}, head="gls"),
        weighted,
    ),
}


@pytest.mark.parametrize("name", SPARSE)
def test_the_sparse_solver_makes_of_sums_what_the_blocked_one_does(name):
    make, data = SPARSE[name][0], SPARSE[name][1]()
    found = []
    for solver in ("blocked", "sparse"):
        one = make()
        one.solver = solver
        sums = LevelSums(one, waiting=30)
        for at in torch.arange(120).split(17):
            part = take(data, at)
            sums.add(part, one(part))
        gathered = sums.gathered()
        assert gathered.plan.solver == solver
        assert gathered.plan.rows == 120
        objective = gathered.objective
        at = objective.evaluate()
        own = list(one.covariance_parameters())
        gathered.update()
        found.append(
            [
                at.log_likelihood,
                *objective.gradient(own),
                Curvature([objective]).information,
                *(x for r in at.random for x in (r.values, r.variances)),
                at.fixed.estimate,
                at.fixed.covariance,
                objective.recorded(),
            ]
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_second_derivatives_of_sums_that_would_hold_too_much_are_refused():
    one, data = SPARSE["near"][0](), SPARSE["near"][1]()
    one.solver = Sparse(memory=30_000)
    sums = LevelSums(one, waiting=30)
    sums.add(data, one(data))
    gathered = sums.gathered()
    assert gathered.objective.evaluate().log_likelihood.isfinite()
    with pytest.raises(InputError, match=r"dense matrices that would hold .* GiB of 120 rows"):
        gathered.objective.recorded()


def test_the_plan_takes_the_solver_of_least_cost_for_sums():
    n, q = 3000, 700
    torch.manual_seed(0)
    codes = {name: torch.randint(0, q, (n,)) for name in ("a", "b")}
    data = {"x": torch.randn(n, 2).double(), "y": torch.randn(n).double(), "groups": codes}
    near = VecchiaMatrix(torch.rand(q, 2).double(), GaussianCorrelation(), neighbours=5)
    for effects, solver in (
        ({"a": RandomEffect(q, near)}, "sparse"),
        ({"a": RandomEffect(q)}, "blocked"),
    ):
        one = model(effects)
        batch = {**data, "groups": {name: codes[name] for name in effects}}
        sums = LevelSums(one)
        sums.add(batch, one(batch))
        assert sums.gathered().plan.solver == solver
