"""What a bootstrap says of its samples."""

import numpy as np
import pandas as pd
import pytest

from openreml_nn import lmm
from openreml_nn.datasets import sleepstudy
from openreml_nn.inference import bootstrap, bootstrap_test
from openreml_nn.inference.resampling import Bootstrap


def test_intervals_bias_and_standard_errors_are_those_of_the_samples():
    samples = pd.DataFrame({"a": np.arange(101.0), "b": np.arange(101.0) ** 2})
    found = Bootstrap(samples, pd.Series({"a": 40.0, "b": 0.0})).intervals(0.9).set_index("name")
    assert found["estimate"].tolist() == [40.0, 0.0]
    np.testing.assert_allclose(found["bias"], [10.0, np.mean(np.arange(101.0) ** 2)])
    np.testing.assert_allclose(found["std_error"], samples.std())
    np.testing.assert_allclose(found["low"], [5.0, 25.0])
    np.testing.assert_allclose(found["high"], [95.0, 95.0**2])


def test_a_model_without_fixed_effects_has_a_bootstrap():
    table = sleepstudy()
    table["Reaction"] = table["Reaction"] - table["Reaction"].mean()
    result = lmm("Reaction ~ 0 + (1 | Subject)", table)
    found = bootstrap(result, 40, progress=False)
    assert list(found.samples) == list(found.estimate.index)
    spread = found.samples.std()
    # The residual's standard deviation has the standard error sigma / sqrt(2 (n - q)).
    residual = found.estimate.iloc[-1]
    assert residual == pytest.approx(result.residual_variance**0.5, rel=1e-6)
    assert spread.iloc[-1] == pytest.approx(residual / (2 * (180 - 18)) ** 0.5, rel=0.4)


@pytest.mark.parametrize("solver", ["krylov", "dense"])
def test_a_bootstrap_by_any_solver_is_that_of_the_blocked_one(solver):
    one, other = (
        lmm("Reaction ~ Days + (1 | Subject)", sleepstudy(), solver=s) for s in (solver, "blocked")
    )
    found, expected = (bootstrap(r, 3, progress=False).samples for r in (one, other))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    small = lmm("Reaction ~ Days", sleepstudy())
    assert bootstrap_test(small, one, 3, progress=False) == 1 / 4
