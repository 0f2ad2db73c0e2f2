"""Matrices given entry by entry over a triangle."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2
from openreml_nn.support.checks import check_count
from openreml_nn.terms.covariance import RepeatedCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.term import Term

__all__ = ["LowerTriangularMatrix", "UnconstrainedMatrix", "UnstructuredMatrix"]


def _triangle(n: int, m: int) -> list[tuple[int, int]]:
    """Positions (i, j) with i >= j of an (n, m) matrix, row by row."""
    return [(i, j) for i in range(n) for j in range(min(i + 1, m))]


@cache
def _places(n: int, m: int) -> np.ndarray:
    """Which value of the triangle each entry is, row by row; the last, a zero, above the diagonal."""
    places = _triangle(n, m)
    found = np.full((n, m), len(places))
    for value, place in enumerate(places):
        found[place] = value
    return found.reshape(-1)


class _Entries(Matrix):
    """A matrix whose parameters are its entries over the lower triangle."""

    def _index(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the entries."""
        rows, columns = torch.tril_indices(*self.shape, device=like.device)
        return rows, columns

    def _place(self, values: Tensor) -> Tensor:
        """The lower-triangular matrix with ``values`` (…, num_params) row by row."""
        n, m = self.shape
        padded = torch.cat([values, values.new_zeros(*values.shape[:-1], 1)], -1)
        found = padded.index_select(-1, torch.from_numpy(_places(n, m)).to(values.device))
        return found.reshape(*values.shape[:-1], n, m)

    def _start(self, diagonal: Tensor) -> bool:
        done = []
        for (i, j), name in zip(_triangle(*self.shape), self.param_names, strict=True):
            moved = self.set_start(name, diagonal[i] if i == j else torch.zeros_like(diagonal[i]))
            done.append(moved or i != j)
        return all(done)

    def _unit(self, free_params: FreeParams) -> Tensor:
        """Derivatives of the placed matrix by each entry, (num_params, n, m)."""
        like = self.flat_params(free_params)
        return self._place(torch.eye(self.num_params, dtype=like.dtype, device=like.device))


class LowerTriangularMatrix(_Entries):
    r"""Free lower-triangular matrix.

    ========= ========= =======
    parameter transform default
    ========= ========= =======
    ``L_i_j`` identity  1
    ========= ========= =======

    for i ≥ j, row by row.

    Args:
        n: number of rows.
        m: number of columns.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, m).

    Raises:
        TypeError, InputError: if a size is no whole number of 1 or more, or a specification is
            invalid.

    >>> LowerTriangularMatrix(2, 2)(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 0.],
            [2., 3.]])
    """

    def __init__(self, n: int, m: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n, m = check_count("n", n, 1), check_count("m", m, 1)
        names = [f"L_{i}_{j}" for i, j in _triangle(n, m)]
        super().__init__((n, m), merge_specs(free_specs(names, default=1.0), param_specs))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return self._place(self.build_params(free_params))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        rows, columns = self._index(self.flat_params(free_params))
        return self.entries_grad([rows * self.shape[1] + columns], free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        return self.free_vjp(cotangent[self._index(cotangent)], free_params)


class UnconstrainedMatrix(_Entries):
    r"""Free symmetric matrix by its entries; *not* necessarily positive definite.

    =============== ====================================== =======
    parameter       transform                              default
    =============== ====================================== =======
    ``sigma^2_i_j`` :math:`e^{2x}` for i = j, identity off 0
    =============== ====================================== =======

    for i ≥ j, row by row, mirrored above the diagonal. For a covariance that
    stays positive definite use :class:`UnstructuredMatrix`.

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    >>> UnconstrainedMatrix(2)(torch.tensor([0.0, 0.5, 0.5]))
    tensor([[1.0000, 0.5000],
            [0.5000, 2.7183]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        default: dict[str, Any] = {}
        for i, j in _triangle(n, n):
            trans = TransformExpPow2() if i == j else None
            default |= free_specs([f"sigma^2_{i}_{j}"], trans=trans)
        super().__init__((n, n), merge_specs(default, param_specs))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        lower = self._place(self.build_params(free_params))
        return lower + lower.tril(-1).mT

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        rows, columns = self._index(self.flat_params(free_params))
        n = self.shape[0]
        return self.entries_grad([rows * n + columns, columns * n + rows], free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        folded = cotangent + cotangent.triu(1).mT
        return self.free_vjp(folded[self._index(folded)], free_params)

    def structure(self) -> list[Term]:
        whole = RepeatedCovariance(self())
        return [Term(IdentityDesign(self.shape[0]), whole)]

    def moment_start(self, variance: Tensor) -> bool:
        return self._start(variance)


class UnstructuredMatrix(_Entries):
    r"""Positive-definite covariance :math:`\Sigma = L L^\top` by its Cholesky factor.

    The default for correlated random effects.

    ========= ==================================== =======
    parameter transform                            default
    ========= ==================================== =======
    ``L_i_j`` :math:`e^x` for i = j, identity off  0
    ========= ==================================== =======

    for i ≥ j, row by row, so that the default is the identity matrix.

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    Reference:
        Pinheiro and Bates, Unconstrained parametrizations for
        variance-covariance matrices, Statistics and Computing 6 (1996), 2.2.

    >>> UnstructuredMatrix(2)(torch.tensor([0.0, 0.5, 0.0]))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.2500]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        default: dict[str, Any] = {}
        for i, j in _triangle(n, n):
            default |= free_specs([f"L_{i}_{j}"], trans=TransformExp(degree=1) if i == j else None)
        super().__init__((n, n), merge_specs(default, param_specs))

    def factor(self, free_params: FreeParams = None) -> Tensor:
        """The Cholesky factor :math:`L`."""
        return self._place(self.build_params(free_params))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        lower = self.factor(free_params)
        return lower @ lower.mT

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        half = self._unit(free_params) @ self.factor(free_params).mT
        return self.free_grad(half + half.mT, free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        pulled = (cotangent + cotangent.mT) @ self.factor(free_params)
        return self.free_vjp(pulled[self._index(pulled)], free_params)

    def structure(self) -> list[Term]:
        lower = self.factor()
        whole = RepeatedCovariance(lower @ lower.mT, 1, lower)
        return [Term(IdentityDesign(self.shape[0]), whole)]

    def moment_start(self, variance: Tensor) -> bool:
        return self._start(variance.sqrt())

    def canonical(self, coordinates: dict[str, float]) -> dict[str, float]:
        # The sign of a column of L is arbitrary: where that of the diagonal is folded, all of it is.
        found, names = dict(coordinates), self.param_names
        turned = {name for name, u in coordinates.items() if self._is_turned(name, u)}
        for (i, j), name in zip(_triangle(*self.shape), names, strict=True):
            if i > j and name in found and names[j * (j + 3) // 2] in turned:
                found[name] = -found[name]
        return super().canonical(found)

    def _is_turned(self, name: str, u: float) -> bool:
        """Whether the value of a parameter has the other sign once its coordinate is folded."""
        trans = self.own_trans[name]
        both = torch.tensor([u, trans.fold(u)], dtype=torch.float64)
        one, other = trans.at_coordinate(both).sign().tolist()
        return bool(one * other < 0)
