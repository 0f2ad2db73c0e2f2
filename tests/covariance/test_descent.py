"""The inverse of a relationship matrix, taken apart into who descends from whom."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix

from openreml_nn.covariance import Pedigree
from openreml_nn.terms.descent import Descent
from openreml_nn.terms.kernel import Kernel


def inverse_of(n: int, unknown: float, seed: int) -> csc_matrix:
    """Of animals with earlier ones as parents, some of them sibs; odd ones are sires, even ones dams."""
    rng = np.random.default_rng(seed)
    sires: list[str | None] = []
    dams: list[str | None] = []
    for i in range(1, n + 1):
        earlier = rng.permutation(np.arange(1, i))
        for parents, odd in ((sires, 1), (dams, 0)):
            own = [p for p in earlier if p % 2 == odd and rng.random() >= unknown]
            parents.append(str(own[0]) if own else None)
    found = Pedigree.of([str(i) for i in range(1, n + 1)], sires, dams)
    return csc_matrix(found.inverse.to_dense().numpy())


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.0, 0.7, 1.0]), st.integers(0, 50))
def test_a_pedigree_is_found_in_the_inverse_of_its_relationship_matrix(n, unknown, seed):
    Q = inverse_of(n, unknown, seed)
    found, dense = Descent.of(Q), Q.toarray()
    assert found is not None
    assert (np.diff(found.W.indptr) <= 3).all()  # itself and two parents
    assert found.log_det == pytest.approx(np.linalg.slogdet(dense)[1], rel=1e-12, abs=1e-12)
    x = np.random.default_rng(seed).standard_normal((n, 3))
    np.testing.assert_allclose(found.solve(x), np.linalg.solve(dense, x), rtol=1e-10, atol=1e-11)
    kernel = Kernel(inverse=torch.from_numpy(dense).to_sparse())
    assert kernel.log_det() == -found.log_det
    np.testing.assert_array_equal(kernel.multiply(torch.from_numpy(x)).numpy(), found.solve(x))


def path(n: int) -> np.ndarray:
    return np.diag(np.full(n, 4.0)) - np.eye(n, k=1) - np.eye(n, k=-1)


@pytest.mark.parametrize(
    "Q",
    [
        np.kron(path(9), np.eye(9)) + np.kron(np.eye(9), path(9)),  # a grid fills up
        path(400),  # so many generations are no gain
        inverse_of(40, 0.0, 1).toarray()[::-1, ::-1],  # offspring stand before their parents
        np.diag([1.0, -1.0]),
        np.array([[1.0, 1.0], [1.0, 1.0]]),
        np.array([[1.0, 2.0], [2.0, 1.0]]),
    ],
    ids=["grid", "path", "backwards", "negative", "singular", "indefinite"],
)
def test_what_is_no_pedigree_is_left_to_a_factor_of_its_pattern(Q):
    assert Descent.of(csc_matrix(Q)) is None
