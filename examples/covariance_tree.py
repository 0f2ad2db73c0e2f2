"""Correlated random slopes as a tree of modules, fitted by AI-REML and then by Adam in a plain loop."""

import torch

from openreml_nn import REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.datasets import sleepstudy


def main() -> None:
    table = sleepstudy()
    y = torch.tensor(table["Reaction"].to_numpy())
    days = torch.tensor(table["Days"].to_numpy(), dtype=y.dtype)
    X = torch.stack([torch.ones_like(days), days], 1)
    V = Sum(
        subject=CovariancePropagation(
            z=DummyMatrix(table["Subject"], covariates=X),
            g=KroneckerProduct(IdentityMatrix(18), UnstructuredMatrix(2)),
        ),
        residual=ScalarMatrix(180),
    ).double()
    print(V)

    result = fit_reml(V, y, X, names=["(Intercept)", "Days"])
    print(f"AI-REML  {result.log_likelihood:.6f} in {result.iterations} iterations")

    # The covariance is a module like any other: perturb it and train it again.
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.add_(0.5)
    loss = REMLLoss(V)
    optimizer = torch.optim.Adam(V.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        value = loss(y, X)
        value.backward()
        optimizer.step()
    print(f"Adam     {-180 * loss(y, X).item():.6f}")


if __name__ == "__main__":
    main()
