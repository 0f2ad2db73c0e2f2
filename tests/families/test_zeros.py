"""Zero inflation: its derivatives, its fits against a direct maximisation, its predictions."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import gammaln
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect, glmm
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix
from openreml_nn.families import (
    Binomial,
    Family,
    Gamma,
    NegativeBinomial,
    NegativeBinomial1,
    Poisson,
    ZeroInflated,
)
from openreml_nn.inference import heritability, r2, variance_shares
from openreml_nn.lightning import MixedModule
from openreml_nn.likelihood import LaplaceLoss
from openreml_nn.metrics import MeanDeviance, mean_deviance
from tests.families.test_glmm import data
from tests.test_neural import quiet

INNER = [Poisson, NegativeBinomial, NegativeBinomial1, Binomial]


def inflated(make):
    torch.manual_seed(0)
    return ZeroInflated(make(), nn.Linear(2, 1, bias=False), ["(Intercept)", "z"])


def responses(n=30, binary=False):
    g = torch.Generator().manual_seed(1)
    y = torch.poisson(torch.full((n,), 0.7 if binary else 1.5), generator=g)
    y = y.clamp(max=1) if binary else y
    return torch.stack([y, torch.ones(n), torch.randn(n, generator=g)], 1)


@pytest.mark.parametrize("make", INNER)
def test_derivatives_are_those_of_automatic_differentiation(make):
    family, y = inflated(make), responses(binary=make is Binomial)
    eta = torch.linspace(-4, 3, len(y))
    with torch.no_grad():
        found = family.derivatives(y, eta)
    for one, other in zip(found, Family.derivatives(family, y, eta), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("solver", ["blocked", "sparse"])
def test_gradients_are_those_of_finite_differences(make, solver):
    family, y = inflated(make), responses(binary=make is Binomial)
    z = DummyMatrix.from_codes(torch.arange(30) % 6, [str(i) for i in range(6)])
    loss = LaplaceLoss(CovariancePropagation(z=z, g=ScalarMatrix(6)), family, solver=solver)
    eta = torch.linspace(-1, 1, 30, requires_grad=True)
    y.requires_grad_()
    loss(y, eta).backward()
    step = 1e-5
    for tensor in [eta, *loss.parameters()]:
        flat = tensor.data.view(-1)
        for i in range(min(3, len(flat))):
            kept, ends = flat[i].item(), []
            for sign in (1, -1):
                flat[i] = kept + sign * step
                ends.append(loss(y, eta).item())
            flat[i] = kept
            found = (ends[0] - ends[1]) / (2 * step)
            assert tensor.grad.view(-1)[i].item() == pytest.approx(found, rel=2e-6, abs=2e-7)


def test_a_fit_is_that_of_a_direct_maximisation():
    table = data("salamanders")
    result = glmm(
        "count ~ mined + (1 | site)", table, family="poisson", zi="~ mined", quadrature=15
    )
    assert result.converged
    y, mined = table["count"].to_numpy(), (table.mined == "yes").to_numpy(float)
    site = pd.factorize(table.site)[0]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = np.log(weights / weights.sum())

    def loss(x):
        a = (x[0] + x[1] * mined)[:, None] + np.exp(x[4]) * nodes
        zeta = (x[2] + x[3] * mined)[:, None]
        some = y[:, None] * a - np.exp(a) - gammaln(y + 1)[:, None] - np.logaddexp(0, zeta)
        rows = np.where(y[:, None] == 0, np.logaddexp(some, -np.logaddexp(0, -zeta)), some)
        total = np.stack([rows[site == s].sum(0) for s in range(site.max() + 1)]) + weights
        return -np.logaddexp.reduce(total, 1).sum()

    found = minimize(loss, [1.2, -1.1, -0.6, 1.7, -1.2], method="BFGS", options={"gtol": 1e-5})
    assert result.log_likelihood == pytest.approx(-found.fun, rel=1e-7)
    zi = {e.name: e.value for e in result.family_parameters}
    ours = [*result.fixed.estimate.tolist(), zi["zi (Intercept)"], zi["zi minedyes"]]
    assert ours == pytest.approx(found.x[:4], abs=2e-3)
    errors = [*result.fixed.std_error.tolist(), *(e.std_error for e in result.family_parameters)]
    h = 1e-3 * np.eye(5)
    H = [
        [
            sum(a * b * loss(found.x + a * h[i] + b * h[j]) for a in (1, -1) for b in (1, -1))
            / 4e-6
            for j in range(5)
        ]
        for i in range(5)
    ]
    assert errors == pytest.approx(np.sqrt(np.diag(np.linalg.inv(H)))[:4], rel=1e-2)


def test_a_laplace_fit_is_that_of_glmmtmb():
    # Brooks et al., The R Journal 9 (2017) 378: AIC 1908.5, site variance 0.0784.
    table = data("salamanders")
    result = glmm("count ~ mined + (1 | site)", table, family="poisson", zi="~ mined")
    assert -2 * result.log_likelihood + 10 == pytest.approx(1908.5, abs=0.05)
    assert float(result.components[0].covariance) == pytest.approx(0.0784, abs=1e-4)


def test_predictions_hold_the_zeros(tmp_path):
    table = data("salamanders").astype({"mined": str})
    table.loc[3, "cover"] = np.nan
    with pytest.warns(RuntimeWarning, match="1 of 644 rows left out"):
        result = glmm("count ~ mined + (1 | site)", table, family="poisson", zi="~ cover")
    assert result.rows == len(table) - 1
    zi = {e.name: e.value for e in result.family_parameters}
    new = pd.DataFrame({"mined": "no", "site": "R-1", "cover": [0.0, 2.0]})
    found = result.predict(new)
    logit = zi["zi (Intercept)"] + zi["zi cover"] * new.cover
    ratio = (1 + np.exp(logit[0])) / (1 + np.exp(logit[1]))
    assert found["mean"][1] / found["mean"][0] == pytest.approx(ratio, rel=1e-10)
    assert result.fitted.mean() == pytest.approx(table["count"].drop(3).mean(), rel=0.05)
    result.to_json(tmp_path / "result.json")
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["model"]["family"] == "zero-inflated poisson"
    assert set(record["family_parameters"]) == {"zi (Intercept)", "zi cover"}
    assert "zi cover" in result.summary()


def test_a_network_of_the_zeros_is_trained():
    torch.manual_seed(0)
    n, q = 400, 20
    z, codes = torch.randn(n, 1), torch.arange(n) % q
    some = torch.bernoulli(torch.sigmoid(2 * z[:, 0]))
    y = some * torch.poisson((1 + 0.5 * torch.randn(q)[codes]).exp())
    zeros = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    family = ZeroInflated(Poisson(), zeros)
    model = MixedModel(nn.Linear(1, 1), {"g": RandomEffect(q)}, family=family)
    batch = {"x": torch.ones(n, 1), "y": y, "groups": {"g": codes}, "zi": z}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.corrcoef(torch.stack([zeros(z)[:, 0], -2 * z[:, 0]]))[0, 1] > 0.9
    model.update(batch)
    found = model.predict(batch)
    assert torch.corrcoef(torch.stack([found.mean, z[:, 0]]))[0, 1] > 0.7


def test_a_module_without_names_of_inputs_has_the_fit_of_glmm():
    table = data("salamanders")
    result = glmm("count ~ mined + (1 | site)", table, family="poisson", zi="~ mined")
    mined = torch.tensor((table.mined == "yes").to_numpy(float))
    codes = torch.tensor(table.site.astype("category").cat.codes.to_numpy(), dtype=torch.long)
    x = torch.stack([torch.ones_like(mined), mined], 1)
    family = ZeroInflated(Poisson(), nn.Linear(2, 1, bias=False))
    model = MixedModel(nn.Identity(), {"g": RandomEffect(23)}, head="gls", family=family)
    batch = {"x": x, "y": torch.tensor(table["count"].to_numpy(float)), "groups": codes, "zi": x}
    module = MixedModule(model)
    quiet(100).fit(module, DataLoader([batch], batch_size=None))
    assert module.result.log_likelihood == pytest.approx(result.log_likelihood, abs=1e-6)
    assert module.result.fixed.estimate.tolist() == pytest.approx(
        result.fixed.estimate.tolist(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "of"), [(None, lambda mu: np.log1p(1 / mu)), ("delta", lambda mu: 1 / mu)]
)
def test_shares_of_variance_are_those_of_the_responses_beside_the_zeros(kind, of):
    """With the mean of the null model, whose zero part is that of the fit."""
    table = data("salamanders")
    result = glmm("count ~ mined + (1 | site)", table, family="poisson", zi="~ mined")
    null = glmm("count ~ 1 + (1 | site)", table, family="poisson", zi="~ mined")
    fixed = float((result.source.X @ result.fixed.estimate).var())
    random = float(result.components[0].covariance)
    mu = np.exp(float(null.fixed.estimate) + float(null.components[0].covariance) / 2)
    total = fixed + random + of(mu)
    np.testing.assert_allclose(r2(result, kind), [fixed / total, (fixed + random) / total], 1e-6)
    shares = variance_shares(result, kind)
    assert shares["share"].tolist() == pytest.approx(
        [random / (total - fixed), of(mu) / (total - fixed)]
    )
    assert heritability(result, "site").estimate == pytest.approx(
        variance_shares(result)["share"][0]
    )


def test_an_inflated_response_has_no_unit_deviance():
    family = ZeroInflated(Poisson(), nn.Linear(1, 1))
    said = "`family` is 'zero-inflated poisson', which has no unit deviance: judge"
    with pytest.raises(InputError, match=said):
        mean_deviance(torch.ones(3), torch.ones(3), family)
    with pytest.raises(InputError, match=said):
        MeanDeviance(family)
    with pytest.raises(InputError, match=r"no unit deviance: .* fits by Result\.deviance"):
        family.deviance(torch.ones(3), torch.ones(3))


def test_what_has_no_zero_part_is_refused():
    table = data("salamanders")
    with pytest.raises(InputError, match=r"`family` is 'gamma', without zeros to inflate"):
        ZeroInflated(Gamma(), nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"`zi` is '1 \+ mined': expected '~' and fixed effects"):
        glmm("count ~ 1 + (1 | site)", table, family="poisson", zi="1 + mined")
    with pytest.raises(InputError, match="depend on each other"):
        glmm("count ~ 1 + (1 | site)", table, family="poisson", zi="~ cover + I(2 * cover)")
    batch = {"x": torch.ones(4, 1), "y": torch.ones(4), "groups": {"g": torch.arange(4) % 2}}
    model = MixedModel(nn.Linear(1, 1), {"g": RandomEffect(2)}, family=Poisson())
    with pytest.raises(InputError, match="the family is not ZeroInflated"):
        model.loss(batch | {"zi": torch.ones(4, 1)})
    model = MixedModel(nn.Linear(1, 1), {"g": RandomEffect(2)}, family=inflated(Poisson))
    with pytest.raises(InputError, match=r"no inputs of the zero part: expected `batch\['zi'\]`"):
        model.loss(batch)


def test_a_gaussian_response_takes_no_part_for_its_zeros():
    model = MixedModel(nn.Linear(1, 1), {"g": RandomEffect(3)}).double()
    batch = {
        "x": torch.ones(6, 1).double(),
        "y": torch.arange(6.0).double(),
        "groups": {"g": torch.arange(6) % 3},
    }
    assert model.loss(batch).isfinite()
    with pytest.raises(InputError, match=r"`batch\['zi'\]` is given but the response is Gaussian"):
        model.loss({**batch, "zi": batch["x"]})
