"""Simulation from a fit, and the parametric bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import nan

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.estimation.starts import climb
from openreml_nn.inference.batched import maximise
from openreml_nn.inference.laplace_refit import LaplaceRefit, numbers_of
from openreml_nn.inference.likelihood_ratio import likelihood_ratio_test
from openreml_nn.inference.refit import Refit, check_level, family_of, matrix_entries, tracked
from openreml_nn.likelihood.loss import Objective
from openreml_nn.support.checks import check_count, check_flag, found
from openreml_nn.support.errors import NumericalError
from openreml_nn.support.warning import warn

__all__ = ["Bootstrap", "bootstrap", "bootstrap_test", "simulate"]


def simulate(result: Result, n: int = 1, seed: int = 0) -> Tensor:
    r"""Draw responses :math:`X\hat\beta + \sum_t Z_t b_t + e` from a fit, its offset added; of a family,
    from its distribution given that linear predictor without e.

    Args:
        result: a fit.
        n: how many responses.
        seed: of the random numbers.

    Returns:
        Responses (rows, n), with random effects drawn anew for each of the n; (rows, 2, n) of
        successes and failures.

    Raises:
        InputError: if ``n`` is below 1, the rows were streamed, or the family cannot draw.
        TypeError: if an argument is of another kind.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> simulate(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy()), 3).shape
    torch.Size([180, 3])
    """
    n, seed = check_count("n", n, 1), check_count("seed", seed)
    if family_of(result) is not None:
        own = LaplaceRefit(result)
        drawn = own.draw(n, seed)
        # Inputs of a zero part stand beside the responses.
        return drawn if own.loss.family.inputs_of(own.y) is None else drawn[:, 0]
    refit = Refit(result)
    # What the rows have beside the response that was fitted.
    offset = result.fitted + result.residuals - refit.y
    return _drawn(refit, n, seed) + offset[:, None]


def _drawn(refit: Refit, samples: int, seed: int) -> Tensor:
    """Responses less the offset, as a fit has them, (n, samples)."""
    generator = torch.Generator().manual_seed(seed)
    y = (refit.X @ refit.result.fixed.estimate)[:, None].repeat(1, samples)
    with torch.no_grad():
        for term in refit.objective().terms():
            q = term.design.shape[1]
            noise = torch.randn(q, samples, generator=generator, dtype=y.dtype).to(y.device)
            y += term.design.matmul(term.covariance.root().multiply(noise))
    return y


@dataclass(frozen=True)
class Bootstrap:
    """Estimates from simulated responses.

    Attributes:
        samples: a row for each sample, a column for each statistic.
        estimate: the statistics of the fit itself.
        failures: how many of the samples are left out, because their fit had no maximum, as of
            separated responses.
    """

    samples: pd.DataFrame
    estimate: pd.Series
    failures: int = 0

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Percentile intervals: name, estimate, bias, std_error, low, high.

        Raises:
            InputError: if the level is not between 0 and 1.
            TypeError: if it is no number.
        """
        level = check_level(level)
        low, high = (self.samples.quantile(q) for q in ((1 - level) / 2, (1 + level) / 2))
        return pd.DataFrame(
            {
                "name": self.estimate.index,
                "estimate": self.estimate.to_numpy(),
                "bias": (self.samples.mean() - self.estimate).to_numpy(),
                "std_error": self.samples.std().to_numpy(),
                "low": low.to_numpy(),
                "high": high.to_numpy(),
            }
        )


def bootstrap(
    result: Result,
    samples: int = 1000,
    seed: int = 0,
    statistic: Callable[[Result], Mapping[str, float]] | None = None,
    progress: bool = True,
) -> Bootstrap:
    """Fit the model to responses that are simulated from it.

    All are drawn at once, and for grouping factors of moderate size all are fitted at once, by
    Newton's method on a batch; what that leaves, such as fits at a variance of zero, and every fit
    with a ``statistic`` of one's own or a family, is fitted one after another.

    Args:
        result: a fit.
        samples: how many responses.
        seed: of the random numbers.
        statistic: numbers by name from a fit; standard deviations, correlations, fixed effects and
            a family's parameters by default, named as in :func:`profile`.
        progress: whether a bar shows on stderr.

    Warns:
        RuntimeWarning: if samples of a family could not be fitted, with their number.

    Raises:
        InputError: if there is no sample, the rows were streamed, or the family cannot draw.
        NumericalError: if no sample could be fitted.
        TypeError: if an argument is of another kind.

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 6.5.
    """
    check_flag("progress", progress)
    if statistic is not None and not callable(statistic):
        raise TypeError(f"`statistic` is {found(statistic)}: expected a function of a Result")
    samples, seed = check_count("samples", samples, 1), check_count("seed", seed)
    if family_of(result) is not None:
        return _of_family(result, samples, seed, statistic, progress)
    refit = Refit(result)
    estimate = _numbers(refit, refit.objective()) if statistic is None else dict(statistic(result))
    responses = _drawn(refit, samples, seed)
    maxima = None if statistic is not None else maximise(refit, responses)
    rows = []
    for b, y in enumerate(tracked(responses.unbind(1), "bootstrap", progress)):
        if maxima is not None and bool(maxima.found[b]):
            rows.append(dict(zip(estimate, maxima.numbers[b].tolist(), strict=True)))
            continue
        refit.reset()
        if statistic is None:
            objective = refit.objective(y)
            climb(objective, 100)
            rows.append(_numbers(refit, objective))
        else:
            rows.append(dict(statistic(refit.fit(y=y))))
    return Bootstrap(pd.DataFrame(rows), pd.Series(estimate))


