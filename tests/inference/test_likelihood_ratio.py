"""Likelihood ratios are of fits of one data set, and name what differs."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, fit_reml, lmm
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum, weighted
from openreml_nn.datasets import sleepstudy
from openreml_nn.inference import anova, likelihood_ratio_test

TABLE = sleepstudy()
RNG = np.random.default_rng(0)
TABLE["w"] = RNG.uniform(1, 3, len(TABLE))
TABLE["u"] = 2 * TABLE["w"]
TABLE["late"] = np.where(TABLE["Days"] > 4, "late", "early")
TABLE["z"] = RNG.standard_normal(len(TABLE))


TABLES = {
    "all": TABLE,
    "shuffled": TABLE.sample(frac=1, random_state=1),
    "one weight": TABLE.assign(w=TABLE["w"].where(TABLE.index != 3, 9.0)),
    "one day": TABLE.assign(Days=TABLE["Days"].where(TABLE.index != 7, 9)),
    "first 170": TABLE.iloc[:170],
}


@cache
def fitted(fixed="Days", random="(1 | Subject)", table="all", **options):
    return lmm(f"Reaction ~ {fixed} + {random}", TABLES[table], **options)


@pytest.mark.parametrize(
    ("small", "large", "message"),
    [
        ({"weights": "w"}, {}, "have other weights, in row .* times that of row 1"),
        ({"weights": "w"}, {"weights": "w", "table": "one weight"}, "other weights, in row 4 "),
        ({}, {"table": "shuffled"}, "have other responses, .* in row 1: expected fits of the same"),
        ({}, {"fixed": "Days + offset(z)"}, "have other responses"),
        ({}, {"table": "first 170"}, "180 rows and .* 170 rows"),
    ],
    ids=["weights or none", "one weight", "another order", "an offset", "rows"],
)
def test_fits_of_other_data_are_refused_by_what_differs(small, large, message):
    small, large = fitted(**small), fitted(random="(Days | Subject)", **large)
    with pytest.raises(InputError, match=f"`small` .*{message}"):
        likelihood_ratio_test(small, large)
    with pytest.raises(InputError, match=r"`results\[0\]` .*`results\[1\]`|other weights"):
        anova(small, large)


def test_fixed_effects_of_other_values_are_other_data():
    large = fitted(random="(Days | Subject)", table="one day")
    with pytest.raises(InputError, match="other values of the fixed effect 'Days'"):
        likelihood_ratio_test(fitted(), large)


def test_weights_in_another_unit_are_the_same_weights():
    small, large = fitted(weights="w"), fitted(random="(Days | Subject)", weights="u")
    expected = likelihood_ratio_test(small, fitted(random="(Days | Subject)", weights="w"))
    assert likelihood_ratio_test(small, large).statistic == pytest.approx(expected.statistic)


def test_weights_of_a_tree_of_ones_own_are_compared():
    y, X = torch.tensor(TABLE["Reaction"]), torch.ones(180, 1, dtype=torch.float64)
    subject = DummyMatrix(TABLE["Subject"].tolist())

    def tree(residual, **more):
        return fit_reml(Sum(residual=residual, **more).double(), y, X)

    w = torch.tensor(TABLE["w"])
    one = CovariancePropagation(z=subject, g=ScalarMatrix(18))
    with pytest.raises(InputError, match="other weights"):
        likelihood_ratio_test(tree(ScalarMatrix(180)), tree(weighted(w), subject=one))
    test = likelihood_ratio_test(tree(weighted(w)), tree(weighted(3 * w), subject=one))
    assert test.df == 1


def test_models_are_nested_by_their_columns_whatever_their_names():
    small = fitted("I(2 * Days + 3)", method="ml")
    large = fitted("Days + z", method="ml")
    test = likelihood_ratio_test(small, large)
    expected = likelihood_ratio_test(fitted(method="ml"), large)
    assert test.statistic == pytest.approx(expected.statistic, abs=1e-7)
    assert test.df == expected.df == 1
    with pytest.raises(InputError, match=r"not nested: .* 'I\(Days\^2\)' is none of the larger"):
        likelihood_ratio_test(fitted("I(Days**2)", method="ml"), large)


def test_a_residual_with_strata_contains_one_without():
    small, large = fitted(), fitted(residual="diag(late)")
    assert likelihood_ratio_test(small, large).df == 1
    assert pd.notna(anova(small, large)["p"].iloc[1])
