"""Metrics of predictive distributions."""

import pytest
import torch
from torchmetrics import MetricCollection

from openreml_nn import metrics


def predictions(n=500):
    mean, variance = torch.randn(n), torch.rand(n) + 0.5
    return mean, variance, mean + variance.sqrt() * torch.randn(n)


def test_density_equals_torchs_distribution():
    mean, variance, target = predictions()
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(target).mean()
    found = metrics.gaussian_negative_log_density(mean, variance, target)
    torch.testing.assert_close(found, expected)


def test_coverage_of_true_intervals_is_their_level():
    mean, variance, target = predictions(20_000)
    for level in (0.5, 0.95):
        found = metrics.interval_coverage(mean, variance, target, level)
        assert float(found) == pytest.approx(level, abs=0.012)
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    width = 2 * normal.icdf(torch.tensor(0.975)) * variance.sqrt().mean()
    torch.testing.assert_close(metrics.interval_width(variance), width)


def test_modules_over_batches_equal_functions_over_all_rows():
    mean, variance, target = predictions()
    collection = MetricCollection(
        [
            metrics.GaussianNegativeLogDensity(),
            metrics.IntervalCoverage(0.9),
            metrics.IntervalWidth(0.9),
        ]
    )
    for part in torch.arange(500).split(37):
        collection.update(mean[part], variance[part], target[part])
    found = collection.compute()
    expected = {
        "GaussianNegativeLogDensity": metrics.gaussian_negative_log_density(mean, variance, target),
        "IntervalCoverage": metrics.interval_coverage(mean, variance, target, 0.9),
        "IntervalWidth": metrics.interval_width(variance, 0.9),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.double())


def test_reliability():
    torch.testing.assert_close(
        metrics.blup_reliability(torch.tensor([0.0, 1.0]), 1.0), torch.tensor([1.0, 0.0])
    )
    with pytest.raises(ValueError, match="`prior` is 0"):
        metrics.blup_reliability(torch.ones(1), 0.0)


def test_wrong_input_is_named():
    one = torch.ones(3)
    with pytest.raises(ValueError, match="have shapes"):
        metrics.interval_coverage(one, one, torch.ones(3, 1))
    with pytest.raises(ValueError, match="`variance` has the entry 0"):
        metrics.gaussian_negative_log_density(one, 0 * one, one)
    with pytest.raises(ValueError, match="`level` is 95"):
        metrics.IntervalCoverage(95)