def bootstrap_test(
    small: Result,
    large: Result,
    samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """p value of a likelihood-ratio test by simulation under the smaller model.

    It needs no distribution of the statistic, and so is right for any number of variances.

    Args:
        small, large: as in :func:`likelihood_ratio_test`.
        samples: how many responses.
        seed: of the random numbers.
        progress: whether a bar shows on stderr.

    Raises:
        TypeError, InputError: as in :func:`likelihood_ratio_test`, or if ``samples`` or ``seed`` is no
            whole number.

    Warns:
        RuntimeWarning: if samples of a family could not be fitted, with their number; they are left
            out.

    Reference:
        Davison and Hinkley, Bootstrap Methods and their Application (1997), eq. 4.11.
    """
    check_flag("progress", progress)
    samples, seed = check_count("samples", samples, 1), check_count("seed", seed)
    observed = likelihood_ratio_test(small, large).statistic
    if family_of(small) is not None:
        return _test_of_family(small, large, observed, samples, seed, progress)
    fits = [Refit(small), Refit(large)]
    reached = 0
    responses = _drawn(fits[0], samples, seed)
    maxima = [maximise(fit, responses) for fit in fits]
    for b, y in enumerate(tracked(responses.unbind(1), "bootstrap", progress)):
        value = []
        for fit, many in zip(fits, maxima, strict=True):
            if bool(many.found[b]):
                value.append(float(many.log_likelihood[b]))
                continue
            fit.reset()
            objective = fit.objective(y)
            climb(objective, 100)
            value.append(float(objective.evaluate().log_likelihood))
        reached += 2 * (value[1] - value[0]) >= observed
    return (1 + reached) / (1 + samples)


def _of_family(
    result: Result,
    samples: int,
    seed: int,
    statistic: Callable[[Result], Mapping[str, float]] | None,
    progress: bool,
) -> Bootstrap:
    refit = LaplaceRefit(result)
    estimate = numbers_of(result) if statistic is None else dict(statistic(result))
    responses = refit.draw(samples, seed)
    rows = []
    for y in tracked(responses.unbind(-1), "bootstrap", progress):
        with suppress(NumericalError):
            fit = refit.again(y)
            of_fit = statistic is None
            rows.append(refit.numbers(fit) if of_fit else dict(statistic(refit.result_of(fit))))  # type: ignore[misc]
    failures = _told(samples, len(rows))
    return Bootstrap(pd.DataFrame(rows), pd.Series(estimate), failures)


def _test_of_family(
    small: Result, large: Result, observed: float, samples: int, seed: int, progress: bool
) -> float:
    fits = [LaplaceRefit(small), LaplaceRefit(large)]
    values = []
    for y in tracked(fits[0].draw(samples, seed).unbind(-1), "bootstrap", progress):
        with suppress(NumericalError):
            one, two = (fit.again(y) for fit in fits)
            constants = one.jacobian - two.jacobian
            values.append(2 * (one.value - two.value - constants))
    _told(samples, len(values))
    return (1 + sum(value >= observed for value in values)) / (1 + len(values))


def _told(samples: int, fitted: int) -> int:
    """The number of samples without a fit, which a warning names."""
    if not fitted:
        raise NumericalError(f"none of the {samples} samples could be fitted")
    if fitted < samples:
        warn(f"{samples - fitted} of {samples} samples could not be fitted and are left out")
    return samples - fitted


def _numbers(refit: Refit, objective: Objective) -> dict[str, float]:
    """Standard deviations, correlations and fixed effects at the present parameters."""
    numbers: dict[str, float] = {}
    with torch.no_grad():
        matrices = [term.shown() for term in objective.terms()]
    for name, (index, i, j) in matrix_entries(refit.result).items():
        matrix = matrices[index]
        scale = float((matrix[i, i] * matrix[j, j]).clamp(min=0).sqrt())
        if i == j:
            numbers[name] = scale**0.5
        else:
            numbers[name] = float(matrix[i, j]) / scale if scale else nan
    fixed = objective.problem.fixed
    beta = fixed.coefficients(objective.evaluate().gamma).tolist()
    return numbers | dict(zip(refit.result.fixed.names, beta, strict=True))
