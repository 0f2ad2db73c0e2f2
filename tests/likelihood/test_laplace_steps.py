"""Steps to a mode by a factor of near by: they end where those by the true one do."""

import pytest
import torch

from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.families import Binomial, Poisson
from openreml_nn.likelihood import LaplaceLoss, Sparse
from openreml_nn.likelihood.laplace_steps import Steps
from openreml_nn.support.errors import InputError, NumericalError

N = 3000


class OfMatrix:
    """The factor of a matrix, with the border that it has."""

    def __init__(self, H: torch.Tensor) -> None:
        self._L = torch.linalg.cholesky(H)

    def solve(self, g, g_X):
        found = torch.cholesky_solve(torch.cat([g, g_X]), self._L)
        return found.split([len(g), len(g_X)])


def steps_down(H, near, count):
    """How far from zero steps on the quadratic of H end, by a factor of another matrix."""
    steps = Steps(OfMatrix(near), len(H) - 2)
    x = torch.linspace(-1, 2, len(H), dtype=torch.float64)
    for _ in range(count):
        x = x - steps.step(x, H @ x)[0]
    return float(x.norm())


def test_steps_by_another_factor_are_corrected_by_what_gradients_show():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(30, 60, generator=generator, dtype=torch.float64)
    H = A @ A.mT / 60 + torch.eye(30)
    assert steps_down(H, H, 1) < 1e-13
    near = H + 0.2 * torch.diag(torch.rand(30, generator=generator, dtype=torch.float64))
    E = torch.eye(30).to(H) - torch.linalg.solve(near, H)
    x = torch.linspace(-1, 2, 30, dtype=torch.float64)
    plain = float((torch.linalg.matrix_power(E, 8) @ x).norm())
    assert steps_down(H, near, 8) < plain / 100


def test_a_step_that_leads_nowhere_is_refused():
    steps = Steps(OfMatrix(torch.eye(3).double()), 3)
    with pytest.raises(NumericalError, match="random effects is nan long"):
        steps.step(torch.zeros(3).double(), torch.full((3,), torch.nan).double())


def crossed(sigma_a, sigma_b, levels=(400, 300)):
    parts = {}
    for j, (q, sigma) in enumerate(zip(levels, (sigma_a, sigma_b), strict=True)):
        codes = torch.randint(q, (N,), generator=torch.Generator().manual_seed(j))
        g = ScalarMatrix(q)
        g.set_value("sigma^2", sigma, natural=True)
        parts[f"f{j}"] = CovariancePropagation(z=DummyMatrix.from_codes(codes, q), g=g)
    return Sum(**parts).double()


@pytest.mark.parametrize("family", [Binomial(), Poisson()])
@pytest.mark.parametrize("solver", ["sparse", "blocked"])
def test_a_mode_found_from_an_earlier_one_far_away_is_that_found_anew(family, solver):
    generator = torch.Generator().manual_seed(5)
    y = (torch.rand(N, generator=generator) < 0.4).double()
    eta = torch.randn(N, generator=generator).double()
    kept = LaplaceLoss(crossed(0.05, 2.0), family, solver=solver)
    kept(y, eta)
    X = torch.stack([torch.ones(N), eta], 1).double()
    # Where a fit begins: with coefficients of X, of which the next call has none.
    start = kept.penalised(y, 0 * eta, X, torch.zeros(2).double())[0]
    values = {}
    for name, loss in (
        ("kept", kept),
        ("new", LaplaceLoss(crossed(1.5, 0.3), family, solver=solver)),
    ):
        for j, sigma in enumerate((1.5, 0.3)):
            loss.covariance.set_value(f"f{j}/g/sigma^2", sigma, natural=True)
        at = (X @ start).requires_grad_()
        value = loss(y, at)
        slopes = torch.autograd.grad(value, [at, *loss.covariance.parameters()])
        values[name] = [value.detach(), *slopes]
    for one, other in zip(values["kept"], values["new"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_coefficients_where_a_fit_begins_are_near_those_of_the_mode():
    y = (torch.rand(N, generator=torch.Generator().manual_seed(5)) < 0.4).double()
    X = torch.stack([torch.ones(N), torch.linspace(-1, 1, N)], 1).double()
    rough, exact = (
        LaplaceLoss(crossed(0.5, 0.3), Binomial(), method, solver=solver)
        for method, solver in (("ml", "sparse"), ("reml", "blocked"))
    )
    found, spread = rough.penalised(y, 0 * y, X, torch.zeros(2).double())
    mode = exact.evaluate(y, 0 * y, X)
    off = (found - mode.coefficients) / mode.coefficient_covariance.diagonal().sqrt()
    assert float(off.abs().max()) < 0.02
    known = mode.coefficient_covariance.diagonal()
    torch.testing.assert_close(spread.diagonal(), known, rtol=0.1, atol=0)


def test_a_system_of_families_beyond_memory_is_refused_before_it_is_made():
    q = 80_000
    i = torch.arange(q)
    one, other = torch.cat([i, i]), torch.cat([i, (i + 1) % q])
    V = Sum(
        **{
            name: CovariancePropagation(DummyMatrix.from_codes(codes, q), ScalarMatrix(q))
            for name, codes in (("a", one), ("b", other))
        }
    ).double()
    y, eta = (one % 2).double(), torch.zeros(2 * q).double()
    for solver in ("blocked", "dense"):
        what = rf"the {solver} solver would hold \d+ GiB .* solver='krylov' is approximate .* a larger machine"
        with pytest.raises(InputError, match=what):
            LaplaceLoss(V, Binomial(), solver=solver)(y, eta)
    with pytest.raises(InputError, match=r"solver='krylov' is approximate .* `Sparse\(mem"):
        LaplaceLoss(crossed(1.0, 1.0), Binomial(), solver=Sparse(memory=1e4))(y[:N], eta[:N])
