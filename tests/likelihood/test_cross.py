"""Cross-products by their non-zeros against dense ones, and groups of columns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openreml_nn.likelihood.system import cross
from openreml_nn.likelihood.system.crossproducts import Pattern, Statistics
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.likelihood.system.placement import Placement
from openreml_nn.terms.design import IndexedDesign


def dense(design):
    return design.matmul(torch.eye(design.shape[1]))


def nested(n, seed):
    """Three nested factors and the design of a crossed one."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, 12, (n,), generator=generator)
    return inner, inner // 3, inner // 6


@given(st.integers(0, 1000), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.booleans())
def test_sparse_products_equal_dense_ones(seed, k, r, crossed):
    n = 40
    generator = torch.Generator().manual_seed(seed)
    inner, middle, outer = nested(n, seed)
    if crossed:
        outer = torch.randint(0, 2, (n,), generator=generator)

    def values(effects):
        return None if effects == 1 else torch.randn(n, effects, generator=generator)

    one = IndexedDesign(inner, values(k), 12)
    two = [IndexedDesign(middle, values(r), 4), IndexedDesign(outer, values(1), 2)]
    like = torch.zeros(n, 1)
    W, square, partition = _forced(one, two, [False, False], like)
    assert isinstance(W, cross.SparseCross)
    Z1 = dense(one)
    Z2 = torch.cat([dense(design) for design in two], 1)
    expected = (Z1.mT @ Z2).unflatten(0, (12, k))
    torch.testing.assert_close(W.times(torch.eye(partition.q)), expected)
    torch.testing.assert_close(_whole(square, partition), Z2.mT @ Z2)
    if not crossed:
        assert partition.count == 2

    K = torch.randn(12, k, k, generator=generator)
    K = K + K.mT
    gram = (expected.mT @ K @ expected).sum(0)
    eye = torch.eye(k).expand_as(K)
    torch.testing.assert_close(_whole(W.gram(eye, K), partition), gram)
    half = torch.randn(12, k, k, generator=generator)
    square = (expected.mT @ half.mT @ half @ expected).sum(0)
    torch.testing.assert_close(_whole(W.gram(half, half), partition), square)
    Q = torch.randn(partition.q, partition.q, generator=generator)
    Q = (Q + Q.mT) * (partition.group[:, None] == partition.group)
    by_groups = _by_groups(Q, partition)
    torch.testing.assert_close(W.quadratic(by_groups), expected @ Q @ expected.mT)
    x = torch.randn(partition.q, 3, generator=generator)
    torch.testing.assert_close(W.times(x), expected @ x)
    y = torch.randn(12, k, 3, generator=generator)
    torch.testing.assert_close(W.t_times(y), (expected.mT @ y).sum(0))
    torch.testing.assert_close(partition.collect(partition.spread(x)), x)
    torch.testing.assert_close(partition.collect(by_groups @ partition.spread(x)), Q @ x)
    own = partition.own(by_groups, 0, 4, r)
    blocks = Q[: 4 * r, : 4 * r].reshape(4, r, 4, r)
    torch.testing.assert_close(own, torch.stack([blocks[i, :, i] for i in range(4)]))


def _forced(one, two, linked, like):
    designs = [one, *two]
    pattern = Pattern.of(designs)
    at = Placement(designs, pattern, [0], [1, 2], linked, pair_cost=0)
    system = at.place(pattern.products(designs, like))
    return system.W, system.A22, at.partition


def _whole(square, partition):
    i = torch.arange(partition.q)
    same = partition.group[:, None] == partition.group
    at = torch.where(same, partition.index(i[:, None], i), 0)
    return torch.where(same, square.reshape(-1)[at], 0.0)


def _by_groups(Q, partition):
    flat = partition.zeros(Q)
    i, j = (partition.group[:, None] == partition.group).nonzero(as_tuple=True)
    flat[partition.index(i, j)] = Q[i, j]
    return partition.square(flat)


def test_columns_of_a_linked_design_stay_together():
    inner, middle, outer = nested(40, 0)
    two = [IndexedDesign(middle, None, 4), IndexedDesign(outer, None, 2)]
    _, _, partition = _forced(
        IndexedDesign(inner, None, 12), two, [False, True], torch.zeros(40, 1)
    )
    assert partition.count == 1


