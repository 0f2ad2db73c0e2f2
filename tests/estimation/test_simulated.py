"""Forty of forty simulated sets converge to lme4's likelihood, whatever the variance and the units."""

import json
from math import log
from pathlib import Path

import pytest

from openreml_nn import lmm
from tests.reference.simulate import FORMULAS, SETS, SETTINGS, simulate

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "reference" / "simulated.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_forty_of_forty_reach_the_likelihood_of_lme4(setting, unit):
    ratio, slopes = SETTINGS[setting]
    for seed in range(SETS):
        table = simulate(ratio, slopes, seed)
        table["y"] *= unit
        result = lmm(FORMULAS[slopes], table)
        expected = REFERENCE[setting][seed] - (200 - 2) * log(unit)
        assert result.converged, f"set {seed}: {result.score_norm}"
        tolerance = 1e-6 * abs(REFERENCE[setting][seed])
        assert result.log_likelihood > expected - tolerance, f"set {seed}"
        assert result.log_likelihood < expected + 1e-3, f"set {seed}"
