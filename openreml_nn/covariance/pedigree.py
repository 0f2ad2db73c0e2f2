"""Relationship through a pedigree, by its sparse inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance.ancestry import (
    inbreeding_of,
    parents_first,
    pass_down,
    quaas_inverse,
    relate,
    sampling_variances,
)
from openreml_nn.covariance.relationship import Relationship, check_column, name_of
from openreml_nn.support.checks import check_flag, check_names, check_number
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = ["Pedigree"]

#: Columns of A that are computed at a time.
_COLUMNS = 256


@dataclass(frozen=True)
class Pedigree(Relationship):
    r"""Animals with the inverse of their additive relationship matrix A.

    Attributes:
        levels: names of the animals, parents before their offspring.
        inverse: :math:`A^{-1}`, (n, n), a sparse tensor of float64.
        inbreeding: (n,) coefficients of inbreeding, :math:`A_{ii} - 1`.
        parents: (n, 2) positions of sire and dam among the levels, -1 for one that is unknown, and
            n + k for one of the k-th group.
        groups: names of the groups of unknown parents.
    """

    inbreeding: Tensor
    parents: Tensor
    groups: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        animal: Sequence[Any],
        sire: Sequence[Any],
        dam: Sequence[Any],
        groups: Sequence[str] = (),
        hermaphrodite: bool | None = None,
    ) -> Pedigree:
        """From a pedigree table, by Henderson's rules with inbreeding.

        The rows may come in any order. A parent without a row of its own is a
        founder. Missing values, 0 and empty strings are unknown parents.

        Args:
            animal, sire, dam: names, as many of each.
            groups: names in ``sire`` and ``dam`` that are no animals but stand for unknown parents
                of one origin (phantom parents), as unrelated and not inbred as other unknown ones
                but of a mean of their own: see :attr:`contributions` and :meth:`grouped`.
            hermaphrodite: whether one may be a sire and a dam, as plants are: otherwise that is an
                error, where nothing is said a warning; not so where a row has one parent twice.

        Raises:
            InputError: if the lengths differ, an animal stands in two rows, has
                no name, is its own ancestor, or has completely inbred parents; if a group has a
                row, or is nobody's parent; if an animal is a sire and a dam with ``hermaphrodite=False``.

        Warns:
            UserWarning: of an animal that is a sire and a dam, where nothing is said.

        Reference:
            Henderson, Biometrics 32 (1976) 69; inbreeding by Meuwissen and
            Luo, Genetics Selection Evolution 24 (1992) 305; groups by Quaas, Journal of Dairy
            Science 71 (1988) 1338.

        >>> found = Pedigree.of(["c", "d"], ["a", "a"], ["b", "c"])
        >>> found.levels
        ('a', 'b', 'c', 'd')
        >>> found.inbreeding
        tensor([0.0000, 0.0000, 0.0000, 0.2500], dtype=torch.float64)
        """
        for name, column in (("animal", animal), ("sire", sire), ("dam", dam)):
            check_column(name, column)
        if not len(animal) == len(sire) == len(dam):
            raise InputError(
                f"`animal`, `sire` and `dam` have {len(animal)}, {len(sire)} and {len(dam)} "
                "entries: expected as many"
            )
        names, sires, dams = (list(map(name_of, column)) for column in (animal, sire, dam))
        origins = tuple(check_names("groups", groups))
        _check_groups(origins, names, {*sires, *dams})
        said = hermaphrodite is not None and check_flag("hermaphrodite", hermaphrodite)
        if not said and (two := _two_sexes(sires, dams, set(origins))):
            if hermaphrodite is not None:
                raise InputError(two)
            warn(two, UserWarning)
        levels, parents = parents_first(names, sires, dams, origins)
        known = np.where(parents < len(levels), parents, -1)
        inbreeding = inbreeding_of(known)
        sampling = sampling_variances(known, inbreeding)
        _check_sampling(levels, sampling)
        inverse = quaas_inverse(known, sampling, len(levels))
        F, at = torch.from_numpy(inbreeding), torch.from_numpy(parents)
        return cls(tuple(levels), inverse, F, at, origins)

    def _known(self) -> np.ndarray:
        """Positions of parents, -1 for those that are not animals."""
        parents = self.parents.numpy()
        return np.where(parents < len(self.levels), parents, -1)

    @property
    def contributions(self) -> pd.DataFrame:
        r"""The share Q (n, groups) of each animal's genes that comes from each group.

        Breeding values are :math:`Qg + u` with :math:`u \sim N(0, A\sigma^2)`: columns of Q, joined
        to the records, are the fixed effects g of groups. What is missing in a row from 1 comes
        from unknown parents of no group, whose mean is 0.

        Reference:
            Quaas, Journal of Dairy Science 71 (1988) 1338.

        >>> Pedigree.of(["a", "b"], ["G1", "a"], ["G2", "G2"], ["G1", "G2"]).contributions
             G1    G2
        a  0.50  0.50
        b  0.25  0.75
        """
        n, k = len(self.levels), len(self.groups)
        shares = np.zeros((n + k + 1, k))
        shares[n : n + k] = np.eye(k)
        pass_down(self.parents.numpy(), shares)
        return pd.DataFrame(shares[:n], list(self.levels), list(self.groups))

    def grouped(self, variance: float) -> Relationship:
        r"""Animals and groups of random means, whose BLUPs are of whole breeding values :math:`Qg + u`.

        The inverse is that of Quaas, :math:`W^\top D^{-1} W`, in which groups are parents,
        and :math:`1/v` more for each group: :math:`g \sim N(0, v \sigma^2 I)`. As v grows the
        estimates go to those of groups as fixed effects.

        Args:
            variance: v, the variance of groups over the additive one.

        Raises:
            InputError: if there are no groups, or ``variance`` is not positive.

        >>> found = Pedigree.of(["a"], ["G"], ["G"], ["G"]).grouped(2.0)
        >>> found.levels, found.inverse.to_dense()
        (('a', 'G'), tensor([[ 1.0000, -1.0000],
                [-1.0000,  1.5000]], dtype=torch.float64))
        """
        variance = check_number("variance", variance, above=0.0)
        n, k = len(self.levels), len(self.groups)
        if not k:
            raise InputError("the pedigree has no groups: expected `groups` in Pedigree.of")
        inverse = quaas_inverse(
            self.parents.numpy(), sampling_variances(self._known(), self.inbreeding.numpy()), n + k
        )
        at = torch.arange(n, n + k)
        own = torch.full((k,), 1 / variance, dtype=inverse.dtype)
        own = torch.sparse_coo_tensor(
            torch.stack([at, at]), own, (n + k, n + k), check_invariants=True
        )
        return Relationship(self.levels + self.groups, (inverse + own).coalesce())

    def relationship(self, animals: Sequence[Any] | None = None) -> pd.DataFrame:
        """A among some animals, all by default, without the matrix of all.

        Raises:
            InputError: if one is not in the pedigree.

        Reference:
            Colleau, Genetics Selection Evolution 34 (2002) 409.

        >>> Pedigree.of(["c"], ["a"], ["b"]).relationship(["c", "a"])
             c    a
        c  1.0  0.5
        a  0.5  1.0
        """
        at, names = np.arange(len(self.levels)), self.levels
        if animals is not None:
            at = self.positions(animals)
            names = tuple(self.levels[i] for i in at)
        parents, sampling = (
            self._known(),
            sampling_variances(self._known(), self.inbreeding.numpy()),
        )
        found = np.empty((len(at), len(at)))
        for first in range(0, len(at), _COLUMNS):
            some = at[first : first + _COLUMNS]
            x = np.zeros((len(self.levels), len(some)))
            x[some, np.arange(len(some))] = 1.0
            relate(parents, sampling, x)
            found[:, first : first + _COLUMNS] = x[at]
        return pd.DataFrame((found + found.T) / 2, list(names), list(names))

    def dominance(self) -> pd.DataFrame:
        r"""Dominance relationships :math:`D_{ij} = (A_{ss'}A_{dd'} + A_{sd'}A_{ds'})/4`, ones on the
        diagonal, by the relationships of the sires s, s' and dams d, d' of i and j.

        Raises:
            InputError: if an animal is inbred, for which that does not hold.

        Reference:
            Cockerham, Genetics 39 (1954) 859.

        >>> found = Pedigree.of(["c", "d"], ["a", "a"], ["b", "b"])
        >>> float(found.dominance().loc["c", "d"])
        0.25
        """
        inbred = self.inbreeding.numpy() > 0
        if inbred.any():
            name = self.levels[int(inbred.argmax())]
            raise InputError(
                f"`animal` {name!r} is inbred: dominance relationships by a pedigree are of "
                "animals that are not; take those by markers"
            )
        n, known = len(self.levels), self._known()
        A = np.zeros((n + 1, n + 1))  # the last for unknown parents
        A[:n, :n] = self.relationship().to_numpy()
        s, d = known.T
        across = A[np.ix_(s, d)]
        D = (A[np.ix_(s, s)] * A[np.ix_(d, d)] + across * across.T) / 4
        np.fill_diagonal(D, 1.0)
        return pd.DataFrame(D, list(self.levels), list(self.levels))


def _check_sampling(levels: Sequence[str], sampling: np.ndarray) -> None:
    if sampling.min() < np.finfo(float).eps:
        raise InputError(
            f"the parents of `animal` {levels[int(sampling.argmin())]!r} are completely inbred: it "
            "has no variance of its own, and the relationship matrix has no inverse"
        )


def _check_groups(
    groups: tuple[str, ...], names: list[str | None], parents: set[str | None]
) -> None:
    for row, name in enumerate(names, 1):
        if name is not None and name in groups:
            raise InputError(
                f"`groups` has {name!r}, which is an `animal` in row {row}: expected names of "
                "unknown parents, which have no row"
            )
    if len(set(groups)) < len(groups):
        twice = next(name for name in groups if groups.count(name) > 1)
        raise InputError(f"`groups` has {twice!r} twice: expected each name once")
    for name in groups:
        if name not in parents:
            raise InputError(f"`groups` has {name!r}, which is no `sire` or `dam`: leave it out")


def _two_sexes(sires: list[str | None], dams: list[str | None], groups: set[str]) -> str:
    """What is to be said of the first animal of two sexes; nothing where there is none, or the
    pedigree is one of plants that self."""
    fathers = {name: row for row, name in reversed(list(enumerate(sires, 1))) if name is not None}
    of_both = [(row, name) for row, name in enumerate(dams, 1) if name in fathers.keys() - groups]
    selfs = any(
        s is not None and s == d for s, d in zip(sires, dams, strict=True) if s not in groups
    )
    if not of_both or selfs:
        return ""
    row, name = of_both[0]
    return (
        f"{name!r} is a `sire` in row {fathers[name]} and a `dam` in row {row}: expected one sex of "
        "an animal; correct the pedigree, or say `hermaphrodite=True` of plants"
    )
