"""The model that a formula and options make of a table, and what a checkpoint keeps of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from openreml_nn.covariance import Matrix
from openreml_nn.estimation.fit import moment_start
from openreml_nn.families import Family, Ordinal
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.family import FamilyOptions
from openreml_nn.lightning.formula import FormulaOptions, spread
from openreml_nn.lightning.sharing import checksum
from openreml_nn.likelihood.plan import check_solver
from openreml_nn.likelihood.solvers.dense import check_method
from openreml_nn.model import HEADS, MixedModel, RandomEffect, ResidualStructure
from openreml_nn.model.batch import Batch
from openreml_nn.model.checkpoint import bases_in
from openreml_nn.model.constraints import Constraint, Constraints
from openreml_nn.model.linear import in_user_basis
from openreml_nn.model.several import refuse_copies
from openreml_nn.model.structured_residual import start_residual
from openreml_nn.model.structures import bases_of, labels_of, random_effect_of, residual_of
from openreml_nn.result import Label, Result
from openreml_nn.support.checks import (
    check_choice,
    check_instance,
    check_maker,
    check_names,
    check_text,
)
from openreml_nn.support.errors import InputError
from openreml_nn.support.instantiate import build
from openreml_nn.table import Encoded, Learned, Places, RandomDesign

__all__ = ["Network", "TableModel", "is_plain"]

Network = Mapping[str, Any] | nn.Module


class TableModel:
    """A formula with the options of :class:`MixedModule`.

    Attributes:
        options: the formula, and how a table is read for it.
        encoder: what the formula makes of a table.
        head: of the model.
        response: the family of the response.
        places: where the training rows are (n, k), of levels at places; None without such.
        labels: names of levels and effects by random effect.
        bases: in which random slopes are better conditioned, by random effect.

    Raises:
        InputError: if the formula or an option is invalid.
    """

    def __init__(
        self,
        formula: str,
        network: Network | None = None,
        head: str | None = None,
        residual: str | Network | None = None,
        weights: str | None = None,
        categorical: Sequence[str] = (),
        method: str | None = None,
        solver: str = "auto",
        family: str | Family | None = None,
        link: str | None = None,
        quadrature: int = 1,
        zi: str | None = None,
        constraints: Mapping[str, Constraint] | None = None,
        starts: Mapping[str, float] | None = None,
    ) -> None:
        check_text("formula", formula)
        check_names("categorical", categorical)
        self.head = head or ("gls" if network is None else "ml")
        _check_mean(network, self.head)
        _check_options(residual, weights, method, solver)
        text = residual if isinstance(residual, str) else None
        self.response = FamilyOptions(family, link, quadrature)
        self.response.check(residual, method, solver)
        self._categories = 2
        self.options = FormulaOptions(formula, family, tuple(categorical), text, weights, zi)
        self.encoder = self.options.response().encoder
        self.labels: dict[str, Label] = {}
        self.bases: dict[str, Tensor] = {}
        self.places: Tensor | None = None
        self._network, self._residual, self._method, self._solver = (
            network, residual, method, solver
        )  # fmt: skip
        self._constraints = Constraints(constraints, starts)
        self._names: tuple[str, ...] = ()
        self._columns = 0
        self._data: MixedModelDataModule | None = None
        if not self.encoder.formula.random and network is not None:
            raise InputError(f"formula {formula!r} has no random effect")

    # ------------------------------------------------------------------ building

    def built(self, data: MixedModelDataModule) -> MixedModel:
        """The model for the data module's table, with a start in the units of its response."""
        self._data, self.encoder, encoded = data, data.encoder, data.encoded
        if self.response.family is None and not self._constraints:  # of the user's effects
            self.bases = bases_of(encoded.random)
        for design in encoded.random:
            if isinstance(design.relation, Places):
                self.places = design.relation.coordinates[design.codes]
        if self._residual is None:
            _check_traits(encoded, self.encoder.formula.traits)
        self._categories = max(2, len(data.response.levels))
        model = self._made(encoded)
        if self._network is None and self.response.family is None:
            loss, y, X = model.data(model(batch := encoded.batch()), batch)
            loss.names = self._names
            moment_start(loss, y, X)
        self.begin(model, encoded.batch())
        return model

    def begin(self, model: MixedModel, batch: Batch) -> None:
        """Set the covariance parameters that the user starts to their starts."""
        self._constraints.begin(model, batch)

    def attach(self, data: MixedModelDataModule) -> None:
        """Take the table of a model that was fitted or loaded.

        Raises:
            InputError: if it is not the one that the model was built from.
        """
        own, other = (checksum(e.learned.to_dict()) for e in (self.encoder, data.encoder))
        if own != other:
            raise InputError(
                "the module has the model of another table: fit a new MixedModule of the formula"
            )
        self._data, self.encoder = data, data.encoder

    def _made(self, encoded: Encoded) -> MixedModel:
        self.labels, self._names = _labels(encoded, self.bases), encoded.names
        self._columns = len(encoded.names)
        if self.response.family is not None:
            return self._made_of_family(encoded)
        y = encoded.X.new_tensor([0.0, 1.0]) if encoded.y is None else encoded.adjusted
        variance = spread(y, self._network is not None)
        count = max(len(encoded.random), 1)
        random = self._effects(encoded, variance / count)
        model = MixedModel(
            _mean(self._network, self.head, encoded.X, float(y.mean()), variance**0.5),
            random,
            _residual(encoded, self._residual, variance / 2),
            self.head,
            method=self._method,
            solver=self._solver,
        )
        _try(model.mean, encoded, "network")
        _try(model.residual, encoded, "residual")
        return self._constraints.applied(model, encoded.batch())

    def _made_of_family(self, encoded: Encoded) -> MixedModel:
        own, center, variance = self.response.start(encoded, self.encoder, self._categories)
        model = MixedModel(
            _mean(self._network, self.head, encoded.X, center),
            self._effects(encoded, variance / len(encoded.random)),
            head=self.head,
            family=own,
            method=self._method,
            solver=self._solver,
            quadrature=self.response.quadrature,
        )
        _try(model.mean, encoded, "network")
        return self._constraints.applied(model, encoded.batch())

    def _effects(self, encoded: Encoded, variance: float) -> dict[str, RandomEffect]:
        return {d.name: _effect(d, variance, self.bases.get(d.name)) for d in encoded.random}

    # ------------------------------------------------------------------ results

    def completed(self, result: Result) -> Result:
        """A result with what the table says: fitted values, names, and how it predicts."""
        data, source = self._data, result.source
        assert data is not None
        encoded, rows = data.encoded, {}
        if self.response.family is None:
            batch = move_data_to_device(encoded.batch(), result.model.beta.device)
            fitted = result.model.predict(batch).mean
            assert encoded.y is not None
            rows = {"fitted": fitted, "residuals": encoded.y.to(fitted) - fitted}
            if source is not None and self.bases:
                result = in_user_basis(result, result.model, batch, labels_of(encoded))
                source = result.source
        if source is not None:
            cells = self.encoder.cells(encoded.kept(data.table))
            source = replace(source, means=self.encoder.learned.means, cells=cells)
        return replace(
            result,
            **rows,
            formula=self.encoder.formula.text,
            zi=self.options.zi,
            dropped_rows=encoded.dropped_rows,
            encoder=self.encoder,
            source=source,
            constraints=self._constraints.held,
        )

    def names(self, p: int) -> list[str]:
        """Names of the p columns of X."""
        if self._network is None:
            return list(self._names)
        return [f"feature{j}" if j else "(Intercept)" for j in range(p)]

    def adopt(self, result: Result) -> None:
        """Take what the formula learned in a fit that was made elsewhere."""
        self.encoder, self._columns = result.encoder, len(result.fixed.aliases)
        assert result.model is not None
        family = result.model.family
        self._categories = family.levels if isinstance(family, Ordinal) else 2
        self.bases = bases_in(result.model)

    # ------------------------------------------------------------------ checkpoints

    def to_dict(self) -> dict[str, Any]:
        """What the formula learned from the table, for a checkpoint."""
        return {
            "encoder": self.encoder.learned.to_dict(),
            "columns": self._columns,
            "bases": self.bases,
            "has_network": self._network is not None,
            "has_family": self.response.family is not None,
            "categories": self._categories,
        }

    def from_dict(self, kept: Mapping[str, Any]) -> MixedModel:
        """A model of a checkpoint's shapes.

        Raises:
            InputError: if the checkpoint is of a network that it does not hold.
        """
        _check_parts(kept, self._network, self.response.family)
        self._categories = kept["categories"]
        self.encoder.learned = Learned.from_dict(kept["encoder"])
        self.bases = dict(kept["bases"])
        return self._made(self.encoder.skeleton(2, kept["columns"]))


