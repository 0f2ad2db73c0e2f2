"""Relationship through a pedigree, by its sparse inverse."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance.dummy import DummyMatrix
from openreml_nn.covariance.kernel import check_symmetric
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExpPow2
from openreml_nn.support.checks import found
from openreml_nn.support.compilation import compiled
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import ScaledCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.kernel import Kernel, same_content
from openreml_nn.terms.term import Term

__all__ = ["KnownInverseMatrix", "Pedigree"]


@dataclass(frozen=True)
class Pedigree:
    r"""Animals with the inverse of their additive relationship matrix A.

    Attributes:
        levels: names of the animals, parents before their offspring.
        inverse: :math:`A^{-1}`, (n, n), a sparse tensor of float64.
        inbreeding: (n,) coefficients of inbreeding, :math:`A_{ii} - 1`.
    """

    levels: tuple[str, ...]
    inverse: Tensor
    inbreeding: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The animals, which are the levels of a random effect."""
        return self.levels

    @classmethod
    def of(cls, animal: Sequence[Any], sire: Sequence[Any], dam: Sequence[Any]) -> Pedigree:
        """From a pedigree table, by Henderson's rules with inbreeding.

        The rows may come in any order. A parent without a row of its own is a
        founder. Missing values, 0 and empty strings are unknown parents.

        Raises:
            InputError: if the lengths differ, an animal stands in two rows, has
                no name, is its own ancestor, or has completely inbred parents.

        Warns:
            UserWarning: of an animal that is a sire and a dam, as plants may be.

        Reference:
            Henderson, Biometrics 32 (1976) 69; inbreeding by Meuwissen and
            Luo, Genetics Selection Evolution 24 (1992) 305.

        >>> found = Pedigree.of(["c", "d"], ["a", "a"], ["b", "c"])
        >>> found.levels
        ('a', 'b', 'c', 'd')
        >>> found.inbreeding
        tensor([0.0000, 0.0000, 0.0000, 0.2500], dtype=torch.float64)
        """
        for name, column in (("animal", animal), ("sire", sire), ("dam", dam)):
            _check_column(name, column)
        if not len(animal) == len(sire) == len(dam):
            raise InputError(
                f"`animal`, `sire` and `dam` have {len(animal)}, {len(sire)} and {len(dam)} "
                "entries: expected as many"
            )
        names, sires, dams = (list(map(_name, column)) for column in (animal, sire, dam))
        _check_sexes(sires, dams)
        levels, parents = _ordered(names, sires, dams)
        inbreeding = _inbreeding(parents)
        sampling = _mendelian(parents, inbreeding)
        if len(sampling) and sampling.min() < np.finfo(float).eps:
            name = levels[int(sampling.argmin())]
            raise InputError(
                f"the parents of `animal` {name!r} are completely inbred: it has no variance of "
                "its own, and the relationship matrix has no inverse"
            )
        inverse = _henderson(parents, sampling)
        return cls(tuple(levels), inverse, torch.from_numpy(inbreeding))

    def design(self, animal: Sequence[Any]) -> DummyMatrix:
        """The design of records of animals, with columns in the order of ``levels``.

        Raises:
            InputError: if an animal is not in the pedigree.

        >>> Pedigree.of(["c"], ["b"], ["a"]).design(["c", "b"])()
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
        """
        _check_column("animal", animal)
        position = {name: i for i, name in enumerate(self.levels)}
        codes = []
        for row, value in enumerate(animal):
            name = _name(value)
            if name not in position:
                raise InputError(f"`animal` {value!r} in row {row} is not in the pedigree")
            codes.append(position[name])
        return DummyMatrix.from_codes(torch.tensor(codes), self.levels)


def _check_column(name: str, column: object) -> None:
    if isinstance(column, str | bytes | Mapping) or not hasattr(column, "__len__"):
        raise TypeError(f"`{name}` is {found(column)}: expected a sequence of names")
    if getattr(column, "ndim", 1) != 1 or isinstance(column, set):
        raise InputError(f"`{name}` is {found(column)}: expected a sequence of names")
    if not len(column):
        raise InputError(f"`{name}` is empty: expected a name for each row")


def _name(value: Any) -> str | None:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return None if str(value) in ("", "0") else str(value)


