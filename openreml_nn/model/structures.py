"""The covariance of the rows that a formula and a table say, as a tree of matrices."""

from __future__ import annotations

from openreml_nn.covariance import (
    AR1Matrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    weighted,
)
from openreml_nn.covariance.structures import in_cells
from openreml_nn.result.result import Label
from openreml_nn.table import Encoded, RandomDesign

__all__ = ["covariance_of", "effect_covariance", "labels_of", "residual_covariance"]


def effect_covariance(design: RandomDesign) -> Matrix:
    r"""The covariance G of a term's effects, level by level, (q k, q k).

    One effect has :math:`\sigma^2 I`, several have :math:`I \otimes \Sigma`.
    """
    q, k = len(design.levels), len(design.effects)
    if k == 1:
        return ScalarMatrix(q)
    return KroneckerProduct(levels=IdentityMatrix(q), effects=UnstructuredMatrix(k))


def residual_covariance(encoded: Encoded) -> Matrix:
    """The covariance R of the residuals, (n, n)."""
    if encoded.residual is not None:
        design = encoded.residual
        size = len(design.positions)
        matrix: Matrix = {
            "ar1": AR1Matrix,
            "cs": CompoundSymmetricMatrix,
            "us": UnstructuredMatrix,
            "diag": DiagonalMatrix,
        }[design.kind](size)
        return in_cells(design.codes, design.groups, matrix)
    if encoded.weights is not None:
        return weighted(encoded.weights)
    return ScalarMatrix(len(encoded.X))


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
    return Sum(parts).to(encoded.X.dtype)


def labels_of(encoded: Encoded) -> dict[str, Label]:
    """Names for the tables of :func:`fit_reml`, by operand of the tree."""
    found = {d.name: Label(d.group, d.effects, d.levels) for d in encoded.random}
    if encoded.residual is not None:
        found["residual"] = Label("Residual", encoded.residual.positions, ())
    return found
