"""Evaluations without a fit, and the digits that they have."""

import copy
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch

import openreml_nn
from openreml_nn import InputError, NumericalError, REMLLoss, restricted_log_likelihood
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
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
)
from openreml_nn.likelihood import Blocked, Dense, Evaluation, NotPositiveDefiniteError, Solver
from openreml_nn.likelihood.solvers.blocked import BlockedProblem
from openreml_nn.likelihood.solvers.dense import DenseProblem
from tests.likelihood.exact import IS_LONG, LONG, answer, cholesky, long
from tests.likelihood.test_scores import started
from tests.strategies import kinship, pedigree

N = 24
needs_long = pytest.mark.skipif(not IS_LONG, reason="long double is double here")


def grouped(codes, g, levels, values=None):
    return CovariancePropagation(z=DummyMatrix.from_codes(codes, levels, values), g=g)


def family(kind):
    """A model of a kind, its solvers, and the shape of each term's BLUPs."""
    at = torch.arange(N)
    slopes = torch.stack([torch.ones(N), torch.randn(N)], 1)
    match kind:
        case "nested":
            # The last level has no rows.
            parts = {
                "t0": grouped(at // 8, ScalarMatrix(3), 3),
                "t1": grouped(at // 3, ScalarMatrix(9), 9),
            }
            return parts, ["dense", "blocked"], [(3, 1), (9, 1)]
        case "crossed":
            us = KroneckerProduct(IdentityMatrix(6), UnstructuredMatrix(2))
            parts = {
                "t0": grouped(at % 6, us, 6, slopes),
                "t1": grouped(at % 5, ScalarMatrix(5), 5),
            }
            return parts, ["dense", "blocked"], [(6, 2), (5, 1)]
        case "kernel":
            parts = {
                "t0": grouped(torch.randperm(N), KnownMatrix(kinship(N)), N),
            }
            return parts, ["dense", "blocked", "spectral"], [(N, 1)]
        case "pedigree":
            g = KroneckerProduct(KnownInverseMatrix(pedigree(7).inverse), UnstructuredMatrix(2))
            return {"t0": grouped(at % 6, g, 7, slopes)}, ["dense", "blocked"], [(7, 2)]
        case "field":
            parts = {"field": ar1_field(4, 6), "t0": grouped(at % 5, ScalarMatrix(5), 5)}
            return parts, ["dense", "grid"], [(N, 1), (5, 1)]
        case "factor analytic":
            return {"t0": grouped(at % 4, factor_analytic(4, 2), 4)}, ["dense", "blocked"], [(4, 1)]
        case "scaled":
            return {"t0": grouped(at % 4, heterogeneous_ar1(4), 4)}, ["dense", "blocked"], [(4, 1)]
    raise ValueError(kind)


@needs_long
@pytest.mark.parametrize("method", ["reml", "ml"])
@pytest.mark.parametrize(
    "kind", ["nested", "crossed", "kernel", "pedigree", "field", "factor analytic", "scaled"]
)
def test_an_evaluation_says_what_the_textbook_says(kind, method):
    parts, solvers, shapes = family(kind)
    V = started(Sum({**parts, "residual": ScalarMatrix(N)}).double())
    y, X = torch.randn(N), torch.randn(N, 2)
    expected = answer(V, y, X, method)
    for solver in (*solvers, "auto"):
        found = REMLLoss(V, method, solver).evaluate(y, X)
        assert isinstance(found, Evaluation)
        assert found.log_likelihood.shape == ()
        assert not found.log_likelihood.requires_grad
        assert found.log_likelihood.item() == pytest.approx(
            float(expected.log_likelihood), rel=1e-12
        )
        np.testing.assert_allclose(found.fixed.estimate, expected.beta.astype(float), rtol=1e-9)
        sd = found.fixed.covariance.diagonal().sqrt()
        np.testing.assert_allclose(sd, expected.beta_sd.astype(float), rtol=1e-9)
        assert found.fixed.columns == (0, 1)
        assert [effects.name for effects in found.random] == list(parts)
        for effects, (q, k) in zip(found.random, shapes, strict=True):
            assert effects.values.shape == (q, k)
            assert effects.variances.shape == (q, k, k)
            if effects.name in expected.effects:
                b, spread = (x.astype(float) for x in expected.effects[effects.name])
                blocks = spread.reshape(q, k, q, k)[np.arange(q), :, np.arange(q)]
                np.testing.assert_allclose(effects.values.numpy(), b.reshape(q, k), atol=1e-10)
                np.testing.assert_allclose(effects.variances.numpy(), blocks, atol=1e-10)


def test_the_columns_that_were_kept_are_told():
    V = Sum(t0=grouped(torch.arange(N) % 4, ScalarMatrix(4), 4), residual=ScalarMatrix(N)).double()
    X = torch.randn(N, 3)
    wide = torch.stack([X[:, 0], X[:, 1], X[:, 0] - X[:, 1], X[:, 2]], 1)
    y = torch.randn(N)
    with pytest.warns(RuntimeWarning, match="dropped column 2"):
        found = REMLLoss(V).evaluate(y, wide).fixed
    assert found.columns == (0, 1, 3)
    torch.testing.assert_close(found.estimate, REMLLoss(V).evaluate(y, X).fixed.estimate)


def test_rows_are_those_of_the_covariance():
    V = Sum(t0=grouped(torch.arange(N) % 4, ScalarMatrix(4), 4), residual=ScalarMatrix(N)).double()
    rows = torch.randperm(N)[:11]
    y, X = torch.randn(11), torch.ones(11, 1)
    one, other = (REMLLoss(V, solver=s).evaluate(y, X, rows) for s in ("dense", "blocked"))
    assert len(one.random) == 1
    torch.testing.assert_close(one.random[0].values, other.random[0].values)
    torch.testing.assert_close(one.random[0].variances, other.random[0].variances)


def test_no_more_is_computed_than_asked_for():
    V = Sum(t0=grouped(torch.arange(N) % 4, ScalarMatrix(4), 4), residual=ScalarMatrix(N)).double()
    loss = REMLLoss(V, solver="blocked")
    evaluation = loss.evaluate(torch.randn(N), torch.ones(N, 1))
    with mock.patch.object(type(evaluation), "random_effects", side_effect=AssertionError):
        assert evaluation.fixed.estimate.shape == (1,)
        with pytest.raises(AssertionError):
            _ = evaluation.random
    assert evaluation.random is evaluation.random


# ---------------------------------------------------------------------- digits


def ratio_model(log_ratio, k=1, g=None):
    at = torch.arange(N)
    values = torch.randn(N, k)
    g = g or KroneckerProduct(IdentityMatrix(8), UnstructuredMatrix(k))
    V = Sum(t0=grouped(at % 8, g, 8, values), residual=ScalarMatrix(N)).double()
    with torch.no_grad():
        for name, p in V.named_parameters():
            at_diagonal = name.startswith("t0") and (name.endswith("^2") or name[-1] == name[-3])
            p.fill_(log_ratio if at_diagonal else 0.1)
    y = (cholesky(long(torch.eye(N))) @ np.random.default_rng(0).standard_normal(N)).astype(float)
    b = torch.exp(torch.tensor(log_ratio)) * torch.randn(8, k)
    return V, torch.tensor(y) + (values * b[at % 8]).sum(1)


@needs_long
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("log_ratio", [4.0, 8.0, 12.0, 17.0])
def test_digits_are_kept_where_random_effects_dwarf_the_residual(log_ratio, solver, k):
    V, y = ratio_model(log_ratio, k)
    X = torch.ones(N, 1)
    expected = answer(V, y, X, "reml")
    loss = REMLLoss(V, solver=solver, reduction="sum")
    value = loss(y, X)
    assert -value.item() == pytest.approx(float(expected.log_likelihood), rel=1e-8)
    value.backward()
    for (name, p), g in zip(V.named_parameters(), expected.gradient.values(), strict=True):
        assert -p.grad.item() == pytest.approx(float(g), rel=2e-6, abs=2e-6), name
    effects = loss.evaluate(y, X).random[0]
    b, spread = (x.astype(float) for x in expected.effects["t0"])
    blocks = spread.reshape(8, k, 8, k)[np.arange(8), :, np.arange(8)]
    np.testing.assert_allclose(
        effects.values.numpy().reshape(-1), b, rtol=0, atol=1e-6 * abs(b).max()
    )
    sd = np.sqrt(np.diagonal(blocks, axis1=1, axis2=2))
    error = abs(effects.variances.numpy() - blocks) / (sd[:, :, None] * sd[:, None, :])
    assert error.max() < 1e-5


def test_variances_of_a_covariance_that_is_indefinite_are_its_difference():
    g = Sum(ScalarMatrix(3), torch.full((3, 3), -0.6))  # an eigenvalue is -0.8
    at = torch.arange(N) % 3
    residual = ScalarMatrix(N).set_value("sigma^2", 2.0)
    V = Sum(t=CovariancePropagation(z=DummyMatrix.from_codes(at, 3), g=g), e=residual).double()
    y, X = torch.randn(N), torch.randn(N, 2)
    found = REMLLoss(V, solver="dense").evaluate(y, X).random[0].variances
    inverse, G = torch.linalg.inv(V().detach()), g().detach()
    half = torch.linalg.solve(X.mT @ inverse @ X, X.mT @ inverse)
    Z = torch.nn.functional.one_hot(at, 3).to(G)
    expected = G - G @ Z.mT @ (inverse - inverse @ X @ half) @ Z @ G
    torch.testing.assert_close(found.flatten(), expected.diagonal(), rtol=1e-10, atol=1e-12)


class BlockedAlone(BlockedProblem):
    def precise(self, terms):
        return None


class DenseAlone(DenseProblem):
    def precise(self, terms):
        return None


@dataclass(frozen=True)
class Alone(Solver):
    """A solver without the square roots that it goes to where digits are lost."""

    name: ClassVar[str] = "alone"
    other: Solver

    def forecast(self, terms, p, dtype):
        return self.other.forecast(terms, p, dtype)

    def problem(self, fixed, terms, method):
        if isinstance(self.other, Blocked):
            return BlockedAlone(fixed, terms, method, self.other)
        return DenseAlone(fixed, terms, method)


def test_small_variances_lose_no_digits_of_prediction_error():
    # In the blocked way itself, without the square roots.
    V, y = ratio_model(6.0, 2)
    X = torch.ones(N, 1)
    exact = REMLLoss(V, solver="dense").evaluate(y, X).random[0].variances
    found = REMLLoss(V, solver=Alone(Blocked())).evaluate(y, X)
    torch.testing.assert_close(found.random[0].variances, exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("solver", [Dense(), Blocked()])
def test_what_float64_cannot_tell_is_an_error_that_says_so(solver):
    V, y = ratio_model(17.0, 2)
    X = torch.ones(N, 1)
    with pytest.raises(NumericalError, match="hold the residual variance further from zero"):
        REMLLoss(V, solver=Alone(solver))(y, X)
    with pytest.raises(NumericalError):
        REMLLoss(V, solver=Alone(solver)).evaluate(y, X)


def test_float32_says_that_float64_would_do():
    V, y = ratio_model(12.0, 2)
    X = torch.ones(N, 1)
    with pytest.raises(NumericalError, match=r"torch\.float32.*use float64"):
        REMLLoss(copy.deepcopy(V).float())(y.float(), X.float())
    REMLLoss(V)(y, X)


def test_a_gradient_whose_terms_cancel_is_an_error():
    # Loadings of a factor that leave nothing specific: G has an inverse that float64 cannot tell.
    g = KroneckerProduct(IdentityMatrix(8), factor_analytic(2, 1))
    V, y = ratio_model(10.0, 2, g)
    with torch.no_grad():
        for name, p in V.named_parameters():
            if "loadings" in name:
                p.fill_(2e4)
            elif "specific" in name:
                p.fill_(-1.0)
    value = REMLLoss(V, reduction="sum")
    with pytest.raises(NumericalError):
        value(y, torch.ones(N, 1)).backward()


def test_second_derivatives_say_so_too():
    V, y = ratio_model(15.0, 2)
    value = REMLLoss(V, solver="blocked")(y, torch.ones(N, 1))
    with pytest.raises(NumericalError):
        torch.autograd.grad(value, list(V.parameters()), create_graph=True)


def test_errors_are_of_one_family():
    assert openreml_nn.NumericalError is NumericalError
    assert issubclass(NotPositiveDefiniteError, NumericalError)
    assert issubclass(NotPositiveDefiniteError, ValueError)
    assert not issubclass(NumericalError, ValueError)


# ---------------------------------------------------------------------- at a given V


@needs_long
@pytest.mark.parametrize("method", ["reml", "ml"])
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_the_functional_form_equals_long_double(method, unit):
    y, X = unit * torch.randn(N), torch.randn(N, 3) * torch.tensor([1.0, 1e4, 1e-4])
    V = unit**2 * (kinship(N) + 0.3 * torch.eye(N))
    L = cholesky(long(V))
    white = np.linalg.solve(L.astype(float), np.eye(N)).astype(LONG)
    for _ in range(2):  # Newton's method for an inverse
        white = white + white @ (np.eye(N, dtype=LONG) - L @ white)
    a, b = white @ long(X), white @ long(y)
    C = cholesky(a.T @ a)
    half = np.zeros(3, dtype=LONG)
    for i in range(3):
        half[i] = ((a.T @ b)[i] - C[i, :i] @ half[:i]) / C[i, i]
    log_det = 2 * np.log(np.diagonal(L)).sum()
    if method == "reml":
        log_det += 2 * np.log(np.diagonal(C)).sum()
    rank = N - 3 if method == "reml" else N
    expected = -(rank * np.log(2 * LONG(np.pi)) + log_det + b @ b - half @ half) / 2
    found = restricted_log_likelihood(y, X, V, method).item()
    assert found == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda y, X, V: (y, X, V.tolist()), TypeError, "`V` is list"),
        (lambda y, X, V: (y, X, V.long()), TypeError, "`V` is torch.int64"),
        (lambda y, X, V: (y, X, V.float()), TypeError, "`V` is torch.float32 but `y`"),
        (lambda y, X, V: (y, X, V[:5, :5]), InputError, "`V` has shape"),
        (lambda y, X, V: (y, X, V.index_fill(0, torch.tensor([3]), torch.nan)), InputError, "row"),
        (lambda y, X, V: (y, X, V.triu()), InputError, "`V` is not symmetric"),
        (
            lambda y, X, V: (y, X, V - 2 * torch.eye(N)),
            NotPositiveDefiniteError,
            "V is not positive",
        ),
        (lambda y, X, V: (y, X, torch.ones(N, N)), NotPositiveDefiniteError, "V is not positive"),
        (lambda y, X, V: (y, X, V, "map"), InputError, "`method` is 'map'"),
        (lambda y, X, V: (y, X, V, None), InputError, "`method` is None"),
        (lambda y, X, V: (y[:, None], X, V), InputError, "`y` has shape"),
    ],
)
def test_wrong_arguments_of_the_functional_form_are_refused(change, error, match):
    y, X, V = torch.randn(N), torch.randn(N, 2), torch.eye(N) + 0.1
    with pytest.raises(error, match=match):
        restricted_log_likelihood(*change(y, X, V))


