"""The likelihood estimated by random signs: how far it is off, and what makes it less so."""

from dataclasses import dataclass
from unittest import mock

import torch

from openreml_nn import REMLLoss
from openreml_nn.covariance import Pedigree
from openreml_nn.likelihood import Krylov
from openreml_nn.likelihood.solvers.krylov import KrylovProblem
from openreml_nn.likelihood.system.control import Control
from openreml_nn.likelihood.system.listed import Levels
from tests.likelihood import test_krylov


class Plain(KrylovProblem):
    """Without the control of what is known."""

    @property
    def control(self):
        return Control(Levels([], self.f), self.probes, 1e-6)


@dataclass(frozen=True)
class WithoutControl(Krylov):
    def problem(self, fixed, terms, method):
        return Plain(fixed, terms, method, self)


def evaluated(V, y, X, solver):
    return REMLLoss(V, solver=solver).objective(y, X).evaluate()


def test_the_error_that_it_states_is_that_over_other_signs():
    V, y, X = test_krylov.crossed(n=500, users=60, items=40)
    exact = REMLLoss(V, solver="blocked").objective(y, X).evaluate().log_likelihood
    off, stated = [], []
    for seed in range(24):
        found = evaluated(V, y, X, Krylov(seed=seed))
        off.append(float(found.log_likelihood - exact))
        stated.append(found.error)
    spread = float(torch.tensor(off).square().mean().sqrt())
    assert 0.6 < spread / float(torch.tensor(stated).mean()) < 1.6


def test_the_known_determinant_of_relatives_makes_the_error_less():
    generator = torch.Generator().manual_seed(0)
    parents = (torch.rand(150, 2, generator=generator) * torch.arange(150)[:, None]).long()
    sires, dams = parents[:, 0].tolist(), (parents[:, 1] + 1).tolist()
    dams[0] = None
    found = Pedigree.of(list(range(2, 151)), sires[1:], dams[1:])
    with mock.patch.object(test_krylov, "pedigree", return_value=found):
        m = test_krylov.related(300, len(found.levels), 1, 0)
    plain = evaluated(m.covariance, m.y, m.X, WithoutControl())
    controlled = evaluated(m.covariance, m.y, m.X, Krylov())
    exact = REMLLoss(m.covariance, solver="dense").objective(m.y, m.X).evaluate().log_likelihood
    assert controlled.error < 0.8 * plain.error
    assert abs(float(controlled.log_likelihood - exact)) < 4 * controlled.error
