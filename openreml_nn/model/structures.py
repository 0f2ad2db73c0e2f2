"""The model that a formula and a table say: matrices for its random effects and residuals."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from openreml_nn.covariance import (
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    Pedigree,
    ScalarMatrix,
    factor_analytic,
    heterogeneous_compound_symmetry,
)
from openreml_nn.estimation.basis import basis_of
from openreml_nn.families import Family
from openreml_nn.likelihood.solver import Solver
from openreml_nn.model.mixed_model import MixedModel
from openreml_nn.model.named import MATRICES, distances, hold_scale, named_matrix
from openreml_nn.model.random_effect import RandomEffect
from openreml_nn.model.table_residual import residual_of
from openreml_nn.result.result import Label
from openreml_nn.support.errors import InputError
from openreml_nn.table import (
    Encoded,
    Known,
    Places,
    RandomDesign,
    ResidualDesign,
    read_kernel,
    read_table,
)

__all__ = ["bases_of", "effect_covariance", "labels_of", "linear_model", "relations_of"]


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
        hold_scale(levels)
    return KroneckerProduct(levels=levels, effects=_among_effects(design))


def _among_levels(relation: Known | Places) -> Matrix:
    if isinstance(relation, Places):
        return MATRICES[relation.structure.name](
            distances(relation.coordinates), **relation.structure.options
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
    return named_matrix(design.structure, k, lags)


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


def bases_of(designs: Sequence[RandomDesign]) -> dict[str, Tensor]:
    """Bases in which random slopes are better conditioned, see :func:`basis_of`, by the names of
    designs whose covariance among effects is free, and as free in any basis."""
    free = [design for design in designs if design.structure.name == "us"]
    found = {design.name: basis_of(design.values) for design in free}
    return {name: B for name, B in found.items() if B is not None}


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
    residual = residual_of(encoded.residual) if family is None else None
    if residual is not None and residual_variance is not None:
        assert isinstance(residual, ScalarMatrix)
        residual.double().fix("sigma^2", residual_variance, natural=True)
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
    return model.to(encoded.X.dtype)


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
