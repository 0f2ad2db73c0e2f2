"""Structured covariances against the matrices that they stand for."""

import pytest
import torch
from torch.func import jvp, vjp

from openreml_nn.terms.covariance import (
    DenseCovariance,
    DiagonalCovariance,
    KroneckerCovariance,
    RepeatedCovariance,
    ScaledCovariance,
)
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.kernel import Kernel
from tests.strategies import kinship


def positive(n):
    half = torch.randn(n, n)
    return half @ half.mT + torch.eye(n)


#: A covariance with its size.
STRUCTURES = {
    "scalar": lambda: (RepeatedCovariance(positive(1), 6), 6),
    "repeated": lambda: (RepeatedCovariance(positive(2), 3), 6),
    "diagonal": lambda: (DiagonalCovariance(torch.rand(6)), 6),
    "dense": lambda: (DenseCovariance(positive(6)), 6),
    "kronecker": lambda: (KroneckerCovariance.of(positive(2), positive(3)), 6),
    "kernel": lambda: (ScaledCovariance(positive(1), Kernel(kinship(6).double())), 6),
    "traits of a kernel": lambda: (ScaledCovariance(positive(2), Kernel(kinship(3).double())), 6),
}


@pytest.fixture(params=STRUCTURES)
def structure(request):
    return STRUCTURES[request.param]()


def test_products_are_those_of_the_matrix(structure):
    g, q = structure
    x = torch.randn(q, 4)
    torch.testing.assert_close(g.multiply(x), g.whole(q) @ x)
    root = g.root()
    torch.testing.assert_close(root.multiply(root.multiply(x, transpose=True)), g.whole(q) @ x)


def test_derivatives_are_those_of_the_matrix(structure):
    g, q = structure
    x, d, cotangent = torch.randn(q, 4), torch.randn_like(g.matrix), torch.randn(q, q)

    def whole(matrix):
        return g.with_matrix(matrix).whole(q)

    _, moved = jvp(whole, (g.matrix,), (d,))
    torch.testing.assert_close(g.along(d, x), moved @ x)
    _, pull = vjp(whole, g.matrix)
    (expected,) = pull(cotangent)
    torch.testing.assert_close(g.fold(cotangent), expected)


@pytest.mark.parametrize(("name", "levels", "effects"), [("repeated", 3, 2), ("diagonal", 3, 2)])
def test_blocks_are_those_of_the_matrix(name, levels, effects):
    g, q = STRUCTURES[name]()
    four = g.whole(q).reshape(levels, effects, levels, effects)
    blocks = four.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    torch.testing.assert_close(g.blocks(levels, effects).expand_as(blocks), blocks)
    cotangent = torch.randn(levels, effects, effects)
    whole = torch.block_diag(*cotangent)
    torch.testing.assert_close(g.fold_blocks(cotangent), g.fold(whole))


def test_a_summand_and_its_pull_back_are_those_of_the_dense_design(structure):
    """Whatever the levels of the design are beside the blocks of the covariance."""
    g, size = structure
    for effects in (1, 2, 3, 6):
        codes = torch.randint(0, size // effects, (9,))
        values = None if effects == 1 else torch.randn(9, effects)
        for z in (values, torch.randn(9, effects)):
            design = IndexedDesign(codes, z, size // effects)
            Z = design.dense(g.matrix)
            torch.testing.assert_close(g.sandwich(design), Z @ g.whole(size) @ Z.mT)
            S = torch.randn(9, 9)
            found = g.fold_sandwich(design, S + S.mT)
            torch.testing.assert_close(found, g.fold(Z.mT @ (S + S.mT) @ Z))
