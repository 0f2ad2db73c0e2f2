"""Parameters of designs are estimated with those of the covariance."""

import pytest
import torch
from torch import nn

from openreml_nn import AIREML, InputError, REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    LowerTriangularMatrix,
    ScalarMatrix,
    Sum,
)


def factor_model(n=30, p=4):
    z = KroneckerProduct(IdentityMatrix(n), LowerTriangularMatrix(p, 1))
    return Sum(f=CovariancePropagation(z=z, g=IdentityMatrix(n)), e=ScalarMatrix(n * p)).double()


def factor_data(n=30, p=4):
    generator = torch.Generator().manual_seed(0)
    loadings = torch.tensor([2.0, 1.0, 0.5, -1.0]).double()
    scores = torch.randn(n, generator=generator).double()
    noise = torch.randn(n * p, generator=generator).double()
    y = loadings.repeat(n) * scores.repeat_interleave(p) + 0.5 * noise
    return y, torch.eye(p).repeat(n, 1).double()


class Growth(nn.Module):
    """Z(x; w): a saturating curve in x."""

    def __init__(self, x):
        super().__init__()
        self.x = x
        self.rate = nn.Parameter(torch.tensor([0.3], dtype=x.dtype))

    def forward(self):
        return 1 - torch.exp(-self.rate * self.x)


def curve_model(n=80, q=10):
    x = torch.linspace(0.1, 5, n // q).double().repeat(q)
    z = DummyMatrix([i // (n // q) for i in range(n)], covariates=Growth(x))
    return Sum(g=CovariancePropagation(z=z, g=ScalarMatrix(q)), e=ScalarMatrix(n)).double(), x


def curve_data(n=80, q=10):
    _, x = curve_model(n, q)
    generator = torch.Generator().manual_seed(1)
    b = 3 * torch.randn(q, generator=generator).double().repeat_interleave(n // q)
    y = b * (1 - torch.exp(-1.2 * x)) + 0.3 * torch.randn(n, generator=generator).double()
    return y, torch.ones(n, 1).double()


def by_lbfgs(V, y, X):
    loss = REMLLoss(V, reduction="sum")
    optimizer = torch.optim.LBFGS(loss.parameters(), line_search_fn="strong_wolfe", max_iter=200)

    def closure():
        optimizer.zero_grad()
        value = loss(y, X)
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    return -loss(y, X).item()


MODELS = {
    "loadings": (factor_model, factor_data),
    "curve": (lambda: curve_model()[0], curve_data),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_fit_reaches_the_optimum_of_lbfgs(name):
    make, data = MODELS[name]
    y, X = data()
    result = fit_reml(make(), y, X)
    assert result.converged
    assert result.iterations <= 25
    assert result.log_likelihood == pytest.approx(by_lbfgs(make(), y, X), abs=1e-6)


def test_the_result_lists_the_parameters_of_a_network_with_standard_errors():
    V = curve_model()[0]
    y, X = curve_data()
    result = fit_reml(V, y, X)
    by = {p.name: p for p in result.parameters}
    rate = by["g/z/covariates/rate"]
    assert rate.value == V.operands["g"].operands["z"].covariates.rate.item()
    assert abs(rate.value - 1.2) < 4 * rate.std_error < 1.2
    assert result.num_params == 3
    # The observed information: by differences of the gradient of the likelihood.
    loss = REMLLoss(V, reduction="sum")
    parameters = list(V.parameters())

    def gradient():
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(y, X), parameters)])

    rows = []
    for p in parameters:
        ends = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                p.add_(step)
            ends.append(gradient())
            with torch.no_grad():
                p.sub_(step)
        rows.append((ends[0] - ends[1]) / 2e-4)
    names = [name for name, _ in V.named_parameters()]
    error = torch.linalg.inv(torch.stack(rows)).diagonal().sqrt()
    at = names.index("g.z.covariates.rate")
    assert rate.std_error == pytest.approx(error[at].item(), rel=1e-4)


def test_the_optimizer_estimates_them_too():
    y, X = factor_data()
    expected = fit_reml(factor_model(), y, X).log_likelihood
    V = factor_model()
    loss = REMLLoss(V, reduction="sum")
    optimizer = AIREML(loss.parameters())
    for _ in range(30):
        value = optimizer.step(lambda: loss(y, X))
        if optimizer.last.converged:
            break
    assert optimizer.last.converged
    assert -value.item() == pytest.approx(expected, abs=1e-6)


def test_frozen_loadings_stay():
    y, X = factor_data()
    V = factor_model()
    V.operands["f"].operands["z"].requires_grad_(False)
    result = fit_reml(V, y, X)
    assert result.converged
    assert [p.value for p in result.parameters if p.fixed] == [1.0] * 4


def test_scale_in_z_and_g_at_once_is_said_to_be_indistinct():
    n, p = 30, 4
    z = KroneckerProduct(IdentityMatrix(n), LowerTriangularMatrix(p, 1))
    V = Sum(f=CovariancePropagation(z=z, g=ScalarMatrix(n)), e=ScalarMatrix(n * p)).double()
    y, X = factor_data()
    with pytest.warns(RuntimeWarning, match="cannot tell apart"):
        result = fit_reml(V, y, X)
    assert result.converged
    assert "f/z/op_1/L_0_0" in result.indistinct
    expected = fit_reml(factor_model(), y, X).log_likelihood
    assert result.log_likelihood == pytest.approx(expected, abs=1e-6)


def test_a_network_that_is_too_large_is_refused_by_name():
    x = torch.linspace(0, 1, 80).double()[:, None]

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 600), nn.Tanh(), nn.Linear(600, 1))

        def forward(self):
            return self.net(x)

    z = DummyMatrix([i // 8 for i in range(80)], covariates=Wide().double())
    V = Sum(g=CovariancePropagation(z=z, g=ScalarMatrix(10)), e=ScalarMatrix(80)).double()
    y, X = curve_data()
    with pytest.raises(InputError, match="covariates/net/0/weight"):
        fit_reml(V, y, X)
