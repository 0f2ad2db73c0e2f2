"""Random mixed models, and the likelihood as a textbook would compute it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from openreml_nn.covariance import (
    AR1Matrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    stratified,
    weighted,
    within,
)


@dataclass
class Model:
    covariance: Matrix
    y: Tensor
    X: Tensor


@st.composite
def models(draw, structured: bool = False) -> Model:
    """Random intercepts and slopes, nested and crossed, with residuals of one variance or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    n = draw(st.integers(14, 30))
    outer = torch.randint(0, draw(st.integers(2, 4)), (n,), generator=generator).tolist()
    inner = torch.randint(0, 3, (n,), generator=generator).tolist()
    crossed = torch.randint(0, draw(st.integers(2, 5)), (n,), generator=generator).tolist()
    factors = [[outer], [outer, inner], [crossed]]
    parts: dict[str, Matrix] = {}
    for i in range(draw(st.integers(0, 3))):
        labels = factors[draw(st.integers(0, 2))]
        k = draw(st.integers(1, 3))
        values = torch.randn(n, k, generator=generator) if k > 1 or draw(st.booleans()) else None
        z = DummyMatrix(*labels, drop_empty_cols=True, covariates=values)
        q = z.shape[1] // k
        kind = draw(st.sampled_from(["correlated", "scalar", "diagonal", "dense"]))
        if kind == "correlated":
            g: Matrix = KroneckerProduct(IdentityMatrix(q), UnstructuredMatrix(k))
        elif kind == "scalar":
            g = ScalarMatrix(q * k)
        elif kind == "diagonal":
            g = DiagonalMatrix(q * k)
        else:
            g = UnstructuredMatrix(q * k) if q * k <= 4 else ScalarMatrix(q * k)
        design = z(torch.zeros(0)) if draw(st.integers(0, 5)) == 0 else z
        parts[f"t{i}"] = CovariancePropagation(z=design, g=g)
    parts["residual"] = draw(residuals(outer, inner, generator)) if structured else ScalarMatrix(n)
    covariance = Sum(parts).double()
    with torch.no_grad():
        for p in covariance.parameters():
            p.copy_(0.5 * torch.randn(1, generator=generator))
    p = draw(st.integers(1, 3))
    X = torch.randn(n, p, generator=generator)
    y = torch.randn(n, generator=generator)
    return Model(covariance, y, X)


@st.composite
def residuals(draw, outer: list[int], inner: list[int], generator: torch.Generator) -> Matrix:
    """Weights, strata, and correlation within ragged groups, alone or on top of a variance."""
    n = len(outer)
    kind = draw(st.sampled_from(["weights", "strata", "within", "both", "blocks"]))
    if kind == "weights":
        return weighted(torch.rand(n, generator=generator) + 0.1)
    if kind == "strata":
        return stratified(torch.randint(0, 3, (n,), generator=generator).tolist())
    if kind == "blocks":
        # Over the rows as they stand, with variances of their own on top.
        k = 2 if n % 2 == 0 else 1
        block = KroneckerProduct(IdentityMatrix(n // k), CompoundSymmetricMatrix(max(k, 2)))
        return Sum(block, DiagonalMatrix(n)) if k == 2 else DiagonalMatrix(n)
    groups = [f"{a}-{b}" for a, b in zip(outer, inner, strict=True)]
    size = max(groups.count(g) for g in groups)
    matrices = [AR1Matrix, CompoundSymmetricMatrix, UnstructuredMatrix]
    matrix = draw(st.sampled_from(matrices))(max(size, 2) + 1)
    order = draw(st.booleans())
    positions = torch.randperm(n, generator=generator).tolist() if order else None
    if positions is not None:
        ranks = {
            g: sorted(p for p, h in zip(positions, groups, strict=True) if h == g) for g in groups
        }
        positions = [ranks[g].index(p) for p, g in zip(positions, groups, strict=True)]
    found = within(groups, matrix, positions)
    return Sum(correlated=found, nugget=ScalarMatrix(n)) if kind == "both" else found


def reference(y: Tensor, X: Tensor, V: Tensor, method: str) -> float:
    """By the density of the data, or of an orthonormal set of error contrasts."""
    y, X, V = (t.detach().numpy() for t in (y, X, V))
    n, p = X.shape
    beta = np.linalg.solve(X.T @ np.linalg.solve(V, X), X.T @ np.linalg.solve(V, y))
    if method == "ml":
        e = y - X @ beta
        return -0.5 * (n * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + e @ np.linalg.solve(V, e))
    K = np.linalg.qr(X, mode="complete")[0][:, p:]
    W = K.T @ V @ K
    k = K.T @ y
    density = -0.5 * (
        (n - p) * np.log(2 * np.pi) + np.linalg.slogdet(W)[1] + k @ np.linalg.solve(W, k)
    )
    # lme4's convention differs from the density of orthonormal contrasts by log |X'X| / 2.
    return density - 0.5 * np.linalg.slogdet(X.T @ X)[1]
