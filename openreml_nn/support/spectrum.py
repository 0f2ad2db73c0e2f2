"""Eigenvalues, with errors that say of what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from openreml_nn.support.errors import NumericalError

__all__ = ["decomposed", "eigenvalues"]


def decomposed(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, m), in ascending order, and eigenvectors (…, m, m) of a symmetric matrix.

    Raises:
        NumericalError: if it has none, as one that holds NaN; the message says what it is.
    """
    with _named(matrix, what):
        values, vectors = torch.linalg.eigh(matrix)
        return _finite(values), vectors


def eigenvalues(matrix: Tensor, what: str) -> Tensor:
    """Those of :func:`decomposed` alone, which takes less time."""
    with _named(matrix, what):
        return _finite(torch.linalg.eigvalsh(matrix))


def _finite(values: Tensor) -> Tensor:
    # Of some sizes a matrix with NaN has eigenvalues that are NaN, and of others it has none.
    if not bool(torch.isfinite(values).all()):
        raise torch.linalg.LinAlgError  # type: ignore[attr-defined]
    return values


@contextmanager
def _named(matrix: Tensor, what: str) -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        finite = bool(torch.isfinite(matrix).all())
        why = "they do not converge" if finite else "it holds numbers that are not finite"
        raise NumericalError(f"{what} has no eigenvalues: {why}") from error
