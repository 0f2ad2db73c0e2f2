"""The fixed part of a model: checked, of full rank and well conditioned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from openreml_nn.support.checks import is_finite
from openreml_nn.support.errors import InputError
from openreml_nn.support.modes import outside_inference
from openreml_nn.support.warning import warn

__all__ = [
    "FixedPart",
    "aliased_columns",
    "check_data",
    "check_shapes",
    "estimable",
    "null_space",
    "traced",
]

#: A row this near to the row space of X, beside the sizes of its entries, lies in it.
_ESTIMABLE = 1e-6


def traced(*tensors: Tensor | None) -> bool:
    """Whether a ``torch.func`` transform runs on one of them."""
    if not torch._C._are_functorch_transforms_active():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(isinstance(t, Tensor) and wrapped(t) for t in tensors)


def check_data(y: Tensor, X: Tensor) -> None:
    """Raise an error that says what is wrong with a response or a model matrix.

    Raises:
        TypeError: if ``y`` or ``X`` is not a floating-point tensor or the dtypes differ.
        InputError: if shapes or devices do not fit, a value is not finite, or n ≤ p.
    """
    check_shapes(y, X)
    for name, value in (("y", y), ("X", X)):
        if value.is_meta:
            raise InputError(f"`{name}` is on the meta device: expected a tensor that holds values")
        if value.numel() and not is_finite(value):
            row = int((~torch.isfinite(value)).reshape(len(y), -1).any(1).nonzero()[0])
            raise InputError(f"`{name}` is not finite in row {row}")


def check_shapes(y: Tensor, X: Tensor) -> None:
    """What :func:`check_data` checks, but for the values."""
    for name, value, dim, shape in (("y", y, 1, "(n,)"), ("X", X, 2, "(n, p)")):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`{name}` is {got}: expected a floating-point tensor")
        if value.dim() != dim:
            raise InputError(f"`{name}` has shape {tuple(value.shape)}: expected {shape}")
    if y.dtype != X.dtype:
        raise TypeError(
            f"`y` is {y.dtype} but `X` is {X.dtype}: expected one dtype, convert one of them"
        )
    if y.device != X.device:
        raise InputError(f"`y` is on {y.device} but `X` on {X.device}: move one of them")
    if y.shape[0] != X.shape[0]:
        raise InputError(f"`y` has {y.shape[0]} rows but `X` has {X.shape[0]}: expected as many")
    if y.shape[0] <= X.shape[1]:
        raise InputError(
            f"there are {y.shape[0]} rows for {X.shape[1]} fixed effects: more rows are needed"
        )


def aliased_columns(R: Tensor, tolerance: float = 1e-7) -> list[int]:
    """Columns that are linear combinations of columns before them.

    A column counts as aliased when less than ``tolerance`` of its length is
    left after projection on the columns kept so far (Gram-Schmidt, twice).

    Args:
        R: (p, p) triangular factor of the model matrix.
        tolerance: relative to the length of the column.
    """
    kept = R.new_zeros(R.shape[0], 0)
    aliased = []
    for j in range(R.shape[1]):
        length = torch.linalg.vector_norm(R[:, j])
        rest = R[:, j]
        for _ in range(2):
            rest = rest - kept @ (kept.mT @ rest)
        left = torch.linalg.vector_norm(rest)
        if bool(left <= tolerance * length):
            aliased.append(j)
        else:
            kept = torch.cat([kept, (rest / left)[:, None]], 1)
    return aliased


def null_space(R: Tensor, columns: Sequence[int]) -> Tensor:
    """The null space of a matrix by its triangular factor.

    Args:
        R: (a, a) triangular factor of X, or any root of X'X.
        columns: independent columns of which all others are combinations.

    Returns:
        (a, d), a column for each other: 1 at its own place, minus what it is of the independent
        ones at theirs; coefficients that are rounding are zero.
    """
    others = [j for j in range(R.shape[1]) if j not in columns]
    found = R.new_zeros(R.shape[1], len(others))
    if not others:
        return found
    kept, size = list(columns), torch.linalg.vector_norm(R, dim=0)
    if kept:
        unit, target = R[:, kept] / size[kept], R[:, others]
        parts = torch.linalg.lstsq(unit, target, driver="gels").solution
        parts = torch.where(parts.abs() > 1e-9 * size[others], parts, 0)
        found[kept] = -parts / size[kept, None]
    found[others, range(len(others))] = 1
    return found


def estimable(rows: Tensor, aliases: Tensor) -> Tensor:
    r"""Whether the data say what :math:`x^\top\beta` is, for rows x of a model matrix.

    It is so where x is a combination of rows of X, and so orthogonal to its null space.

    Args:
        rows: (m, a), aliased columns included.
        aliases: (a, d) as in :class:`FixedPart`; columns of zeros say nothing.

    Returns:
        (m,) booleans.

    Reference:
        Searle, Linear Models (1971), section 5.4.

    >>> estimable(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[-1.0], [1.0]]))
    tensor([ True, False])
    """
    N = aliases.to(rows)
    return ((rows @ N).abs() <= _ESTIMABLE * (rows.abs() @ N.abs())).all(1)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What there is of no coefficients: a matrix and a vector without entries."""
    with outside_inference(recording=False):
        none = torch.zeros(0, 0, dtype=dtype, device=device)
        return none, none.reshape(0)


