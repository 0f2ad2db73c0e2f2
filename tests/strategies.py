"""Hypothesis strategies and helpers that several test files share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    LowerTriangularMatrix,
    Matrix,
    ScalarMatrix,
    Sum,
    UnconstrainedMatrix,
    UnstructuredMatrix,
)

LEAVES = {
    "identity": IdentityMatrix,
    "scalar": ScalarMatrix,
    "diagonal": DiagonalMatrix,
    "lower": lambda n: LowerTriangularMatrix(n, n),
    "unconstrained": UnconstrainedMatrix,
    "unstructured": UnstructuredMatrix,
}


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


@st.composite
def dummies(draw, n: int, q: int) -> DummyMatrix:
    """A one-hot design (n, q), sometimes with covariates."""
    k = draw(st.sampled_from(divisors(q)))
    levels = list(range(q // k))
    labels = draw(st.lists(st.sampled_from(levels), min_size=n, max_size=n))
    values = None
    if k > 1 or draw(st.booleans()):
        seed = draw(st.integers(0, 99))
        values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return DummyMatrix(labels, levels=levels, covariates=values)


@st.composite
def trees(draw, n: int, depth: int = 3) -> Matrix:
    """A random square matrix of size n, nested to a depth."""
    kinds = list(LEAVES)
    if depth:
        kinds += ["sum", "kronecker", "propagation", "tied"]
    kind = draw(st.sampled_from(kinds))
    if kind in LEAVES:
        return LEAVES[kind](n)
    if kind == "sum":
        return Sum(*[draw(trees(n, depth - 1)) for _ in range(draw(st.integers(2, 3)))])
    if kind == "tied":
        one = draw(trees(n, depth - 1))
        return Sum(one, draw(trees(n, depth - 1)), one)
    if kind == "kronecker":
        k = draw(st.sampled_from(divisors(n)))
        return KroneckerProduct(draw(trees(k, depth - 1)), draw(trees(n // k, depth - 1)))
    q = draw(st.integers(1, 4))
    z = draw(dummies(n, q)) if draw(st.booleans()) else torch.randn(n, q)
    return CovariancePropagation(z=z, g=draw(trees(q, depth - 1)))


@st.composite
def points(draw, matrix: Matrix) -> torch.Tensor:
    """Free parameters at which nothing is extreme."""
    seed = draw(st.integers(0, 10_000))
    return 0.5 * torch.randn(matrix.num_free_params, generator=torch.Generator().manual_seed(seed))


@st.composite
def matrices(draw, depth: int = 3, fixed: bool = True) -> Matrix:
    """A tree of random size, some of its parameters fixed."""
    matrix = draw(trees(draw(st.integers(1, 6)), depth)).double()
    if fixed:
        for name in matrix.param_names:
            if draw(st.integers(0, 3)) == 0:
                matrix.fix(name, 0.3)
    return matrix
