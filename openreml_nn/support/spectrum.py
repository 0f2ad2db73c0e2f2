"""Eigenvalues, and errors that say of which matrix they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from openreml_nn.support.errors import NumericalError

__all__ = ["decomposed", "eigenvalues", "named_errors"]


def decomposed(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, m), in ascending order, and eigenvectors (…, m, m) of a symmetric matrix.

    Raises:
        NumericalError: if it has none, as one that holds NaN; the message says what it is.
    """
    with named_errors(matrix, what, "eigenvalues", "they do not converge"):
        values, vectors = torch.linalg.eigh(matrix)
        return _finite(values), vectors


def eigenvalues(matrix: Tensor, what: str) -> Tensor:
    """Those of :func:`decomposed` alone, which takes less time."""
    with named_errors(matrix, what, "eigenvalues", "they do not converge"):
        return _finite(torch.linalg.eigvalsh(matrix))


def _finite(values: Tensor) -> Tensor:
    # Of some sizes a matrix with NaN has eigenvalues that are NaN, and of others it has none.
    if not bool(torch.isfinite(values).all()):
        raise torch.linalg.LinAlgError  # type: ignore[attr-defined]
    return values


@contextmanager
def named_errors(matrix: Tensor, what: str, lacks: str, otherwise: str) -> Iterator[None]:
    """Say of which matrix an error of torch is.

    Args:
        matrix: of which something is computed in this context.
        what: the matrix in the message.
        lacks: what it does not have where torch fails.
        otherwise: why, where all its numbers are finite.

    Raises:
        NumericalError: in the place of torch's error.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        finite = bool(torch.isfinite(matrix).all())
        why = otherwise if finite else "it holds numbers that are not finite"
        raise NumericalError(f"{what} has no {lacks}: {why}") from error
