"""Complete grids: the grid solver against the dense one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openreml_nn import REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    ar1_field,
)
from openreml_nn.likelihood import NotPositiveDefiniteError
from tests.likelihood.models import Model
from tests.likelihood.test_loss import METHODS, _compare_solvers

#: Of each of four kinds, in all that derives from a likelihood.
FEWER = settings(max_examples=settings.default.max_examples // 10)


def field(r, c, seed, nugget=True, genotypes=True, grid=None, trend=True):
    generator = torch.Generator().manual_seed(seed)
    n = r * c
    parts = {"field": ar1_field(r, c) if grid is None else grid}
    if genotypes:
        labels = torch.randint(0, 4, (n,), generator=generator)
        z = DummyMatrix.from_codes(labels, 4)
        parts["genotype"] = CovariancePropagation(z=z, g=ScalarMatrix(4))
    if trend:
        columns = torch.randn(n, 2, generator=generator)
        parts["trend"] = CovariancePropagation(z=columns, g=UnstructuredMatrix(2))
    if nugget:
        parts["nugget"] = ScalarMatrix(n)
    V = Sum(parts).double()
    with torch.no_grad():
        for p in V.parameters():
            p.copy_(0.5 * torch.randn(1, generator=generator))
    return Model(V, torch.randn(n, generator=generator), torch.randn(n, 2, generator=generator))


@pytest.mark.parametrize("nugget", [True, False])
@pytest.mark.parametrize("genotypes", [True, False])
@FEWER
@given(st.integers(2, 5), st.integers(3, 5), st.integers(0, 1000), st.sampled_from(METHODS))
def test_grid_equals_dense(genotypes, nugget, r, c, seed, method):
    _compare_solvers(field(r, c, seed, nugget, genotypes), method, ("dense", "grid"))


def test_any_two_matrices_make_a_grid():
    grid = KroneckerProduct(UnstructuredMatrix(3), UnstructuredMatrix(4))
    _compare_solvers(field(3, 4, 0, grid=grid), "reml", ("dense", "grid"))


def test_a_start_without_correlation_is_an_ordinary_point():
    m = field(4, 5, 0)
    for name, p in m.covariance.named_parameters():
        if name.endswith("rho"):
            p.data.zero_()
    _compare_solvers(m, "reml", ("dense", "grid"))


def test_auto_takes_it_for_a_field_and_both_reach_the_same_fit():
    m = field(9, 10, 3, trend=False)
    found = fit_reml(m.covariance, m.y, m.X)
    assert found.plan.solver == "grid"
    assert "eigendecompositions of 9 x 9 and 10 x 10" in str(found.plan)
    values = [p.value for p in found.parameters]
    other = fit_reml(m.covariance, m.y, m.X, solver="dense")
    assert found.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-10)
    assert values == pytest.approx([p.value for p in other.parameters], rel=1e-4, abs=1e-6)
    (component,) = (c for c in found.components if c.name == "field")
    assert component.covariance.shape == (1, 1)


def test_errors():
    m = field(3, 4, 0)
    rest = Sum(m.covariance.operands["genotype"], ScalarMatrix(12)).double()
    with pytest.raises(ValueError, match="grid solver needs one Kronecker product"):
        REMLLoss(rest, solver="grid")(m.y, m.X)
    m = field(3, 4, 0, nugget=False)
    with torch.no_grad():
        dict(m.covariance.named_parameters())["field.row.sigma^2"].fill_(-400.0)
    with pytest.raises(NotPositiveDefiniteError, match="V is not positive definite"):
        REMLLoss(m.covariance, solver="grid")(m.y, m.X)


@pytest.mark.parametrize("nugget", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@FEWER
@given(st.integers(0, 1000), st.sampled_from(METHODS))
def test_rows_in_any_order_and_with_weights(weights, nugget, seed, method):
    """The grid of a table: rows as they come, and the same weights for the field and the nugget."""
    generator = torch.Generator().manual_seed(seed)
    r, c = 4, 3
    order = torch.randperm(r * c, generator=generator)
    scale = 0.5 + torch.rand(r * c, generator=generator) if weights else None
    parts = {
        "residual": CovariancePropagation(
            z=DummyMatrix.from_codes(order, r * c, scale),
            g=KroneckerProduct(groups=IdentityMatrix(1), matrix=ar1_field(r, c)),
        ),
        "genotype": CovariancePropagation(
            z=DummyMatrix.from_codes(torch.arange(r * c) % 4, 4), g=ScalarMatrix(4)
        ),
    }
    if nugget:
        rows = torch.arange(r * c)
        units = CovariancePropagation(
            z=DummyMatrix.from_codes(rows, r * c, scale), g=ScalarMatrix(r * c)
        )
        parts["units"] = units if weights else ScalarMatrix(r * c)
    V = Sum(parts).double()
    with torch.no_grad():
        for p in V.parameters():
            p.copy_(0.5 * torch.randn(1, generator=generator))
    y = torch.randn(r * c, generator=generator)
    _compare_solvers(
        Model(V, y, torch.randn(r * c, 2, generator=generator)), method, ("dense", "grid")
    )
