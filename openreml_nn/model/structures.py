"""The covariance of the rows that a formula and a table say, as a tree of matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from openreml_nn.covariance import (
    AntedependenceMatrix,
    AR1Matrix,
    ARMAMatrix,
    CARMatrix,
    CompoundSymmetricMatrix,
    ContinuousAR1Matrix,
    Correlation,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialCorrelation,
    ExponentialMatrix,
    GaussianCorrelation,
    GaussianMatrix,
    ICARMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    LinearCorrelation,
    LinearMatrix,
    MaternCorrelation,
    MaternMatrix,
    Matrix,
    RandomWalkMatrix,
    RationalQuadraticCorrelation,
    RationalQuadraticMatrix,
    ScalarMatrix,
    SphericalCorrelation,
    SphericalMatrix,
    StationaryMatrix,
    UnstructuredMatrix,
    VecchiaMatrix,
    factor_analytic,
    heterogeneous,
    heterogeneous_compound_symmetry,
)
from openreml_nn.covariance.params import operand_name
from openreml_nn.covariance.spaced import distances
from openreml_nn.estimation.basis import basis_of
from openreml_nn.families import Family
from openreml_nn.likelihood.solver import Solver
from openreml_nn.model.mixed_model import MixedModel
from openreml_nn.model.random_effect import RandomEffect, independent_levels
from openreml_nn.model.structured_residual import ByCovariate, ByStratum, WithUnits
from openreml_nn.result.parts import RESIDUAL_GROUP, Label
from openreml_nn.support.errors import InputError
from openreml_nn.table import (
    Encoded,
    Graph,
    Known,
    Places,
    RandomDesign,
    ResidualDesign,
    Stratum,
    Structure,
    Walk,
)
from openreml_nn.table.structure import VARYING

__all__ = [
    "bases_of",
    "labels_of",
    "linear_model",
    "random_effect_of",
    "residual_of",
]


# ---------------------------------------------------------------------- random effects


def _effect_covariance(design: RandomDesign) -> Matrix:
    r"""The covariance G of a term's effects, level by level, (q k, q k).

    :math:`G = K \otimes \Sigma` with Σ (k, k) among the effects of a level and K (q, q) among the
    levels, the identity by default. A single effect of independent levels has
    :math:`\sigma^2 I`; where both are said, the scale is that of Σ.
    """
    q, k = len(design.levels), len(design.effects)
    if design.relation is None and (k == 1 or (q == 1 and design.structure.name == "idv")):
        return ScalarMatrix(q * k)
    if design.relation is None and design.structure.name == "us":
        return independent_levels(q, k)
    levels = IdentityMatrix(q) if design.relation is None else _among_levels(design.relation)
    if k == 1:
        return levels
    if design.relation is not None:
        _hold_scale(levels)
    return KroneckerProduct(levels=levels, effects=_among_effects(design))


def _among_levels(relation: Known | Places | Graph | Walk) -> Matrix:
    if isinstance(relation, Walk):
        if relation.name == "ar1":
            return AR1Matrix(relation.size)
        return RandomWalkMatrix(relation.size, {"rw1": 1, "rw2": 2}[relation.name])
    if isinstance(relation, Graph):
        return (CARMatrix if relation.name == "car" else ICARMatrix)(relation.weights)
    if isinstance(relation, Places):
        options = dict(relation.structure.options)
        neighbours = options.pop("neighbours", None)
        if neighbours is not None:
            correlation = _CORRELATIONS[relation.structure.name](**options)
            return VecchiaMatrix(relation.coordinates, correlation, int(neighbours))
        return _kernel(relation.structure, relation.coordinates)
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


_CORRELATIONS: dict[str, Callable[..., Correlation]] = {
    "exponential": ExponentialCorrelation,
    "gaussian": GaussianCorrelation,
    "matern": MaternCorrelation,
    "spherical": SphericalCorrelation,
    "linear": LinearCorrelation,
    "rational": RationalQuadraticCorrelation,
}
_KERNELS: dict[str, Callable[..., Matrix]] = {
    "exponential": ExponentialMatrix,
    "gaussian": GaussianMatrix,
    "matern": MaternMatrix,
    "spherical": SphericalMatrix,
    "linear": LinearMatrix,
    "rational": RationalQuadraticMatrix,
    "car1": ContinuousAR1Matrix,
}


def _kernel(structure: Structure, places: Tensor) -> Matrix:
    """A kernel of places (k, d); of a single column they are on a line."""
    on_line = places.shape[1] == 1
    distance = places[:, 0] if on_line else distances(places, places)
    return _KERNELS[structure.name](distance, **structure.options)


_LAGGED: dict[str, Callable[[int], Matrix]] = {
    "ar1": AR1Matrix,
    "hetar1": AR1Matrix,
    "toep": StationaryMatrix,
    "hettoep": StationaryMatrix,
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


def _by_name(structure: Structure, k: int, places: Tensor | None) -> Matrix:
    """A structure of k positions; the lags of those in time are differences of their places."""
    if structure.name in _KERNELS:
        assert places is not None
        return _kernel(structure, places.double())
    if structure.name not in _LAGGED:
        # A table of one stratum alone, as a subset has, is one of a single variance.
        alone = k == 1 and structure.name == "diag"
        return ScalarMatrix(1) if alone else _OTHER[structure.name](k)
    at = torch.arange(k) if places is None else places.reshape(-1)
    size = int(at.max()) + 1
    matrix = _LAGGED[structure.name](size)
    if structure.name.startswith("het"):
        _hold_scale(matrix)
    if size > k and isinstance(matrix, AR1Matrix):
        matrix = matrix.at(torch.zeros_like(at), at)
    elif size > k:
        matrix = CovariancePropagation(z=DummyMatrix.from_codes(at, size), g=matrix)
    return heterogeneous(matrix) if structure.name.startswith("het") else matrix


def _hold_scale(matrix: Matrix) -> None:
    """Hold the variance at one, where another matrix has the scale."""
    with torch.no_grad():
        matrix.fix("sigma^2", 0.0)


# ---------------------------------------------------------------------- residuals


def residual_of(encoded: Encoded) -> Matrix | nn.Module:
    """The residual of a model of the table, see :class:`MixedModel`: the variance of each row,
    (1, 1); the covariance of the positions within a group, (T, T); or a module for several of
    these, variances that depend on a covariate, or a nugget."""
    design = encoded.residual
    if design is None:
        return ScalarMatrix(1)
    found: nn.Module | None = _within(design.strata[0]) if design.strata else None
    if len(design.strata) > 1:
        found = ByStratum({stratum.name: _within(stratum) for stratum in design.strata})
    if design.variance is not None:
        return ByCovariate(design.variance, found, design.of_fitted)
    assert found is not None
    return WithUnits(found) if design.nugget else found


def _within(stratum: Stratum) -> Matrix:
    """The covariance of the positions within a group."""
    sides: dict[str, Matrix] = {}
    for positions in stratum.positions:
        sides[operand_name(positions.name or "position", sides)] = _by_name(
            positions.structure, len(positions.labels), positions.places
        )
    if len(sides) == 1:
        return next(iter(sides.values()))
    varying = [p.structure.name in VARYING for p in stratum.positions]
    if sum(varying) > 1:
        raise InputError(
            "a product of residual structures has a variance for each position on one side only: "
            f"found {' and '.join(p.structure.name for p in stratum.positions)}"
        )
    for i, matrix in enumerate(sides.values()):
        if i != (varying.index(True) if any(varying) else 0):
            _hold_scale(matrix)
    return KroneckerProduct(sides)


# ---------------------------------------------------------------------- the model


def _cells(design: ResidualDesign) -> tuple[str, ...]:
    """Labels of the cells of correlated residuals, in their order: positions joined by ':'."""
    sizes = [stratum.size for stratum in design.strata]
    found = []
    for stratum in design.strata:
        prefix = f"{stratum.name}:" if stratum.name else ""
        cells = product(*(side.labels for side in stratum.positions))
        found += [prefix + ":".join(cell) for cell in cells]
    if len(sizes) > 1:  # there the rows have a column each, stratum by stratum
        return tuple(found[code] for code in design.cells.sort().values.tolist())
    groups = int(design.cells.max()) // sizes[0] + 1
    return tuple(f"{i + 1}:{cell}" if groups > 1 else cell for i in range(groups) for cell in found)


def bases_of(designs: Sequence[RandomDesign]) -> dict[str, Tensor]:
    """Bases in which random slopes are better conditioned, see :func:`basis_of`, by the names of
    designs whose covariance among effects is free, and as free in any basis."""
    free = [d for d in designs if d.structure.name == "us" and d.values.dim() == 2]
    found = {design.name: basis_of(design.values) for design in free}
    return {name: B for name, B in found.items() if B is not None}


def random_effect_of(design: RandomDesign, basis: Tensor | None = None) -> RandomEffect:
    """The random effect of a term, with the places of its levels where it has such.

    Args:
        design: the term's rows.
        basis: see :class:`RandomEffect`.
    """
    return RandomEffect(
        design.levels,
        _effect_covariance(design),
        design.effects,
        basis=basis,
        places=design.relation.coordinates if isinstance(design.relation, Places) else None,
    )


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
        design.name: random_effect_of(design, bases.get(design.name)) for design in encoded.random
    }
    residual = residual_of(encoded) if family is None else None
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
        found["residual"] = Label(RESIDUAL_GROUP, encoded.residual.positions, ())
        if encoded.residual.nugget:
            # The independent errors are the residual, and what is correlated an effect of the rows.
            cells = _cells(encoded.residual)
            found["residual"] = Label(encoded.residual.text, ("(Intercept)",), cells)
            found["units"] = Label(RESIDUAL_GROUP, ("units",), ())
    return found
