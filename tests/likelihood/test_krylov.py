"""The Krylov solver: exact where every sign is a probe, and as accurate as it says where not."""

from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openreml_nn import REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    Pedigree,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    stratified,
)
from openreml_nn.likelihood import Auto, Krylov
from openreml_nn.likelihood.plan import Plan
from openreml_nn.likelihood.system.roles import Roles, separated
from openreml_nn.terms.kernel import Kernel
from tests.likelihood.models import Model, models
from tests.likelihood.test_loss import METHODS, _compare_solvers
from tests.strategies import kinship, pedigree

#: Each takes hundreds of systems of equations.
FEWER, FEW = (settings(max_examples=settings.default.max_examples // k) for k in (3, 10))


def crossed(n=3000, users=300, items=60, slopes=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(0, users, (n,), generator=generator)
    item = torch.randint(0, items, (n,), generator=generator)
    x = torch.randn(n, generator=generator)
    values = torch.stack([torch.ones(n), x], 1) if slopes else None
    k = 2 if slopes else 1
    g = KroneckerProduct(IdentityMatrix(items), UnstructuredMatrix(k))
    V = Sum(
        user=CovariancePropagation(z=DummyMatrix.from_codes(user, users), g=ScalarMatrix(users)),
        item=CovariancePropagation(
            z=DummyMatrix.from_codes(item, items, values),
            g=g if slopes else ScalarMatrix(items),
        ),
        residual=ScalarMatrix(n),
    ).double()
    b = (
        torch.randn(users, generator=generator)[user]
        + torch.randn(items, generator=generator)[item]
    )
    y = b + 0.5 * x + torch.randn(n, generator=generator)
    return V, y, torch.stack([torch.ones(n), x], 1)


#: All 2^q patterns, over which a random sign's expectation is the mean.
EVERY_SIGN = Krylov(probes=2**9, probe_tolerance=1e-13)


@FEWER
@given(st.data(), st.sampled_from(METHODS))
def test_with_every_sign_it_equals_dense(data, method):
    m = data.draw(models())
    terms = separated(m.covariance.terms())
    assume(Krylov().obstacle(terms) is None)
    assume(sum(terms[i].design.shape[1] for i in Roles.of(terms).rest) <= 8)
    _compare_solvers(m, method, ("dense", EVERY_SIGN), second=False, tolerance=1e-8)


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_as_accurate_as_it_says(slopes, seed):
    V, y, X = crossed(slopes=slopes, seed=seed)
    exact = fit_reml(V, y, X, solver="blocked")
    exact_components = [c.covariance.clone() for c in exact.components]
    found = fit_reml(V, y, X, solver="krylov")
    assert found.converged
    assert 0 < found.log_likelihood_error < 1
    assert abs(found.log_likelihood - exact.log_likelihood) < 4 * found.log_likelihood_error
    for c, expected in zip(found.components, exact_components, strict=True):
        # Estimates within a twentieth of their standard errors.
        assert bool(((c.covariance - expected).abs() <= 0.05 * c.std_error + 1e-12).all())
    torch.testing.assert_close(
        found.fixed.estimate,
        exact.fixed.estimate,
        rtol=0,
        atol=float(exact.fixed.std_error[0]) / 50,
    )
    for one, other in zip(exact.random, found.random, strict=True):
        spread = one.values.std()
        torch.testing.assert_close(other.values, one.values, rtol=0, atol=float(spread) / 100)
    assert "standard error of" in found.summary()


def test_what_needs_no_probe_is_exact():
    V, y, X = crossed()
    found = {}
    for solver in ("blocked", "krylov"):
        objective = REMLLoss(V, solver=solver).objective(y, X)
        evaluation = objective.evaluate()
        derivatives = [
            torch.ones(1, *m.shape) for m in objective.problem.matrices(objective.terms())
        ]
        found[solver] = [
            evaluation.y_p_y,
            evaluation.gamma,
            evaluation.gamma_factor,
            evaluation.information(derivatives),
            *[effects.values for effects in evaluation.random_effects()],
        ]
    torch.testing.assert_close(found["krylov"], found["blocked"], rtol=1e-8, atol=1e-9)


def test_the_same_point_gives_the_same_number():
    V, y, X = crossed()
    first = REMLLoss(V, solver="krylov")(y, X)
    assert REMLLoss(V, solver="krylov")(y, X).item() == first.item()


def test_auto_takes_it_with_a_warning_only_where_exact_solvers_would_not_fit():
    V, y, X = crossed()
    assert REMLLoss(V).objective(y, X).problem.__class__.__name__ == "BlockedProblem"
    loss = REMLLoss(V, solver=Auto(memory=1000))
    insists = "approximate: exact solvers would need .*; solver='blocked' insists on an exact one"
    with pytest.warns(RuntimeWarning, match=insists):
        loss(y, X)
    assert loss.plan.solver == "krylov"
    assert "'item': conjugate gradients, 60 columns" in str(loss.plan)


def test_auto_takes_it_where_exact_solvers_would_take_too_long():
    """Half a minute an evaluation by default; it then takes a tenth of that at most."""
    n, generator = 8_000, torch.Generator().manual_seed(0)
    parts = {}
    for name, q in (("a", 1000), ("b", 1200), ("c", 1400)):
        codes = torch.randint(0, q, (n,), generator=generator)
        z = DummyMatrix.from_codes(codes, q)
        parts[name] = CovariancePropagation(z=z, g=ScalarMatrix(q))
    terms = Sum(**parts, residual=ScalarMatrix(n)).double().terms()
    plans = [Plan.of(terms, 1, solver, torch.float64) for solver in ("auto", Auto(operations=1e8))]
    assert [plan.exact for plan in plans] == [True, False]
    assert "an exact evaluation would take" in plans[1].reason
    assert plans[0].cost.operations >= 10 * plans[1].cost.operations
    # Of few columns it takes as long as an exact one, which is then kept.
    V, _, _ = crossed()
    assert Plan.of(V.terms(), 1, Auto(operations=1.0), torch.float64).exact


def test_what_it_cannot_do_is_said():
    n, q = 12, 4
    y, X = torch.randn(n), torch.ones(n, 1)
    z = DummyMatrix([i % q for i in range(n)])
    kernel = Sum(CovariancePropagation(z=z, g=KnownMatrix(kinship(q))), ScalarMatrix(n)).double()
    with pytest.raises(ValueError, match="grouping factors with independent levels"):
        REMLLoss(kernel, solver="krylov")(y, X)
    strata = Sum(
        CovariancePropagation(z=z, g=ScalarMatrix(q)), stratified([i % 2 for i in range(n)])
    ).double()
    with pytest.raises(ValueError, match="residuals of one variance"):
        REMLLoss(strata, solver="krylov")(y, X)
    V, y, X = crossed()
    value = REMLLoss(V, solver="krylov")(y, X)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(value, list(V.parameters()), create_graph=True)


def test_the_gradient_by_the_response_is_exact():
    V, y, X = crossed()
    y.requires_grad_()
    gradient = {
        solver: torch.autograd.grad(REMLLoss(V, "ml", solver)(y, X), y)[0]
        for solver in ("blocked", "krylov")
    }
    torch.testing.assert_close(gradient["krylov"], gradient["blocked"], rtol=1e-8, atol=1e-11)


def related(n, q, traits, seed, crossed=True):
    """Records of related animals in litters, on one or more traits."""
    generator = torch.Generator().manual_seed(seed)
    animal = torch.randint(0, q, (n,), generator=generator)
    trait = torch.arange(n) % traits
    known = KnownInverseMatrix(pedigree(q).inverse)
    if traits == 1:
        g, codes, levels = known, animal, q
    else:
        known.fix("sigma^2", 0.0)
        g = KroneckerProduct(traits=UnstructuredMatrix(traits), animals=known)
        codes, levels = trait * q + animal, traits * q
    parts = {"animal": CovariancePropagation(z=DummyMatrix.from_codes(codes, levels), g=g)}
    if crossed:
        litter = torch.randint(0, 3, (n,), generator=generator)
        z = DummyMatrix.from_codes(litter, 12)
        parts["litter"] = CovariancePropagation(z=z, g=ScalarMatrix(12))
    V = Sum({**parts, "residual": ScalarMatrix(n)}).double()
    with torch.no_grad():
        for p in V.parameters():
            p.copy_(0.5 * torch.randn(1, generator=generator))
    return Model(V, torch.randn(n, generator=generator), torch.randn(n, 2, generator=generator))


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize(("traits", "q"), [(1, 8), (2, 4)])
@FEW
@given(st.integers(0, 1000), st.sampled_from(METHODS))
def test_relatives_by_a_sparse_inverse_equal_dense(crossed, traits, q, seed, method):
    m = related(20, q, traits, seed, crossed)
    _compare_solvers(m, method, ("dense", EVERY_SIGN), second=False, tolerance=1e-8)


@pytest.mark.slow
def test_the_inverse_of_a_large_pedigree_is_never_made_dense():
    generator = torch.Generator().manual_seed(0)
    parents = (torch.rand(500, 2, generator=generator) * torch.arange(500)[:, None]).long()
    names = list(range(1, 501))
    sires, dams = parents[:, 0].tolist(), (parents[:, 1] + 1).tolist()
    dams[0] = None  # parents are born before: 0 is unknown
    found = Pedigree.of(names[1:], sires[1:], dams[1:])
    with mock.patch(f"{__name__}.pedigree", return_value=found):
        m = related(700, len(found.levels), 1, 0)
    with (
        mock.patch.object(Kernel, "dense", side_effect=AssertionError),
        pytest.warns(RuntimeWarning) as told,
    ):
        # One step takes all that the others do.
        result = fit_reml(m.covariance, m.y, m.X, solver=Auto(memory=2**10), max_iterations=1)
    assert any("approximate" in str(warning.message) for warning in told)
    assert result.plan.solver == "krylov"
    assert all(torch.isfinite(effects.variances).all() for effects in result.random)


def test_a_variance_of_zero_is_an_ordinary_point_for_relatives():
    m = related(30, 8, 1, 0)
    m.covariance.fix("animal/g/sigma^2", -float("inf"))
    value = REMLLoss(m.covariance, solver=EVERY_SIGN)(m.y, m.X)
    value.backward()
    torch.testing.assert_close(value, REMLLoss(m.covariance, solver="dense")(m.y, m.X))
    assert all(torch.isfinite(p.grad).all() for p in m.covariance.parameters())
