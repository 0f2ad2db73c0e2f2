"""Conditional AIC: its degrees of freedom are the slope of the fitted values by the responses, with all
estimated anew."""

import warnings

import numpy as np
import pytest

from openreml_nn import InputError, lmm
from openreml_nn.datasets import sleepstudy
from openreml_nn.inference import conditional_aic, influence

SOME = sleepstudy().query("Days % 3 == 0")[:12].assign(w=np.linspace(0.5, 2, 12))


@pytest.mark.parametrize(
    ("formula", "options", "own"),
    [
        ("Reaction ~ Days + (Days | Subject)", {"weights": "w"}, 1),
        ("Reaction ~ Days + (1 | Subject)", {"residual": "exp(Days)", "method": "ml"}, 2),
        ("Reaction ~ Days + (1 | Subject)", {"residual_variance": 400.0}, 0),
    ],
)
def test_degrees_of_freedom_are_the_slopes_of_refits(formula, options, own):
    found = conditional_aic(lmm(formula, SOME, **options))
    y, h, slopes = SOME["Reaction"].to_numpy(), 0.05, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(len(y)):
            ends = []
            for sign in (1, -1):
                moved = y.copy()
                moved[i] += sign * h
                fit = lmm(formula, SOME.assign(Reaction=moved), **options)
                ends.append(float(fit.fitted[i]))
            slopes += (ends[0] - ends[1]) / (2 * h)
    assert found.df == pytest.approx(slopes + own, abs=2e-3)
    assert found.aic == pytest.approx(-2 * found.log_likelihood + 2 * found.df, abs=1e-9)


def test_a_variance_of_zero_leaves_the_linear_model():
    rows = SOME.assign(Reaction=np.tile([1.0, -1.0, 2.0, -1.5], 3))
    fits = [lmm(f, rows) for f in ("Reaction ~ Days + (1 | Subject)", "Reaction ~ Days")]
    found = [conditional_aic(fit) for fit in fits]
    assert found[0].df == pytest.approx(3, abs=1e-6)
    np.testing.assert_allclose(found[0][:3], found[1][:3], rtol=1e-6)


def test_without_estimated_variances_it_is_the_sum_of_leverages():
    options = {"residual_variance": 400.0, "constraints": {"Subject/sigma^2": 900.0}}
    fit = lmm("Reaction ~ Days + (1 | Subject)", SOME, **options)
    assert conditional_aic(fit).df == pytest.approx(influence(fit)["leverage"].sum(), abs=1e-9)
    with pytest.raises(InputError, match="`correction` is 'differences': expected 'slopes'"):
        conditional_aic(fit, "differences")
