"""Metrics of predictions and of models."""

import pytest
import torch
from torch import distributed
from torchmetrics import MetricCollection

from openreml_nn import InputError, metrics, restricted_log_likelihood
from openreml_nn.families import (
    Binomial,
    Gamma,
    Gaussian,
    NegativeBinomial,
    NegativeBinomial1,
    Poisson,
)
from tests.forked import ranks


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
    with pytest.raises(
        ValueError, match=r"`target` is .* shape \(3, 1\): expected .* of shape \(n,\)"
    ):
        metrics.interval_coverage(one, one, torch.ones(3, 1))
    with pytest.raises(ValueError, match="`variance` has the entry 0"):
        metrics.gaussian_negative_log_density(one, 0 * one, one)
    with pytest.raises(ValueError, match="`level` is 95"):
        metrics.IntervalCoverage(95)


COMPONENTS = torch.tensor([0.5, 0.25, 1.0])
SPREAD = torch.tensor([[0.04, -0.01, 0.0], [-0.01, 0.02, 0.001], [0.0, 0.001, 0.03]])


def test_intraclass_correlation_and_heritability():
    found = metrics.intraclass_correlation(COMPONENTS)
    torch.testing.assert_close(found, COMPONENTS / 1.75)
    share, error = metrics.narrow_sense_heritability(COMPONENTS, SPREAD)
    slope = torch.func.grad(lambda v: v[0] / v.sum())(COMPONENTS)
    torch.testing.assert_close(share, found[0])
    torch.testing.assert_close(error, (slope @ SPREAD @ slope).sqrt())
    module = metrics.NarrowSenseHeritability(3)
    for scale in (0.5, 1.5):
        module.update(scale * COMPONENTS, SPREAD)
    torch.testing.assert_close(module.compute(), (share.double(), error.double()))
    shares = metrics.IntraclassCorrelation(3)
    shares.update(COMPONENTS)
    torch.testing.assert_close(shares.compute(), found.double())


def test_r2_over_batches_is_that_of_all_rows():
    mean, random = 1e6 + torch.randn(500), torch.rand(500)
    residual = torch.tensor(0.3)
    fixed, r = mean.var(), random.mean()
    total = fixed + r + residual
    torch.testing.assert_close(metrics.marginal_r2(mean, random, residual), fixed / total)
    torch.testing.assert_close(metrics.conditional_r2(mean, random, residual), (fixed + r) / total)
    collection = MetricCollection([metrics.MarginalR2(), metrics.ConditionalR2()])
    for part in torch.arange(500).split(37):
        collection.update(population_mean=mean[part], random=random[part], residual=residual)
    found = collection.compute()
    torch.testing.assert_close(found["MarginalR2"], fixed / total)
    torch.testing.assert_close(found["ConditionalR2"], (fixed + r) / total)


def block(n):
    root = torch.randn(n, n)
    return torch.randn(n), torch.randn(n, 3), root @ root.mT + torch.eye(n)


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_the_likelihood_of_independent_batches_is_that_of_all_rows(method):
    parts = [block(n) for n in (4, 1, 7)]
    metric = metrics.RestrictedLogLikelihood(3, method)
    for part in parts:
        metric.update(*part)
    y, X = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    V = torch.block_diag(*(part[2] for part in parts))
    torch.testing.assert_close(metric.compute(), restricted_log_likelihood(y, X, V, method))


def test_one_collection_takes_what_each_metric_knows():
    collection = MetricCollection(
        [
            metrics.GaussianNegativeLogDensity(),
            metrics.IntervalWidth(),
            metrics.BLUPReliability(),
            metrics.MarginalR2(),
            metrics.IntraclassCorrelation(2),
            metrics.RestrictedLogLikelihood(3),
        ]
    )
    mean, variance, target = predictions()
    y, X, V = block(9)
    found = collection(
        mean=mean, variance=variance, target=target, error_variance=variance / 4, prior=1.0,
        population_mean=mean, random=variance, residual=variance, components=COMPONENTS[:2],
        y=y, X=X, V=V,
    )  # fmt: skip
    assert len(found) == 6
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


