"""The known matrices between levels that a formula names, as users give them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from openreml_nn.covariance import Pedigree, Relationship
from openreml_nn.support.errors import InputError
from openreml_nn.table import Known, read_kernel, read_table

__all__ = ["read_pedigree", "relations_of"]


def relations_of(
    pedigree: Any = None, kernels: Mapping[str, Any] | None = None
) -> dict[str, Known]:
    """The known matrices between levels, as formulas name them.

    Args:
        pedigree: for ``ped(animal)``: a table with the columns animal, sire and dam by name, or in
            this order; its path; or a :class:`Relationship`, such as a :class:`Pedigree`.
        kernels: for ``vm(level, K)``: each matrix by its name, see :func:`read_kernel`; or a
            :class:`Relationship`.

    Raises:
        InputError: if a table is invalid.
    """
    found: dict[str, Known] = {}
    if pedigree is not None:
        found["ped"] = _inverse(read_pedigree(pedigree))
    if kernels is not None and not isinstance(kernels, Mapping):
        raise TypeError(
            f"`kernels` is a {type(kernels).__name__}: expected a mapping of names to matrices"
        )
    for name, value in (kernels or {}).items():
        if name == "ped":
            raise InputError("`kernels` has 'ped', which is the name of the pedigree's matrix")
        is_inverse = isinstance(value, Relationship)
        found[name] = _inverse(value) if is_inverse else read_kernel(name, value)
    return found


def _inverse(relationship: Relationship) -> Known:
    return Known(relationship.names, relationship.inverse, is_inverse=True)


def read_pedigree(
    given: Any,
    groups: Sequence[str] = (),
    group_variance: float = 1.0,
    hermaphrodite: bool | None = None,
) -> Relationship:
    """The relationships of a pedigree as a user gives it.

    Args:
        given: a table with the columns animal, sire and dam by name, or in this order; its path; or
            a :class:`Relationship`, which is taken as it is.
        groups: names of unknown parents of one origin, see :meth:`Pedigree.of`: levels beside the
            animals, of random means, see :meth:`Pedigree.grouped`.
        group_variance: that of such means over the additive one.
        hermaphrodite: whether one may be a sire and a dam, see :meth:`Pedigree.of`.

    Raises:
        TypeError, InputError: if the table is invalid.
    """
    if isinstance(given, Relationship):
        return given
    if isinstance(given, str | os.PathLike):
        given = read_table(given)
    if not isinstance(given, pd.DataFrame):
        raise TypeError(
            f"`pedigree` is a {type(given).__name__}: expected a table with the columns animal, "
            "sire and dam, or its path"
        )
    names = ["animal", "sire", "dam"]
    columns = {str(column).lower(): column for column in given.columns}
    if set(names) <= set(columns):
        given = given[[columns[name] for name in names]]
    elif given.shape[1] != 3 or set(names) & set(columns):
        raise InputError(
            f"`pedigree` has the columns {', '.join(map(str, given.columns[:10]))}: expected "
            "animal, sire and dam"
        )
    animal, sire, dam = (given.iloc[:, i].tolist() for i in range(3))
    found = Pedigree.of(animal, sire, dam, groups, hermaphrodite)
    return found.grouped(group_variance) if groups else found
