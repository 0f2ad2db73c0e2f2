"""The likelihood estimated by random signs: how far it is off, and what makes it less so."""

from unittest import mock

import torch

from openreml_nn import REMLLoss
from openreml_nn.covariance import Pedigree
from openreml_nn.likelihood.solvers import krylov
from openreml_nn.likelihood.solvers.krylov import KrylovProblem
from tests.likelihood import test_krylov


def evaluated(V, y, X):
    return REMLLoss(V, solver="krylov").objective(y, X).evaluate()


def test_the_error_that_it_states_is_that_over_other_signs():
    V, y, X = test_krylov.crossed(n=500, users=60, items=40)
    exact = REMLLoss(V, solver="blocked").objective(y, X).evaluate().log_likelihood
    off, stated = [], []
    for seed in range(24):

        def signs(q, count, seed=seed):
            generator = torch.Generator().manual_seed(seed)
            return 2 * torch.randint(0, 2, (q, count), generator=generator) - 1

        with mock.patch.object(krylov, "_signs", signs):
            found = evaluated(V, y, X)
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
    with mock.patch.object(KrylovProblem, "controlled", lambda self, samples: samples):
        plain = evaluated(m.covariance, m.y, m.X)
    controlled = evaluated(m.covariance, m.y, m.X)
    exact = REMLLoss(m.covariance, solver="dense").objective(m.y, m.X).evaluate().log_likelihood
    assert controlled.error < 0.8 * plain.error
    assert abs(float(controlled.log_likelihood - exact)) < 4 * controlled.error