def test_a_matrix_close_to_singular_is_refused():
    V = torch.ones(N, N) + 1e-13 * torch.eye(N)
    with pytest.raises(NumericalError):
        restricted_log_likelihood(torch.randn(N), torch.randn(N, 1), V)


def test_aliased_columns_of_the_functional_form_are_dropped():
    y, X, V = torch.randn(N), torch.randn(N, 2), torch.eye(N) + 0.1
    with pytest.warns(RuntimeWarning, match="dropped column 2"):
        found = restricted_log_likelihood(y, torch.cat([X, X.sum(1, keepdim=True)], 1), V)
    torch.testing.assert_close(found, restricted_log_likelihood(y, X, V))


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["one", "slopes", "apart", "crossed", "none"])
def test_the_krylov_solver_follows_the_dtype(kind, dtype, default):
    at = torch.arange(N)
    x = torch.randn(N, dtype=torch.float64)
    y = torch.randn(N, dtype=dtype)
    torch.set_default_dtype(default)
    slopes = torch.stack([torch.ones_like(x), x], 1)
    us = KroneckerProduct(IdentityMatrix(6), UnstructuredMatrix(2))
    parts = {
        "one": {"a": grouped(at % 6, ScalarMatrix(6), 6)},
        "slopes": {"a": grouped(at % 6, us, 6, slopes)},
        "apart": {
            "a": grouped(at % 6, ScalarMatrix(6), 6),
            "b": grouped(at % 6, ScalarMatrix(6), 6, x),
        },
        "crossed": {
            "a": grouped(at % 6, ScalarMatrix(6), 6),
            "b": grouped(at % 4, ScalarMatrix(4), 4),
        },
        "none": {},
    }[kind]
    V = Sum({**parts, "residual": ScalarMatrix(N)}).to(dtype)
    X = torch.ones(N, 1, dtype=dtype)
    found = {}
    for solver in ("blocked", "krylov"):
        loss = REMLLoss(V, solver=solver, reduction="sum")
        value = loss(y, X)
        assert value.dtype == dtype
        gradient = torch.autograd.grad(value, list(V.parameters()))
        found[solver] = [value, *gradient, *(e.values for e in loss.evaluate(y, X).random)]
    if kind != "crossed":  # nothing is left to be estimated
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        torch.testing.assert_close(
            found["krylov"], found["blocked"], rtol=tolerance, atol=tolerance
        )
    assert {x.dtype for x in found["krylov"]} == {dtype}


def test_an_ar1_random_effect_is_level_by_level():
    V = started(Sum(t0=grouped(torch.arange(N) % 5, AR1Matrix(5), 5), r=ScalarMatrix(N)).double())
    y, X = torch.randn(N), torch.ones(N, 1)
    one, other = (REMLLoss(V, solver=s).evaluate(y, X).random[0] for s in ("dense", "blocked"))
    torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(one.variances, other.variances)
