"""The family of the response as options of a formula."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from openreml_nn.covariance import ScalarMatrix
from openreml_nn.families import Family, named_family
from openreml_nn.likelihood import LaplaceLoss
from openreml_nn.model.zeros import inflated
from openreml_nn.support.checks import check_count
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoded, Encoder

__all__ = ["FamilyOptions"]


@dataclass(frozen=True)
class FamilyOptions:
    """Of the response, see :func:`glmm`; a Gaussian one without a family."""

    family: str | Family | None = None
    link: str | None = None
    quadrature: int = 1

    @property
    def name(self) -> str | None:
        """Name of the family; None for a Gaussian response."""
        return self.family.name if isinstance(self.family, Family) else self.family

    def check(self, residual: object, method: str | None, solver: str) -> None:
        """Refuse options that do not fit each other, or those beside them.

        Raises:
            InputError: naming the option.
        """
        check_count("quadrature", self.quadrature, 1)
        if self.family is not None:
            own = named_family(self.family, self.link)
            # It refuses what the likelihood does not take.
            LaplaceLoss(ScalarMatrix(1), own, method or "ml", self.quadrature, solver)
            if residual:
                raise InputError(
                    f"`residual` is {described(residual)} beside `family`: expected None, as it is for "
                    "Gaussian responses"
                )
        elif self.link is not None:
            raise InputError(f"`link` is {self.link!r} without a `family`: expected None")
        elif self.quadrature != 1:
            raise InputError(f"`quadrature` is {self.quadrature} without a `family`: expected 1")

    def start(self, encoded: Encoded, encoder: Encoder, levels: int) -> tuple[Family, float, float]:
        """A family near the data, with mean and variance of the linear predictor there.

        Args:
            encoded: the table, maybe without responses.
            encoder: by which it was, which knows of a zero part.
            levels: categories of an ordinal response.
        """
        assert self.family is not None
        own = copy.deepcopy(named_family(self.family, self.link, levels))
        own = inflated(own, encoder).double()
        near = encoded.X.new_tensor([0.0, 1.0])
        if encoded.y is not None:
            near = own.start(own.with_inputs(encoded.y, encoded.zi))
            near = near if encoded.offset is None else near - encoded.offset
        # Without a spread of its own, as of an ordinal response, the link's is near one.
        spread = float(near.var())
        return own, float(near.mean()), spread if spread > 1e-8 else 1.0
