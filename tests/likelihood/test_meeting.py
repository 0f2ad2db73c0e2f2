"""Which levels meet, and how often, is the same whichever way it is found."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, diags, eye

from openreml_nn.likelihood.system.crossproducts import Cells
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.part import Part
from openreml_nn.terms.design import IndexedDesign

N, LEVELS = 40, (9, 6)


def codes():
    generator = np.random.default_rng(3)
    return [generator.integers(0, q, N) for q in LEVELS]


def equations(values):
    """Two crossed parts, the first of as many effects as there are columns of values."""
    one, two = codes()
    k = values.shape[1]
    place = np.repeat(np.arange(N), k), (one[:, None] * k + np.arange(k)).reshape(-1)
    first = csr_matrix((values.reshape(-1), place), (N, LEVELS[0] * k))
    second = csr_matrix((np.ones(N), (np.arange(N), two)), (N, LEVELS[1]))
    return Equations([Part("one", first, k, k), Part("two", second, 1, 1)])


@pytest.mark.parametrize(
    "values", [np.ones((N, 1)), np.ones((N, 2)), np.arange(2.0 * N).reshape(N, 2) % 5 + 1]
)
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_products_known_from_the_pattern_are_those_of_the_rows(values, weight):
    known = equations(values)
    rows = csr_matrix(eye(N) * weight)
    found = known.products(rows)
    Z = [part.design.toarray() for part in known.parts]
    for cross, blocks, again in zip(known.crosses, found, known.products(rows), strict=True):
        assert np.array_equal(blocks, again)
        (k, m), whole = cross.shape, weight * Z[cross.one].T @ Z[cross.other]
        for row, column, block in zip(cross.row, cross.column, blocks, strict=True):
            part = whole[row * k : (row + 1) * k, column * m : (column + 1) * m]
            np.testing.assert_allclose(block, part, rtol=1e-14)
        assert abs(blocks.sum() - whole.sum()) < 1e-9 * whole.sum()


def test_rows_of_several_weights_are_weighted():
    known, weight = equations(np.ones((N, 1))), np.linspace(1, 2, N)
    blocks = known.products(csr_matrix(diags(weight)))
    Z = [part.design.toarray() for part in known.parts]
    for cross, found in zip(known.crosses, blocks, strict=True):
        whole = Z[cross.one].T @ (weight[:, None] * Z[cross.other])
        np.testing.assert_allclose(found[:, 0, 0], whole[cross.row, cross.column], rtol=1e-14)


def test_levels_that_meet_are_the_same_with_and_without_their_rows():
    one, two = (
        IndexedDesign(torch.from_numpy(code), None, q)
        for code, q in zip(codes(), LEVELS, strict=True)
    )
    for pair in ((one, two), (two, one), (one, one)):
        places, summed = Cells.of(*pair, rows=False), Cells.of(*pair)
        assert torch.equal(places.a, summed.a)
        assert torch.equal(places.b, summed.b)
