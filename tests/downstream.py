"""What a user writes, with the types that it has: mypy reads it with the package, and again with the
wheel alone, as ``py.typed`` promises. It also runs."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

from openreml_nn import (
    AIREML,
    InputError,
    MixedModel,
    NumericalError,
    RandomEffect,
    REMLLoss,
    Result,
    datasets,
    fit_reml,
    glmm,
    lmm,
)
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    Matrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.inference import LikelihoodRatio, likelihood_ratio_test
from openreml_nn.lightning import MixedModule
from openreml_nn.model import Prediction


def tables() -> Result:
    """A fit of a table, and what is read from it."""
    table = datasets.sleepstudy()
    result = lmm("Reaction ~ Days + (Days | Subject)", table, method="ml")
    assert_type(result, Result)
    assert_type(result.log_likelihood, float)
    assert_type(result.aic, float)
    assert_type(result.converged, bool)
    assert_type(result.singular, tuple[str, ...])
    assert_type(result.iterations, int)
    assert_type(result.fixed.names, tuple[str, ...])
    assert_type(result.fixed.estimate, Tensor)
    assert_type(result.fixed.std_error, Tensor)
    assert_type(result.parameters[0].name, str)
    assert_type(result.parameters[0].value, float)
    assert_type(result.components[0].covariance, Tensor)
    assert_type(result.random[0].values, Tensor)
    assert_type(result.residuals, Tensor)
    assert_type(result.plan.solver, str)
    assert_type(result.summary(), str)
    smaller = lmm("Reaction ~ Days + (1 | Subject)", table, method="ml")
    assert_type(likelihood_ratio_test(smaller, result), LikelihoodRatio)
    slow = table.assign(slow=table["Reaction"] > 300)
    assert_type(glmm("slow ~ Days + (1 | Subject)", slow, family="binomial"), Result)
    return result


def trees() -> Result:
    """A covariance as a module, and its likelihood as a loss."""
    groups = DummyMatrix(["a", "a", "b", "b", "c", "c"])
    V = Sum(batch=CovariancePropagation(groups, ScalarMatrix(3)), residual=ScalarMatrix(6)).double()
    tree: Matrix = V
    y, X = torch.arange(6.0, dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64)
    loss = REMLLoss(tree)
    optimizer = AIREML(loss.parameters())
    optimizer.step(lambda: loss(y, X))
    return fit_reml(tree, y, X)


def networks() -> Prediction:
    """A network with random effects, alone and in Lightning."""
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    model = MixedModel(network, {"user": RandomEffect(5)})
    batch = {
        "x": torch.randn(20, 2),
        "y": torch.randn(20),
        "groups": {"user": torch.arange(20) % 5},
    }
    assert_type(model.loss(batch), Tensor)
    model.update(batch)
    found = model.predict(batch)
    assert_type(found, Prediction)
    assert_type(found.mean, Tensor)
    assert_type(found.variance, Tensor)
    assert_type(model.random["user"], RandomEffect)
    assert_type(model.random["user"].prior(), Tensor)
    module = MixedModule(model, training="alternating")
    assert_type(module.model, MixedModel)
    assert_type(module.result, Result | None)
    return found


def mistakes() -> list[str]:
    """What is wrong is a ValueError of one line."""
    said = []
    for formula in ("Reaction ~ Nights", "Reaction ~ (Days | Subject"):
        try:
            lmm(formula, datasets.sleepstudy())
        except (InputError, NumericalError) as error:
            said.append(str(error))
    return said
