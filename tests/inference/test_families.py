"""Inference from fits of responses that are not Gaussian: asymptotic, or refused."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from openreml_nn import InputError, glmm, lmm
from openreml_nn.inference import (
    anova,
    bootstrap,
    coefficients,
    influence,
    likelihood_ratio_test,
    profile,
    r2,
    scan,
    simulate,
    variance_shares,
    wald_test,
)

RNG = np.random.default_rng(0)
TABLE = pd.DataFrame({"g": np.arange(200) % 20, "x": RNG.standard_normal(200)})
TABLE["y"] = RNG.poisson(np.exp(0.3 + 0.4 * TABLE["x"] + 0.5 * RNG.standard_normal(20)[TABLE["g"]]))


@pytest.fixture(scope="module")
def fits():
    return [glmm(f"y ~ {x} + (1 | g)", TABLE, family="poisson") for x in ("1", "x")]


def test_coefficients_have_normal_tests(fits):
    found = coefficients(fits[1], "asymptotic")
    z = fits[1].fixed.estimate / fits[1].fixed.std_error
    np.testing.assert_allclose(found["statistic"], z)
    np.testing.assert_allclose(found["p"], 2 * stats.norm.sf(abs(z)))
    for call in (coefficients, lambda r: wald_test(r, ["x"])):
        with pytest.raises(
            InputError, match=r"`ddf` is 'satterthwaite' and .* 'poisson': .*asympt"
        ):
            call(fits[1])
    terms = anova(fits[1])
    assert terms["statistic"][0] == pytest.approx(float(z[1]) ** 2)
    assert terms["den_df"][0] == np.inf


def test_likelihood_ratios_are_of_one_family(fits):
    test = likelihood_ratio_test(*fits)
    expected = 2 * (fits[1].log_likelihood - fits[0].log_likelihood)
    assert (test.statistic, test.df) == (pytest.approx(expected), 1)
    assert anova(*fits)["statistic"].iloc[1] == pytest.approx(expected)
    linear = lmm("y ~ x + (1 | g)", TABLE, method="ml")
    with pytest.raises(
        InputError, match="`small` is of the family 'poisson' and `large` of 'gauss"
    ):
        likelihood_ratio_test(fits[0], linear)


def test_likelihood_ratios_are_of_one_offset(fits):
    table = TABLE.assign(z=1 + TABLE.index % 3)
    other = glmm("y ~ x + offset(log(z)) + (1 | g)", table, family="poisson")
    with pytest.raises(InputError, match=r"other offsets, 0 and 0.693147 in row 1"):
        likelihood_ratio_test(fits[0], other)


@pytest.mark.parametrize("call", [bootstrap, influence, profile, r2, simulate, variance_shares])
def test_what_takes_a_gaussian_response_says_so(fits, call):
    with pytest.raises(InputError, match="`result` has a response of the family 'poisson'"):
        call(fits[1])
    with pytest.raises(InputError, match="`result` has a response of the family 'poisson'"):
        scan(fits[1], np.ones((200, 1)))
