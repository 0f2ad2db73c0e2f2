"""A neural mixed model of a table."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from typing import Any

import pandas as pd
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from openreml_nn.covariance import Matrix, ScalarMatrix
from openreml_nn.estimation.outcome import outcome
from openreml_nn.lightning.data import attached
from openreml_nn.lightning.neural import NeuralMixedModule
from openreml_nn.likelihood.plan import check_solver
from openreml_nn.model import MixedModel, RandomEffect
from openreml_nn.model.structures import labels_of
from openreml_nn.result.result import Result
from openreml_nn.support.checks import (
    check_instance,
    check_maker,
    check_mapping,
    check_names,
    check_text,
)
from openreml_nn.support.errors import InputError
from openreml_nn.support.instantiate import build
from openreml_nn.table import Encoded, Encoder, Learned, RandomDesign

__all__ = ["TabularMixedModule"]

Network = Mapping[str, Any] | nn.Module


class TabularMixedModule(NeuralMixedModule):
    """A network on the columns of a table, with the random effects of a formula.

    The fixed part of the formula is what the network takes, standardised by the training rows;
    its last layer yields features. Head ``"ml"`` adds a linear layer that makes the mean of them,
    head ``"gls"`` a constant, and takes both as X. The model is built from the data module when
    fitting begins, and from its checkpoint when that is loaded.

    Args:
        formula: an lme4-style formula.
        network: config of the network, or the network. The number of columns that it
            takes is found out by a ``torch.nn.LazyLinear``.
        head: ``"ml"`` or ``"gls"``, see :class:`MixedModel`.
        residual: a network, as before, for the log-variance of the residual; one variance by
            default.
        kernels: for a grouping factor the config of a covariance between its levels by their
            distance, such as ``{"plot": {"_target_": "openreml_nn.covariance.MaternMatrix",
            "columns": ["east", "north"]}}``, with the columns that hold a level's place.
        categorical: numeric columns to be taken as factors.
        solver: see :class:`REMLLoss`.
        **options: of :class:`NeuralMixedModule`.

    Attributes:
        result: the :class:`Result` of the covariance at the final mean, after training.
        places: where the training rows are (n, k), with a kernel, after training.

    Raises:
        InputError: if the formula or a config is at fault.

    Example::

        data = MixedModelDataModule(ratings(), formula, validation=0.2)
        layers = [{"_target_": "torch.nn.LazyLinear", "out_features": 32},
                  {"_target_": "torch.nn.Tanh"}]
        module = TabularMixedModule(formula, {"_target_": "torch.nn.Sequential", "_args_": layers})
        Trainer(max_epochs=20).fit(module, data)
        module.predict(new_table)
    """

    def __init__(
        self,
        formula: str,
        network: Network,
        head: str = "ml",
        residual: Network | None = None,
        kernels: Mapping[str, Mapping[str, Any]] | None = None,
        categorical: Sequence[str] = (),
        solver: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(None, **options)
        check_text("formula", formula)
        check_network("network", network)
        self._check_head(head)
        if residual is not None:
            check_network("residual", residual)
        check_mapping("kernels", {} if kernels is None else kernels, Mapping)
        check_names("categorical", categorical)
        check_solver(solver)
        given = {
            "formula": formula,
            "network": network,
            "head": head,
            "residual": residual,
            "kernels": kernels,
            "categorical": list(categorical),
            "solver": solver,
            **options,
        }
        # What a checkpoint can hold, so that it can be loaded with weights_only.
        self.save_hyperparameters({k: v for k, v in given.items() if _is_plain(v)})
        self.encoder = Encoder(formula, categorical)
        self.result: Result | None = None
        self.places: Tensor | None = None
        self._network, self._head, self._solver = network, head, solver
        self._residual_network = residual
        self._kernels = dict(kernels or {})
        self._coordinates: dict[str, Tensor] = {}
        if unknown := [g for g in self._kernels if g not in self._groups()]:
            raise InputError(f"kernel of {unknown[0]!r}: the groups are {self._groups()}")

    def _groups(self) -> list[str]:
        return [":".join(part.factors) for part in self.encoder.formula.random]

    # ------------------------------------------------------------------ building

    def setup(self, stage: str) -> None:
        """Build the model from the data module's table."""
        if stage != "fit" or hasattr(self, "model"):
            return
        data = attached(self, self.encoder)
        self.encoder, encoded = data.encoder, data.encoded
        for design in encoded.random:
            if design.group in self._kernels:
                table = data.table.iloc[encoded.rows]
                self._coordinates[design.group] = self._places(design, table)
        self._build(encoded)

    def _places(self, design: RandomDesign, table: pd.DataFrame) -> Tensor:
        """Where each level is."""
        columns = list(self._kernels[design.group].get("columns", ()))
        missing = [column for column in columns if column not in table.columns]
        if missing or not columns:
            raise InputError(
                f"kernel of {design.group!r}: `columns` are {columns}: expected columns of the "
                "table with the places of its levels"
            )
        by_level = table[columns].groupby(design.codes.numpy())
        if bool((by_level.nunique(dropna=False) > 1).any(axis=None)):
            raise InputError(f"kernel of {design.group!r}: a level has rows at several places")
        return torch.tensor(by_level.first().to_numpy(), dtype=torch.float64)

    def _build(self, encoded: Encoded) -> None:
        y = encoded.X.new_tensor([0.0, 1.0]) if encoded.y is None else encoded.y
        variance = float(y.var())
        random = {d.name: self._effect(d, variance / len(encoded.random)) for d in encoded.random}
        if not random:
            raise InputError(f"formula {self.encoder.formula.text!r} has no random effect")
        center, scale = float(y.mean()), variance**0.5
        features = self._made(self._network, "network")
        mean: nn.Module
        if self._head == "gls":
            mean = _Standardised(nn.Sequential(features, _WithConstant()), encoded.X)
        else:
            layers = nn.Sequential(features, nn.LazyLinear(1))
            mean = _Standardised(layers, encoded.X, center, scale)
        model = MixedModel(
            mean,
            random,
            self._residual(encoded.X, variance / 2),
            self._head,
            solver=self._solver,
        )
        for what, network in (("network", model.mean), ("residual", model.residual)):
            if not isinstance(network, Matrix):
                _try(network, encoded.X[:2], what)
        self._adopt(model)

    def _residual(self, X: Tensor, variance: float) -> Matrix | nn.Module:
        if self._residual_network is None:
            one = ScalarMatrix(1).double()
            one.moment_start(X.new_full((1,), variance))
            return one
        features = self._made(self._residual_network, "residual")
        return _Standardised(nn.Sequential(features, nn.LazyLinear(1)), X, log(variance))

    def _made(self, network: Network, what: str) -> nn.Module:
        found = build(network, what) if isinstance(network, Mapping) else copy.deepcopy(network)
        if not isinstance(found, nn.Module):
            raise InputError(f"config {what!r}: expected a network, got {type(found).__name__}")
        return found

    def _effect(self, design: RandomDesign, variance: float) -> RandomEffect:
        q, k = len(design.levels), len(design.effects)
        kernel: Matrix | None = None
        if design.group in self._kernels:
            options = {x: v for x, v in self._kernels[design.group].items() if x != "columns"}
            place = self._coordinates[design.group]
            kernel = build(options, f"kernels.{design.group}", _distances(place))
        effect = RandomEffect(design.levels, kernel, design.effects)
        effect.g.moment_start(torch.full((q * k,), variance / 2, dtype=torch.float64))
        return effect

    # ------------------------------------------------------------------ results

    def on_train_end(self) -> None:
        """As in :class:`NeuralMixedModule`, and keep the result."""
        super().on_train_end()
        data = self._rows_of_data
        if data is None:
            return
        encoded = attached(self, self.encoder).encoded
        labels = labels_of(encoded)
        for design in encoded.random:
            if design.group in self._coordinates:
                self.places = self._coordinates[design.group][design.codes]
        loss, y, X = self.model.data(self._outputs(data), data)
        names = [f"feature{j}" if j else "(Intercept)" for j in range(X.shape[1])]
        objective = loss.objective(y, X)
        result = outcome(objective, loss.plan, y, X, self.history, names, labels)
        self.result = replace(result, fitted=data["y"] - result.residuals)

    def predict(self, table: pd.DataFrame) -> pd.DataFrame:
        """Mean, variance and population mean for the rows of a table, with its index; rows with
        missing values are left out.

        Raises:
            InputError: if a column is missing or a level of a fixed factor is unknown.
            ValueError: if the module was neither fitted nor loaded.
        """
        check_instance("table", table, pd.DataFrame, "a data frame")
        if not hasattr(self, "model"):
            raise ValueError("the module has no estimates: fit it or load a checkpoint")
        encoded = self.encoder.transform(table)
        found = self.model.predict(move_data_to_device(encoded.batch(), self.device))
        columns = {name: value.numpy(force=True) for name, value in found._asdict().items()}
        return pd.DataFrame(columns, index=table.index[encoded.rows])

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the formula learned from the table."""
        super().on_save_checkpoint(checkpoint)
        mean = self.model.mean
        assert isinstance(mean, _Standardised)
        checkpoint["tabular"] = {
            "encoder": self.encoder.learned.to_dict(),
            "columns": len(mean.center),
            "coordinates": self._coordinates,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build a model of the checkpoint's shapes, if there is none."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint["tabular"]
        if not hasattr(self, "model"):
            self.encoder.learned = Learned.from_dict(kept["encoder"])
            self._coordinates = kept["coordinates"]
            self._build(self.encoder.skeleton(2, kept["columns"]))


def check_network(name: str, network: Network) -> None:
    """Refuse what is neither a network nor the config of one."""
    if not isinstance(network, nn.Module):
        check_maker(name, network)
        check_instance(name, network, Mapping, "a network, or a config with `_target_`")


def _try(network: nn.Module, rows: Tensor, what: str) -> None:
    """Run a network on some rows: lazy layers learn their sizes, and others are checked."""
    try:
        with torch.no_grad():
            network(rows)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what!r} fails for {rows.shape[1]} columns: {reason}") from error


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
        return self.y_center + self.y_scale * found


class _WithConstant(nn.Module):
    """A constant before the features."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(features[:, :1]), features], 1)


def _is_plain(value: Any) -> bool:
    """Whether a value is made of Python's own numbers, strings and containers."""
    if isinstance(value, Mapping):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float)


def _distances(place: Tensor) -> Tensor:
    # The faster way, by a matrix product, puts rounding on the diagonal.
    return torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")
