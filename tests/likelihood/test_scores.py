"""Each solver's gradient is the difference of its own likelihood, whatever the structure and
whichever parameters are held."""

import pytest
import torch

from openreml_nn import REMLLoss, fit_reml
from openreml_nn.covariance import (
    AR1Matrix,
    BlockDiagonal,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    EquicorrelationMatrix,
    ExponentialMatrix,
    HadamardProduct,
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    ar1_field,
    factor_analytic,
    heterogeneous_ar1,
    stratified,
    weighted,
    within,
)
from openreml_nn.likelihood import restricted_log_likelihood
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import DenseCovariance, KroneckerCovariance
from tests.likelihood.test_krylov import EVERY_SIGN
from tests.strategies import distances, kinship, pedigree

Q, K, N = 4, 2, 24
#: Covariances of four levels of two effects.
STRUCTURES = {
    "scalar": lambda: ScalarMatrix(Q * K),
    "diagonal": lambda: DiagonalMatrix(Q * K),
    "unstructured": lambda: UnstructuredMatrix(Q * K),
    "known": lambda: KnownMatrix(kinship(Q * K)),
    "known inverse": lambda: KnownInverseMatrix(pedigree(Q * K).inverse),
    "exponential": lambda: ExponentialMatrix(distances(Q * K)),
    "ar1": lambda: AR1Matrix(Q * K),
    "heterogeneous": lambda: heterogeneous_ar1(Q * K),
    "factor analytic": lambda: factor_analytic(Q * K, 2),
    "blocks": lambda: BlockDiagonal(AR1Matrix(3), ScalarMatrix(5)),
    "hadamard": lambda: HadamardProduct(AR1Matrix(Q * K), EquicorrelationMatrix(Q * K)),
    "levels x us": lambda: KroneckerProduct(IdentityMatrix(Q), UnstructuredMatrix(K)),
    "levels x fa": lambda: KroneckerProduct(IdentityMatrix(Q), factor_analytic(K, 1)),
    "levels x hetar1": lambda: KroneckerProduct(IdentityMatrix(Q), heterogeneous_ar1(K)),
    "us x levels": lambda: KroneckerProduct(UnstructuredMatrix(K), IdentityMatrix(Q)),
    "ar1 x us": lambda: KroneckerProduct(AR1Matrix(Q), UnstructuredMatrix(K)),
    "cs x us": lambda: KroneckerProduct(CompoundSymmetricMatrix(Q), UnstructuredMatrix(K)),
    "us x us": lambda: KroneckerProduct(UnstructuredMatrix(Q), UnstructuredMatrix(K)),
    "ar1 x diagonal": lambda: KroneckerProduct(AR1Matrix(Q), DiagonalMatrix(K)),
    "us x ar1 x cs": lambda: KroneckerProduct(
        UnstructuredMatrix(2), AR1Matrix(2), CompoundSymmetricMatrix(K)
    ),
    "known x us": lambda: KroneckerProduct(KnownMatrix(kinship(Q)), UnstructuredMatrix(K)),
    "pedigree x us": lambda: KroneckerProduct(
        KnownInverseMatrix(pedigree(Q).inverse), UnstructuredMatrix(K)
    ),
}
RESIDUALS = {
    "one": lambda: ScalarMatrix(N),
    "weights": lambda: weighted(torch.rand(N) + 0.1),
    "strata": lambda: stratified([i % 3 for i in range(N)]),
    "correlated": lambda: within([i // 6 for i in range(N)], AR1Matrix(6)),
    "cells of strata": lambda: cells([2 * i + i // 5 % 2 for i in range(N)], DiagonalMatrix(2)),
    "missing cells": lambda: cells([4 * (i // 2) + 3 * (i % 2) for i in range(N)], AR1Matrix(4)),
}


def cells(codes, matrix):
    """R of rows that are some of the positions of groups of as many as the matrix has."""
    groups = max(codes) // matrix.shape[0] + 1
    z = DummyMatrix.from_codes(torch.tensor(codes), groups * matrix.shape[0])
    return CovariancePropagation(z=z, g=KroneckerProduct(IdentityMatrix(groups), matrix))


def tree(structure, residual="one", crossed=True):
    codes = torch.arange(N) // 6
    values = torch.randn(N, K)
    parts = {
        "t": CovariancePropagation(
            z=DummyMatrix.from_codes(codes, Q, values), g=STRUCTURES[structure]()
        )
    }
    if crossed:
        other = DummyMatrix.from_codes(torch.arange(N) % 5, 5)
        parts["other"] = CovariancePropagation(z=other, g=ScalarMatrix(5))
    V = Sum({**parts, "residual": RESIDUALS[residual]()}).double()
    return started(V)


def started(V):
    with torch.no_grad():
        for p in V.parameters():
            p.copy_(0.4 * torch.randn(1))
    return V


def held(V, seed):
    """Some parameters fixed; the last, the residual's, is never."""
    generator = torch.Generator().manual_seed(seed)
    for name in V.free_param_names[:-1]:
        if seed and torch.rand(1, generator=generator) < 0.5:
            V.fix(name)
    return V


def difference(function, parameters, h=1e-5):
    """Central differences of a number, or of a vector, by each parameter."""
    found = []
    for p in parameters:
        ends = []
        for step in (h, -2 * h):
            with torch.no_grad():
                p.add_(step)
            ends.append(function())
        with torch.no_grad():
            p.add_(h)
        found.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(found)


def check(V, method, solver, second=True, tolerance=1e-7):
    n = V.shape[0]
    y, X = torch.randn(n), torch.randn(n, 2)
    parameters = list(V.parameters())
    loss = REMLLoss(V, method, solver)

    def gradient(graph=False):
        return torch.cat(torch.autograd.grad(loss(y, X), parameters, create_graph=graph))

    found = gradient()
    expected = difference(lambda: loss(y, X).detach(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=tolerance)
    dense = torch.cat(torch.autograd.grad(REMLLoss(V, method, "dense")(y, X), parameters))
    torch.testing.assert_close(found, dense, rtol=1e-8, atol=1e-10)
    if second:
        rows = [
            torch.cat(torch.autograd.grad(g, parameters, retain_graph=True)) for g in gradient(True)
        ]
        torch.testing.assert_close(
            torch.stack(rows), difference(gradient, parameters), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("method", "seed"), [("reml", 0), ("ml", 1)])
def test_gradients_are_differences_for_every_structure(structure, solver, method, seed):
    check(held(tree(structure), seed), method, solver, second=seed == 0 and solver == "blocked")


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("structure", ["levels x us", "ar1 x us"])
def test_gradients_are_differences_for_every_residual(structure, residual, solver):
    check(held(tree(structure, residual, crossed=False), 2), "reml", solver)


@pytest.mark.parametrize("nugget", [False, True])
@pytest.mark.parametrize("seed", [0, 3])
def test_gradients_of_a_field_are_differences(nugget, seed):
    sides = KroneckerProduct(CompoundSymmetricMatrix(4), UnstructuredMatrix(3))
    for field in (ar1_field(4, 3), sides):
        parts = {"field": field, **({"nugget": ScalarMatrix(12)} if nugget else {})}
        check(held(started(Sum(parts).double()), seed), "reml", "grid")


@pytest.mark.parametrize("traits", [1, 2])
def test_gradients_of_one_kernel_are_differences(traits):
    n = 7
    known = KnownMatrix(kinship(n))
    if traits == 1:
        V = Sum(a=known, residual=ScalarMatrix(n))
    else:
        V = Sum(
            a=KroneckerProduct(known, UnstructuredMatrix(2)),
            residual=KroneckerProduct(IdentityMatrix(n), UnstructuredMatrix(2)),
        )
    check(held(started(V.double()), 4), "reml", "spectral")


@pytest.mark.parametrize("structure", ["scalar", "levels x us", "levels x hetar1"])
def test_gradients_of_the_krylov_solver_are_differences(structure):
    V = tree(structure)
    check(held(V, 5), "reml", EVERY_SIGN, second=False, tolerance=1e-6)


def everything(cls):
    return {s for sub in cls.__subclasses__() for s in {sub, *everything(sub)}}


def test_every_covariance_declares_its_inner_product():
    for cls in everything(Covariance):
        assert cls.inner is not Covariance.inner, cls
    A, B, S = torch.randn(2, 2), torch.randn(3, 3), torch.randn(6, 6)
    for G in (KroneckerCovariance.of(A, B), DenseCovariance(torch.kron(A, B))):
        torch.testing.assert_close(G.inner(G.fold(S)), (S * torch.kron(A, B)).sum())


def test_a_fit_with_the_random_part_held_finds_the_residual():
    q, n = 12, 120
    codes, x = torch.arange(n) % q, torch.randn(n)
    Z = torch.stack([torch.ones(n), x], 1)
    b = torch.linalg.cholesky(AR1Matrix(q)(torch.tensor([0.0, 1.0]))) @ torch.randn(q, 2)
    y = (Z * b[codes]).sum(1) + torch.randn(n)
    found = []
    for solver in ("dense", "blocked"):
        V = Sum(
            t=CovariancePropagation(
                z=DummyMatrix.from_codes(codes, q, Z),
                g=KroneckerProduct(AR1Matrix(q), UnstructuredMatrix(2)),
            ),
            residual=ScalarMatrix(n),
        ).double()
        for name in V.free_param_names[:-1]:
            V.fix(name, 0.5)
        result = fit_reml(V, y, torch.ones(n, 1), solver=solver)
        assert result.converged
        found.append((result.log_likelihood, result.residual_variance))
    assert found[0] == pytest.approx(found[1], rel=1e-7)


def test_the_dense_score_of_a_few_cells_of_many_levels():
    # Cells of a level share a block of G: rows of one are not rows of another.
    codes = torch.tensor([0, 1, 5, 6, 9])  # 10 levels of 2 occasions, a column for each cell
    V = Sum(
        cells=CovariancePropagation(
            DummyMatrix.from_codes(codes, 20),
            KroneckerProduct(IdentityMatrix(10), UnstructuredMatrix(2)),
        ),
        residual=ScalarMatrix(5),
    ).double()
    with torch.no_grad():
        for i, parameter in enumerate(V.parameters()):
            parameter.fill_(0.3 * i - 0.4)
    y, X = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0]).double(), torch.ones(5, 1).double()
    parameters = list(V.parameters())
    found = torch.autograd.grad(REMLLoss(V, solver="dense", reduction="sum")(y, X), parameters)
    expected = torch.autograd.grad(-restricted_log_likelihood(y, X, V()), parameters)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-10, atol=1e-12)
