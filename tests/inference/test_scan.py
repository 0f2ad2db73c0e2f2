"""A scan against generalised least squares with each marker."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from openreml_nn import InputError, fit_stream, lmm
from openreml_nn.datasets import oats, sleepstudy, table_path
from openreml_nn.inference import scan, wald_test
from tests.inference.dense import covariance, generalised

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["blocked", "dense", "ar1"])
def result(request):
    if request.param == "ar1":
        return lmm("Reaction ~ Days", sleepstudy(), residual="ar1(Days | Subject)")
    return lmm("Reaction ~ Days + (1 | Subject)", sleepstudy(), solver=request.param)


def gls(result, marker):
    """Estimate, standard error and t of the last column of [X | marker], the scale estimated."""
    V, y = covariance(result), result.source.y
    X = torch.cat([result.source.X, torch.as_tensor(marker)[:, None].double()], 1)
    n, p = X.shape
    beta, phi = generalised(y, X, V)
    rest = y - X @ beta
    scale = rest @ torch.linalg.solve(V, rest) / (n - p)
    error = (scale * phi[-1, -1]).sqrt()
    return float(beta[-1]), float(error), float(beta[-1] / error), n - p


def test_each_marker_has_its_generalised_least_squares(result):
    markers = RNG.integers(0, 3, (180, 5))
    found = scan(result, torch.from_numpy(markers))
    assert found["name"].tolist() == list("01234")
    for j in range(5):
        estimate, error, t, df = gls(result, markers[:, j])
        row = found.iloc[j]
        assert row["estimate"] == pytest.approx(estimate, rel=1e-8)
        assert row["std_error"] == pytest.approx(error, rel=1e-8)
        assert row["statistic"] == pytest.approx(t, rel=1e-8)
        assert row["df"] == df == 177
        assert row["p"] == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-8)


def test_units_order_and_kind_of_markers_do_not_matter(result):
    markers = RNG.integers(0, 3, (180, 4)).astype(np.int8)
    found = scan(result, markers)
    named = pd.DataFrame(markers, columns=list("abcd"))
    assert scan(result, named)["name"].tolist() == list("abcd")
    for other in (
        named,
        torch.from_numpy(markers).float(),
        1000 * markers.astype(float) - 7,
        markers.astype(float) + np.asarray(sleepstudy()["Days"])[:, None],
    ):
        np.testing.assert_allclose(scan(result, other)["statistic"], found["statistic"], rtol=1e-6)
    turned = scan(result, markers[:, ::-1])
    np.testing.assert_allclose(turned["statistic"][::-1], found["statistic"])


def test_a_marker_that_the_fixed_effects_hold_has_no_test(result):
    days = sleepstudy()["Days"].to_numpy(float)
    found = scan(result, np.stack([np.ones(180), 3 * days + 2, days**2], 1))
    assert found["statistic"].isna().tolist() == [True, True, False]
    assert found["p"].isna().tolist() == [True, True, False]


def test_a_scan_of_the_own_term_is_its_wald_test():
    """At the ratios of the fit that has the marker, the scale that REML estimates is this one."""
    full = lmm("Reaction ~ Days + (1 | Subject)", sleepstudy())
    test = wald_test(full, ["Days"], "asymptotic")
    small = lmm("Reaction ~ 1 + (1 | Subject)", sleepstudy())
    t = scan(small, sleepstudy()[["Days"]])["statistic"][0]
    assert t**2 == pytest.approx(test.statistic, rel=0.15)


def test_many_rows_are_scanned_by_the_solver_of_the_fit():
    n, size = 5_200, 13
    group = np.repeat(np.arange(n // size), size)
    y = RNG.standard_normal(n // size)[group] + RNG.standard_normal(n)
    result = lmm("y ~ 1 + (1 | g)", pd.DataFrame({"y": y, "g": group}))
    markers = RNG.integers(0, 3, (n, 3)).astype(float)
    found = scan(result, markers)
    between, within = (float(c.covariance) for c in result.components)

    def inverse_times(x):
        sums = np.bincount(group, x)[group]
        return (x - between / (within + size * between) * sums) / within

    one = np.ones(n)
    W = inverse_times(one)
    for j in range(3):
        m = markers[:, j] - one * (W @ markers[:, j]) / (W @ one)
        r = y - one * (W @ y) / (W @ one)
        s, my = m @ inverse_times(m), m @ inverse_times(r)
        scale = (r @ inverse_times(r) - my**2 / s) / (n - 2)
        assert found["estimate"][j] == pytest.approx(my / s, rel=1e-8)
        assert found["statistic"][j] == pytest.approx(my / (s * scale) ** 0.5, rel=1e-8)


def test_what_is_no_marker_is_refused():
    result = lmm("yield ~ Variety + (1 | Block)", oats())
    missing = pd.DataFrame({"m1": np.ones(72), "m2": np.r_[np.ones(9), np.nan, np.ones(62)]})
    streamed = fit_stream("yield ~ 1 + (1 | Block)", table_path("oats"), progress=False)
    for call, message in (
        (lambda: scan(result, np.ones((71, 2))), r"`markers` is .*: expected .* shape \(72, m\)"),
        (lambda: scan(result, missing), "`markers` has no number for 'm2' in row 10"),
        (lambda: scan(result, oats()[["Variety"]]), "`markers` has the column 'Variety' of"),
        (lambda: scan(streamed, np.ones((72, 1))), "read in chunks"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    for wrong in ([[1.0]], None, np.array([["a"]])):
        with pytest.raises(TypeError, match="`markers` is"):
            scan(result, wrong)
    assert len(scan(result, np.ones((72, 0)))) == 0
