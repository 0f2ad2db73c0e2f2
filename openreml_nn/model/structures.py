"""The model that a formula and a table say: matrices for its random effects and residuals."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from openreml_nn.covariance import (
    AR1Matrix,
    CompoundSymmetricMatrix,
    DiagonalMatrix,
    Matrix,
    ScalarMatrix,
    UnstructuredMatrix,
)
from openreml_nn.families import Family
from openreml_nn.likelihood.solver import Solver
from openreml_nn.model.mixed_model import MixedModel
from openreml_nn.model.random_effect import RandomEffect, independent_levels
from openreml_nn.result.result import Label
from openreml_nn.table import Encoded, RandomDesign

__all__ = ["effect_covariance", "labels_of", "linear_model", "residual_matrix"]


def effect_covariance(design: RandomDesign) -> Matrix:
    r"""The covariance G of a term's effects, level by level, (q k, q k).

    One effect has :math:`\sigma^2 I`, several have :math:`I \otimes \Sigma`.
    """
    return independent_levels(len(design.levels), len(design.effects))


def residual_matrix(encoded: Encoded) -> Matrix:
    """The covariance of the positions within a group of rows, (T, T), or the variance of each row,
    (1, 1)."""
    if encoded.residual is None:
        return ScalarMatrix(1)
    return {
        "ar1": AR1Matrix,
        "cs": CompoundSymmetricMatrix,
        "us": UnstructuredMatrix,
        "diag": DiagonalMatrix,
    }[encoded.residual.kind](len(encoded.residual.positions))


def linear_model(
    encoded: Encoded,
    method: str = "reml",
    solver: str | Solver = "auto",
    residual_variance: float | None = None,
    bases: Mapping[str, Tensor] | None = None,
    family: Family | None = None,
    quadrature: int = 1,
) -> MixedModel:
    """The linear mixed model of a table: its x is the model matrix.

    Args:
        encoded: the table.
        method, solver: see :class:`MixedModel`.
        residual_variance: at which the residual variance is held, of a row of weight 1; it is
            estimated by default.
        bases: of random effects, see :class:`RandomEffect`, by the names of their designs.
        family: of the response, which has the residual's place; Gaussian by default.
        quadrature: see :class:`LaplaceLoss`.
    """
    bases = bases or {}
    random = {
        d.name: RandomEffect(d.levels, effect_covariance(d), d.effects, basis=bases.get(d.name))
        for d in encoded.random
    }
    residual = residual_matrix(encoded) if family is None else None
    model = MixedModel(
        nn.Identity(),
        random,
        residual,
        "gls",
        family,
        method=method,
        solver=solver,
        quadrature=quadrature,
    )
    model.to(encoded.X.dtype)
    if residual is not None and residual_variance is not None:
        residual.fix("sigma^2", residual_variance, natural=True)
    return model


def labels_of(encoded: Encoded) -> dict[str, Label]:
    """Names for the tables of :func:`fit_reml`, by operand of the tree."""
    found = {d.name: Label(d.group, d.effects, d.levels) for d in encoded.random}
    if encoded.residual is not None:
        found["residual"] = Label("Residual", encoded.residual.positions, ())
    return found
