"""The sparse solver against dense algebra, whatever meets whatever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, random_array, tril

from openreml_nn import (
    InputError,
    MixedModel,
    NumericalError,
    RandomEffect,
    REMLLoss,
    fit_reml,
)
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    ExponentialMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    Pedigree,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    ar1_field,
    stratified,
    weighted,
    within,
)
from openreml_nn.likelihood import Auto, Evaluation, Plan, Sparse
from openreml_nn.likelihood.system.sparse.factor import Factor
from openreml_nn.likelihood.system.sparse.ordering import leaves_dense
from openreml_nn.likelihood.system.sparse.symbolic import Symbolic
from tests.likelihood.models import models
from tests.strategies import distances, kinship, pedigree


def natural(pattern: csc_matrix) -> np.ndarray:
    return np.arange(pattern.shape[0])


def backwards(pattern: csc_matrix) -> np.ndarray:
    return np.arange(pattern.shape[0])[::-1].copy()


def shuffled(pattern: csc_matrix) -> np.ndarray:
    return np.random.default_rng(1).permutation(pattern.shape[0])


ORDERS = [None, natural, backwards, shuffled]


# ---------------------------------------------------------------------- the factor


def positive_definite(n: int, density: float, seed: int) -> csc_matrix:
    rng = np.random.default_rng(seed)
    B = csc_matrix(random_array((n, n), density=density, rng=rng))
    return csc_matrix(B @ B.T + csc_matrix(np.eye(n)))


def factored(A: csc_matrix, order: Callable[[csc_matrix], np.ndarray] | None) -> Factor:
    symbolic = Symbolic.of(A, None if order is None else order(A))
    low = tril(A).tocoo()
    values = np.zeros(symbolic.entries)
    values[symbolic.where(low.row.astype(np.int64), low.col.astype(np.int64))] = low.data
    return Factor(symbolic, values)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 5, 30, 120]),
    st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    st.integers(0, 50),
    st.sampled_from(ORDERS),
)
def test_factor_solves_and_inverts_within_its_pattern(n, density, seed, order):
    A = positive_definite(n, density, seed)
    found, dense = factored(A, order), A.toarray()
    assert found.log_det == pytest.approx(np.linalg.slogdet(dense)[1], rel=1e-12, abs=1e-12)
    x = np.random.default_rng(seed).standard_normal((n, 7))
    np.testing.assert_allclose(found.solve(x), np.linalg.solve(dense, x), rtol=0, atol=1e-11)
    # Of few columns by another routine.
    np.testing.assert_allclose(found.solve(x[:, :2]), found.solve(x)[:, :2], rtol=0, atol=1e-11)
    half = found.half(x)
    np.testing.assert_allclose(half.T @ half, x.T @ np.linalg.solve(dense, x), atol=1e-10)
    low = tril(A).tocoo()
    place = found.symbolic.where(low.row.astype(np.int64), low.col.astype(np.int64))
    np.testing.assert_allclose(
        found.inverse[place], np.linalg.inv(dense)[low.row, low.col], rtol=0, atol=1e-12
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.sampled_from([0.01, 0.05, 0.2]), st.integers(0, 50))
def test_columns_of_one_pattern_are_one_supernode(n, density, seed):
    # Which they are is told by how many entries columns of L have, found without L.
    A = positive_definite(n, density, seed)
    symbolic = Symbolic.of(A, shuffled(A))
    L = A.toarray()[np.ix_(symbolic.order, symbolic.order)] != 0
    for j in range(n):
        below = j + 1 + L[j + 1 :, j].nonzero()[0]
        L[np.ix_(below, below)] = True
    L = np.tril(L)
    count, height = L.sum(0), np.diff(symbolic.row_start)
    assert (count[symbolic.first[:-1]] <= height).all()
    alike = L.diagonal(-1) & (count[:-1] == count[1:] + 1)
    assert (symbolic.of_column[:-1] == symbolic.of_column[1:])[alike].all()


@pytest.mark.parametrize(("wide", "reach", "merged"), [(20, 420, True), (40, 200, False)])
def test_columns_that_reach_far_into_a_large_block_are_part_of_it(wide, reach, merged):
    # Three times some columns that do not meet; the inverse of those that stay is found by panels.
    rng, few, last = np.random.default_rng(0), 3 * wide, 600
    A = np.diag(np.full(few + last, 400.0))
    A[few:, few:] += rng.standard_normal((last, last)) / 10
    for a in range(0, few, wide):
        A[np.ix_(few + np.sort(rng.permutation(last)[:reach]), range(a, a + wide))] = 1.0
        A[a : a + wide, a : a + wide] += 1.0
    A = csc_matrix(np.tril(A) + np.tril(A, -1).T)
    found = factored(A, natural)
    widths = np.diff(found.symbolic.first).tolist()
    assert widths == ([few + last] if merged else [wide, wide, wide, last])
    low = tril(A).tocoo()
    place = found.symbolic.where(low.row.astype(np.int64), low.col.astype(np.int64))
    inverse = np.linalg.inv(A.toarray())
    np.testing.assert_allclose(found.inverse[place], inverse[low.row, low.col], rtol=0, atol=1e-16)
    assert found.log_det == pytest.approx(np.linalg.slogdet(A.toarray())[1], rel=1e-14)


def test_every_entry_of_the_pattern_of_the_factor_is_of_the_inverse():
    # A grid: its supernodes are of all widths.
    n = 14
    path = np.diag(np.full(n, 4.0)) - np.eye(n, k=1) - np.eye(n, k=-1)
    A = csc_matrix(np.kron(path, np.eye(n)) + np.kron(np.eye(n), path) - 3.9 * np.eye(n * n))
    found = factored(A, None)
    inverse = np.linalg.inv(A.toarray())
    row, column = (x.reshape(-1) for x in np.indices(A.shape))
    place = found.symbolic.where(row, column)
    inside = place >= 0
    assert inside.sum() > A.nnz
    np.testing.assert_allclose(
        found.inverse[place[inside]], inverse[row[inside], column[inside]], rtol=1e-10
    )


def crossed_pattern(seed: int, groups: int = 1) -> csc_matrix:
    """Positive definite, of 300 columns that do not meet and 400 others, in groups of their own."""
    rng, first, rest = np.random.default_rng(seed), 300, 400
    W = np.zeros((first, rest))
    for i in range(first):
        own = np.arange(i % groups, rest, groups)
        W[i, rng.permutation(own)[:25]] = rng.standard_normal(25)
    corner = np.diag(30.0 + rng.random(rest))
    return csc_matrix(np.block([[np.diag(30.0 + rng.random(first)), W], [W.T, corner]]))


@pytest.mark.parametrize("ordered", ["columns first", "narrow columns first", "dissected"])
def test_many_columns_that_reach_into_a_large_block_are_taken_line_by_line(ordered):
    A = crossed_pattern(0)
    if ordered == "narrow columns first":  # pairs of columns are supernodes of two
        A = csc_matrix(np.kron(A.toarray()[::2, ::2], np.eye(2)) + 0.1 * np.eye(700))
        A = csc_matrix(A + np.kron(np.eye(350), np.full((2, 2), 0.5)))
    dissected = ordered == "dissected"
    found, dense = factored(A, None if dissected else natural), A.toarray()
    widest = np.diff(found.symbolic.first).max()
    assert widest >= 200 and (dissected or ordered != "columns first" or found.symbolic.runs)
    assert found.log_det == pytest.approx(np.linalg.slogdet(dense)[1], rel=1e-12)
    low = tril(A).tocoo()
    place = found.symbolic.where(low.row.astype(np.int64), low.col.astype(np.int64))
    np.testing.assert_allclose(
        found.inverse[place], np.linalg.inv(dense)[low.row, low.col], rtol=0, atol=1e-14
    )
    x = np.random.default_rng(1).standard_normal((700, 3))
    np.testing.assert_allclose(found.solve(x), np.linalg.solve(dense, x), rtol=0, atol=1e-13)


def test_a_long_factorisation_says_how_far_it_is_and_finds_the_same():
    path = np.diag(np.full(14, 4.0)) - np.eye(14, k=1) - np.eye(14, k=-1)
    A = csc_matrix(np.kron(path, np.eye(14)) + np.kron(np.eye(14), path))
    short = factored(A, None)
    long = replace(short.symbolic, operations=1e12)  # as one that takes minutes
    low, said = tril(A).tocoo(), []
    values = np.zeros(long.entries)
    values[long.where(low.row.astype(np.int64), low.col.astype(np.int64))] = low.data
    found = Factor(long, values, lambda *said_now: said.append(said_now))
    assert found.log_det == short.log_det
    np.testing.assert_array_equal(found.inverse, short.inverse)
    assert len(long.pieces) > 5
    for what in ("factor", "inverse"):
        shares = [share for own, share in said if own == what]
        assert len(shares) > 1 and shares == sorted(shares) and shares[-1] == 1


def test_what_is_left_of_crossed_factors_is_dense_unless_they_fall_into_groups():
    first = np.arange(300)
    assert leaves_dense(crossed_pattern(0), first)
    assert not leaves_dense(crossed_pattern(0, groups=4), first)


def test_a_factor_takes_the_memory_of_one_that_is_gone_and_of_no_other():
    A = positive_definite(120, 0.05, 0)
    symbolic, low = Symbolic.of(A), tril(A).tocoo()
    place = symbolic.where(low.row.astype(np.int64), low.col.astype(np.int64))

    def made(scale: float) -> Factor:
        values = symbolic.memory.take()
        values.fill(0.0)
        values[place] = scale * low.data
        return Factor(symbolic, values)

    one = made(1.0)
    first, part = one.values.ctypes.data, one.inverse[: len(place)]
    known = part.copy()
    del one  # of its inverse a part is still looked at
    other = made(2.0)
    assert other.values.ctypes.data == first
    np.testing.assert_allclose(2 * other.inverse[place], factored(A, None).inverse[place])
    np.testing.assert_array_equal(part, known)


def test_matrix_without_a_positive_pivot_is_refused():
    A = csc_matrix(np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    with pytest.raises(NumericalError, match="not positive definite"):
        factored(A, natural)


# ---------------------------------------------------------------------- the likelihood


def evaluated(
    V: Matrix, y: torch.Tensor, X: torch.Tensor, method: str, solver: str | Sparse
) -> tuple[Evaluation, list[torch.Tensor], list[torch.Tensor]]:
    """An evaluation, its scores, and directions for its information."""
    objective = REMLLoss(V, method, solver).objective(y, X)
    found = objective.evaluate()
    generator = torch.Generator().manual_seed(0)
    directions = []
    for matrix in objective.matrices(None):
        d = torch.randn(3, *matrix.shape, generator=generator, dtype=matrix.dtype)
        directions.append(d + d.mT if d.dim() == 3 and d.shape[1] == d.shape[2] else d)
    return found, found.scores(), directions


def assert_equal(
    V: Matrix,
    y: torch.Tensor,
    X: torch.Tensor,
    method: str = "reml",
    solver: str | Sparse = "sparse",
    tolerance: float = 1e-9,
) -> None:
    dense, expected, directions = evaluated(V, y, X, method, "dense")
    sparse, scores, _ = evaluated(V, y, X, method, solver)

    def close(one: torch.Tensor, other: torch.Tensor) -> None:
        size = max(float(other.abs().max()), 1e-3) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size)

    close(sparse.log_likelihood, dense.log_likelihood)
    close(sparse.fixed.estimate, dense.fixed.estimate)
    close(sparse.fixed.covariance, dense.fixed.covariance)
    for one, other in zip(scores, expected, strict=True):
        close(one, other)
    close(sparse.information(directions), dense.information(directions))
    for one, other in zip(sparse.data_scores(), dense.data_scores(), strict=True):
        close(one, other)
    assert [x.name for x in sparse.random] == [x.name for x in dense.random]
    for one, other in zip(sparse.random, dense.random, strict=True):
        close(one.values, other.values)
        close(one.variances, other.variances)


@settings(max_examples=30, deadline=None)
@given(models(structured=True), st.sampled_from(["reml", "ml"]))
def test_any_mix_of_terms_and_residuals_equals_dense(model, method):
    if Sparse().obstacle(model.covariance.terms()) is None:
        assert_equal(model.covariance, model.y, model.X, method)


@st.composite
def related(draw) -> tuple[Matrix, torch.Tensor, torch.Tensor]:
    """Relatives and other kernels, one or several effects a level, crossed with a factor."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, q = int(rng.integers(12, 30)), int(rng.integers(3, 12))
    k = draw(st.sampled_from([1, 1, 2, 3]))
    kind = draw(st.sampled_from(["pedigree", "dense inverse", "kernel", "distances"]))
    K: Matrix = {
        "pedigree": lambda: KnownInverseMatrix(pedigree(q).inverse),
        "dense inverse": lambda: KnownInverseMatrix(torch.linalg.inv(kinship(q))),
        "kernel": lambda: KnownMatrix(kinship(q)),
        "distances": lambda: ExponentialMatrix(distances(q)),
    }[kind]()
    if k > 1:
        K.fix("sigma^2", 0.0)
        K = KroneckerProduct(K, UnstructuredMatrix(k))
    values = torch.from_numpy(rng.standard_normal((n, k))) if k > 1 else None
    z = DummyMatrix.from_codes(torch.from_numpy(rng.integers(0, q, n)), q, values)
    other = DummyMatrix.from_codes(torch.from_numpy(rng.integers(0, 4, n)), 4)
    group = (np.arange(n) // 3).tolist()
    residual: Matrix = draw(
        st.sampled_from(
            [
                ScalarMatrix(n),
                weighted(torch.from_numpy(rng.uniform(0.5, 2, n))),
                stratified(rng.integers(0, 3, n).tolist()),
                within(group, UnstructuredMatrix(3)),
            ]
        )
    )
    V = Sum(
        relatives=CovariancePropagation(z, K),
        factor=CovariancePropagation(other, ScalarMatrix(4)),
        residual=residual,
    ).double()
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.copy_(torch.from_numpy(0.5 * rng.standard_normal(1)))
    X = torch.from_numpy(np.column_stack([np.ones(n), rng.standard_normal(n)]))
    return V, torch.from_numpy(rng.standard_normal(n)), X


@settings(max_examples=30, deadline=None)
@given(related(), st.sampled_from(["reml", "ml"]), st.sampled_from(ORDERS))
def test_relatives_equal_dense_in_any_order_of_elimination(model, method, order):
    assert_equal(*model, method, Sparse(ordering=order))


def animals(n: int, seed: int = 0) -> tuple[Sum, torch.Tensor, torch.Tensor]:
    """A pedigree of ten generations with a record each."""
    rng = np.random.default_rng(seed)
    size = n // 10
    names = [f"a{i}" for i in range(n)]
    sires: list[str | None] = [None] * size
    dams: list[str | None] = [None] * size
    for i in range(size, n):
        base = (i // size - 1) * size
        sires.append(names[base + int(rng.integers(max(2, size // 10)))])
        dams.append(names[base + int(rng.integers(size))])
    found = Pedigree.of(names, sires, dams)
    V = Sum(
        animal=CovariancePropagation(found.design(names), KnownInverseMatrix(found.inverse)),
        residual=ScalarMatrix(n),
    ).double()
    y = torch.from_numpy(rng.standard_normal(n))
    return V, y, torch.ones(n, 1, dtype=torch.float64)


@pytest.mark.parametrize("log_sd", [-200.0, -12.0, -5.0, 0.0, 3.0])
def test_a_variance_near_zero_is_an_ordinary_point(log_sd):
    V, y, X = animals(60)
    V.set_value("animal/op_1/sigma^2", log_sd)
    assert_equal(V, y, X)


def test_a_variance_of_exactly_zero_is_an_ordinary_point():
    V, y, X = animals(60)
    V.set_value("animal/op_1/sigma^2", 0.0, natural=True)
    assert_equal(V, y, X)


def test_a_singular_covariance_of_effects_is_an_ordinary_point():
    rng = np.random.default_rng(0)
    codes, values = torch.from_numpy(rng.integers(0, 6, 40)), rng.standard_normal((40, 2))
    z = DummyMatrix.from_codes(codes, 6, torch.from_numpy(values))
    loadings = torch.tensor([[1.0, 0.0], [0.7, 0.0]])
    flat = CovariancePropagation(loadings, UnstructuredMatrix(2))
    V = Sum(
        slopes=CovariancePropagation(z, KroneckerProduct(IdentityMatrix(6), flat)),
        residual=ScalarMatrix(40),
    ).double()
    assert_equal(V, torch.from_numpy(rng.standard_normal(40)), torch.ones(40, 1).double())


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, 6), (6, 1), (4, 5), (3, 8)]),
    st.booleans(),
    st.integers(0, 1000),
    st.sampled_from(["reml", "ml"]),
)
def test_an_autoregressive_field_with_missing_plots_equals_dense(sizes, several, seed, method):
    rng = np.random.default_rng(seed)
    q = sizes[0] * sizes[1]
    rows = np.sort(rng.permutation(np.repeat(np.arange(q), 2 if several else 1))[: q + 3])
    n = len(rows)
    field = AR1Matrix(q) if 1 in sizes else ar1_field(*sizes)
    block = DummyMatrix.from_codes(torch.from_numpy(rng.integers(0, 3, n)), 3)
    V = Sum(
        field=CovariancePropagation(DummyMatrix.from_codes(torch.from_numpy(rows), q), field),
        block=CovariancePropagation(block, ScalarMatrix(3)),
        nugget=ScalarMatrix(n),
    ).double()
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.copy_(torch.from_numpy(0.7 * rng.standard_normal(1)))
    y, X = torch.from_numpy(rng.standard_normal(n)), torch.ones(n, 1, dtype=torch.float64)
    dense, expected, directions = evaluated(V, y, X, method, "dense")
    sparse, scores, _ = evaluated(V, y, X, method, "sparse")
    assert float(sparse.log_likelihood) == pytest.approx(float(dense.log_likelihood), rel=1e-10)
    # A chain's score is by the entries that its inverse depends on: by parameters it is the same.
    found = {}
    for solver, by_entries in (("dense", expected), ("sparse", scores)):
        objective = REMLLoss(V, method, solver).objective(y, X)
        matrices = objective.matrices(None)
        value = sum((s * m).sum() for s, m in zip(by_entries, matrices, strict=True))
        parameters = list(V.parameters())
        found[solver] = torch.cat(torch.autograd.grad(value, parameters, retain_graph=True))
    for one, other in (
        (found["sparse"], found["dense"]),
        (sparse.information(directions), dense.information(directions)),
    ):
        size = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * size)
    for one, other in zip(sparse.random, dense.random, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-9)
        torch.testing.assert_close(one.variances, other.variances, rtol=0, atol=1e-9)


def test_relatives_over_the_rows_themselves():
    V, y, X = animals(40)
    pedigree_of_rows = V.operands["animal"].operands["op_1"]
    assert isinstance(pedigree_of_rows, KnownInverseMatrix)
    over_rows = Sum(
        animal=KnownInverseMatrix(pedigree_of_rows.inverse), residual=ScalarMatrix(40)
    ).double()
    assert_equal(over_rows, y, X)


def test_float32_has_the_digits_of_float32():
    V, y, X = animals(60)
    exact = REMLLoss(V, solver="dense", reduction="sum").evaluate(y, X)
    found = REMLLoss(V.float(), solver="sparse", reduction="sum").evaluate(y.float(), X.float())
    assert found.log_likelihood.dtype == torch.float32
    assert float(found.log_likelihood) == pytest.approx(float(exact.log_likelihood), rel=1e-6)
    for one, other in zip(found.random, exact.random, strict=True):
        torch.testing.assert_close(one.values.double(), other.values, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.variances.double(), other.variances, rtol=0, atol=1e-5)


def crossed() -> tuple[Sum, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal((60, 2)))
    a = DummyMatrix.from_codes(torch.from_numpy(rng.integers(0, 9, 60)), 9, values)
    b = DummyMatrix.from_codes(torch.from_numpy(rng.integers(0, 7, 60)), 7)
    V = Sum(
        slopes=CovariancePropagation(a, KroneckerProduct(IdentityMatrix(9), UnstructuredMatrix(2))),
        other=CovariancePropagation(b, ScalarMatrix(7)),
        residual=ScalarMatrix(60),
    ).double()
    return V, torch.from_numpy(rng.standard_normal(60)), torch.ones(60, 1, dtype=torch.float64)


@pytest.mark.parametrize("model", [lambda: animals(40), crossed])
def test_second_derivatives_equal_those_of_dense(model):
    V, y, X = model()
    found = {}
    for solver in ("dense", "sparse"):
        loss, parameters = REMLLoss(V, solver=solver), list(V.parameters())
        first = torch.autograd.grad(loss(y, X), parameters, create_graph=True)
        found[solver] = torch.stack(
            [torch.cat(torch.autograd.grad(g, parameters, retain_graph=True)) for g in first]
        )
    torch.testing.assert_close(found["sparse"], found["dense"], rtol=1e-9, atol=1e-12)


def field() -> tuple[Sum, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(20, generator=g).double()
    return ar1_field(5, 4).double(), y, torch.ones(20, 1).double()


@pytest.mark.parametrize("model", [lambda: animals(40), crossed, field])
def test_transforms_of_torch_have_the_gradient(model):
    V, y, X = model()
    loss, parameters = REMLLoss(V, solver="sparse"), list(V.parameters())
    expected = torch.autograd.grad(loss(y, X), parameters)
    names = [f"covariance.{name}" for name, _ in V.named_parameters()]

    def value(*theta):
        return torch.func.functional_call(loss, dict(zip(names, theta, strict=True)), (y, X))

    at, places = [p.detach() for p in parameters], tuple(range(len(names)))
    found = torch.func.grad(value, argnums=places)(*at)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_transforms_of_torch_take_crossed_factors_of_many_levels():
    g = torch.Generator().manual_seed(0)
    n, levels = 700, (520, 510)
    random = {
        f"f{i}": CovariancePropagation(
            DummyMatrix.from_codes(torch.randint(q, (n,), generator=g), q), ScalarMatrix(q)
        )
        for i, q in enumerate(levels)
    }
    V = Sum({**random, "residual": ScalarMatrix(n)}).double()
    y, X = torch.randn(n, generator=g).double(), torch.ones(n, 1).double()
    loss = REMLLoss(V)
    found = torch.func.grad(lambda y: loss(y, X))(y)
    moved = y.requires_grad_()
    torch.testing.assert_close(found, *torch.autograd.grad(loss(moved, X), moved))


def test_second_derivatives_of_too_many_rows_are_refused():
    V, y, X = animals(60)
    value = REMLLoss(V, solver=Sparse(memory=2e5))(y, X)
    with pytest.raises(InputError, match=r"dense matrices .* of 60 rows"):
        torch.autograd.grad(value, list(V.parameters()), create_graph=True)


def test_a_trained_design_has_the_gradient_of_dense():
    rng = np.random.default_rng(0)
    Z = torch.nn.Parameter(torch.from_numpy(rng.standard_normal((30, 3))))
    V = Sum(
        load=CovariancePropagation(z=Z, g=UnstructuredMatrix(3)), residual=ScalarMatrix(30)
    ).double()
    y, X = torch.from_numpy(rng.standard_normal(30)), torch.ones(30, 1, dtype=torch.float64)
    found = {}
    for solver in ("dense", "sparse"):
        loss = REMLLoss(V, solver=solver)(y, X)
        found[solver] = torch.autograd.grad(loss, list(V.parameters()))
    for one, other in zip(found["sparse"], found["dense"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_network_of_the_residual_has_the_gradient_of_dense():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 2, generator=g).double(), torch.randn(30, generator=g).double()
    batch = {"x": x, "y": y, "groups": {"g": torch.arange(30) % 5}}
    network = torch.nn.Linear(2, 1).double()
    found = {}
    for solver in ("dense", "sparse"):
        random = {"g": RandomEffect(5)}
        model = MixedModel(torch.nn.Identity(), random, network, "gls", solver=solver)
        found[solver] = torch.autograd.grad(model.loss(batch), list(model.parameters()))
    for one, other in zip(found["sparse"], found["dense"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_other_data_of_the_same_designs():
    V, y, X = animals(60)
    loss = REMLLoss(V, solver="sparse")
    loss(y, X)
    y = y.flip(0).requires_grad_()
    value = loss(y, X)
    value.backward()
    again = y.detach().clone().requires_grad_()
    expected = REMLLoss(V, solver="dense")(again, X)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(y.grad, again.grad, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- the plan


def test_the_plan_takes_it_for_relatives():
    V, y, X = animals(1000)
    loss = REMLLoss(V)
    loss.objective(y, X)
    assert loss.plan.solver == "sparse"
    assert loss.plan.exact
    # Where no other fits, that is the reason, and what an approximation would be taken instead of.
    loss = REMLLoss(V, solver=Auto(memory=2**22))
    assert "solver   sparse: what meets is sparse, others would need" in str(loss.plan)
    loss = REMLLoss(V, solver=Auto(memory=1000))
    assert "GiB; solver='sparse' insists on an exact one" in str(loss.plan)


def test_a_fit_of_relatives_equals_that_of_the_spectral_solver():
    V, y, X = animals(300)
    found = fit_reml(V, y, X, solver="sparse")
    expected = fit_reml(V, y, X, solver="spectral")
    assert found.converged
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-8)
    for one, other in zip(found.parameters, expected.parameters, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5, abs=1e-6)


def test_the_plan_leaves_one_factor_to_the_blocked_solver():
    rng = np.random.default_rng(0)
    z = DummyMatrix.from_codes(torch.from_numpy(rng.integers(0, 900, 3000)), 900)
    V = Sum(g=CovariancePropagation(z, ScalarMatrix(900)), residual=ScalarMatrix(3000)).double()
    assert Plan.of(V.terms(), 1, "auto", torch.float64).solver == "blocked"


# ---------------------------------------------------------------------- what cannot be done


def test_a_factor_beyond_memory_is_refused_before_it_is_made():
    V, y, X = animals(60)
    with pytest.raises(InputError, match=r"sparse solver would hold .* GiB for a factor of 60"):
        REMLLoss(V, solver=Sparse(memory=1e3))(y, X)
    with pytest.raises(InputError, match=r"hold .* for a factor of 9 columns, and the machine has"):
        Sparse(memory=1e40).check_memory(1e30, 9)
    with pytest.raises(TypeError, match="`progress` is 3: expected a function"):
        Sparse(progress=3)


def test_a_singular_precision_is_refused_by_name():
    n = 12
    path = torch.eye(n, dtype=torch.float64) * 2
    path -= torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    path[0, 0] = path[-1, -1] = 1  # a random walk's: its rows sum to zero
    z = DummyMatrix.from_codes(torch.arange(2 * n) % n, n)
    V = Sum(
        walk=CovariancePropagation(z, KnownInverseMatrix(path)), residual=ScalarMatrix(2 * n)
    ).double()
    y = torch.linspace(0, 1, 2 * n, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"'walk'.*not positive definite"):
        REMLLoss(V, solver="sparse")(y, torch.ones(2 * n, 1).double())


def test_a_covariance_over_the_rows_without_a_residual_is_refused():
    V = KnownInverseMatrix(pedigree(8).inverse).double()
    y = torch.linspace(0, 1, 8, dtype=torch.float64)
    with pytest.raises(InputError, match="sparse solver needs"):
        REMLLoss(V, solver="sparse")(y, torch.ones(8, 1).double())


def test_an_ordering_that_is_none_is_refused():
    V, y, X = animals(60)
    with pytest.raises(InputError, match="no order of 60 columns"):
        REMLLoss(V, solver=Sparse(ordering=lambda pattern: np.zeros(60, int)))(y, X)
