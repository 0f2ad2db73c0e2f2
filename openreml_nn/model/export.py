"""Predictions as a program of tensors alone, for :mod:`torch.export` and ONNX."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from openreml_nn.covariance import Matrix
from openreml_nn.families import ZeroInflated
from openreml_nn.likelihood.fixed import estimable
from openreml_nn.model.batch import Batch, part
from openreml_nn.model.means import mean_of
from openreml_nn.model.predictor import Predictor
from openreml_nn.model.random_effect import RandomEffect
from openreml_nn.model.residual import ResidualStructure, structure_of
from openreml_nn.result.joint import JointErrors
from openreml_nn.result.prediction import KnownEffect, Prediction, on_response
from openreml_nn.support.checks import check_instance
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = ["exported"]

#: Parts of a batch that predictions use beside x and groups.
_FURTHER = ("values", "offset", "weights")


@torch.no_grad()
def exported(model: Predictor, batch: Batch) -> torch.export.ExportedProgram:
    r"""The predictions of a model as a program that needs neither this package nor the data.

    The program takes ``x``, ``groups`` and those of ``values``, ``offset`` and ``weights`` that
    the example has, for any number of rows, and yields the mean, the variance and the population
    mean of :meth:`MixedModel.predict`: the network, the BLUPs, and variances with every covariance that
    ``predict`` counts; with too many effects for that a warning says so. Codes are those of the fit,
    -1 for a level that is not known; they are not checked, and one that is out of range is an error of
    torch. It is the model of now: an update or a step of training later does not reach it. For ONNX
    hand it to
    ``torch.onnx.export``, which needs the packages onnx and onnxscript; ONNX Runtime has no error
    function in double precision, and so runs no program of a probit link.

    Args:
        model: after :meth:`MixedModel.update`; before it variances are those of the priors.
        batch: an example of two rows or more.

    Raises:
        TypeError: if the model is of another kind, or the batch no dict.
        InputError: if the example has fewer rows or misses a part, or has places or inputs of a zero
            part; if there are no coefficients yet; if the residual's variance depends on a
            covariate; if there is a zero part; or if a row has several responses, or several levels of one
            factor.

    >>> from openreml_nn import MixedModel, RandomEffect
    >>> model = MixedModel(nn.Linear(2, 1), {"user": RandomEffect(3)})
    >>> batch = {"x": torch.zeros(2, 2), "groups": {"user": torch.tensor([0, -1])}}
    >>> program = exported(model, batch)
    >>> mean, variance, population_mean = program.module()(batch["x"], batch["groups"])
    >>> bool((mean == model.predict(batch).mean).all())
    True
    """
    check_instance("model", model, Predictor, "a MixedModel")
    if model.responses > 1:
        raise InputError(f"`model` has {model.responses} responses: expected one")
    x, groups = part(batch, "x"), part(batch, "groups")
    if isinstance(model.family, ZeroInflated):
        raise InputError(
            "`model` has a zero part, whose inputs no program takes: expected a model without one"
        )
    for key in ("zi", "places"):
        if isinstance(batch.get(key), Tensor) or batch.get(key):
            raise InputError(f"`batch[{key!r}]` is given, which no program takes: leave it out")
    further = {key: batch[key] for key in _FURTHER if batch.get(key) is not None}
    n = len(model.predict(batch).mean)
    if bool(model.joint.is_known) and not bool(model.joint.is_exact):
        warn(
            "there are too many random effects for the joint covariance that a program holds: its "
            "predictive variances take those of different factors, and coefficients, as independent"
        )
    if n < 2:
        raise InputError(f"`batch` has {n} rows: expected an example of two or more")
    rows = torch.export.Dim("rows")
    names = {name: groups[name] for name in model.effects()}
    for name, codes in names.items():
        if codes.dim() == 2:
            raise InputError(
                f"group {name!r} has {codes.shape[1]} levels a row, which no program takes: expected one, "
                "or MixedModel.predict(batch)"
            )
    if "values" in further:
        further["values"] = {k: v for k, v in further["values"].items() if k in names}
    shapes = tree_map(lambda tensor: {0: rows}, {"x": x, "groups": names, **further})
    return torch.export.export(_Predicts(model), (x, names), further, dynamic_shapes=shapes)


class _Predicts(nn.Module):
    """What a model predicts of rows, by operations on tensors whose shapes depend on nothing but the
    number of rows."""

    beta: Tensor
    spread: Tensor
    aliases: Tensor
    variance: Tensor

    def __init__(self, model: Predictor) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False)
        self.head, self.precision = model.head, model.precision
        self.mean, self.family = model.mean, model.family
        self.effects = nn.ModuleList(map(_Levels, model.effects().values()))
        self.names = tuple(model.effects())
        self.has_parameters = any(True for _ in model.mean.parameters())
        self.register_buffer("beta", model.beta)
        self.register_buffer("spread", model.beta_covariance)
        self.register_buffer("aliases", model.aliases)
        self.errors = _Errors(model.joint)
        self.residual: nn.Module | None = None
        variance = torch.zeros(1, dtype=torch.float64, device=model.beta.device)
        if self.family is None and _is_network(model.residual):
            self.residual = model.residual
        elif self.family is None:
            variance = structure_of(model.residual).variances({}, 1)
        self.register_buffer("variance", variance)

    def forward(
        self,
        x: Any,
        groups: Mapping[str, Tensor],
        values: Mapping[str, Tensor] | None = None,
        offset: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = mean_of(self.mean, x, self.head)
        dtype = torch.promote_types(output.dtype, self.precision)
        if self.head == "gls":
            X = output[:, : len(self.beta)].to(dtype)
            population = X @ self.beta.to(X)
            if not self.has_parameters:
                population = torch.where(estimable(X, self.aliases), population, torch.nan)
        else:
            population = output.to(dtype)
            X = population.new_zeros(output.shape[0], 0)
        if offset is not None:
            population = population + offset.to(population)
        known = [
            effect(groups[name], x, None if values is None else values.get(name), population)
            for name, effect in zip(self.names, self.effects, strict=True)
        ]
        mean, variance = population, self._residual(x, population, weights)
        for effect in known:
            seen = effect.codes >= 0
            b = effect.values[effect.codes.clamp(min=0)].to(mean)
            mean = mean + torch.where(seen, (effect.z * b).sum(1), 0)
            if not self.errors.is_known:
                seen = torch.zeros_like(seen)
            prior = _square(effect.z, effect.prior().to(mean))
            variance = variance + torch.where(seen, 0, prior)
        variance = variance + self.errors(known, X, self.spread)
        found = Prediction(mean, variance, population)
        if self.family is not None:
            found = on_response(self.family, found, known)
        return found.mean, found.variance, found.population_mean

    def _residual(self, x: Any, like: Tensor, weights: Tensor | None) -> Tensor:
        """Variance of the residual of each row (n,)."""
        found = self.variance.to(like).expand(like.shape)
        if self.residual is not None:
            found = self.residual(x).reshape(like.shape).exp().to(like)
        return found if weights is None else found / weights.to(like)


class _Levels(nn.Module):
    """What is known of the levels of a factor."""

    blup: Tensor
    variance: Tensor
    basis: Tensor
    prior: Tensor

    def __init__(self, effect: RandomEffect) -> None:
        super().__init__()
        self.features = effect.features
        self.is_basis = effect.effects > 1 and effect.features is None
        for name in ("blup", "variance", "basis"):
            self.register_buffer(name, getattr(effect, name))
        self.register_buffer("prior", effect.prior_in_basis())

    def forward(self, codes: Tensor, x: Any, values: Tensor | None, like: Tensor) -> KnownEffect:
        """The rows' effects, see :meth:`RandomEffect.of_rows`."""
        z = values if self.features is None else self.features(x)
        z = like.new_ones(like.shape[0], 1) if z is None else z
        if self.is_basis:
            z = z @ self.basis.to(z)
        return KnownEffect(codes, z.to(like), self.blup, self.variance, lambda: self.prior)


