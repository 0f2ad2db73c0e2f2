"""The covariance of the rows that a formula and a table say, as a tree of matrices."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import (
    AntedependenceMatrix,
    AR1Matrix,
    ARMAMatrix,
    BlockDiagonal,
    CompoundSymmetricMatrix,
    ContinuousAR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialMatrix,
    GaussianMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    MaternMatrix,
    Matrix,
    Pedigree,
    ScalarMatrix,
    SphericalMatrix,
    Sum,
    ToeplitzMatrix,
    UnstructuredMatrix,
    VarianceFunction,
    factor_analytic,
    heterogeneous,
    heterogeneous_compound_symmetry,
    weighted,
)
from openreml_nn.result.result import Label
from openreml_nn.support.errors import InputError
from openreml_nn.table import (
    Encoded,
    Known,
    Places,
    RandomDesign,
    ResidualDesign,
    Stratum,
    Structure,
    read_kernel,
    read_table,
)

__all__ = [
    "covariance_of",
    "effect_covariance",
    "labels_of",
    "relations_of",
    "residual_covariance",
]


def relations_of(
    pedigree: Any = None, kernels: Mapping[str, Any] | None = None
) -> dict[str, Known]:
    """The known matrices between levels, as formulas name them.

    Args:
        pedigree: for ``ped(animal)``: a table with the columns animal, sire and dam by name, or in
            this order; its path; or a :class:`Pedigree`.
        kernels: for ``vm(level, K)``: each matrix by its name, see :func:`read_kernel`; or a
            :class:`Pedigree`.

    Raises:
        InputError: if a table is at fault.
    """
    found: dict[str, Known] = {}
    if pedigree is not None:
        found["ped"] = _inverse(_pedigree(pedigree))
    if kernels is not None and not isinstance(kernels, Mapping):
        raise TypeError(
            f"`kernels` is a {type(kernels).__name__}: expected a mapping of names to matrices"
        )
    for name, value in (kernels or {}).items():
        if name == "ped":
            raise InputError("`kernels` has 'ped', which is the name of the pedigree's matrix")
        is_pedigree = isinstance(value, Pedigree)
        found[name] = _inverse(value) if is_pedigree else read_kernel(name, value)
    return found


def _inverse(pedigree: Pedigree) -> Known:
    return Known(tuple(pedigree.names), pedigree.inverse, is_inverse=True)


def _pedigree(given: Any) -> Pedigree:
    if isinstance(given, Pedigree):
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
    return Pedigree.of(*(given.iloc[:, i].tolist() for i in range(3)))


# ---------------------------------------------------------------------- random effects


def effect_covariance(design: RandomDesign) -> Matrix:
    r"""The covariance G of a term's effects, level by level, (q k, q k).

    :math:`G = K \otimes \Sigma` with Σ (k, k) among the effects of a level and K (q, q) among the
    levels, the identity by default. A single effect of independent levels has
    :math:`\sigma^2 I`; where both are said, the scale is that of Σ.
    """
    q, k = len(design.levels), len(design.effects)
    if design.relation is None and (k == 1 or (q == 1 and design.structure.name == "idv")):
        return ScalarMatrix(q * k)
    levels = IdentityMatrix(q) if design.relation is None else _among_levels(design.relation)
    if k == 1:
        return levels
    if design.relation is not None:
        _hold_scale(levels)
    return KroneckerProduct(levels=levels, effects=_among_effects(design))


def _among_levels(relation: Known | Places) -> Matrix:
    if isinstance(relation, Places):
        return _KERNELS[relation.structure.name](
            _distances(relation.coordinates), **relation.structure.options
        )
    if relation.is_inverse:
        return KnownInverseMatrix(relation.matrix)
    return KnownMatrix(relation.matrix)


def _among_effects(design: RandomDesign) -> Matrix:
    name, k = design.structure.name, len(design.effects)
    if name == "fa":
        return factor_analytic(k, int(design.structure.options["factors"]))
    if name == "cs":
        return heterogeneous_compound_symmetry(k)
    lags = None if design.places is None else torch.tensor(design.places)
    return _by_name(design.structure, k, lags)


_KERNELS: dict[str, Callable[..., Matrix]] = {
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
#: Structures with a variance for each position.
_VARYING = ("us", "diag", "hetar1", "hettoep", "ante")


def _by_name(structure: Structure, k: int, places: Tensor | None) -> Matrix:
    """A structure of k positions; the lags of those in time are differences of their places."""
    if structure.name in _KERNELS:
        assert places is not None
        return _KERNELS[structure.name](_distances(places.double()), **structure.options)
    if structure.name not in _LAGGED:
        return _OTHER[structure.name](k)
    at = torch.arange(k) if places is None else places.reshape(-1)
    size = int(at.max()) + 1
    matrix = _LAGGED[structure.name](size)
    if structure.name.startswith("het"):
        _hold_scale(matrix)
    if size > k:
        matrix = CovariancePropagation(z=DummyMatrix.from_codes(at, size), g=matrix)
    return heterogeneous(matrix) if structure.name.startswith("het") else matrix


def _hold_scale(matrix: Matrix) -> None:
    """Hold the variance at one, where another matrix has the scale."""
    with torch.no_grad():
        matrix.fix("sigma^2", 0.0)


def _distances(coordinates: Tensor) -> Tensor:
    return torch.cdist(coordinates, coordinates, compute_mode="donot_use_mm_for_euclid_dist")


# ---------------------------------------------------------------------- residuals


def residual_covariance(encoded: Encoded) -> Matrix:
    """The covariance R of the residuals, (n, n), without a nugget."""
    design, weights = encoded.residual, encoded.weights
    n = len(encoded.X)
    if design is None:
        return ScalarMatrix(n) if weights is None else weighted(weights)
    scale = None if weights is None else weights.rsqrt()
    if design.variance is not None:
        assert design.covariate is not None
        matrix: Matrix = VarianceFunction(design.covariate, design.variance)
        if scale is None:
            return matrix
        z = DummyMatrix.from_codes(torch.arange(n), n, scale)
        return CovariancePropagation(z=z, g=matrix)
    if len(design.strata) == 1:
        (stratum,) = design.strata
        size, matrix = _within(stratum)
        z = DummyMatrix.from_codes(stratum.codes, size, scale)
        return CovariancePropagation(z=z, g=matrix)
    blocks: dict[str, Matrix] = {}
    for stratum in design.strata:
        size, matrix = _within(stratum)
        z = DummyMatrix.from_codes(stratum.codes, size)
        blocks[_operand(stratum.name, blocks)] = CovariancePropagation(z=z, g=matrix)
    rows = torch.cat([stratum.rows for stratum in design.strata])
    at = torch.empty_like(rows)
    at[rows] = torch.arange(n)
    return CovariancePropagation(z=DummyMatrix.from_codes(at, n, scale), g=BlockDiagonal(blocks))


def _within(stratum: Stratum) -> tuple[int, Matrix]:
    """How many cells there are, and their covariance."""
    sides: dict[str, Matrix] = {}
    for positions in stratum.positions:
        sides[_operand(positions.name, sides)] = _by_name(
            positions.structure, len(positions.labels), positions.places
        )
    scaled = [p.structure.name in _VARYING for p in stratum.positions]
    if sum(scaled) > 1:
        raise InputError(
            "a product of residual structures has a variance for each position on one side only: "
            f"found {' and '.join(p.structure.name for p in stratum.positions)}"
        )
    for i, matrix in enumerate(sides.values()):
        if i != (scaled.index(True) if any(scaled) else 0):
            _hold_scale(matrix)
    matrix = KroneckerProduct(sides) if len(sides) > 1 else next(iter(sides.values()))
    size = matrix.shape[0]
    if stratum.groups is None:
        return size, matrix
    groups = IdentityMatrix(stratum.groups)
    return size * stratum.groups, KroneckerProduct(groups=groups, matrix=matrix)


def _operand(label: str, taken: Mapping[str, Any]) -> str:
    """A name of an operand, without '/' and '.', that is not taken yet."""
    base = re.sub(r"[/.]", "_", label) or "position"
    found, i = base, 1
    while found in taken:
        found, i = f"{base}_{i}", i + 1
    return found


# ---------------------------------------------------------------------- the tree


def _cells(design: ResidualDesign) -> tuple[str, ...]:
    """Labels of the cells of correlated residuals, in their order: positions joined by ':'."""
    found = []
    for stratum in design.strata:
        sides = [positions.labels for positions in stratum.positions]
        if stratum.groups is not None:
            sides.insert(0, tuple(map(str, range(stratum.groups))))
        cells = [":".join(cell) for cell in product(*sides)]
        if len(design.strata) > 1:  # there the rows have a column each
            cells = [f"{stratum.name}:{cells[code]}" for code in stratum.codes.tolist()]
        found += cells
    return tuple(found)


def covariance_of(encoded: Encoded) -> Matrix:
    r"""The covariance tree :math:`\sum_t Z_t G_t Z_t^\top + R` of the rows of a table."""
    parts: dict[str, Matrix] = {}
    for design in encoded.random:
        values = None if design.is_intercept else design.values
        parts[design.name] = CovariancePropagation(
            z=DummyMatrix.from_codes(design.codes, design.levels, values),
            g=effect_covariance(design),
        )
    parts["residual"] = residual_covariance(encoded)
    if encoded.residual is not None and encoded.residual.nugget:
        n, weights = len(encoded.X), encoded.weights
        parts["units"] = ScalarMatrix(n) if weights is None else weighted(weights)
    return Sum(parts).to(encoded.X.dtype)


def labels_of(encoded: Encoded) -> dict[str, Label]:
    """Names for the tables of :func:`fit_reml`, by operand of the tree."""
    found = {d.name: Label(d.group, d.effects, d.levels) for d in encoded.random}
    if encoded.residual is not None:
        found["residual"] = Label("Residual", encoded.residual.positions, ())
    if encoded.residual is not None and encoded.residual.nugget:
        # The independent errors are the residual, and what is correlated is an effect of the rows.
        cells = _cells(encoded.residual)
        found["residual"] = Label(encoded.residual.text, ("(Intercept)",), cells)
        found["units"] = Label("Residual", ("",), ())
    return found
