"""Simulated sets converge to lme4's likelihood, every one, whatever the variance and the units."""

import json
from math import log
from pathlib import Path

import pytest
from hypothesis import settings

from openreml_nn import lmm
from tests.reference.simulate import FORMULAS, SETS, SETTINGS, simulate

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "reference" / "simulated.json").read_text(encoding="utf-8")
)


#: All forty sets of a setting under the thorough profile, else every fourth.
SEEDS = range(0, SETS, 1 if settings.default.max_examples > 60 else 4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_of_them_reach_the_likelihood_of_lme4(setting):
    """Each set in one of the units: that a fit does not depend on it is a test of its own."""
    ratio, slopes = SETTINGS[setting]
    for seed in SEEDS:
        table, unit = simulate(ratio, slopes, seed), (1e-4, 1.0, 1e4)[seed % 3]
        table["y"] *= unit
        result = lmm(FORMULAS[slopes], table)
        expected = REFERENCE[setting][seed] - (200 - 2) * log(unit)
        assert result.converged, f"set {seed}: {result.score_norm}"
        # The best of lme4's three optimizers, to a tight tolerance, printed to 12 digits, leaves
        # 1.1e-9; other units add the rounding of n log(unit).
        assert result.log_likelihood == pytest.approx(expected, rel=0, abs=1e-8), f"set {seed}"