def test_groups_of_very_unequal_size_are_not_padded():
    chain = torch.arange(50)
    edges = [(chain[:-1] * (chain[1:] < 40), chain[1:] * (chain[1:] < 40))]
    partition = Partition.of(60, edges, torch.device("cpu"))
    assert partition.whole


@pytest.mark.parametrize("q", [0, 1, 5])
def test_one_group(q):
    partition = Partition.of_one(q, torch.device("cpu"))
    assert partition.whole
    x = torch.randn(q, 2)
    torch.testing.assert_close(partition.collect(partition.spread(x)), x)
    assert partition.square(partition.zeros(x)).shape == (1, q, q)


@pytest.mark.parametrize("q", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 2])
def test_dense_products_are_those_of_the_blocks(q, k):
    blocks = torch.randn(7, k, q)
    W = cross.DenseCross(blocks)
    x, y = torch.randn(q, 3), torch.randn(7, k, 3)
    torch.testing.assert_close(W.times(x), blocks @ x)
    torch.testing.assert_close(W.t_times(y), (blocks.mT @ y).sum(0))
    K, Q = torch.randn(7, k, k), torch.randn(q, q)
    K, Q = K + K.mT, Q + Q.mT
    eye = torch.eye(k).expand_as(K)
    torch.testing.assert_close(W.gram(eye, K)[0], (blocks.mT @ K @ blocks).sum(0))
    torch.testing.assert_close(W.gram(K, K)[0], (blocks.mT @ K.mT @ K @ blocks).sum(0))
    torch.testing.assert_close(W.quadratic(Q[None]), blocks @ Q @ blocks.mT)


@given(st.integers(0, 1000), st.booleans(), st.permutations(range(3)))
def test_sums_of_parts_with_levels_in_any_order_are_those_of_all_rows(seed, weighted, order):
    """Cross-products of two parts, each with the levels that it has, by the names of the levels."""
    generator = torch.Generator().manual_seed(seed)
    n, sizes = 30, (12, 4, 5)
    inner, middle, _ = nested(n, seed)
    codes = [inner, middle, torch.randint(0, 5, (n,), generator=generator)]
    slopes = torch.randn(n, 2, generator=generator)
    f = torch.randn(n, 3, generator=generator)
    weights = 0.5 + torch.rand(n, generator=generator) if weighted else None

    def designs(codes, rows, sizes):
        values = [None, slopes[rows], None]
        return [IndexedDesign(*one) for one in zip(codes, values, sizes, strict=True)]

    def of_part(rows):
        """With levels numbered from the last that the part has to its first."""
        present = [code[rows].unique().flip(0) for code in codes]
        own = [(code[rows, None] == p).long().argmax(1) for code, p in zip(codes, present)]
        made = designs(own, rows, [len(p) for p in present])
        part = Statistics.of(made, f[rows], None if weights is None else weights[rows])
        return part.relabelled(present, sizes)

    M = torch.randn(3, 2, generator=generator)
    parts = of_part(torch.arange(n // 3)) + of_part(torch.arange(n // 3, n))
    pattern, found = parts.mapped(M).ordered(order)
    half = torch.ones(n, 1) if weights is None else weights.sqrt()[:, None]
    Z = [half * dense(design) for design in designs(codes, torch.arange(n), sizes)]
    assert parts.rows == n
    assert abs(parts.log_det + 2 * float(half.log().sum()) * bool(weighted)) < 1e-9
    for t, i in enumerate(order):
        torch.testing.assert_close(found.zf[t], Z[i].mT @ (half * f @ M))
        for u, j in enumerate(order[t:], t):
            cells, k, r = pattern.cells[t, u], 1 + (i == 1), 1 + (j == 1)
            whole = torch.zeros(sizes[i], k, sizes[j], r)
            whole[cells.a, :, cells.b] = found.zz[t, u]
            torch.testing.assert_close(whole.reshape(Z[i].shape[1], -1), Z[i].mT @ Z[j])
    torch.testing.assert_close(found.ff, (half * f @ M).mT @ (half * f @ M))
