"""Slopes in a basis in which their covariates are orthogonal, and back in the user's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openreml_nn.estimation.basis import basis_of, factor_in_user_basis, history_in_user_basis


@given(st.integers(0, 1000), st.integers(2, 4), st.floats(1e3, 1e5))
def test_columns_far_from_zero_become_orthonormal(seed, k, shift):
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([torch.ones(40, 1), shift + torch.randn(40, k - 1, generator=generator)], 1)
    B = basis_of(z)
    torch.testing.assert_close((z @ B).mT @ (z @ B) / 40, torch.eye(k), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "z",
    [
        torch.ones(9, 1),  # one column
        torch.tensor([[1.0, 1e4, 3.0], [1.0, 1e4 + 1, 5.0]]),  # fewer rows than columns
        torch.stack([torch.ones(9), torch.zeros(9)], 1),  # a column of zeros
        torch.stack([torch.ones(9), 3 * torch.ones(9)], 1),  # columns that depend on each other
        torch.stack([torch.ones(9), torch.linspace(-1, 1, 9)], 1),  # well conditioned
    ],
    ids=["one", "short", "zeros", "dependent", "well conditioned"],
)
def test_other_columns_are_taken_as_they_are(z):
    assert basis_of(z.double()) is None


@given(st.integers(0, 1000), st.booleans())
def test_a_factor_and_its_history_have_the_covariance_of_the_users_effects(seed, singular):
    generator = torch.Generator().manual_seed(seed)
    L = torch.randn(3, 3, generator=generator).tril()
    L.diagonal().abs_()
    if singular:
        L[2, 2] = 0.0
    B = torch.randn(3, 3, generator=generator) + 3 * torch.eye(3)
    found = factor_in_user_basis(L, B)
    torch.testing.assert_close(found @ found.mT, B @ L @ L.mT @ B.mT)
    assert torch.equal(found, found.tril())
    assert float(found.diagonal().min()) > -1e-12
    names = {f"a.b/g/L_{i}_{j}": float(L[i, j]) for i in range(3) for j in range(i + 1)}
    others = {"aXb/g/L_0_0": 5.0, "a.b/g/rho": 0.5, "residual/sigma^2": 1.0}
    history = history_in_user_basis(names | others, {"a.b": B})
    assert {name: history.pop(name) for name in others} == others
    assert history == {
        f"a.b/g/L_{i}_{j}": pytest.approx(float(found[i, j]))
        for i in range(3)
        for j in range(i + 1)
    }
