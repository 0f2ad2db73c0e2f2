"""Whether other optimisers and other starts end where a fit did."""

from __future__ import annotations

from collections.abc import Callable
from math import nan

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.fit import moment_start
from openreml_nn.estimation.starts import climb
from openreml_nn.inference.refit import Refit, tracked
from openreml_nn.likelihood import REMLLoss
from openreml_nn.likelihood.loss import Objective
from openreml_nn.support.checks import check_count, check_flag
from openreml_nn.support.errors import InputError, NumericalError

__all__ = ["refits"]

#: Steps of a run of AI-REML, and evaluations of another optimiser, at most.
_STEPS, _EVALUATIONS = 200, 5_000
#: A run that ends lower than the best by more than this has not agreed.
_AGREES = 1e-3


def refits(result: Result, starts: int = 3, seed: int = 0, progress: bool = True) -> pd.DataFrame:
    r"""The fit again by other optimisers and from other starts, which should all end alike.

    AI-REML starts from the scale of the data and from ``starts`` random places: each coordinate (a
    standard deviation, a stored correlation) of the estimate is multiplied by :math:`e^{z}` and moved by
    :math:`z' / 2`, both normal. L-BFGS, on exact gradients, and Nelder and Mead's search, which takes none,
    start from the scale of the data.

    Args:
        result: a fit.
        starts: how many random starts there are.
        seed: of the random starts.
        progress: whether a bar shows on stderr.

    Returns:
        A data frame with the columns optimizer, start, log_likelihood (NaN where V was nowhere
        positive definite), lower (by how much it is below the best), agrees (whether that is less
        than 0.001), and a column for each parameter that is estimated, by its name. The first row
        is the fit's own.

    Raises:
        InputError: if no covariance parameter was estimated, the rows were streamed, or the response
            is not Gaussian.
        TypeError: if an argument is of another kind.

    Reference:
        Bates, Maechler, Bolker and Walker, Journal of Statistical Software 67(1) (2015), section 3.4;
        lme4's ``allFit``.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    >>> found = refits(result, starts=1, progress=False)
    >>> found[["optimizer", "start", "agrees"]]
        optimizer    start  agrees
    0     AI-REML  the fit    True
    1     AI-REML  moments    True
    2     AI-REML   random    True
    3      L-BFGS  moments    True
    4 Nelder-Mead  moments    True
    """
    check_count("starts", starts)
    check_count("seed", seed)
    check_flag("progress", progress)
    refit = Refit(result)
    objective = refit.objective()
    with torch.no_grad():
        curvature = Curvature([objective])
    if not len(curvature.u):
        raise InputError(
            "`result` has no estimated covariance parameter: expected one to fit again"
        )
    run = _Runs(refit, objective, curvature, np.random.default_rng(seed))
    ways: list[tuple[str, str, Callable[[], None]]] = [
        ("AI-REML", "the fit", lambda: None),
        ("AI-REML", "moments", lambda: run.climb(run.moments)),
        *[("AI-REML", "random", lambda: run.climb(run.random))] * starts,
        ("L-BFGS", "moments", lambda: run.search("L-BFGS-B")),
        ("Nelder-Mead", "moments", lambda: run.search("Nelder-Mead")),
    ]
    rows = []
    for optimizer, start, go in tracked(ways, "refits", progress):
        refit.reset()
        try:
            go()
            value = run.value()
        except NumericalError:
            value = nan
        rows.append(
            {"optimizer": optimizer, "start": start, "log_likelihood": value, **run.shown()}
        )
    table = pd.DataFrame(rows)
    lower = table["log_likelihood"].max() - table["log_likelihood"]
    table.insert(3, "lower", lower)
    table.insert(4, "agrees", lower < _AGREES)
    return table


class _Runs:
    """Runs of a likelihood from its starts; each leaves the parameters where it ends."""

    def __init__(
        self,
        refit: Refit,
        objective: Objective,
        curvature: Curvature,
        rng: np.random.Generator,
    ) -> None:
        self._refit, self._objective, self._rng = refit, objective, rng
        self._at, self._estimate = curvature.at, curvature.u.clone()

    def value(self) -> float:
        """The log-likelihood at the present parameters."""
        with torch.no_grad():
            return float(self._objective.evaluate().log_likelihood)

    def shown(self) -> dict[str, float]:
        """The present parameters on the natural scale."""
        with torch.no_grad():
            return {e.name: float(e.trans(e.tensor)) for e in self._at.entries}

    def moments(self) -> None:
        """Start from the scale of the data."""
        refit = self._refit
        loss = REMLLoss(refit.covariance, refit.result.method, refit.result.plan.choice)
        moment_start(loss, refit.y, refit.X, refit.source.rows)

    def random(self) -> None:
        """Start from a random place about the estimate."""
        scale, shift = self._rng.standard_normal((2, len(self._estimate)))
        u = self._estimate * torch.from_numpy(np.exp(scale)).to(self._estimate)
        free = ~self._at.vanishing(u)
        self._at.write(torch.where(free, u + torch.from_numpy(shift / 2).to(u), u))

    def climb(self, start: Callable[[], None]) -> None:
        start()
        climb(self._objective, _STEPS)

    def search(self, method: str) -> None:
        """By one of SciPy's optimisers, in the coordinates of estimation."""
        from scipy.optimize import minimize  # which takes long to import, and few need

        self.moments()
        with_slope = method != "Nelder-Mead"
        start = self._at.read(self._estimate)
        # Standard deviations in units of their start.
        sized = self._at.vanishing(start) & (start != 0)
        unit = torch.where(sized, start, 1)

        def loss(x: np.ndarray) -> float | tuple[float, np.ndarray]:
            u = unit * torch.from_numpy(x).to(unit)
            try:
                value, slope = self._evaluated(u, with_slope)
            except NumericalError:
                value, slope = np.inf, np.zeros_like(x)
            return (value, slope * unit.numpy(force=True)) if with_slope else value

        x = (start / unit).numpy(force=True)
        count = {"maxfun" if with_slope else "maxfev": _EVALUATIONS}
        tight = {"ftol": 1e-12, "gtol": 1e-6} if with_slope else {"fatol": 1e-8, "xatol": 1e-6}
        found = minimize(loss, x, jac=with_slope, method=method, options={**count, **tight})
        self._at.write(unit * torch.from_numpy(found.x).to(unit))

    def _evaluated(self, u: Tensor, with_slope: bool) -> tuple[float, np.ndarray]:
        """The negative log-likelihood at coordinates u, and its slope in them."""
        self._at.write(u)
        # A coordinate beyond a bound stands for its mirror image.
        vanishing = self._at.vanishing(u)
        side = torch.where(vanishing & (u < 0), -1.0, 1.0)
        with torch.no_grad():
            if not with_slope:
                return -self.value(), u.numpy(force=True)
            curvature = Curvature([self._objective])
            value = float(self._objective.evaluate().log_likelihood)
        return -value, -(side * curvature.score).numpy(force=True)
