"""Joint tests of unbalanced data, whose degrees of freedom and scale are those of no one contrast.

The figures are those of ``contest(model, L, ddf=...)`` in lmerTest 3.1-3 (with pbkrtest), for ::

    lmer(yield ~ nitro * Variety + (1 | Block/Variety), oats[-c(1, 5, 9, 20, 33, 50, 51), ],
         control = lmerControl("bobyqa", optCtrl = list(rhoend = 1e-10, maxfun = 1e5)))
"""

import pytest

from openreml_nn import lmm
from openreml_nn.datasets import oats
from openreml_nn.inference import wald_test

VARIETIES = ("VarietyMarvellous", "VarietyVictory")
SLOPES = ("nitro:VarietyMarvellous", "nitro:VarietyVictory")
VICTORY = ("nitro", "VarietyVictory", "nitro:VarietyVictory")
#: F, denominator degrees of freedom and p.
CONTESTS = {
    ("satterthwaite", VARIETIES): (2.209898672, 24.53954036, 0.1310783955),
    ("kenward-roger", VARIETIES): (2.199295985, 24.81248993, 0.1320319148),
    ("satterthwaite", SLOPES): (0.6536178576, 45.08450584, 0.5250187859),
    ("kenward-roger", SLOPES): (0.6502322698, 45.19850513, 0.5267371722),
    ("satterthwaite", VICTORY): (22.37998505, 25.85270354, 2.340565886e-07),
    ("kenward-roger", VICTORY): (21.57963181, 29.89846216, 1.239748472e-07),
}


@pytest.fixture(scope="module")
def result():
    table = oats().drop(index=[i - 1 for i in (1, 5, 9, 20, 33, 50, 51)])
    return lmm("yield ~ nitro * Variety + (1 | Block/Variety)", table)


@pytest.mark.parametrize(("ddf", "names"), CONTESTS)
def test_joint_tests_of_unbalanced_data_equal_lmertest_and_pbkrtest(result, ddf, names):
    found = wald_test(result, names, ddf)
    statistic, den_df, p = CONTESTS[ddf, names]
    assert found.num_df == len(names)
    assert found.statistic == pytest.approx(statistic, rel=1e-6)
    assert found.den_df == pytest.approx(den_df, rel=1e-6)
    assert found.p == pytest.approx(p, rel=1e-6)
