"""A mixed model as a regressor of scikit-learn."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import pandas as pd
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_array

from openreml_nn.estimators.base import MixedEstimator
from openreml_nn.estimators.columns import target_of
from openreml_nn.model.linear import lmm
from openreml_nn.result import Result
from openreml_nn.support.errors import InputError, NumericalError

__all__ = ["MixedRegressor"]


class MixedRegressor(RegressorMixin, MixedEstimator):
    r"""A linear mixed model, or a network with random effects, as a regressor of scikit-learn.

    .. math:: y = f(x) + \sum_t Z_t b_t + e,\qquad b_t \sim N(0, G_t),\quad e \sim N(0, \sigma^2 I)

    By default f is linear in the columns of X, and each grouping factor has a random intercept;
    the fit is that of :func:`openreml_nn.lmm`. Grouping factors are columns of X, which ``groups`` or
    ``formula`` name, so that pipelines, searches and cross-validation hand them on; or they are
    handed to ``fit(X, y, groups=...)`` and ``predict(X, groups=...)``, in meta-estimators by metadata
    routing. Without any the model is ordinary regression.

    Args:
        groups: columns of X that are grouping factors, by names of a data frame or by positions.
        formula: right side of an lme4-style formula of the columns of X and of ``groups`` of
            :meth:`fit`, such as ``"x + (x | user)"``; the columns of an array are x0, x1, and so on, a
            nameless vector of groups is ``group``.
        method: ``"reml"`` or ``"ml"``; by default the first, and with a network that of its head.
        solver: see :class:`openreml_nn.REMLLoss`.
        network: a network, or its config, that takes the standardised columns and yields features, as
            :class:`openreml_nn.lightning.MixedModule` has it; a linear layer makes the mean of them.
        optimizer: of the network, see there.
        epochs: of the network, 30 by default.
        rows: of a mini-batch of the network, 1,024 by default.
        random_state: of the network's start and of the order of rows: a number, a generator or
            None. Without a network nothing is drawn.

    Attributes:
        result_: the :class:`openreml_nn.Result`: coefficients, variance components, BLUPs.
        n_features_in_: columns of X.
        feature_names_in_: their names, if X was a data frame.

    Raises:
        InputError: in ``fit``, if options do not fit each other or the data; a ValueError.

    Example::

        model = MixedRegressor(groups="user")
        model.fit(table[["x1", "x2", "user"]], table.rating)
        mean, std = model.predict(new, return_std=True)
        cross_val_score(model, X, y, groups=X.user, cv=GroupKFold())
    """

    def __init__(
        self,
        groups: Any = None,
        *,
        formula: str | None = None,
        method: str | None = None,
        solver: str = "auto",
        network: Any = None,
        optimizer: Any = None,
        epochs: int | None = None,
        rows: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.groups = groups
        self.formula = formula
        self.method = method
        self.solver = solver
        self.network = network
        self.optimizer = optimizer
        self.epochs = epochs
        self.rows = rows
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None, weights: Any = None) -> Self:
        """Fit the model.

        Args:
            X: (n, p) array, or data frame.
            y: (n,) responses.
            groups: grouping factors beside X: (n,) or (n, k), or a series or data frame.
            weights: (n,) by which the residual variance of each row is divided. They are precisions; a
                ``sample_weight`` of scikit-learn would be a number of rows.
        """
        table = self._table(X, groups)
        names = self.columns_
        target = target_of(self, y, len(table))
        table[names.response] = check_array(
            target, ensure_2d=False, dtype=np.float64, input_name="y"
        )
        weight = None
        if weights is not None:
            weight = names.weight
            table[weight] = _weights(weights, len(table))
        formula = names.formula(self.formula, names.linear())
        if self.network is None:
            self.result_ = self._linear(formula, table, weight)
        else:
            self.result_ = self._trained(formula, table, weights=weight, method=self.method)
        return self

    def predict(self, X: Any, groups: Any = None, return_std: bool = False) -> Any:
        """Means of new observations (n,), and their standard deviations if ``return_std``.

        A level that the fit did not see, one that is missing, and every level where ``groups`` is left
        out has the mean of the population, and the variance of its prior.
        """
        found = self._predicted(X, groups)
        mean = found["mean"].to_numpy()
        return (mean, np.sqrt(found["variance"].to_numpy())) if return_std else mean

    def score(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> float:
        """:math:`R^2` of the predictions, see :func:`sklearn.metrics.r2_score`."""
        return float(r2_score(y, self.predict(X, groups), sample_weight=sample_weight))

    def _linear(self, formula: str, table: pd.DataFrame, weights: str | None) -> Result:
        options: dict[str, Any] = {
            "method": "reml" if self.method is None else self.method,
            "solver": self.solver,
            "weights": weights,
        }
        try:
            return lmm(formula, table, **options)
        except InputError:
            # A response without error is no model with a variance, but one that regressors take.
            y = table[self.columns_.response].to_numpy()
            rounding = max(float(np.finfo(y.dtype).eps * np.linalg.norm(y)), 1e-150) ** 2 / len(y)
            try:
                found = lmm(formula, table, residual_variance=rounding, **options)
            except (InputError, NumericalError):
                found = None
            if found is None or found.random or not _is_exact(found, y, rounding):
                raise
            return found


def _is_exact(result: Result, y: np.ndarray, variance: float) -> bool:
    """Whether the fixed effects leave nothing of y but rounding of this variance."""
    left = y - result.fitted.numpy()
    return bool((left**2).mean() <= 100 * variance)


def _weights(given: Any, n: int) -> np.ndarray:
    weights = check_array(given, ensure_2d=False, dtype=np.float64, input_name="weights")
    if weights.shape != (n,):
        raise InputError(f"`weights` has the shape {weights.shape}: expected ({n},)")
    return weights
