"""Systems of linear equations, with errors that say of what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from openreml_nn.support.errors import NumericalError

__all__ = ["inverted", "solved"]


def solved(matrix: Tensor, right: Tensor, what: str) -> Tensor:
    """The solution X of A X = B.

    Args:
        matrix: A, (…, m, m).
        right: B, (…, m, k) or (m,).
        what: A in the message of an error.

    Raises:
        NumericalError: if A is singular.
    """
    with _named(matrix, what):
        return torch.linalg.solve(matrix, right)


def inverted(matrix: Tensor, what: str, pseudo: bool = False, rtol: float | None = None) -> Tensor:
    """The inverse of a matrix, (…, m, m).

    Args:
        matrix: that is inverted.
        what: the matrix in the message of an error.
        pseudo: whether the matrix is symmetric and may be singular: directions of eigenvalues below
            ``rtol`` times the largest one are left out.
        rtol: for ``pseudo``; torch's default else.

    Raises:
        NumericalError: if it is singular, or with ``pseudo`` has no eigenvalues.
    """
    with _named(matrix, what):
        if pseudo:
            found = torch.linalg.pinv(matrix, rtol=rtol, hermitian=True)
            # Of some sizes a matrix with NaN has a pseudo-inverse of NaN, and of others none.
            if not bool(torch.isfinite(found).all()):
                raise torch.linalg.LinAlgError  # type: ignore[attr-defined]
            return found
        return torch.linalg.inv(matrix)


@contextmanager
def _named(matrix: Tensor, what: str) -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        finite = bool(torch.isfinite(matrix).all())
        why = "it is singular" if finite else "it holds numbers that are not finite"
        raise NumericalError(f"{what} has no inverse: {why}") from error
