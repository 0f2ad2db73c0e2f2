"""Labels of every kind as designs."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import DummyMatrix

ONE_HOT = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "labels",
    [
        ["b", "a", "b"],
        [2, 1, 2],
        [10, 9, 10],
        (True, False, True),
        np.array([2.5, 1.5, 2.5]),
        np.array(["b", "a", "b"]),
        torch.tensor([7, 3, 7]),
        pd.Series(["b", "a", "b"], index=[5, 5, 6]),
        pd.Categorical(["x", "y", "x"], categories=["y", "x"]),
        pd.Series(pd.Categorical(["b", "a", "b"])),
    ],
)
def test_labels_of_every_kind(labels):
    lex = not isinstance(labels, pd.Categorical)
    torch.testing.assert_close(DummyMatrix(labels, lex_order=lex)(), ONE_HOT)


def test_numbers_are_sorted_by_size():
    assert DummyMatrix([10, 9, 100]).colnames == ["9", "10", "100"]


def test_labels_without_given_levels_are_sorted_also_without_lex_order():
    assert DummyMatrix(["b", "a", "b"], lex_order=False).colnames == ["a", "b"]
    assert DummyMatrix([10, 9, 10], lex_order=False).colnames == ["9", "10"]


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT])
def test_missing_labels_are_refused_with_their_rows(missing):
    with pytest.raises(ValueError, match=r"missing in 2 row\(s\): 2, 4"):
        DummyMatrix(["a", missing, "b", missing])


def test_flat_levels_of_one_factor():
    Z = DummyMatrix(["b", "a"], levels=["a", "b", "c"])
    torch.testing.assert_close(Z(), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))


def test_unknown_labels_warn_and_are_zero():
    with pytest.warns(RuntimeWarning, match="not among the levels"):
        Z = DummyMatrix(["a", "z"], levels=["a", "b"])
    torch.testing.assert_close(Z(), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_interaction_of_factors():
    Z = DummyMatrix(["a", "b", "a"], [1, 1, 2])
    assert Z.colnames == ["a⋈1", "a⋈2", "b⋈1", "b⋈2"]
    assert Z.codes.tolist() == [0, 2, 1]
    observed = DummyMatrix(["a", "b", "a"], [1, 1, 2], drop_empty_cols=True)
    assert observed.colnames == ["a⋈1", "a⋈2", "b⋈1"]


def test_names_joined_alike_stay_apart():
    Z = DummyMatrix(["a⋈b", "a"], ["c", "b⋈c"], drop_empty_cols=True)
    assert Z.shape == (2, 2)
    torch.testing.assert_close(Z(), torch.eye(2).flip(0) if Z.codes[0] else torch.eye(2))


def test_only_observed_cells_of_many_factors_are_formed():
    labels = [list(range(1000))] * 3
    Z = DummyMatrix(*labels, drop_empty_cols=True)
    assert Z.shape == (1000, 1000)


def test_drop_first():
    torch.testing.assert_close(DummyMatrix(["b", "a", "b"], drop_first=True)(), ONE_HOT[:, 1:])
    with pytest.raises(ValueError, match="single level"):
        DummyMatrix(["a", "a"], drop_first=True)


def test_covariates_are_level_major():
    Z = DummyMatrix(["b", "a"], covariates=torch.tensor([[1.0, 5.0], [1.0, 7.0]]))
    torch.testing.assert_close(Z(), torch.tensor([[0.0, 0.0, 1.0, 5.0], [1.0, 7.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("labels", "options", "match"),
    [
        ([], {}, "at least one label"),
        ([[]], {}, "at least one label"),
        ([["a"], ["a", "b"]], {}, "same length"),
        ([["a"]], {"covariates": torch.ones(2, 1)}, "covariates"),
        ([["a"], ["b"]], {"levels": ["a", "b"]}, "levels"),
        ([["a"]], {"levels": ["a", "b", "a"]}, "twice"),
    ],
)
def test_wrong_input_is_refused(labels, options, match):
    with pytest.raises(ValueError, match=match):
        DummyMatrix(*labels, **options)


def test_a_single_string_is_refused():
    with pytest.raises(TypeError, match="sequence of labels"):
        DummyMatrix("abc")


def test_design_from_codes():
    Z = DummyMatrix.from_codes(torch.tensor([1, 0, -1]), ["a", "b"])
    assert Z.colnames == ["a", "b"]
    torch.testing.assert_close(Z(), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    for codes in (torch.tensor([2]), torch.tensor([-2]), torch.tensor([[0]]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match="codes"):
            DummyMatrix.from_codes(codes, 2)


@pytest.mark.parametrize("covariates", [None, torch.arange(1.0, 7).reshape(3, 2)])
def test_a_row_of_no_level_is_a_row_of_zeros(covariates):
    Z = DummyMatrix.from_codes(torch.tensor([1, -1, 0]), 2, covariates)
    assert Z()[1].tolist() == [0.0] * Z.shape[1]
    assert bool((Z()[[0, 2]].abs().sum(1) > 0).all())
    x = torch.randn(Z.shape[1], 3)
    torch.testing.assert_close(Z.design.matmul(x), Z().to(x) @ x)
    y = torch.randn(3, 2)
    torch.testing.assert_close(Z.design.t_matmul(y), Z().to(y).mT @ y)
