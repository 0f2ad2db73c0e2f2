"""Other optimisers and other starts end where a fit did, unless there are several optima."""

import numpy as np
import pandas as pd
import pytest

from openreml_nn import InputError, glmm, lmm
from openreml_nn.datasets import sleepstudy
from openreml_nn.inference import refits

SOME = sleepstudy()[:60]


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_all_ways_agree_and_leave_the_fit_alone(method):
    fit = lmm("Reaction ~ Days + (Days | Subject)", SOME, method=method)
    before = fit.predict(SOME)
    found = refits(fit, starts=2, progress=False)
    assert list(found["optimizer"]) == ["AI-REML"] * 4 + ["L-BFGS", "Nelder-Mead"]
    assert found["agrees"].all()
    np.testing.assert_allclose(found["log_likelihood"], fit.log_likelihood, atol=1e-5)
    own = {p.name: p.value for p in fit.parameters}
    for name, value in own.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-2)
        assert found[name][0] == value
    pd.testing.assert_frame_equal(fit.predict(SOME), before)
    again = refits(fit, starts=2, progress=False)
    pd.testing.assert_frame_equal(found, again)


def test_a_fit_that_stopped_short_is_told():
    with pytest.warns(RuntimeWarning, match="did not converge"):
        fit = lmm("Reaction ~ Days + (Days | Subject)", SOME, max_iterations=1)
    found = refits(fit, starts=0, progress=False)
    assert list(found["agrees"]) == [False, True, True, True]
    assert found["lower"][0] > 1e-3


def test_a_variance_of_zero_and_held_parameters_agree():
    rows = SOME.assign(Reaction=np.tile([1.0, -1.0, 2.0, -1.5, 0.5, -1.0], 10))
    fit = lmm("Reaction ~ Days + (1 | Subject)", rows)
    assert fit.singular
    assert refits(fit, starts=1, progress=False)["agrees"].all()
    held = lmm("Reaction ~ Days + (1 | Subject)", SOME, constraints={"Subject/sigma^2": 100.0})
    found = refits(held, starts=1, progress=False)
    assert found["agrees"].all()
    assert "Subject/g/sigma^2" not in found
    both = {"Subject/sigma^2": 100.0, "residual/sigma^2": 400.0}
    for fit, message in (
        (lmm("Reaction ~ Days + (1 | Subject)", SOME, constraints=both), "no estimated covariance"),
        (glmm("Days ~ 1 + (1 | Subject)", SOME, family="poisson"), "family 'poisson'"),
    ):
        with pytest.raises(InputError, match=message):
            refits(fit)