def _check_traits(encoded: Encoded, traits: Sequence[tuple[str, Any]]) -> None:
    if traits and (cells := encoded.batch().get("residual")) is not None:
        refuse_copies(encoded.adjusted, encoded.X, cells, [name for name, _ in traits])


def _labels(encoded: Encoded, bases: Mapping[str, Tensor]) -> dict[str, Label]:
    labels = labels_of(encoded)
    return labels | {name: labels[name]._replace(basis=B) for name, B in bases.items()}


def _mean(
    network: Network | None, head: str, X: Tensor, center: float, scale: float = 1.0
) -> nn.Module:
    if network is None:
        return nn.Identity()
    features = _network(network, "network")
    if head == "gls":
        return _Standardised(nn.Sequential(features, _WithConstant()), X)
    return _Standardised(nn.Sequential(features, nn.LazyLinear(1)), X, center, scale)


def _residual(encoded: Encoded, given: str | Network | None, variance: float) -> Matrix | nn.Module:
    X = encoded.X
    if isinstance(given, Matrix):
        return copy.deepcopy(given)
    if given is None or isinstance(given, str):
        if encoded.residual is not None and encoded.residual.of_fitted:
            raise InputError(
                f"`residual` is {given!r}, whose variances are of the fitted values, which training "
                "moves: expected a function of a column, or lmm()"
            )
        residual = residual_of(encoded).double()
        start_residual(residual, variance)
        return residual
    layers = nn.Sequential(_network(given, "residual"), nn.LazyLinear(1))
    return _Standardised(layers, X, log(variance))


