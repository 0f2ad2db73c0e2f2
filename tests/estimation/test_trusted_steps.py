"""A short step may be taken without an evaluation at its end, where a better likelihood is evaluated there."""

import pytest
import torch

from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.estimation import fit
from openreml_nn.estimation.aireml import average_information_step
from openreml_nn.estimation.fit import fit_reml, moment_start
from openreml_nn.estimation.safeguard import Safeguard
from openreml_nn.likelihood import REMLLoss
from openreml_nn.likelihood.solvers.krylov import Krylov
from openreml_nn.likelihood.system.conjugate import log_samples
from openreml_nn.support.errors import NumericalError


def crossed(n=60):
    g = torch.Generator().manual_seed(5)
    codes = [torch.randint(0, q, (n,), generator=g) for q in (12, 8)]
    effects = [torch.randn(q, generator=g, dtype=torch.float64) for q in (12, 8)]
    y = torch.randn(n, generator=g, dtype=torch.float64)
    for code, effect in zip(codes, effects, strict=True):
        y += effect[code]
    terms = {
        name: CovariancePropagation(DummyMatrix(code.tolist()), ScalarMatrix(int(code.max()) + 1))
        for name, code in zip("ab", codes, strict=True)
    }
    V = Sum(**terms, residual=ScalarMatrix(n)).double()
    return V, y, torch.ones(n, 1, dtype=torch.float64)


def stepped(trusted, monkeypatch):
    """The parameters after a step, and how often the likelihood was evaluated."""
    V, y, X = crossed()
    loss = REMLLoss(V, solver="blocked", reduction="sum")
    moment_start(loss, y, X)
    objective, seen = loss.objective(y, X), []
    evaluate = type(objective.problem).evaluate_unchecked
    monkeypatch.setattr(
        type(objective.problem),
        "evaluate_unchecked",
        lambda self, *at: seen.append(1) or evaluate(self, *at),
    )
    step = average_information_step([objective], trusted=trusted)
    monkeypatch.undo()
    return step, torch.cat([p.detach().flatten() for p in V.parameters()]), len(seen)


def test_a_trusted_step_ends_where_the_evaluated_one_does(monkeypatch):
    step, end, count = stepped(100.0, monkeypatch)
    usual, there, more = stepped(0.0, monkeypatch)
    assert step.length == usual.length == 1.0
    assert torch.equal(end, there)
    assert count == more - 1
    # What the quadratic promises is of the order of what is reached.
    assert step.log_likelihood == pytest.approx(usual.log_likelihood, abs=step.score_norm**2 / 2)


def test_a_step_to_a_boundary_is_not_trusted():
    V, y, X = crossed()
    loss = REMLLoss(V, solver="blocked", reduction="sum")
    moment_start(loss, y, X)
    with torch.no_grad():
        guard = Safeguard([loss.objective(y, X)], None, None)
        c, before = guard.curvature, [p.clone() for p in V.parameters()]
        gap = c.at.ends(c.u)[0] - c.u
        move = torch.where(gap == gap.nan_to_num(0, 0, 0), gap, 0)
        assert bool((move < 0).any())
        assert guard.trust(0.95 * move) is None
        assert all(map(torch.equal, V.parameters(), before))
        assert guard.trust(0.5 * move) is not None
        assert not all(map(torch.equal, V.parameters(), before))


def test_the_start_asks_for_no_probe(monkeypatch):
    V, y, X = crossed()
    loss = REMLLoss(V, solver=Krylov(probes=8), reduction="sum")
    asked = []
    monkeypatch.setattr(
        "openreml_nn.likelihood.solvers.krylov.log_samples",
        lambda *given: asked.append(1) or log_samples(*given),
    )
    moment_start(loss, y, X)
    assert not asked
    found = loss.objective(y, X).evaluate()
    assert not asked
    assert found.error > 0
    assert torch.isfinite(found.log_likelihood)
    assert len(asked) == 1


def test_exact_steps_begin_where_the_exact_likelihood_exists(monkeypatch):
    """The last rough step is undone where it ends beyond that."""
    V, y, X = crossed()
    expected = fit_reml(V, y, X, solver="blocked").log_likelihood
    monkeypatch.setattr(fit, "_WORTH", 0.0)
    V, y, X = crossed()
    problem = type(REMLLoss(V, solver="blocked").objective(y, X).problem)
    evaluate, failed = problem.evaluate_unchecked, []

    def evaluate_unchecked(self, *at):
        if not failed:
            failed.append(1)
            raise NumericalError("there is no such likelihood")
        return evaluate(self, *at)

    monkeypatch.setattr(problem, "evaluate_unchecked", evaluate_unchecked)
    found = fit_reml(V, y, X, solver="blocked")
    assert failed
    assert found.log_likelihood == pytest.approx(expected, rel=1e-9)
