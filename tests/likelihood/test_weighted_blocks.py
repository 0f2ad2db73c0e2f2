"""Residuals of blocks with weights: every solver has the likelihood and the gradient of the dense one."""

import pytest
import torch

from openreml_nn import InputError, REMLLoss
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Sum,
)
from openreml_nn.datasets import sleepstudy
from openreml_nn.model.structures import linear_model
from openreml_nn.table import Encoder

SLEEP = sleepstudy().sample(frac=1, random_state=2).iloc[:120].assign(w=lambda t: 1 + t["Days"] % 3)
RESIDUALS = [
    "ar1(Days | Subject)", "us(Days | Subject)", "diag(Days)", "cs(Subject)",
    "ar1(Days | Subject) + units",
]  # fmt: skip


@pytest.mark.parametrize("solver", ["blocked", "sparse"])
@pytest.mark.parametrize("method", ["reml", "ml"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_weights_beside_blocks(residual, method, solver):
    for formula in ("Reaction ~ Days + (1 | Days)", "Reaction ~ Days + (Days | Subject)"):
        encoded = Encoder(formula, residual=residual, weights="w").fit(SLEEP)
        V = linear_model(encoded).covariance(encoded.batch())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in V.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        found = {}
        for name in ("dense", solver):
            loss = REMLLoss(V, method, name, reduction="sum")(encoded.y, encoded.X)
            found[name] = loss.detach(), torch.autograd.grad(loss, list(V.parameters()))
        torch.testing.assert_close(found[solver], found["dense"], rtol=1e-8, atol=1e-8)


def test_weights_of_equal_numbers_are_the_same_weights():
    n = 12
    scale = torch.linspace(0.5, 2, n, dtype=torch.float64)
    X = torch.ones(n, 1, dtype=torch.float64)

    def loss(other: torch.Tensor, solver: str) -> torch.Tensor:
        rows = torch.arange(n)
        parts = {}
        for matrix, weights in ((AR1Matrix(4), scale), (DiagonalMatrix(4), other)):
            within = KroneckerProduct(groups=IdentityMatrix(3), matrix=matrix)
            z = DummyMatrix.from_codes(rows, n, weights)
            parts[type(matrix).__name__] = CovariancePropagation(z=z, g=within)
        V = Sum(parts).double()
        return REMLLoss(V, "reml", solver)(scale.sin(), X)

    torch.testing.assert_close(loss(scale.clone(), "blocked"), loss(scale, "dense"))
    with pytest.raises(InputError, match="same weights for all parts"):
        loss(scale.flip(0), "blocked")
