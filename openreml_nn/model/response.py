"""The response of a table as its family takes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from openreml_nn.families import Family, ZeroInflated, named_family
from openreml_nn.families.zeros import check_inflatable
from openreml_nn.model.zeros import ZeroEncoder
from openreml_nn.support.checks import check_text
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn
from openreml_nn.table import Encoded, Encoder
from openreml_nn.table.columns import as_of_table

__all__ = ["EncodedResponse"]

_CBIND = re.compile(r"^\s*cbind\s*\((.*)\)\s*$", re.DOTALL)


class EncodedResponse:
    """A formula with the responses of a family: categories become their numbers, and
    ``cbind(successes, failures)`` two columns.

    Args:
        formula: an lme4-style formula.
        family: of the response, or its name; None for a Gaussian one, by the encoder alone.
        categorical, source: see :class:`Encoder`.
        zi: formula of the zero part, see :class:`ZeroEncoder`; none by default.
        **options: see :class:`Encoder`.

    Attributes:
        encoder: what the formula makes of a table.
        levels: the categories of the response that the fit has met, in their order; none for
            numbers.

    Raises:
        InputError: if the formula does not parse, or is not for the family.
    """

    def __init__(
        self,
        formula: str,
        family: str | Family | None,
        categorical: Sequence[str] = (),
        source: str = "the table",
        zi: str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(family, ZeroInflated):
            raise InputError(
                "`family` is zero-inflated: expected that of the other responses beside a formula, and "
                "that of the zero part as `zi`"
            )
        self._given = family
        self.family = family.name if isinstance(family, Family) else family
        self.levels: tuple[str, ...] = ()
        self._codes: Mapping[Any, int] | None = None
        left, right = _sides(formula)
        self._name = left.strip()
        both = None if self.family is None else _CBIND.match(left)
        forms = [formula]
        if both is not None:
            if self.family != "binomial":
                raise InputError(
                    f"formula {formula!r}: cbind(successes, failures) is for family 'binomial'"
                )
            one, two = _arguments(both.group(1), formula)
            # Rows that miss either are left out of both.
            forms = [f"I(({a}) + 0 * ({b}))~{right}" for a, b in ((one, two), (two, one))]
        options = {"known_residual": self.family is not None, **options}
        if zi is not None:
            check_text("zi", zi)
            if family is None:
                raise InputError(f"`zi` is {zi!r} without a `family`: expected None")
            check_inflatable(named_family(family))
            if len(forms) > 1:
                raise InputError(f"`zi` is {zi!r} beside cbind(): expected a response of 0 and 1")
            self.encoder: Encoder = ZeroEncoder(formula, zi, categorical, source, **options)
            self._failures = None
            return
        encoders = [Encoder(text, categorical, source, **options) for text in forms]
        self.encoder = encoders[0]
        self._failures = encoders[1] if len(encoders) > 1 else None

    def fit(self, table: pd.DataFrame) -> tuple[Encoded, pd.DataFrame]:
        """Learn from a table and encode it; also the table with the numbers of its categories.

        Raises:
            InputError: as :meth:`Encoder.fit` does, or if the family cannot have a response.
        """
        table = self._learned(table)
        found = self.encoder.fit(table)
        if self._failures is not None:
            found = _with_failures(found, self._failures.fit(table))
        return self._checked(found, table), table

    def held_out(self, table: pd.DataFrame) -> Encoded:
        """Encode rows that were held out, by what was learned.

        Raises:
            InputError: as :meth:`Encoder.transform` does.
        """
        table = self._numbered(table)
        found = self.encoder.transform(table, held_out=True)
        if self._failures is not None:
            found = _with_failures(found, self._failures.transform(table, held_out=True))
        return found if self._given is None else self._counted(found, table)

    def _learned(self, table: pd.DataFrame) -> pd.DataFrame:
        self._codes, self.levels, self.encoder.categories = None, (), None
        name = self._name.strip("`")
        if name not in table.columns or self.family not in ("binomial", "ordinal"):
            return table
        column = table[name]
        is_bool = pd.api.types.is_bool_dtype(column)
        if self.family == "binomial" and (is_bool or pd.api.types.is_numeric_dtype(column)):
            return table
        if isinstance(column.dtype, pd.CategoricalDtype):
            levels = [level for level in column.cat.categories if (column == level).any()]
        else:
            levels = sorted(column.dropna().unique())
        if self.family == "binomial" and len(levels) != 2:
            raise InputError(
                f"the response {name!r} has {len(levels)} categories, {levels[:5]}: expected two "
                "for family 'binomial'"
            )
        if self.family == "ordinal" and len(levels) < 2:
            raise InputError(f"the response {name!r} has one category: expected two or more")
        is_text = any(isinstance(level, str) for level in levels)
        if (
            self.family == "ordinal"
            and is_text
            and not isinstance(column.dtype, pd.CategoricalDtype)
        ):
            shown = " < ".join(map(repr, levels[:5]))
            warn(
                f"the response {name!r} is text, whose categories are taken in the order of their "
                f"spelling, {shown}{' …' * (len(levels) > 5)}: make it an ordered categorical, or in "
                f"a file spell its categories in their order, such as {'1_' + str(levels[0])!r}"
            )
        self._codes = {level: i for i, level in enumerate(levels)}
        self.encoder.categories = self._codes
        self.levels = tuple(map(str, levels))
        return self._numbered(table)

    def _numbered(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with a response of categories as their numbers."""
        name = self._name.strip("`")
        if self._codes is None or name not in table.columns:
            return table
        return table.assign(**{name: table[name].map(self._codes).astype(float)})

    def _counted(self, encoded: Encoded, table: pd.DataFrame) -> Encoded:
        """Proportions whose weights are their trials as successes and failures."""
        y, weights = encoded.y, encoded.weights
        if y is None or weights is None:
            return encoded
        assert self._given is not None
        own = named_family(self._given, None, max(2, len(self.levels)))
        with self._as_of_table(encoded, table):
            y, weights = own.with_weights(y, weights)
        return replace(encoded, y=y, weights=weights)

    def _as_of_table(self, encoded: Encoded, table: pd.DataFrame) -> AbstractContextManager[None]:
        names = {"y": self._name, "weights": self.encoder.weights}
        return as_of_table(table, encoded.rows, names, self.encoder.source)

    def _checked(self, encoded: Encoded, table: pd.DataFrame) -> Encoded:
        if self._given is None:
            return encoded
        encoded = self._counted(encoded, table)
        y, left, source = encoded.y, self._name, self.encoder.source
        assert y is not None
        own = named_family(self._given, None, max(2, len(self.levels)))
        with self._as_of_table(encoded, table):
            own.check(y, f"{source}: the response {left!r}")
        if self.family == "binomial":
            total = y if y.dim() == 1 else y[:, 0] / y.sum(1)
            if bool((total == total[0]).all()) and float(total[0]) in (0.0, 1.0):
                raise InputError(
                    f"{source}: the response {left!r} is {int(total[0])} in every row: expected "
                    "both successes and failures"
                )
        elif bool((y == y[0]).all()):
            raise InputError(f"{source}: the response {left!r} is {float(y[0]):.6g} in every row")
        return encoded


def _with_failures(successes: Encoded, failures: Encoded) -> Encoded:
    if successes.y is None or failures.y is None:
        return successes
    return replace(successes, y=torch.stack([successes.y, failures.y], 1))


def _sides(formula: str) -> tuple[str, str]:
    left, tilde, right = formula.partition("~")
    if not tilde or not left.strip():
        raise InputError(f"formula {formula!r}: expected a response, '~' and effects")
    return left, right


def _arguments(text: str, formula: str) -> tuple[str, str]:
    """The two arguments of cbind()."""
    depth, at = 0, []
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            at.append(i)
    if len(at) != 1:
        raise InputError(
            f"formula {formula!r}: cbind() has {len(at) + 1} arguments: expected two, successes and "
            "failures"
        )
    return text[: at[0]], text[at[0] + 1 :]
