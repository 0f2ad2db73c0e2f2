"""What the regressor and the classifier share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import Trainer
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from openreml_nn.estimators.columns import Columns, group_table
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from openreml_nn.result import Result
from openreml_nn.support.checks import check_count, check_text
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError

__all__ = ["MixedEstimator"]

#: Epochs of a network, and rows of its mini-batches.
_EPOCHS, _ROWS = 30, 1024


class MixedEstimator(BaseEstimator):
    """A mixed model of arrays or data frames; see :class:`MixedRegressor`."""

    groups: Any
    formula: Any
    method: Any
    solver: Any
    network: Any
    optimizer: Any
    epochs: Any
    rows: Any
    random_state: Any
    result_: Result
    columns_: Columns

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # The order of mini-batches is drawn.
        tags.non_deterministic = self.network is not None and self.random_state is None
        return tags

    def _table(self, X: Any, groups: Any) -> pd.DataFrame:
        """The rows of a fit as a table, once the options fit each other."""
        if self.formula is not None:
            check_text("formula", self.formula)
            if "~" in self.formula:
                raise InputError(
                    f"`formula` is {self.formula!r}: expected its right side, without ~"
                )
            if self.groups is not None:
                raise InputError(
                    "`groups` beside `formula`: expected one, as a formula has its own"
                )
        if self.network is None:
            for name in ("optimizer", "epochs", "rows"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(
                        f"`{name}` is {described(value)} without a network: leave it out"
                    )
        columns = self.groups if self.groups is not None else ()
        if isinstance(columns, str | int | np.integer):
            columns = (columns,)
        if not isinstance(columns, Sequence):
            raise TypeError(f"`groups` is {described(columns)}: expected columns of X")
        beside = group_table(groups)
        self.columns_ = Columns.of(X, columns, beside, self.formula)
        return self.columns_.table(self, X, beside, fitting=True)

    def _trained(self, formula: str, table: pd.DataFrame, **options: Any) -> Result:
        """The result of a network's training."""
        rows = _ROWS if self.rows is None else check_count("rows", self.rows, 1)
        epochs = _EPOCHS if self.epochs is None else check_count("epochs", self.epochs, 1)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        data = MixedModelDataModule(
            table, formula, weights=options.get("weights"), family=options.get("family")
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = MixedModule(
                formula,
                self.optimizer,
                network=copy.deepcopy(self.network),
                rows=rows,
                seed=seed,
                solver=self.solver,
                **options,
            )
            trainer = Trainer(
                max_epochs=epochs,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, data)
        assert module.result is not None
        return module.result

    def _predicted(self, X: Any, groups: Any) -> pd.DataFrame:
        """Predictions of rows, one of each."""
        check_is_fitted(self)
        beside = group_table(groups)
        if beside is not None and not self.columns_.given:
            raise InputError("`groups` is given but the fit had none beside X: leave it out")
        table = self.columns_.table(self, X, beside, fitting=False)
        found = self.result_.predict(table)
        if len(found) < len(table):
            row = int((~np.isin(np.arange(len(table)), found.index)).argmax())
            raise InputError(
                f"row {row + 1} of X misses a value: expected all that the formula needs"
            )
        return found