def shared():
    """What metrics find, of which each process sees every other batch."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    found = [
        metrics.GaussianNegativeLogDensity(),
        metrics.IntervalCoverage(),
        metrics.IntervalWidth(),
        metrics.BLUPReliability(),
        metrics.MarginalR2(),
        metrics.ConditionalR2(),
        metrics.IntraclassCorrelation(2),
        metrics.NarrowSenseHeritability(2),
        metrics.RestrictedLogLikelihood(2),
    ]
    binary = [
        metrics.AUC(),
        metrics.LogLoss(),
        metrics.BrierScore(),
        metrics.CalibrationError(),
        metrics.CalibrationCurve(2),
    ]
    for step in range(4):
        n = 3 + step
        mean, variance, target = torch.randn(n), torch.rand(n) + 0.5, torch.randn(n)
        root, X = torch.randn(n, n), torch.randn(n, 2)
        given = [(mean, variance, target)] * 3 + [(variance / 4, 2.0)]
        given += [(mean, variance, variance)] * 2
        given += [(variance[:2],), (variance[:2], root[:2] @ root[:2].mT)]
        given += [(target, X, root @ root.mT + torch.eye(n))]
        if step % size == rank:
            for metric, arguments in zip(found, given, strict=True):
                metric.update(*arguments)
        if rank == 0:  # a process may have no row of a short set
            for metric in binary:
                metric.update(torch.linspace(0.1, 0.7, n).double(), torch.arange(n) % 2)
    found += binary
    values = [torch.stack(v) if isinstance(v := m.compute(), tuple) else v for m in found]
    return torch.cat([v.flatten() for v in values])


def test_two_processes_find_what_one_does(tmp_path):
    (one,) = ranks(shared, 1, tmp_path)
    for found in ranks(shared, 2, tmp_path):
        torch.testing.assert_close(found, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.intraclass_correlation(-COMPONENTS), "expected variances"),
        (
            lambda: metrics.narrow_sense_heritability(COMPONENTS, SPREAD[:2]),
            r"expected .* \(3, 3\)",
        ),
        (lambda: metrics.marginal_r2(torch.ones(2), torch.ones(3), torch.ones(2)), "`random`"),
        (
            lambda: metrics.marginal_r2(torch.ones(0), torch.ones(()), torch.ones(())),
            "is empty: expected a prediction",
        ),
        (lambda: metrics.RestrictedLogLikelihood(2).update(*block(4)), r"expected .* \(4, 2\)"),
        (lambda: metrics.RestrictedLogLikelihood(2, "map"), "'map'"),
    ],
)
def test_wrong_components_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_whole_numbers_have_the_r2_of_the_same_numbers_with_a_point():
    mean, one = torch.arange(10), torch.tensor(1.0)
    for function in (metrics.marginal_r2, metrics.conditional_r2):
        found = function(mean, one, one)
        assert found.dtype == one.dtype
        torch.testing.assert_close(found, function(mean.to(one), one, one))
    assert float(metrics.marginal_r2(mean, one, one)) == pytest.approx(55 / 6 / (55 / 6 + 2))
    zero, ones = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    assert float(metrics.interval_coverage(zero, ones, torch.tensor([0, 3]))) == 0.5


@pytest.mark.parametrize("additive", [-1, 2, True, 0.5])
def test_function_and_module_refuse_a_component_that_is_not_there(additive):
    components, covariance = torch.tensor([1.0, 2.0]), torch.eye(2)
    with pytest.raises((TypeError, ValueError), match=f"`additive` is {additive}: expected"):
        metrics.narrow_sense_heritability(components, covariance, additive)
    with pytest.raises((TypeError, ValueError), match=f"`additive` is {additive}: expected"):
        metrics.NarrowSenseHeritability(2, additive)


def test_what_is_not_finite_or_no_variance_is_refused_by_functions_and_modules():
    zero, one = torch.zeros(4), torch.ones(4)
    lost = torch.tensor([0.0, 0.0, float("nan"), float("nan")])
    for call in (
        metrics.interval_coverage, metrics.gaussian_negative_log_density,
        metrics.IntervalCoverage().update, metrics.GaussianNegativeLogDensity().update,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="`target` holds NaN or infinity: expected finite"):
            call(zero, one, lost)
    for call in (metrics.marginal_r2, metrics.conditional_r2, metrics.MarginalR2().update):
        with pytest.raises(ValueError, match="`residual` holds NaN"):
            call(zero, one, lost)
    for wrong in ([3.0, 1.0], [-1.0, 1.0]):
        with pytest.raises(ValueError, match=f"entry {wrong[0]:g}: expected prediction-error"):
            metrics.blup_reliability(torch.tensor(wrong), 2.0)
    with pytest.raises(ValueError, match="`covariance` is not symmetric"):
        metrics.narrow_sense_heritability(one[:2], torch.tensor([[1.0, 0.0], [0.5, 1.0]]))


def test_a_share_of_no_variance_or_of_one_row_is_refused():
    one, none = torch.ones(()), torch.zeros(())
    module = metrics.MarginalR2()
    module.update(torch.ones(1), one, one)
    for call in (module.compute, lambda: metrics.conditional_r2(torch.ones(1), one, one)):
        with pytest.raises(InputError, match="`population_mean` has 1 rows in all: a variance"):
            call()
    with pytest.raises(InputError, match="there is no variance to explain"):
        metrics.marginal_r2(torch.ones(3), none, none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_functions_and_modules_agree_in_every_precision(dtype):
    mean, variance = torch.arange(1, 9).to(dtype), torch.arange(2, 10).to(dtype)
    target = mean.flip(0)
    for function, module, given in (
        (metrics.gaussian_negative_log_density, metrics.GaussianNegativeLogDensity(), 3),
        (metrics.interval_coverage, metrics.IntervalCoverage(), 3),
        (metrics.interval_width, metrics.IntervalWidth(), 1),
    ):
        found = function(*(mean, variance, target) if given == 3 else (variance,))
        wanted = dtype if dtype.is_floating_point else torch.get_default_dtype()
        assert found.dtype == wanted
        for part in torch.arange(8).split(3):
            module.update(mean[part], variance[part], target[part])
        torch.testing.assert_close(module.compute(), found.double())


def test_a_width_needs_the_variance_alone():
    mean, variance, target = predictions(8)
    alone, among = metrics.IntervalWidth(), metrics.IntervalWidth()
    alone.update(variance=variance)
    among.update(mean, variance, target)
    assert alone.compute() == among.compute() > 0
    with pytest.raises(InputError, match=r"`variance` is None: expected update\(variance="):
        alone.update(variance)


def probabilities(n=400):
    mean = torch.rand(n, dtype=torch.float64)
    return mean, (torch.rand(n) < mean).double()


def test_binary_metrics_equal_their_definitions():
    mean, target = probabilities()
    bernoulli = torch.distributions.Bernoulli(mean)
    close = torch.testing.assert_close
    close(metrics.log_loss(mean, target), -bernoulli.log_prob(target).mean())
    close(metrics.brier_score(mean, target), ((mean - target) ** 2).mean())
    yes, no = mean[target == 1], mean[target == 0]
    close(metrics.auc(mean, target), (yes[:, None] > no).double().mean())
    bins = (mean * 10).floor().long()
    gaps = [(mean - target)[bins == b].sum().abs() for b in range(10)]
    close(metrics.calibration_error(mean, target, 10), sum(gaps) / len(mean))
    curve = metrics.calibration_curve(mean, target, 10)
    for b in range(10):
        own = bins == b
        close(curve[b], torch.stack([mean[own].mean(), target[own].mean(), own.sum()]).double())
    shares = curve[:, 2] / len(mean)
    error = (shares * (curve[:, 0] - curve[:, 1]).abs()).nansum()
    close(error, metrics.calibration_error(mean, target, 10))
    close(metrics.mean_deviance(mean, target, Binomial()), 2 * metrics.log_loss(mean, target))
    assert torch.isnan(metrics.auc(mean, torch.ones_like(mean)))
    # Certain and right costs nothing, certain and wrong all.
    assert metrics.log_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0
    assert metrics.log_loss(torch.tensor([0.0]), torch.tensor([1.0])) == torch.inf


@pytest.mark.parametrize(
    "family", [Gaussian(), Binomial(), Poisson(), NegativeBinomial(), NegativeBinomial1(), Gamma()]
)
def test_unit_deviance_is_the_integral_of_its_score(family):
    y = torch.tensor([0.0, 1.0, 1.0] if family.name == "binomial" else [1.0, 2.0, 7.0])
    y, mean = y.double(), torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64).requires_grad_()
    eta = torch.logit(mean) if family.name == "binomial" else mean.log()
    variance = family.variance(mean if family.name == "gaussian" else eta)
    for name, of in {"gamma": "phi", "gaussian": "sigma^2"}.items():
        variance = variance / (family.natural(of, mean) if family.name == name else 1)
    if family.name == "negative_binomial_1":
        variance = variance / (1 + family.natural("phi", mean))
    (slope,) = torch.autograd.grad(family.deviance(y, mean).sum(), mean)
    torch.testing.assert_close(slope, -2 * (y - mean) / variance)
    best = family.deviance(y, y)
    torch.testing.assert_close(best, torch.zeros_like(best))


def test_modules_of_families_over_batches_equal_functions_over_all_rows():
    mean, target = probabilities()
    made = [metrics.LogLoss(), metrics.BrierScore(), metrics.AUC(), metrics.CalibrationError(7)]
    made += [metrics.MeanDeviance(Binomial()), metrics.CalibrationCurve(7)]
    collection = MetricCollection(made)
    for part in torch.arange(400).split(37):
        collection.update(mean[part], target[part])
    found = collection.compute()
    expected = {
        "LogLoss": metrics.log_loss(mean, target),
        "BrierScore": metrics.brier_score(mean, target),
        "AUC": metrics.auc(mean, target),
        "CalibrationError": metrics.calibration_error(mean, target, 7),
        "MeanDeviance": metrics.mean_deviance(mean, target, Binomial()),
        "CalibrationCurve": metrics.calibration_curve(mean, target, 7),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), equal_nan=True)


@pytest.mark.parametrize(
    ("mean", "target", "message"),
    [
        ([0.5, 1.5], [0.0, 1.0], "`mean` has the entry 1.5"),
        ([0.5, 0.5], [0.0, 2.0], "`target` has the entry 2"),
        ([0.5], [0.0, 1.0], "`target` is .2,. but `mean` has 1 rows"),
        ([], [], "`mean` is empty"),
    ],
)
def test_wrong_probabilities_are_refused(mean, target, message):
    for metric in (metrics.log_loss, metrics.brier_score, metrics.auc, metrics.calibration_error):
        with pytest.raises(InputError, match=message):
            metric(torch.tensor(mean), torch.tensor(target))


METRICS = {
    **{name: getattr(metrics, name) for name in ("MarginalR2", "ConditionalR2")},
    **{name: getattr(metrics, name) for name in ("AUC", "LogLoss", "CalibrationError")},
    "CalibrationCurve": metrics.CalibrationCurve,
    "IntervalCoverage": metrics.IntervalCoverage,
}


@pytest.mark.parametrize("name", METRICS)
def test_calls_updates_and_merged_parts_find_what_updates_do(name):
    g = torch.Generator().manual_seed(0)
    mean, variance = torch.rand(40, generator=g), torch.rand(40, generator=g)
    target = (torch.rand(40, generator=g) < mean).double()

    def take(metric, rows, update=True):
        if name.endswith("R2"):
            arguments = mean[rows], variance[rows], torch.tensor(0.3)
        elif name == "IntervalCoverage":
            arguments = mean[rows], variance[rows], target[rows]
        else:
            arguments = mean[rows], target[rows]
        return metric.update(*arguments) if update else metric(*arguments)

    parts = torch.arange(40).split(11)
    whole, called, mixed = (METRICS[name]() for _ in range(3))
    take(whole, torch.arange(40))
    for i, rows in enumerate(parts):
        take(called, rows, update=False)
        take(mixed, rows, update=i % 2 == 1)
    first, *others = (METRICS[name]() for _ in parts)
    for metric, rows in zip((first, *others), parts, strict=True):
        take(metric, rows)
    for metric in others:
        first.merge_state(metric)
    for found in (called, mixed, first):
        torch.testing.assert_close(found.compute(), whole.compute(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_rows_of_half_precision_have_the_metrics_of_their_numbers(dtype):
    g = torch.Generator().manual_seed(0)
    mean = torch.rand(200_000, generator=g).to(dtype)
    target = (torch.rand(200_000, generator=g) < 0.5).to(dtype)
    for function in (metrics.log_loss, metrics.brier_score, metrics.calibration_curve):
        found = function(mean.clamp(0.01, 0.99), target)
        expected = function(mean.clamp(0.01, 0.99).double(), target.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_area_of_nothing_is_none():
    assert metrics.AUC().compute().isnan()