def _check_sexes(sires: list[str | None], dams: list[str | None]) -> None:
    """Warn of the first animal of two sexes, unless the pedigree is one of plants that self."""
    fathers = {name: row for row, name in reversed(list(enumerate(sires))) if name is not None}
    of_both = [(row, name) for row, name in enumerate(dams) if name in fathers]
    if of_both and not any(s is not None and s == d for s, d in zip(sires, dams, strict=True)):
        row, name = of_both[0]
        warnings.warn(
            f"{name!r} is a `sire` in row {fathers[name]} and a `dam` in row {row}: "
            "expected one sex of an animal; correct the pedigree unless it is of plants",
            UserWarning,
            stacklevel=3,
        )


def _ordered(
    names: list[str | None], sires: list[str | None], dams: list[str | None]
) -> tuple[list[str], np.ndarray]:
    """Animals with parents first, and the positions of their parents, -1 if unknown, (n, 2)."""
    known: dict[str, tuple[str | None, str | None]] = {}
    for row, (name, sire, dam) in enumerate(zip(names, sires, dams, strict=True)):
        if name is None:
            raise InputError(f"`animal` has no name in row {row}")
        if name in known:
            raise InputError(f"`animal` {name!r} stands in two rows, the second is row {row}")
        known[name] = (sire, dam)
    for parent in (*sires, *dams):
        if parent is not None:
            known.setdefault(parent, (None, None))
    position: dict[str, int] = {}
    visiting: set[str] = set()
    for first in sorted(known, key=lambda name: known[name] != (None, None)):
        stack = [first]
        while stack:
            name = stack[-1]
            if name in position:
                stack.pop()
                continue
            waiting = [p for p in known[name] if p is not None and p not in position]
            if not waiting:
                position[name] = len(position)
                visiting.discard(name)
                stack.pop()
                continue
            visiting.add(name)
            for parent in waiting:
                if parent in visiting:
                    raise InputError(f"`animal` {parent!r} is its own ancestor")
            stack += waiting
    parents = np.full((len(position), 2), -1, dtype=np.int64)
    for name, i in position.items():
        for side, parent in enumerate(known[name]):
            if parent is not None:
                parents[i, side] = position[parent]
    return list(position), parents


@compiled
def _inbreeding(parents):  # type: ignore[no-untyped-def]
    """By tracing each animal's ancestors from the youngest to the oldest.

    Args:
        parents: (n, 2) positions of the parents, before that of the animal; -1 if unknown.
    """
    n = len(parents)
    F, variance, weight = np.zeros(n), np.ones(n), np.zeros(n)
    for i in range(n):
        queue = [0]  # of what type it is
        queue.clear()
        for parent in parents[i]:
            if parent >= 0:
                variance[i] -= 0.25 * (1 + F[parent])
                if weight[parent] == 0:
                    heappush(queue, -parent)
                weight[parent] += 0.5
        if min(parents[i]) < 0:
            for parent in parents[i]:
                if parent >= 0:
                    weight[parent] = 0
            continue  # an unknown parent: not inbred
        total = 0.0
        while len(queue) > 0:
            j = -heappop(queue)
            w = weight[j]
            weight[j] = 0
            total += w * w * variance[j]
            for parent in parents[j]:
                if parent >= 0:
                    if weight[parent] == 0:
                        heappush(queue, -parent)
                    weight[parent] += w / 2
        # The path of the animal itself contributes its own sampling variance.
        F[i] = total + variance[i] - 1
    return F


def _mendelian(parents: np.ndarray, F: np.ndarray) -> np.ndarray:
    """Mendelian sampling variances: 1, 3/4 or 1/2 less a quarter of the parents' inbreeding."""
    return 1.0 - np.where(parents >= 0, 0.25 * (1 + F[parents]), 0.0).sum(1)


def _henderson(parents: np.ndarray, sampling: np.ndarray) -> Tensor:
    n = len(parents)
    at = np.arange(n)
    weight = 1 / sampling
    columns = [
        (at, np.ones(n)),
        (parents[:, 0], -0.5 * np.ones(n)),
        (parents[:, 1], -0.5 * np.ones(n)),
    ]
    rows, cols, values = [], [], []
    for i, a in columns:
        for j, b in columns:
            kept = (i >= 0) & (j >= 0)
            rows.append(i[kept])
            cols.append(j[kept])
            values.append((a * b * weight)[kept])
    index = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(cols)]))
    entries = torch.from_numpy(np.concatenate(values))
    return torch.sparse_coo_tensor(index, entries, (n, n), check_invariants=True).coalesce()


