"""Fields of plots, several and with plots missing, by sparse precisions against dense algebra."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openreml_nn import MixedModel, REMLLoss
from openreml_nn.covariance import (
    AR1Matrix,
    BlockDiagonal,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialMatrix,
    Matrix,
    ScalarMatrix,
    Sum,
    ar1_field,
)
from openreml_nn.likelihood import Sparse
from openreml_nn.model.structures import linear_model
from openreml_nn.table import Encoder
from openreml_nn.terms.covariance import DiagonalCovariance
from tests.strategies import distances

Model = tuple[Sum, torch.Tensor, torch.Tensor]


def trials(
    sizes: list[tuple[int, int]],
    missing: float = 0.0,
    seed: int = 0,
    weights: bool = False,
    nugget: bool = False,
    genotypes: bool = True,
) -> Model:
    """Plots of some trials in any order of rows, each trial with a field of its own."""
    rng = np.random.default_rng(seed)
    blocks: dict[str, Matrix] = {}
    for i, (rows, columns) in enumerate(sizes):
        q = rows * columns
        kept = torch.from_numpy(rng.permutation(q)[: max(2, round(q * (1 - missing)))])
        field = AR1Matrix(q) if 1 in (rows, columns) else ar1_field(rows, columns)
        blocks[f"site{i}"] = CovariancePropagation(z=DummyMatrix.from_codes(kept, q), g=field)
    joined = BlockDiagonal(blocks)
    n = joined.shape[0]
    scale = torch.from_numpy(rng.uniform(0.5, 2, n)) if weights else None
    z = DummyMatrix.from_codes(torch.from_numpy(rng.permutation(n)), n, scale)
    parts: dict[str, Matrix] = {"field": CovariancePropagation(z=z, g=joined)}
    if genotypes:
        codes = torch.from_numpy(rng.integers(0, 5, n))
        parts["gen"] = CovariancePropagation(DummyMatrix.from_codes(codes, 5), ScalarMatrix(5))
    if nugget:
        parts["units"] = ScalarMatrix(n)
    V = Sum(parts).double()
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.copy_(torch.from_numpy(0.7 * rng.standard_normal(1)))
    X = np.column_stack([np.ones(n), rng.standard_normal(n)])
    return V, torch.from_numpy(rng.standard_normal(n)), torch.from_numpy(X)


def assert_equal(model: Model, method: str = "reml", tolerance: float = 1e-9) -> None:
    """The sparse solver equals the dense one in all that an evaluation gives."""
    V, y, X = model
    found = []
    for solver in ("sparse", "dense"):
        objective = REMLLoss(V, method, solver).objective(y, X)
        at, matrices = objective.evaluate(), objective.matrices(None)
        # A chain's score is by the entries that its inverse depends on: it is compared by parameters.
        value = sum((s * m).sum() for s, m in zip(at.scores(), matrices, strict=True))
        gradient = torch.autograd.grad(value, list(V.parameters()), retain_graph=True)
        generator = torch.Generator().manual_seed(0)
        along = []
        for matrix in matrices:
            d = torch.randn(2, *matrix.shape, generator=generator, dtype=matrix.dtype)
            along.append(d + d.mT if d.dim() == 3 and d.shape[1] == d.shape[2] else d)
        effects = [x for each in at.random for x in (each.values, each.variances)]
        found.append(
            [
                at.log_likelihood, at.fixed.estimate, at.fixed.covariance, torch.cat(gradient),
                at.information(along), *at.data_scores(), *effects,
            ]
        )  # fmt: skip
    for one, other in zip(*found, strict=True):
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from([(3, 4), (1, 6), (5, 3)]), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 1000),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["reml", "ml"]),
)
def test_fields_of_trials_equal_dense(sizes, missing, seed, weights, nugget, genotypes, method):
    assert_equal(trials(sizes, missing, seed, weights, nugget, genotypes), method)


def test_a_field_does_not_depend_on_the_order_of_its_plots_nor_on_the_unit():
    V, y, X = trials([(4, 5), (3, 4)], 0.2)
    expected = REMLLoss(V, solver="sparse").evaluate(y, X)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    z = DummyMatrix.from_codes(order, len(y))
    moved = Sum({name: CovariancePropagation(z, each) for name, each in V.operands.items()})
    found = REMLLoss(moved, solver="sparse").evaluate(y[order], X[order])
    assert float(found.log_likelihood) == pytest.approx(float(expected.log_likelihood), abs=1e-10)
    with torch.no_grad():
        for name, parameter in V.named_parameters():
            if name.endswith("sigma^2"):
                parameter += np.log(1e-6)  # x of e^2x
    scaled = REMLLoss(V, solver="sparse").evaluate(1e-6 * y, X)
    lost = (len(y) - X.shape[1]) * np.log(1e-6)
    assert float(scaled.log_likelihood + lost) == pytest.approx(
        float(expected.log_likelihood), abs=1e-8
    )


def test_large_fields_are_planned_to_be_sparse():
    V, *_ = trials([(20, 30)] * 3, 0.1)
    assert REMLLoss(V).plan.solver == "sparse"


def test_blocks_of_any_kind_have_the_likelihood_of_their_matrix():
    n = 9
    blocks = BlockDiagonal(near=ExponentialMatrix(distances(n)), far=DiagonalMatrix(4)).double()
    y, X = torch.linspace(-1, 1, n + 4).double() ** 2, torch.ones(n + 4, 1).double()
    (term,) = blocks.terms()
    torch.testing.assert_close(term.dense(), blocks())
    whole = REMLLoss(blocks).evaluate(y, X)
    by_hand = REMLLoss(Sum(blocks, torch.zeros(n + 4, n + 4).double())).evaluate(y, X)
    assert float(whole.log_likelihood) == pytest.approx(float(by_hand.log_likelihood), abs=1e-10)
    plain = BlockDiagonal(ScalarMatrix(3), DiagonalMatrix(2)).double()
    (term,) = plain.terms()
    assert isinstance(term.covariance, DiagonalCovariance)
    torch.testing.assert_close(term.dense(), plain())


@pytest.mark.parametrize("nugget", ["", " + units"])
@pytest.mark.parametrize("weights", [None, "w"])
def test_fields_by_formula_are_sparse_and_equal_dense(nugget, weights):
    rng = np.random.default_rng(0)
    grid = np.array([(s, i, j) for s in "ab" for i in range(4) for j in range(5)], dtype=object)
    table = pd.DataFrame(grid[rng.permutation(40)[:33]], columns=["site", "row", "col"])
    table = table.assign(y=rng.standard_normal(33), w=rng.uniform(0.5, 2, 33))
    encoded = Encoder(
        "y ~ site", weights=weights, residual=f"diag(site):ar1(row):ar1(col){nugget}"
    ).fit(table)
    found = []
    for solver in ("dense", "sparse"):
        model: MixedModel = linear_model(encoded, solver=solver)
        found.append(float(model.objective(encoded.batch()).evaluate().log_likelihood))
    assert found[1] == pytest.approx(found[0], abs=1e-9)
    assert Sparse().obstacle(model.covariance(encoded.batch()).terms()) is None