@dataclass(frozen=True)
class FixedPart:
    r"""The likelihood is invariant to :math:`y - Xb` and, up to a constant, to :math:`XT`.

    So it is computed from least-squares residuals and orthonormal columns,
    whose cross-products lose no digits whatever the units. T and b are
    constants: derivatives with respect to y and X are those of the original.

    Attributes:
        y: (n,) residuals :math:`y - X b`.
        Q: (n, p) orthonormal columns :math:`X T`.
        T: (p, p) upper triangular.
        offset: (p,) the least-squares coefficients b.
        columns: the columns of X that were kept.
        aliases: (a, d) the null space of X with all its a columns, a column for each that was
            dropped: 1 at its own place, minus what it is of the kept ones at theirs.
    """

    y: Tensor
    Q: Tensor
    T: Tensor
    offset: Tensor
    columns: list[int]
    aliases: Tensor

    @classmethod
    def of(cls, y: Tensor, X: Tensor, names: Sequence[str] | None = None) -> FixedPart:
        """Drop aliased columns with a warning that names them, and orthonormalise the rest."""
        if not X.shape[1]:
            none, offset = _nothing(X.dtype, X.device)
            return cls(y, X, none, offset, [], none)
        with torch.no_grad():
            Q, R = torch.linalg.qr(X.detach())
        aliased = aliased_columns(R)
        columns = [j for j in range(X.shape[1]) if j not in aliased]
        aliases = null_space(R, columns)
        if aliased:
            named = [names[j] if names else f"column {j}" for j in aliased]
            warn(f"the fixed-effect model matrix is rank deficient: dropped {', '.join(named)}")
            X = X[:, columns]
            with torch.no_grad():
                Q, R = torch.linalg.qr(X.detach())
        with torch.no_grad():
            eye = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
            T = torch.linalg.solve_triangular(R, eye, upper=True)
            offset = T @ (Q.mT @ y.detach())
        if X.requires_grad:
            Q = X @ T
        return cls(y - X @ offset, Q, T, offset, columns, aliases)

    @classmethod
    def plain(cls, y: Tensor, X: Tensor) -> FixedPart:
        """As it is: for ``torch.func`` transforms, under which values cannot be looked at."""
        eye = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
        none = X.new_zeros(X.shape[1], 0)
        return cls(y, X, eye, X.new_zeros(X.shape[1]), list(range(X.shape[1])), none)

    def detach(self) -> FixedPart:
        """The numbers of the fixed part without their graph."""
        if not (self.y.requires_grad or self.Q.requires_grad):
            return self
        Q = self.Q.detach() if self.Q.requires_grad else self.Q
        return replace(self, y=self.y.detach(), Q=Q)

    @property
    def log_det(self) -> Tensor:
        r""":math:`\log|\det T|`."""
        return self.T.diagonal().abs().log().sum()

    def coefficients(self, gamma: Tensor) -> Tensor:
        r"""From coefficients of Q to those of the kept columns of X."""
        return self.T @ gamma + self.offset
