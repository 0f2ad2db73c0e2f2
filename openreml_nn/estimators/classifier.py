"""A mixed model of two classes as a classifier of scikit-learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import assert_all_finite

from openreml_nn.estimators.base import MixedEstimator
from openreml_nn.estimators.columns import target_of
from openreml_nn.families import Binomial
from openreml_nn.model.generalised import fit_family, glmm
from openreml_nn.model.response import EncodedResponse
from openreml_nn.model.structures import labels_of, linear_model
from openreml_nn.result import Result
from openreml_nn.support.checks import check_number
from openreml_nn.support.errors import InputError

__all__ = ["MixedClassifier"]


class MixedClassifier(ClassifierMixin, MixedEstimator):
    r"""A logistic mixed model, or a network with random effects, as a classifier of two classes.

    .. math:: \log\frac{p}{1 - p} = \beta_0 + x^\top\beta + \sum_t Z_t b_t,\qquad
        \beta \sim N(0, C I),\quad b_t \sim N(0, G_t)

    The random effects, and the coefficients of X, are integrated by Laplace's method. The prior of the
    coefficients is the penalty of :class:`sklearn.linear_model.LogisticRegression` of the same C: without
    groups both have the same coefficients. Those of a ``formula`` have none: its fit is that of
    :func:`openreml_nn.glmm`.

    Args:
        groups, formula, solver, optimizer, epochs, rows, random_state: see :class:`MixedRegressor`.
        network: see :class:`MixedRegressor`. It needs a grouping factor, and is trained by the marginal
            likelihood of all rows, an optimizer's step an epoch.
        C: prior variance of the coefficients of X, 1 by default; infinite for none. It is refused
            beside a formula or a network, whose coefficients have no prior.

    Attributes:
        classes_: the two classes.
        result_: the :class:`openreml_nn.Result`; where the coefficients have a prior, they are the random
            effects of its first factor.
        n_features_in_: columns of X.
        feature_names_in_: their names, if X was a data frame.

    Raises:
        InputError: in ``fit``, if options do not fit each other or the data; a ValueError.
        NumericalError: in ``fit``, if the classes are separated and the coefficients have no prior.

    Example::

        model = MixedClassifier(groups="patient").fit(X, y)
        model.predict_proba(new)[:, 1]
    """

    method = None

    def __init__(
        self,
        groups: Any = None,
        *,
        formula: str | None = None,
        C: float | None = None,
        solver: str = "auto",
        network: Any = None,
        optimizer: Any = None,
        epochs: int | None = None,
        rows: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.groups = groups
        self.formula = formula
        self.C = C
        self.solver = solver
        self.network = network
        self.optimizer = optimizer
        self.epochs = epochs
        self.rows = rows
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit the model.

        Args:
            X: (n, p) array, or data frame.
            y: (n,) classes, of two.
            groups: grouping factors beside X: (n,) or (n, k), or a series or data frame.
        """
        variance = self._prior()
        table = self._table(X, groups)
        names = self.columns_
        self.classes_, table[names.response] = _two_classes(self, y, len(table))
        linear = names.linear()
        if self.network is not None:
            formula = names.formula(self.formula, linear)
            self.result_ = self._trained(formula, table, family="binomial")
        elif variance is None or not names.numbers:
            formula = names.formula(self.formula, linear)
            self.result_ = glmm(formula, table, family="binomial", solver=self.solver)
        else:
            self.result_ = self._shrunken(table, variance)
        return self

    def predict_proba(self, X: Any, groups: Any = None) -> Any:
        """Probabilities of both classes (n, 2): expectations over the random effects, given the data.

        Levels that are not known: see :meth:`MixedRegressor.predict`.
        """
        p = self._predicted(X, groups)["mean"].to_numpy()
        return np.stack([1 - p, p], 1)

    def predict(self, X: Any, groups: Any = None) -> Any:
        """The more probable class of each row (n,)."""
        p = self.predict_proba(X, groups)[:, 1]
        return self.classes_[(p > 0.5).astype(int)]

    def score(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> float:
        """Share of rows whose class is predicted, see :func:`sklearn.metrics.accuracy_score`."""
        return float(accuracy_score(y, self.predict(X, groups), sample_weight=sample_weight))

    def _prior(self) -> float | None:
        """Prior variance of the coefficients, None for none."""
        if self.formula is not None or self.network is not None:
            if self.C is not None:
                raise InputError(
                    "`C` is for the columns of X: leave it out beside a formula or network"
                )
            return None
        given = 1.0 if self.C is None else self.C
        return None if given == np.inf else check_number("C", given, above=0)

    def _shrunken(self, table: pd.DataFrame, variance: float) -> Result:
        """The fit whose coefficients are effects of one level, of a variance that is known."""
        names = self.columns_
        columns = " + ".join(f"`{name}`" for name in names.numbers)
        fixed = f"1 + idv(0 + {columns} | `{names.one}`)"
        formula = names.formula(None, fixed)
        response = EncodedResponse(formula, "binomial")
        encoded, _ = response.fit(table)
        model = linear_model(encoded, "reml", self.solver, family=Binomial().double())
        first = next(iter(model.effects().values()))
        first.g.fix("sigma^2", variance, natural=True)
        result = fit_family(model, encoded.batch(), names=encoded.names, labels=labels_of(encoded))
        return replace(result, formula=formula, encoder=response.encoder)


def _two_classes(estimator: Any, y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes, and a 1 in each row of the second."""
    y = target_of(estimator, y, n)
    assert_all_finite(y, input_name="y")
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) != 2:
        kind = type_of_target(y)
        raise InputError(
            f"Only binary classification is supported. The type of the target is {kind}: y has "
            f"{len(classes)} class{'es' * (len(classes) != 1)}, expected 2 classes"
        )
    return classes, codes.astype(float)