def _effect(design: RandomDesign, variance: float, basis: Tensor | None) -> RandomEffect:
    effect = random_effect_of(design, basis).double()
    size = len(design.levels) * len(design.effects)
    effect.g.moment_start(torch.full((size,), variance / 2, dtype=torch.float64))
    return effect


def _check_mean(network: Network | None, head: str) -> None:
    if network is not None:
        check_network("network", network)
    check_choice("head", head, HEADS)
    if network is None and head == "ml":
        raise InputError("`head` is 'ml' without a `network`: a linear mean is of head 'gls'")


def _check_options(
    residual: str | Network | None,
    weights: str | None,
    method: str | None,
    solver: str,
) -> None:
    if weights is not None:
        check_text("weights", weights)
    if residual is not None and not isinstance(residual, str):
        check_network("residual", residual)
    if method is not None:
        check_method(method)
    check_solver(solver)


def _check_parts(
    kept: Mapping[str, Any], network: Network | None, family: str | Family | None
) -> None:
    """Refuse a checkpoint of what it does not hold and was not given."""
    if kept["has_network"] and network is None:
        raise InputError(
            "the checkpoint is of a network that was given as a module, which it does not hold: "
            "pass `network` and, where it was one too, `residual` to load_from_checkpoint()"
        )
    if kept["has_family"] and family is None:
        raise InputError(
            "the checkpoint is of a family that was given as a module, which it does not hold: "
            "pass `family` to load_from_checkpoint()"
        )


def check_network(name: str, network: Network) -> None:
    """Refuse what is neither a network nor the config of one."""
    if not isinstance(network, nn.Module):
        check_maker(name, network)
        check_instance(name, network, Mapping, "a network, or a config with `_target_`")


def _network(network: Network, what: str) -> nn.Module:
    if isinstance(network, Mapping):
        return build(network, what, nn.Module)
    return copy.deepcopy(network)


def _try(network: nn.Module, encoded: Encoded, what: str) -> None:
    """Run a network on some rows: lazy layers learn their sizes, and others are checked."""
    if isinstance(network, Matrix | ResidualStructure):
        return
    try:
        with torch.no_grad():
            network(encoded.X[:2])
    except (TypeError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        p, names = len(encoded.names), list(encoded.names)
        raise InputError(f"{what!r} fails for {p} columns, {names}: {reason}") from error


class _Standardised(nn.Module):
    """A network in units of the training rows: of its input, and of what it yields."""

    center: Tensor
    scale: Tensor
    y_center: Tensor
    y_scale: Tensor

    def __init__(
        self, network: nn.Module, X: Tensor, y_center: float = 0.0, y_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.network = network
        scale = X.std(0, correction=0)
        self.register_buffer("center", X.mean(0))
        self.register_buffer("scale", torch.where(scale > 0, scale, 1))
        self.register_buffer("y_center", X.new_tensor(y_center))
        self.register_buffer("y_scale", X.new_tensor(y_scale))

    def forward(self, x: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        found = self.network(((x - self.center) / self.scale).to(dtype))
        # The network may run in half precision, which has too few digits for units.
        return self.y_center + self.y_scale * found.to(self.y_scale.dtype)


class _WithConstant(nn.Module):
    """A constant before the features."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(features[:, :1]), features], 1)


def is_plain(value: Any) -> bool:
    """Whether a value is made of Python's own numbers, strings and containers."""
    if isinstance(value, Mapping):
        return all(is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float)
