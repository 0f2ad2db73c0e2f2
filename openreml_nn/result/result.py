"""What a fit found."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from types import NoneType
from typing import Any

import pandas as pd

from openreml_nn.result.parts import (
    Component,
    Estimate,
    FixedEffects,
    Label,
    Record,
    Source,
    Start,
)
from openreml_nn.result.prediction import predict_table
from openreml_nn.result.record import to_record
from openreml_nn.result.summary import summarise
from openreml_nn.result.update import with_rows
from openreml_nn.result.values import FitValues
from openreml_nn.support.checks import check_instance
from openreml_nn.support.errors import InputError
from openreml_nn.support.files import check_writable, write_text
from openreml_nn.table.encoding import read_as
from openreml_nn.table.reading import TableFile

__all__ = ["Component", "Estimate", "FixedEffects", "Label", "Record", "Result", "Source", "Start"]


@dataclass(frozen=True, repr=False)
class Result(FitValues):
    """A fitted mixed model, linear or generalised, with predictions, text and JSON.

    Its attributes are those of :class:`openreml_nn.result.values.FitValues`.
    """

    def __repr__(self) -> str:
        """The fit in a line: what was fitted to what, and how well."""
        names = ("formula", "method", "log_likelihood", "rows", "groups", "converged")
        return f"Result({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def predict(
        self, table: pd.DataFrame | str | os.PathLike[str] | TableFile, level: float = 0.95
    ) -> pd.DataFrame:
        r"""Predictions of new observations for a table, on the scale of the formula's left side.

        ``mean`` is :math:`x^\top\hat\beta + \sum_t z_t^\top \hat b_t`, in which levels that were not
        seen have :math:`\hat b = 0` and are counted in a warning, and places that were not seen, of
        ``matern(east, north)`` and the like, the mean given those of the fit (kriging); and ``population_mean`` is
        :math:`x^\top\hat\beta`; NaN where the data do not say what that is. Both hold the offset.

        ``variance`` is that of :math:`y - \hat y`: the error variance of ``mean``, in which all
        covariances of coefficients and BLUPs count and a level that was not seen has
        :math:`z^\top G z`, and the residual's. That of a row is divided by its weight where the table
        has the weights' column, and is that of its position or stratum where it has its columns, else
        the mean. The residual of a new observation is independent of those of the data; so is a field
        beside ``units``, which :attr:`fitted` has among the random effects. Covariance
        parameters count as known. Where the effects are so many that even a sparse factor of their
        equations would have more than 50 million entries, random effects of different factors count
        as independent, with a warning that says by how much variances may be too small.

        Args:
            table: a data frame with the columns of the formula, the path or URI of a file, which is
                read as that of the fit was, or a :class:`TableFile`, which says itself how it is read;
                the response is not needed.
            level: probability that a new observation is between ``low`` and ``high``.

        Returns:
            A data frame with the table's index and the columns ``mean``, ``variance``,
            ``population_mean``, ``low`` and ``high``; rows with missing values are left out. For
            ``cbind(y1, y2)`` each row has one row for every response, named in a column ``trait``.

        Raises:
            InputError: if there is no formula, a column is missing, or a level of a factor of the
                fixed effects is unknown.

        Reference:
            Henderson, Biometrics 31 (1975) 423.
        """
        if self.encoder is None or self.model is None:
            raise InputError(
                "`result` has no formula by which to read a table: expected a fit of a "
                "formula; a model without one predicts by MixedModel.predict(batch)"
            )
        encoder, rows = read_as(self.encoder, table)
        return predict_table(encoder, self.model, rows, level)

    def update(self, table: pd.DataFrame | str | os.PathLike[str] | TableFile) -> Result:
        r"""The result with more rows, at the same parameters: as if these had been among the rows of
        the fit when coefficients and BLUPs were computed, and exact.

        Levels of grouping factors that the fit did not see are new levels from then on. Parameters,
        their standard errors and what the fit was like stay; coefficients, BLUPs, their variances,
        predictions and the log-likelihood are those of all rows. The rows of the fit are not
        needed, but their cross-products, which a result keeps; so there are no fitted values, and no
        ``source`` for inference that takes the rows. With a family modes and coefficients are found
        anew from the rows of the fit and the new ones, the family's parameters held; then a result
        takes up rows once, and the standard errors of coefficients are given the parameters.

        Args:
            table: the new rows, with all columns of the fit, as in :meth:`predict`.

        Raises:
            InputError: if a column is missing, a level of the fixed effects or of correlated levels
                is unknown, there is no formula, or rows do not add up: with correlated residuals, or of a
                family that is ordinal, has a zero part or is of ``cbind(successes, failures)``.

        Reference:
            Henderson, Biometrics 31 (1975) 423.

        >>> from openreml_nn import lmm
        >>> from openreml_nn.datasets import sleepstudy
        >>> rows = sleepstudy()
        >>> result = lmm("Reaction ~ Days + (1 | Subject)", rows[rows.Subject != "372"])
        >>> len(result.update(rows[rows.Subject == "372"]).random[0].values)
        18
        """
        if self.encoder is None or self.model is None:
            raise InputError(
                "`result` has no formula by which to read a table: expected a fit of a "
                "formula; a model without one takes up rows by MixedModel.add(batch)"
            )
        return with_rows(self, *read_as(self.encoder, table))

    def summary(self, title: str | None = None) -> str:
        """The model as text, in the order of lme4's summary.

        Args:
            title: what stands for the formula; the result's own by default.

        Raises:
            TypeError: if ``title`` is no text.
        """
        check_instance("title", title, (str, NoneType), "text, or None")
        return summarise(self, title)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a JSON file, whole or not at all.

        Raises:
            InputError: if there can be no file of that name.
        """
        check_instance("path", path, (str, os.PathLike), "a path")
        check_writable("path", path)
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """All but BLUPs and fitted values, by the schema of ``result.json``. Numbers that do not
        exist are None."""
        return to_record(self)
