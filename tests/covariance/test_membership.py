"""Rows of several levels of one factor against the dense design."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openreml_nn import InputError, REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    MembershipMatrix,
    Pedigree,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)

SIRE = [0, 0, 0, 0, 1, 3, 4, 3, 1, 3, 3, 8, 9, 3]
DAM = [0, 0, 0, 0, 2, 2, 6, 5, 6, 2, 7, 7, 2, 6]
PEDIGREE = Pedigree.of(range(1, 15), SIRE, DAM)
#: Animals 5 to 14, each beside its dam.
CODES = torch.tensor([[i, DAM[i] - 1] for i in range(4, 14)])
RNG = np.random.default_rng(3)
Y = torch.from_numpy(RNG.standard_normal(10)) * 5 + 30
X = torch.from_numpy(RNG.standard_normal((10, 2))) + 1


def genetic(kind: str, form: str) -> Matrix:
    """The covariance of all effects, level by level."""
    if form == "inverse":
        A: Matrix = KnownInverseMatrix(PEDIGREE.inverse)
    else:
        A = KnownMatrix(torch.linalg.inv(PEDIGREE.inverse.to_dense()))
    if kind == "overlay":
        return A
    A.fix("sigma^2", 0.0)
    return KroneckerProduct(
        levels=A, effects=UnstructuredMatrix(2) if kind == "us" else DiagonalMatrix(2)
    )


def tree(z, g: Matrix) -> Sum:
    V = Sum(genetic=CovariancePropagation(z=z, g=g), error=ScalarMatrix(10)).double()
    with torch.no_grad():
        for i, p in enumerate(V.parameters()):
            p.fill_(0.3 - 0.2 * i)
    return V


@pytest.mark.parametrize("kind", ["us", "diag", "overlay"])
@pytest.mark.parametrize("form", ["inverse", "kernel"])
@pytest.mark.parametrize("solver", ["dense", "sparse", "blocked", "auto"])
def test_likelihood_gradient_and_effects_are_those_of_the_dense_design(kind, form, solver):
    z = MembershipMatrix(CODES, 14, separate=kind != "overlay")
    found = []
    for Z in (z, z().double()):
        V = tree(Z, genetic(kind, form))
        loss = REMLLoss(V, solver=solver if Z is z else "dense", reduction="sum")
        value = loss(Y, X)
        gradient = torch.cat(torch.autograd.grad(value, list(V.parameters())))
        found.append((value, gradient, loss.evaluate(Y, X).random[0]))
    (value, gradient, random), (expected, slope, dense) = found
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(random.values, dense.values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(random.variances, dense.variances, rtol=1e-9, atol=1e-9)


def test_a_solver_leaves_the_design_as_it_is():
    z = MembershipMatrix(CODES, 14, separate=True).double()
    V, before = tree(z, genetic("us", "inverse")), z()
    solvers = ("sparse", "dense", "sparse", "auto")
    values = torch.stack([REMLLoss(V, solver=solver)(Y, X) for solver in solvers])
    torch.testing.assert_close(values, values[:1].expand(4), rtol=1e-12, atol=1e-12)
    assert torch.equal(z(), before)
    torch.testing.assert_close(V(), tree(before, genetic("us", "inverse"))())


def test_effects_of_the_animal_and_of_its_dam_are_columns_of_their_level():
    own, mother = (DummyMatrix.from_codes(CODES[:, j], 14)() for j in range(2))
    expected = torch.stack([own, mother], 2).flatten(1)
    assert torch.equal(MembershipMatrix(CODES, 14, separate=True)(), expected)
    assert torch.equal(MembershipMatrix(CODES, 14)(), own + mother)


def test_a_level_that_stands_twice_counts_twice_and_none_is_zero():
    z = MembershipMatrix(torch.tensor([[1, 1], [-1, 0]]), 2, torch.tensor([[1.0, 2], [5, 3]]))
    assert z().tolist() == [[0.0, 3.0], [3.0, 0.0]]
    x = torch.randn(2, 3)
    torch.testing.assert_close(z.design.matmul(x), z() @ x)
    torch.testing.assert_close(z.design.t_matmul(x), z().mT @ x)
    assert torch.equal(z.design.take(torch.tensor([1])).matrix, z()[1:])


def test_one_level_a_row_is_the_one_hot_design():
    codes = torch.tensor([2, 0, 1, -1])
    values = torch.randn(4, 2)
    expected = DummyMatrix.from_codes(codes, 3, values)()
    assert torch.equal(MembershipMatrix(codes[:, None], 3, values[:, None])(), expected)


def test_effects_first_or_levels_first_is_one_fit():
    A = KnownInverseMatrix(PEDIGREE.inverse)
    A.fix("sigma^2", 0.0)
    z = MembershipMatrix(CODES, 14, separate=True)
    second = MembershipMatrix(CODES + torch.tensor([0, 14]), 28)
    one = tree(z, KroneckerProduct(levels=A, effects=UnstructuredMatrix(2)))
    other = tree(second, KroneckerProduct(effects=UnstructuredMatrix(2), levels=A))
    torch.testing.assert_close(one(), other())
    values = [REMLLoss(V, solver="sparse")(Y, X) for V in (one, other)]
    torch.testing.assert_close(*values)


def test_a_fit_has_the_names_of_the_levels():
    names = [f"a{i}" for i in range(14)]
    A = KnownInverseMatrix(PEDIGREE.inverse)
    V = Sum(
        genetic=CovariancePropagation(z=MembershipMatrix(CODES, names), g=A),
        error=ScalarMatrix(10),
    ).double()
    V.fix("error/sigma^2", 4.0, natural=True)
    V.fix("genetic/g/sigma^2", 1.0, natural=True)
    assert list(fit_reml(V, Y, X, start="current").components[0].levels) == names


def test_many_relatives_are_no_dense_design():
    n = 3000
    parents = RNG.integers(0, np.maximum(np.arange(n) // 2, 1), (2, n))
    sires, dams = 2 * (parents[0] // 2), 2 * (parents[1] // 2) + 1
    known = np.arange(n) >= 200
    pedigree = Pedigree.of(
        range(1, n + 1),
        [int(s) + 1 if k else None for s, k in zip(sires, known)],
        [int(d) + 1 if k else None for d, k in zip(dams, known)],
    )
    at = {name: i for i, name in enumerate(pedigree.names)}
    rows = [(at[str(i + 1)], at[str(dams[i] + 1)]) for i in range(200, n)]
    z = MembershipMatrix(torch.tensor(rows), n, separate=True)
    A = KnownInverseMatrix(pedigree.inverse)
    A.fix("sigma^2", 0.0)
    g = KroneckerProduct(levels=A, effects=UnstructuredMatrix(2))
    V = Sum(genetic=CovariancePropagation(z=z, g=g), error=ScalarMatrix(n - 200)).double()
    y, X = torch.from_numpy(RNG.standard_normal(n - 200)), torch.ones(n - 200, 1).double()
    loss = REMLLoss(V)
    assert torch.isfinite(loss(y, X))
    assert loss.plan.solver == "sparse"


@pytest.mark.parametrize(
    ("codes", "more", "match"),
    [
        (torch.tensor([1, 0]), {}, r"`codes` has shape \(2,\): expected \(n, m\)"),
        (torch.tensor([[1, 9]]), {}, "beyond the 3 levels"),
        (torch.tensor([[1, 0]]), {"values": torch.ones(1, 3)}, r"expected \(1, 2\) or \(1, 2, k\)"),
        (torch.tensor([[1, 0]]), {"values": torch.tensor([[1, torch.nan]])}, "not finite"),
        (
            torch.tensor([[1, 0]]),
            {"values": torch.ones(1, 2), "separate": True},
            "beside `separate`",
        ),
    ],
)
def test_wrong_arguments_are_named(codes, more, match):
    with pytest.raises(InputError, match=match):
        MembershipMatrix(codes, 3, **more)
