"""The inverse relationship matrix against the tabular method."""

import warnings

import numpy as np
import pytest
import torch

from openreml_nn.covariance import Pedigree


def tabular(parents):
    """A by its definition: each animal is the mean of its parents."""
    n = len(parents)
    A = np.zeros((n, n))
    for i, (s, d) in enumerate(parents):
        for j in range(i):
            A[i, j] = A[j, i] = sum(0.5 * A[j, p] for p in (s, d) if p is not None)
        A[i, i] = 1 + (0.5 * A[s, d] if s is not None and d is not None else 0)
    return A


@pytest.mark.parametrize("seed", range(20))
def test_inverse_and_inbreeding_equal_the_tabular_method(seed):
    rng = np.random.default_rng(seed)
    n = 40
    parents = []
    for i in range(n):
        # Few parents for many generations: much inbreeding, selfing among it.
        pair = [int(rng.integers(max(0, i - 8), i)) if i and rng.random() < 0.9 else None] * 2
        pair[1] = int(rng.integers(max(0, i - 8), i)) if i and rng.random() < 0.9 else None
        parents.append(tuple(pair))
    order = rng.permutation(n)
    name = [f"animal {i}" for i in range(n)]
    found = Pedigree.of(
        [name[i] for i in order],
        [None if parents[i][0] is None else name[parents[i][0]] for i in order],
        [np.nan if parents[i][1] is None else name[parents[i][1]] for i in order],
    )
    A = tabular(parents)
    at = [name.index(level) for level in found.levels]
    expected = np.linalg.inv(A)[np.ix_(at, at)]
    np.testing.assert_allclose(found.inverse.to_dense(), expected, atol=1e-9)
    np.testing.assert_allclose(found.inbreeding, np.diag(A)[at] - 1, atol=1e-12)


def test_parents_come_first_and_unlisted_parents_are_founders():
    found = Pedigree.of([3, 4], [1, 3], [0, 2.0])
    assert set(found.levels) == {"1", "2", "3", "4"}
    assert found.levels.index("3") < found.levels.index("4")
    assert found.inverse.is_sparse
    assert found.inverse.dtype == torch.float64


def test_a_long_line_of_descent_needs_no_recursion():
    n = 5000
    found = Pedigree.of(range(n, 0, -1), range(n - 1, -1, -1), [0] * n)
    assert found.levels[:3] == ("1", "2", "3")
    assert float(found.inbreeding.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ((["a", "a"], [None, None], [None, None]), "'a' stands in two rows"),
        ((["a", None], [None, None], [None, None]), "no name in row 1"),
        ((["a", "b"], ["b", "a"], [None, None]), "its own ancestor"),
        ((["a"], ["a"], [None]), "its own ancestor"),
        ((["a"], [None, None], [None]), "as many"),
    ],
)
def test_wrong_pedigrees_are_refused(columns, match):
    with pytest.raises(ValueError, match=match):
        Pedigree.of(*columns)


def test_complete_inbreeding_is_an_error():
    n = 200
    names = [f"a{i}" for i in range(n)]
    sires = [None if i < 2 else names[i - 2] for i in range(n)]
    dams = [None if i < 2 else names[i - 1] for i in range(n)]
    with pytest.raises(ValueError, match="completely inbred"):
        Pedigree.of(names, sires, dams)


def test_a_design_has_the_order_of_the_pedigree():
    animal = [f"a{i}" for i in range(12)]
    pedigree = Pedigree.of(animal, [None, None, *animal[:10]], [None, None, *animal[1:11]])
    rows = ["a11", "a2", "a11", "a10"]  # in another order, and that of the alphabet
    Z = pedigree.design(rows)()
    assert [pedigree.levels[i] for i in Z.argmax(1)] == rows
    with pytest.raises(ValueError, match="'b' in row 1 is not in the pedigree"):
        pedigree.design(["a1", "b"])


def test_an_animal_of_two_sexes_is_named_in_a_warning():
    with pytest.warns(UserWarning, match="'a' is a `sire` in row 0 and a `dam` in row 1"):
        Pedigree.of(["c", "d"], ["a", "c"], ["b", "a"])


def test_plants_that_self_are_of_both_sexes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Pedigree.of(["b", "c"], ["a", "b"], ["a", "a"])
    assert found.inbreeding.tolist() == [0.0, 0.5, 0.5]