class KnownInverseMatrix(Matrix):
    r"""A matrix known by its sparse inverse, up to a factor: :math:`\sigma^2 (K^{-1})^{-1}`.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    =========== ============== =======

    Calling it forms the dense matrix, which is for small n.

    Args:
        inverse: :math:`K^{-1}`, (n, n), sparse or dense, such as
            :attr:`Pedigree.inverse`.
        null: what the inverse is zero on, (n, k) orthonormal, such as the constant of a random walk:
            K is then its pseudo-inverse, and effects have nothing of it.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: if ``inverse`` is not square, dense and not symmetric, or not zero on ``null``.
        NotPositiveDefiniteError: by calling the matrix, if ``inverse`` is not positive definite.

    >>> pedigree = Pedigree.of(["c"], ["a"], ["b"])
    >>> KnownInverseMatrix(pedigree.inverse)(torch.tensor([0.0])).round(decimals=4).abs()
    tensor([[1.0000, 0.0000, 0.5000],
            [0.0000, 1.0000, 0.5000],
            [0.5000, 0.5000, 1.0000]])
    """

    inverse: Tensor
    null: Tensor | None

    def __init__(
        self,
        inverse: Tensor,
        param_specs: Mapping[str, Any] | None = None,
        null: Tensor | None = None,
    ) -> None:
        if not isinstance(inverse, Tensor) or not inverse.is_floating_point():
            got = inverse.dtype if isinstance(inverse, Tensor) else found(inverse)
            raise TypeError(f"`inverse` is {got}: expected a floating-point tensor")
        if inverse.dim() != 2 or inverse.shape[0] != inverse.shape[1] or not len(inverse):
            raise InputError(f"`inverse` has shape {tuple(inverse.shape)}: expected (n, n)")
        if inverse.layout == torch.strided:
            check_symmetric("inverse", inverse)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        super().__init__(tuple(inverse.shape), merge_specs(default, param_specs))
        if null is not None:
            _check_null(null, inverse)
        self.register_data("inverse", inverse)
        self.register_data("null", null)
        self._kernel: Kernel | None = None

    @property
    def kernel(self) -> Kernel:
        """K, which depends on no parameter: what is computed of it is kept while that is the same."""
        if self._kernel is None or not same_content(self._kernel.source, self.inverse):
            self._kernel = Kernel(inverse=self.inverse, null=self.null)
        return self._kernel

    def _matrix(self, like: Tensor) -> Tensor:
        return self.kernel.dense().to(like)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance = self.build_params(free_params)
        return variance * self._matrix(variance)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        return self.free_grad(self._matrix(self.flat_params(free_params))[None], free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        pulled = (cotangent * self._matrix(cotangent)).sum().reshape(1)
        return self.free_vjp(pulled, free_params)

    def structure(self) -> list[Term]:
        variance = self.build_params().reshape(1, 1)
        whole = Term(IdentityDesign(self.shape[0]), ScaledCovariance(variance, self.kernel))
        return [whole]

    def moment_start(self, variance: Tensor) -> bool:
        return self.set_start(self.param_names[0], harmonic_mean(variance))


def _check_null(null: Tensor, inverse: Tensor) -> None:
    if not isinstance(null, Tensor) or null.dtype != inverse.dtype:
        got = null.dtype if isinstance(null, Tensor) else found(null)
        raise TypeError(f"`null` is {got}: expected a tensor of {inverse.dtype}, as `inverse` is")
    n = len(inverse)
    if null.dim() != 2 or len(null) != n or not 0 < null.shape[1] < n:
        raise InputError(f"`null` has shape {tuple(null.shape)}: expected ({n}, k)")
    rounding = 1e4 * torch.finfo(null.dtype).eps
    eye = torch.eye(null.shape[1], dtype=null.dtype, device=null.device)
    if not float((null.mT @ null - eye).abs().max()) < rounding:
        raise InputError(
            "`null` is not orthonormal: expected columns of length one, at right angles"
        )
    left = inverse @ null
    size = inverse.to_dense() if inverse.layout == torch.strided else inverse.coalesce().values()
    if not float(left.abs().max()) < rounding * float(size.abs().max()):
        raise InputError("`null` is not what `inverse` is zero on: their product is not zero")
