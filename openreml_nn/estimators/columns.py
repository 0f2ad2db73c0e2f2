"""Arrays and data frames of scikit-learn's users as the table of a formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.validation import validate_data

from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError

__all__ = ["Columns", "group_table", "target_of"]

#: What stands for a level that is not known: no label of a file or an array.
_UNKNOWN = "\0"


@dataclass(frozen=True)
class Columns:
    """The columns of a fit's table.

    Attributes:
        numbers: names of the columns of X that are numbers.
        own: names of the columns of X that are grouping factors.
        given: names of the grouping factors that were handed over beside X.
        response, weight: names of the columns of these.
        one: name of a factor of one level, to which coefficients with a prior belong.
        is_frame: whether X was a data frame that the formula takes as it is.
    """

    numbers: tuple[str, ...]
    own: tuple[str, ...]
    given: tuple[str, ...]
    response: str
    weight: str
    one: str
    is_frame: bool

    @classmethod
    def of(
        cls, X: Any, columns: Sequence[Any], groups: pd.DataFrame | None, formula: str | None
    ) -> Columns:
        """The columns of a fit.

        Args:
            X: array or data frame.
            columns: names, or positions, of its columns that are grouping factors.
            groups: grouping factors beside X.
            formula: the fixed and the random part, or None.

        Raises:
            InputError: if a column is not there, or a name stands twice.
        """
        names = _names(X)
        own = tuple(names[at] for at in _positions(X, columns, names))
        given = () if groups is None else tuple(groups.columns)
        everything = [*names, *given]
        twice = sorted({name for name in everything if everything.count(name) > 1})
        if twice:
            raise InputError(f"the column {twice[0]!r} stands twice in X and `groups`: rename one")
        is_frame = formula is not None and isinstance(X, pd.DataFrame)
        numbers = () if is_frame else tuple(name for name in names if name not in own)
        response, weight, one = (_free(name, everything) for name in ("y", "weight", "all"))
        return cls(numbers, own, given, response, weight, one, is_frame)

    def formula(self, formula: str | None, fixed: str) -> str:
        """The whole formula: the one that was given, or ``fixed`` and an intercept of each group."""
        if formula is None:
            groups = (f"(1 | {_quoted(name)})" for name in (*self.own, *self.given))
            formula = " + ".join([fixed, *groups])
        return f"{_quoted(self.response)} ~ {formula}"

    def linear(self) -> str:
        """All numbers, as the fixed part of a formula."""
        return " + ".join(["1", *map(_quoted, self.numbers)])

    def table(self, estimator: Any, X: Any, groups: pd.DataFrame | None, fitting: bool) -> Any:
        """The rows as a table.

        Args:
            estimator: whose X it is, for what scikit-learn remembers of it.
            X: array or data frame.
            groups: grouping factors beside X, None for levels that are not known.
            fitting: whether rows are for a fit; then no level may be missing.

        Raises:
            TypeError, ValueError: if X or the groups are not as they must be.
        """
        found = self._own(estimator, X, fitting)
        n = len(found)
        if groups is None:
            groups = pd.DataFrame(dict.fromkeys(self.given, None), index=found.index, dtype=object)
        elif tuple(groups.columns) != self.given:
            raise InputError(
                f"`groups` has the columns {list(groups.columns)}: expected {list(self.given)}, as "
                "the fit had"
            )
        if len(groups) != n:
            raise InputError(f"`groups` has {len(groups)} rows but X has {n}")
        if not self.is_frame:
            found[self.one] = 0
        for name in self.given:
            found[name] = _levels(name, groups[name], fitting).set_axis(found.index)
        return found

    def _own(self, estimator: Any, X: Any, fitting: bool) -> pd.DataFrame:
        """The columns of X itself."""
        if self.is_frame:
            validate_data(estimator, X, reset=fitting, skip_check_array=True)
            if not isinstance(X, pd.DataFrame):
                raise TypeError(f"X is {described(X)}: expected a data frame, as the fit had")
            return X.reset_index(drop=True)
        least = 2 if fitting else 1
        if not self.own:
            X = validate_data(
                estimator, X, reset=fitting, dtype=np.float64, ensure_min_samples=least
            )
            return pd.DataFrame(X, columns=list(self.numbers))
        X = validate_data(
            estimator,
            X,
            reset=fitting,
            dtype=None,
            ensure_all_finite=False,
            ensure_min_samples=least,
        )
        return self._parted(pd.DataFrame(X, columns=self._in_order(estimator)), fitting)

    def _in_order(self, estimator: Any) -> list[str]:
        kept = getattr(estimator, "feature_names_in_", None)
        return [f"x{i}" for i in range(estimator.n_features_in_)] if kept is None else list(kept)

    def _parted(self, X: pd.DataFrame, fitting: bool) -> pd.DataFrame:
        """The numbers as such, and the levels."""
        found = pd.DataFrame(index=X.index)
        if self.numbers:
            numbers = check_array(X[list(self.numbers)], dtype=np.float64, input_name="X")
            found = pd.DataFrame(numbers, columns=list(self.numbers))
        for name in self.own:
            found[name] = _levels(name, X[name], fitting)
        return found


def group_table(groups: Any) -> pd.DataFrame | None:
    """Grouping factors beside X as a table, a column each.

    Args:
        groups: (n,) or (n, k), or a data frame or series, whose names are kept.

    Raises:
        InputError: if it has another shape.
    """
    if groups is None:
        return None
    if isinstance(groups, pd.DataFrame):
        return groups.set_axis([str(name) for name in groups.columns], axis=1)
    if isinstance(groups, pd.Series):
        return groups.to_frame("group" if groups.name is None else str(groups.name))
    array = np.asarray(groups)
    if array.ndim == 1:
        return pd.DataFrame({"group": array})
    if array.ndim != 2 or not array.shape[1]:
        raise InputError(f"`groups` has the shape {array.shape}: expected (n,) or (n, k)")
    return pd.DataFrame({f"group{j}": array[:, j] for j in range(array.shape[1])})


def _names(X: Any) -> list[str]:
    """Names of the columns of X: those of a data frame, or x0, x1, ...."""
    if isinstance(X, pd.DataFrame) and all(isinstance(name, str) for name in X.columns):
        return list(X.columns)
    shape = getattr(X, "shape", None) or np.asarray(X, dtype=object).shape
    return [f"x{j}" for j in range(shape[1] if len(shape) > 1 else 0)]


def _positions(X: Any, columns: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Positions of some columns of X."""
    found = []
    for column in columns:
        if isinstance(column, str) and column in names:
            found.append(names.index(column))
        elif (
            isinstance(column, int | np.integer)
            and not isinstance(column, bool)
            and 0 <= column < len(names)
        ):
            found.append(int(column))
        else:
            raise InputError(f"`groups` has {column!r}: expected a column of X, {names[:10]}")
    return found


def _levels(name: str, column: pd.Series, fitting: bool) -> pd.Series:
    """Labels of levels, with a word for those that are not known."""
    missing = column.isna()
    if not missing.any():
        return column
    if fitting:
        raise InputError(
            f"`groups` misses the level of {name!r} in row {int(missing.to_numpy().argmax()) + 1}: "
            "expected one in each row that is fitted"
        )
    return column.astype(object).where(~missing, _UNKNOWN)


def _free(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _quoted(name: str) -> str:
    return f"`{name}`"


def target_of(estimator: Any, y: Any, n: int) -> np.ndarray:
    """The target of a fit (n,): there, and of the rows of X.

    Raises:
        ValueError: as scikit-learn does.
    """
    if y is None:
        raise InputError(
            f"{type(estimator).__name__} requires y to be passed, but the target y is None"
        )
    y = column_or_1d(y, warn=True)
    check_consistent_length(y, np.empty(n))
    return y