class _Errors(nn.Module):
    """The variance of the error of coefficients and BLUPs, see :class:`JointErrors`.

    Each level of the factor that is eliminated first has room for as many cells as the level that has
    most.
    """

    conditional: Tensor
    covariance: Tensor
    basis: Tensor
    columns: Tensor
    entries: Tensor

    def __init__(self, joint: JointErrors) -> None:
        super().__init__()
        self.is_known, self.is_exact = bool(joint.is_known), bool(joint.is_exact)
        self.first, self.offsets = int(joint.first), joint.offsets.tolist()
        for name in ("conditional", "covariance", "basis"):
            self.register_buffer(name, getattr(joint, name))
        starts = joint.starts
        lengths = starts[1:] - starts[:-1]
        place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=starts.device)
        there = place < lengths[:, None]
        at = torch.where(there, starts[:-1, None] + place, 0)
        columns, entries = joint.columns, joint.entries
        if len(columns):
            columns = torch.where(there, columns[at], 0)
            entries = torch.where(there[:, :, None], entries[at], 0)
        self.register_buffer("columns", columns)
        self.register_buffer("entries", entries)

    def forward(self, effects: list[KnownEffect], X: Tensor, spread: Tensor) -> Tensor:
        n, total = X.shape[0], X.new_zeros(X.shape[0])  # len() would be a constant
        if not self.is_known:
            return total
        if not self.is_exact:
            total = _square(X, spread.to(X))
            for effect in effects:
                own = effect.variances[effect.codes.clamp(min=0)].to(X)
                total = total + torch.where(effect.codes >= 0, _square(effect.z, own), 0)
            return total
        m = len(self.covariance)
        w = self.covariance.new_zeros(n, m)
        for i, effect in enumerate(effects):
            codes = effect.codes.clamp(min=0)
            z = torch.where((effect.codes >= 0)[:, None], effect.z, 0).to(w)
            if i != self.first:
                k = z.shape[1]
                at = codes[:, None] * k + torch.arange(k, device=codes.device)
                w = w.scatter_add(1, at + self.offsets[i], z)
                continue
            total = _square(z, self.conditional[codes])
            if self.columns.numel():
                by = (self.entries[codes] * z[:, None]).sum(2)
                w = w.scatter_add(1, self.columns[codes], -by)
        if r := self.basis.shape[1]:
            w = torch.cat([w[:, : m - r], w[:, m - r :] + X.to(w) @ self.basis], 1)
        return (total + ((w @ self.covariance) * w).sum(1) if m else total).to(X)


def _square(z: Tensor, matrix: Tensor) -> Tensor:
    """z' M z of each row (n,), for one matrix or one a row."""
    return (z[:, None] @ matrix * z[:, None]).sum((1, 2))


def _is_network(residual: nn.Module) -> bool:
    return not isinstance(residual, Matrix | ResidualStructure)
