"""Structures that are compositions: rows within groups, strata, weights."""

import itertools

import pytest
import torch

from openreml_nn.covariance import (
    AR1Matrix,
    DiagonalMatrix,
    KnownMatrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    stratified,
    weighted,
    within,
)
from tests.strategies import kinship


def entries(V):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return V().detach()


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("kind", [AR1Matrix, UnstructuredMatrix])
def test_positions_count_by_their_order_and_not_by_that_of_the_rows(kind, order):
    """Occasion 10 comes after occasion 9, in whatever row it stands."""
    subject, time = ["a"] * 3 + ["b"] * 3, [8.0, 9.0, 10.0] * 2
    V = within(subject, kind(3), time).double()
    expected = entries(V)
    rows = [*order, *(3 + i for i in reversed(order))]
    moved = within([subject[i] for i in rows], kind(3), [time[i] for i in rows]).double()
    torch.testing.assert_close(entries(moved), expected[rows][:, rows], rtol=0, atol=0)


def test_strata_count_by_their_order_and_not_by_that_of_the_rows():
    V = stratified(["m", "f", "m"]).double()
    with torch.no_grad():
        V.operands["g"].operands["matrix"].get_parameter("sigma^2_0").fill_(1.0)
    assert V().diagonal().tolist() == pytest.approx([1.0, torch.tensor(2.0).exp().item(), 1.0])


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "known", "within"])
def test_terms_of_some_rows_are_those_rows_of_the_matrix(kind):
    n = 6
    V = {
        "scalar": lambda: ScalarMatrix(n),
        "diagonal": lambda: DiagonalMatrix(n),
        "known": lambda: KnownMatrix(kinship(n)),
        "within": lambda: within([0, 0, 0, 1, 1, 1], AR1Matrix(3)),
    }[kind]()
    V = Sum(V).double()
    whole = entries(V)
    for rows in (torch.tensor([4, 1, 5]), torch.tensor([0, 2, 2])):
        found = sum(term.dense() for term in V.terms(rows))
        torch.testing.assert_close(found, whole[rows][:, rows])


def test_weights_divide_the_variance():
    V = weighted(torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(V(), torch.diag(torch.tensor([1.0, 0.25])))
