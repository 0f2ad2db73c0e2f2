"""Levels whose relationship is known by its inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance.dummy import DummyMatrix
from openreml_nn.support.checks import found
from openreml_nn.support.errors import InputError

__all__ = ["Relationship", "check_column", "name_of"]


@dataclass(frozen=True)
class Relationship:
    """Levels with the inverse of the relationship matrix between them.

    A formula takes it as ``vm(animal, K)`` with ``kernels={"K": relationship}``, or as
    ``ped(animal)`` with ``pedigree=relationship``; a tree by :class:`KnownInverseMatrix`.

    Attributes:
        levels: names of the levels, in the order of the matrix.
        inverse: the inverse of the relationship matrix, (n, n), a sparse tensor of float64.
    """

    levels: tuple[str, ...]
    inverse: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The levels of a random effect."""
        return self.levels

    def design(self, animal: Sequence[Any]) -> DummyMatrix:
        """The design of records of animals, with columns in the order of ``levels``.

        Raises:
            InputError: if an animal is not among the levels.

        >>> from openreml_nn.covariance import Pedigree
        >>> Pedigree.of(["c"], ["b"], ["a"]).design(["c", "b"])()
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
        """
        check_column("animal", animal)
        position = {name: i for i, name in enumerate(self.levels)}
        codes = []
        for row, value in enumerate(animal, 1):
            name = name_of(value)
            if name not in position:
                raise InputError(
                    f"`animal` {value!r} in row {row} is not in the pedigree: expected one of its "
                    f"{len(position)} animals; add it there, with unknown parents where need be"
                )
            codes.append(position[name])
        return DummyMatrix.from_codes(torch.tensor(codes), self.levels)

    def positions(self, animals: Sequence[Any]) -> np.ndarray:
        """Positions of animals among the levels.

        Raises:
            InputError: if one is not among them.

        >>> from openreml_nn.covariance import Pedigree
        >>> Pedigree.of(["c"], ["a"], ["b"]).positions(["c", "a"])
        array([2, 0])
        """
        check_column("animals", animals)
        position = {name: i for i, name in enumerate(self.levels)}
        found = [position.get(name_of(animal) or "", -1) for animal in animals]
        if -1 in found:
            raise InputError(
                f"`animals` has {animals[found.index(-1)]!r}, which is not in the pedigree: "
                "expected names that are"
            )
        return np.array(found)


def check_column(name: str, column: object) -> None:
    """Refuse what is no sequence of names.

    Raises:
        TypeError: if it is no sequence, or a string.
        InputError: if it is empty, or has another shape.
    """
    if isinstance(column, str | bytes | Mapping) or not hasattr(column, "__len__"):
        raise TypeError(f"`{name}` is {found(column)}: expected a sequence of names")
    if getattr(column, "ndim", 1) != 1 or isinstance(column, set):
        raise InputError(f"`{name}` is {found(column)}: expected a sequence of names")
    if not len(column):
        raise InputError(f"`{name}` is empty: expected a name for each row")


def name_of(value: Any) -> str | None:
    """The name of an animal as text, whole numbers without decimals; None where it is unknown:
    a missing value, 0 or an empty string."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return None if str(value) in ("", "0") else str(value)
