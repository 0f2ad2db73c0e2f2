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
        ((["a", None], [None, None], [None, None]), "no name in row 2"),
        ((["a", "b"], ["b", "a"], [None, None]), "is its own ancestor, by '?. > . > .'?: expected"),
        ((["a"], ["a"], [None]), "'a' is its own ancestor, by a > a: expected"),
        (
            (["x", "a", "b", "c", "d"], [None, "c", "a", "b", "x"], [None, "x", None, "x", "c"]),
            "is its own ancestor, by (a > b > c > a|b > c > a > b|c > a > b > c): expected",
        ),
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
    with pytest.raises(ValueError, match=r"'b' in row 2 is not in the pedigree: .* add it there"):
        pedigree.design(["a1", "b"])


def test_an_animal_of_two_sexes_is_named_in_a_warning():
    with pytest.warns(UserWarning, match="'a' is a `sire` in row 1 and a `dam` in row 2"):
        Pedigree.of(["c", "d"], ["a", "c"], ["b", "a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pedigree.of(["c", "d"], ["a", "c"], ["b", "a"], hermaphrodite=True)


def test_plants_that_self_are_of_both_sexes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Pedigree.of(["b", "c"], ["a", "b"], ["a", "a"])
    assert found.inbreeding.tolist() == [0.0, 0.5, 0.5]


def family(seed, n=40, groups=()):
    """Sires and dams of animals at random, of which some are unknown and of a group."""
    rng = np.random.default_rng(seed)
    animal = [f"a{i}" for i in range(n)]
    sire, dam = [], []
    for i in range(n):
        pair = [animal[int(rng.integers(max(0, i - 9), i))] if i and rng.random() < 0.8 else None
                for _ in range(2)]  # fmt: skip
        pair = [rng.choice([*groups, None]) if p is None and groups else p for p in pair]
        sire.append(pair[0])
        dam.append(pair[1])
    return animal, sire, dam


@pytest.mark.parametrize("seed", range(3))
def test_relationships_of_some_are_those_among_all(seed):
    pedigree = Pedigree.of(*family(seed, 300), hermaphrodite=True)
    A = np.linalg.inv(pedigree.inverse.to_dense().numpy())
    whole = pedigree.relationship()
    assert tuple(whole.index) == tuple(whole.columns) == pedigree.levels
    np.testing.assert_allclose(whole, A, atol=1e-10)
    some = ["a7", "a250", "a3"]
    np.testing.assert_array_equal(pedigree.relationship(some), whole.loc[some, some])
    with pytest.raises(ValueError, match="'b', which is not in the pedigree"):
        pedigree.relationship(["a1", "b"])


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_parents_without_relatives(seed):
    animal, sire, dam = family(seed, groups=("G", "H"))
    pedigree = Pedigree.of(animal, sire, dam, groups=["G", "H"], hermaphrodite=True)
    plain = Pedigree.of(
        animal, *([None if p in ("G", "H") else p for p in side] for side in (sire, dam)),
        hermaphrodite=True,
    )  # fmt: skip
    at = [pedigree.levels.index(name) for name in plain.levels]
    A = plain.inverse.to_dense()
    torch.testing.assert_close(pedigree.inverse.to_dense()[at][:, at], A, rtol=0, atol=1e-13)
    Q = pedigree.contributions.loc[list(plain.levels)]
    of = dict(zip(animal, zip(sire, dam, strict=True), strict=True))
    share = {"G": np.array([1.0, 0]), "H": np.array([0, 1.0]), None: np.zeros(2)}
    for name in animal:  # parents come first here
        share[name] = (share[of[name][0]] + share[of[name][1]]) / 2
    np.testing.assert_allclose(Q, [share[name] for name in plain.levels], atol=1e-15)
    whole = pedigree.grouped(4.0)
    assert whole.names == (*pedigree.levels, "G", "H")
    q = torch.tensor(Q.to_numpy())
    expected = torch.cat([torch.cat([A, -A @ q], 1), torch.cat([-q.T @ A, q.T @ A @ q], 1)])
    expected[-2:, -2:] += torch.eye(2, dtype=torch.float64) / 4
    order = [*at, len(at), len(at) + 1]
    torch.testing.assert_close(
        whole.inverse.to_dense()[order][:, order], expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Pedigree.of(["a"], ["G"], [None], groups=["a"]), "`groups` has 'a', which is an `animal`"),
        (lambda: Pedigree.of(["a"], ["G"], [None], groups=["G", "H"]), "`groups` has 'H', which is no"),
        (lambda: Pedigree.of(["a"], ["G"], [None], groups=["G", "G"]), "`groups` has 'G' twice"),
        (lambda: Pedigree.of(["a"], ["G"], [None]).grouped(1.0), "the pedigree has no groups"),
        (lambda: Pedigree.of(["a"], ["G"], [None], groups=["G"]).grouped(0), "`variance` is 0"),
        (lambda: Pedigree.of(["c", "d"], ["a", "a"], ["b", "c"]).dominance(), "`animal` 'd' is inbred"),
    ],
)  # fmt: skip
def test_wrong_groups_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_dominance_is_that_of_pairs_of_parents():
    """Full sibs, half sibs, and children of two pairs of full sibs."""
    D = Pedigree.of(list("efghi"), list("aaacc"), list("bbddk")).dominance()
    assert D.loc["e", "f"] == 0.25
    assert D.loc["e", "g"] == D.loc["e", "a"] == D.loc["h", "i"] == 0.0
    double = Pedigree.of(list("efghxy"), list("aaccef"), list("bbddgh"), hermaphrodite=True)
    assert double.dominance().loc["x", "y"] == 1 / 16  # double first cousins
    # The sire of one and the dam of the other are sibs, and the other two are strangers.
    halves = Pedigree.of(list("efxy"), list("aaep"), list("bbgf"), hermaphrodite=True)
    assert halves.dominance().loc["x", "y"] == halves.dominance().loc["y", "x"] == 0.0
    np.testing.assert_array_equal(np.diag(D), 1.0)
