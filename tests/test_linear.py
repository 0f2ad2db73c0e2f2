"""A formula and a table: what may not matter, and levels that were not seen."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import lmm
from openreml_nn.datasets import oats, sleepstudy
from openreml_nn.table import Encoder

OPTIONS = {
    "one variance": ("Reaction ~ Days + (Days | Subject)", {}),
    "ar1": ("Reaction ~ Days", {"residual": "ar1(Days | Subject)"}),
    "us": ("Reaction ~ Days", {"residual": "us(Days | Subject)"}),
    "diag": ("Reaction ~ Days + (1 | Subject)", {"residual": "diag(Days)"}),
    "weights": ("Reaction ~ 1 + (1 | Subject)", {"weights": "w"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_order_of_the_rows_does_not_matter(name):
    formula, options = OPTIONS[name]
    table = sleepstudy().assign(w=lambda t: 1 + t["Days"])
    if name == "us":
        table = table[table["Days"] < 4]
    one, other = (lmm(formula, t, **options) for t in (table, table.sample(frac=1, random_state=3)))
    assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-9)
    for a, b in zip(one.components, other.components, strict=True):
        assert a.effects == b.effects
        assert a.levels == b.levels
        torch.testing.assert_close(b.covariance, a.covariance, rtol=1e-4, atol=1e-4)


def test_positions_of_residuals_are_sorted_by_size():
    table = pd.DataFrame({"y": np.arange(6.0), "g": [1, 1, 1, 2, 2, 2], "t": [10, 9, 8, 9, 8, 10]})
    residual = Encoder("y ~ 1", residual="ar1(t | g)").fit(table).residual
    assert residual.positions == ("8", "9", "10")
    assert residual.codes.tolist() == [2, 1, 0, 4, 3, 5]


def test_a_combination_that_was_not_seen_is_no_level_though_its_parts_were():
    table = oats().query("not (Block == 'II' and Variety == 'Victory')")
    encoder = Encoder("yield ~ nitro + (1 | Block:Variety)")
    (design,) = encoder.fit(table).random
    assert "II:Victory" not in design.levels
    (found,) = encoder.transform(oats()).random
    new = (oats()["Block"] == "II") & (oats()["Variety"] == "Victory")
    assert new.sum() == 4
    assert set(found.codes[new.to_numpy(copy=True)].tolist()) == {-1}
    labels = (oats()["Block"] + ":" + oats()["Variety"])[~new].tolist()
    assert [found.levels[i] for i in found.codes if i >= 0] == labels
