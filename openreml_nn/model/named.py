"""Matrices by the names that formulas have for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openreml_nn.covariance import (
    AntedependenceMatrix,
    AR1Matrix,
    ARMAMatrix,
    CompoundSymmetricMatrix,
    ContinuousAR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialMatrix,
    GaussianMatrix,
    MaternMatrix,
    Matrix,
    ScalarMatrix,
    SphericalMatrix,
    ToeplitzMatrix,
    UnstructuredMatrix,
    heterogeneous,
)
from openreml_nn.table import Structure

__all__ = ["MATRICES", "distances", "hold_scale", "named_matrix"]

MATRICES: dict[str, Callable[..., Matrix]] = {
    "exponential": ExponentialMatrix,
    "gaussian": GaussianMatrix,
    "matern": MaternMatrix,
    "spherical": SphericalMatrix,
    "car1": ContinuousAR1Matrix,
}
_LAGGED: dict[str, Callable[[int], Matrix]] = {
    "ar1": AR1Matrix,
    "hetar1": AR1Matrix,
    "toep": ToeplitzMatrix,
    "hettoep": ToeplitzMatrix,
    "arma": ARMAMatrix,
}
_OTHER: dict[str, Callable[[int], Matrix]] = {
    "us": UnstructuredMatrix,
    "diag": DiagonalMatrix,
    "idv": ScalarMatrix,
    "cs": CompoundSymmetricMatrix,
    "homcs": CompoundSymmetricMatrix,
    "ante": AntedependenceMatrix,
}


def named_matrix(structure: Structure, k: int, places: Tensor | None) -> Matrix:
    """A structure of k positions; the lags of those in time are differences of their places."""
    if structure.name in MATRICES:
        assert places is not None
        return MATRICES[structure.name](distances(places.double()), **structure.options)
    if structure.name not in _LAGGED:
        return _OTHER[structure.name](k)
    at = torch.arange(k) if places is None else places.reshape(-1)
    size = int(at.max()) + 1
    matrix = _LAGGED[structure.name](size)
    if structure.name.startswith("het"):
        hold_scale(matrix)
    if size > k:
        matrix = CovariancePropagation(z=DummyMatrix.from_codes(at, size), g=matrix)
    return heterogeneous(matrix) if structure.name.startswith("het") else matrix


def hold_scale(matrix: Matrix) -> None:
    """Hold the variance at one, where another matrix has the scale."""
    with torch.no_grad():
        matrix.fix("sigma^2", 0.0)


def distances(coordinates: Tensor) -> Tensor:
    """Distances between places (q, d), (q, q)."""
    return torch.cdist(coordinates, coordinates, compute_mode="donot_use_mm_for_euclid_dist")
