"""Systems of linear equations, with errors that say of which matrix they are."""

from __future__ import annotations

import torch
from torch import Tensor

from openreml_nn.support.spectrum import named_errors

__all__ = ["invert_named", "solve_named"]


def solve_named(matrix: Tensor, right: Tensor, what: str) -> Tensor:
    """The solution X of A X = B.

    Args:
        matrix: A, (…, m, m).
        right: B, (…, m, k) or (m,).
        what: A in the message of an error.

    Raises:
        NumericalError: if A is singular, or holds numbers that are not finite.
    """
    with named_errors(matrix, what, "inverse", "it is singular"):
        _check_finite(matrix)
        return torch.linalg.solve(matrix, right)


def invert_named(
    matrix: Tensor, what: str, pseudo: bool = False, rtol: float | None = None
) -> Tensor:
    """The inverse of A, or its Moore-Penrose inverse, (…, m, m).

    Args:
        matrix: A, (…, m, m).
        what: A in the message of an error.
        pseudo: whether A is symmetric and may be singular: directions of eigenvalues below ``rtol``
            times the largest one are left out.
        rtol: for ``pseudo``; by default torch's, m times the rounding of a number.

    Raises:
        NumericalError: if A is singular and ``pseudo`` is not set, or holds numbers that are not finite.
    """
    with named_errors(matrix, what, "inverse", "it is singular"):
        _check_finite(matrix)
        if pseudo:
            return torch.linalg.pinv(matrix, rtol=rtol, hermitian=True)
        return torch.linalg.inv(matrix)


def _check_finite(matrix: Tensor) -> None:
    # torch yields NaN for a matrix with NaN, or fails, as it is of one size or another.
    if not bool(torch.isfinite(matrix).all()):
        raise torch.linalg.LinAlgError  # type: ignore[attr-defined]
