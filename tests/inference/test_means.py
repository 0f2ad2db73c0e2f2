"""Marginal means against the cells that they are the means of."""

import numpy as np
import pandas as pd

from openreml_nn import lmm
from openreml_nn.datasets import oats, sleepstudy
from openreml_nn.inference import coefficients, emmeans


def test_marginal_means_are_the_means_of_their_cells():
    formula = "yield ~ factor(nitro) * Variety + (1 | Block)"
    result = lmm(formula, oats(), categorical=["nitro"])
    cells = emmeans(result, ["Variety", "nitro"])
    for factor, place in (("Variety", 0), ("nitro", 1)):
        means = emmeans(result, factor)
        of = cells.table["name"].str.split(", ").str[place]
        for i, level in enumerate(means.table["name"]):
            inside = (of == level).to_numpy(copy=True)
            assert inside.sum() == {"Variety": 4, "nitro": 3}[factor]
            expected = cells.table["estimate"][inside].mean()
            np.testing.assert_allclose(means.table["estimate"][i], expected, rtol=1e-10)
            np.testing.assert_allclose(means.L[i], cells.L[inside].mean(0), atol=1e-12)
        # Of balanced data they are the plain means.
        plain = oats().groupby(factor)["yield"].mean()
        np.testing.assert_allclose(means.table["estimate"], plain, rtol=1e-10)


def test_booleans_have_the_levels_of_r_and_predict_however_they_are_written():
    table = sleepstudy().assign(late=lambda t: t.Days > 4)
    result = lmm("Reaction ~ late + (1 | Subject)", table)
    assert coefficients(result).name.tolist() == ["(Intercept)", "lateTRUE"]
    assert emmeans(result, "late").table.name.tolist() == ["FALSE", "TRUE"]
    expected = result.predict(table)
    for written in (table.late.map(str), table.late.astype(int)):
        pd.testing.assert_frame_equal(result.predict(table.assign(late=written)), expected)
