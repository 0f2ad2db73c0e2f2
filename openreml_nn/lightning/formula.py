"""What a formula's model takes of a table, which a module says to its data module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from openreml_nn.families import Family
from openreml_nn.model.response import EncodedResponse
from openreml_nn.support.errors import InputError
from openreml_nn.table import Known

__all__ = ["FormulaOptions", "spread"]


@dataclass(frozen=True)
class FormulaOptions:
    """A formula with the options that say how a table is read for it, as those of :func:`lmm`; what
    is None, or empty, is left out."""

    formula: str | None = None
    family: str | Family | None = None
    categorical: tuple[str, ...] = ()
    residual: str | None = None
    weights: str | None = None
    zi: str | None = None

    def completed(self, other: FormulaOptions) -> FormulaOptions:
        """The options, with those of a model in the place of what is left out.

        Raises:
            InputError: if the two say different things.
        """
        for name in (part.name for part in fields(self)):
            own, given = getattr(self, name), getattr(other, name)
            if own and other._meaning(name, own) != other._meaning(name, given):
                what = "formula is" if name == "formula" else f"`{name}` is"
                raise InputError(
                    f"the data module's {what} {_shown(own)} but the model's {_shown(given)}: say "
                    "it to the module alone"
                )
        return replace(other)

    def response(
        self, source: str = "the table", relations: Mapping[str, Known] | None = None
    ) -> EncodedResponse:
        """What makes of a table what the model takes; it has learned nothing yet.

        Args:
            source: what messages call the table.
            relations: see :class:`Encoder`.

        Raises:
            InputError: if there is no formula, or an option is invalid.
        """
        if self.formula is None:
            raise InputError(
                "`formula` is None: expected a formula, or a Trainer that fits a MixedModule of one"
            )
        return EncodedResponse(
            self.formula,
            self.family,
            self.categorical,
            source,
            self.zi,
            residual=self.residual,
            weights=self.weights,
            relations=relations,
        )

    def _meaning(self, name: str, value: Any) -> Any:
        """What an option says beside the others: a formula may be spaced otherwise."""
        if name == "family":
            return value.name if isinstance(value, Family) else value
        return getattr(replace(self, **{name: value}).response().encoder, name)


def _shown(value: Any) -> str:
    return repr(value.name if isinstance(value, Family) else value)


def spread(y: Tensor, has_network: bool) -> float:
    """The variance of a response, which a network starts from.

    Raises:
        InputError: if a network is to learn a response that is the same in all rows.
    """
    rounding = torch.finfo(y.dtype).eps * float(torch.linalg.vector_norm(y))
    found = float(y.var())
    if has_network and not found > rounding**2 / len(y):
        raise InputError("`y` is the same in every row: there is no variance to estimate")
    return found
