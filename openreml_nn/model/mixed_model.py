r"""Neural mixed models: a network for the mean, random effects for the grouping.

.. math:: y = f(x) + \sum_t Z_t b_t + e,\qquad b_t \sim N(0, G_t(\theta)),\quad e \sim N(0, R(\theta))

The covariance is the tree of :mod:`openreml_nn.covariance`, built from the
batch; the loss is the likelihood of :class:`REMLLoss`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.covariance.params import module_name, operand_name, user_name
from openreml_nn.likelihood import REMLLoss
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import check_solver
from openreml_nn.likelihood.solver import Solver
from openreml_nn.model.joint import Factor, JointErrors
from openreml_nn.support.checks import (
    check_choice,
    check_count,
    check_instance,
    check_labels,
    check_mapping,
    check_tensor,
)
from openreml_nn.support.checks import found as described
from openreml_nn.terms.design import IndexedDesign

__all__ = ["MixedModel", "Prediction", "RandomEffect", "take"]

Batch = Mapping[str, Any]
HEADS = ("ml", "gls")


class Prediction(NamedTuple):
    """Predictions of some rows, (n,) each.

    Attributes:
        mean: with the random effects of the levels that are known.
        variance: of a new observation: of the random effects given the data, of
            the coefficients (head ``"gls"``), and of the residual.
        population_mean: without random effects.
    """

    mean: Tensor
    variance: Tensor
    population_mean: Tensor


class RandomEffect(nn.Module):
    r"""The random effects of one grouping factor, :math:`b \sim N(0, G)`.

    Args:
        levels: how many levels there are, or their names.
        covariance: of the effects of a level, (k, k), independent between
            levels; or of all levels, (levels · k, levels · k), such as a kernel. By
            default one variance, or an unstructured matrix for several effects.
        effects: k, how many effects each level has, or their names.
        features: a module that yields the effects' values (n, k) from ``x``: random
            slopes in learned features.

    Attributes:
        blup: (levels, k) BLUPs, after :meth:`MixedModel.update`.
        variance: (levels, k, k) their prediction-error variances.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if the covariance has another shape, or a name stands twice.

    >>> RandomEffect(10, effects=2).g.shape
    (20, 20)
    """

    blup: Tensor
    variance: Tensor

    def __init__(
        self,
        levels: int | Sequence[str],
        covariance: Matrix | None = None,
        effects: int | Sequence[str] = 1,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if isinstance(effects, Integral):
            k = check_count("effects", effects, 1)
            self.effect_names = ("(Intercept)",) if k == 1 else tuple(map(str, range(k)))
        else:
            self.effect_names = check_labels("effects", effects)
        effects = len(self.effect_names)
        if isinstance(levels, Integral):
            self.names, q = None, check_count("levels", levels, 1)
        else:
            self.names = check_labels("levels", levels)
            q = len(self.names)
        check_instance("covariance", covariance, (Matrix, NoneType), "a Matrix, or None")
        check_instance("features", features, (nn.Module, NoneType), "a module, or None")
        self.levels = q
        self.effects = effects
        self.features = features
        if covariance is None:
            covariance = ScalarMatrix(1) if effects == 1 else UnstructuredMatrix(effects)
            covariance = covariance.double()
        if covariance.shape == (effects, effects):
            self.g: Matrix = KroneckerProduct(levels=IdentityMatrix(q), effects=covariance)
        elif covariance.shape == (q * effects, q * effects):
            self.g = covariance
        else:
            raise ValueError(
                f"`covariance` is {covariance.shape}: expected {(effects, effects)} for the "
                f"effects of a level, or {(q * effects, q * effects)} for all levels"
            )
        self.is_per_level = covariance.shape == (effects, effects)
        like = next(covariance.parameters(), torch.zeros(1, dtype=torch.float64))
        self.register_buffer("blup", like.new_zeros(q, effects))
        self.register_buffer("variance", like.new_zeros(q, effects, effects))

    def prior(self) -> Tensor:
        """Covariance of the effects of a level that was not seen, (k, k)."""
        if isinstance(self.g, KroneckerProduct) and self.is_per_level:
            own = self.g.operands["effects"]
            assert isinstance(own, Matrix)
            return own()
        k = self.effects
        blocks = self.g().unflatten(1, (-1, k)).unflatten(0, (-1, k))
        return blocks.diagonal(dim1=0, dim2=2).mean(-1)

    def _contribution(self, codes: Tensor, z: Tensor) -> Tensor:
        r""":math:`z^\top \hat b` of each row's level (n,), 0 for one that was not seen.

        Args:
            codes: (n,) levels, -1 for one that was not seen.
            z: (n, k) values of the effects.
        """
        known = (codes >= 0)[:, None]
        return (z * torch.where(known, self.blup[codes.clamp(min=0)].to(z), 0)).sum(1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, effects={self.effects}"


class _Effects(nn.ModuleDict):
    """Random effects by the names of their factors, whatever these are.

    :class:`torch.nn.ModuleDict` refuses names with dots and those of its own methods;
    such a name is percent-encoded in ``state_dict()`` and nowhere else.
    """

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(self._kept(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(self._kept(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(self._kept(key))

    def __contains__(self, key: str) -> bool:
        return super().__contains__(self._kept(key))

    def __iter__(self) -> Iterator[str]:
        return map(user_name, super().__iter__())

    def keys(self) -> Any:
        return dict.fromkeys(self).keys()

    def items(self) -> Any:
        return dict(zip(self, self.values(), strict=True)).items()

    def _kept(self, key: str) -> str:
        return module_name(key, self)


class MixedModel(nn.Module):
    r"""A network with random effects.

    A batch is a dict: ``x``, what the network takes; ``y`` (n,); ``groups``, a
    dict from the name of each random effect to the level codes (n,), -1 for an
    unknown level in prediction; and ``values``, a dict to the values (n, k) of
    effects other than intercepts.

    Args:
        mean: any network; it yields the mean, (n,) or (n, 1), with head ``"ml"``,
            and features (n, p) with head ``"gls"``.
        random: random effects by name.
        residual: covariance of the residual of a row, a (1, 1) matrix; or a
            network that yields its log-variance (n,) or (n, 1) from ``x``. One variance
            by default.
        head: ``"ml"``: the network is the mean, and the loss the full likelihood.
            ``"gls"``: the features are X; the coefficients are profiled out by
            generalised least squares and the loss is the restricted likelihood.
        solver: see :class:`REMLLoss`.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if an option is unknown, or there is no random effect.

    Reference:
        Simchoni and Rosset, Journal of Machine Learning Research 24 (2023), eq. 3.

    Example::

        model = MixedModel(network, {"user": RandomEffect(1000)})
        loss = model.loss({"x": x, "y": y, "groups": {"user": codes}})
        loss.backward()
        model.update({"x": x, "y": y, "groups": {"user": codes}})
        model.predict({"x": new_x, "groups": {"user": new_codes}}).mean
    """

    beta: Tensor
    beta_covariance: Tensor

    def __init__(
        self,
        mean: nn.Module,
        random: Mapping[str, RandomEffect],
        residual: Matrix | nn.Module | None = None,
        head: str = "ml",
        solver: str | Solver = "auto",
    ) -> None:
        super().__init__()
        check_instance("mean", mean, nn.Module, "a network, an nn.Module")
        check_mapping("random", random, RandomEffect)
        check_instance(
            "residual", residual, (nn.Module, NoneType), "a Matrix or a network, or None"
        )
        check_choice("head", head, HEADS)
        check_solver(solver)
        if not random:
            raise ValueError("`random` is empty: expected a RandomEffect for each grouping factor")
        self.mean = mean
        self.random = _Effects(random)
        self.residual = ScalarMatrix(1).double() if residual is None else residual
        self.head = head
        self.solver = solver
        self.register_buffer("beta", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("beta_covariance", torch.zeros(0, 0, dtype=torch.float64))
        self.joint = JointErrors()
        self._kept: tuple[list[Tensor], REMLLoss] | None = None

    @property
    def method(self) -> str:
        """``"reml"`` with head ``"gls"``, else ``"ml"``."""
        return "reml" if self.head == "gls" else "ml"

    def covariance_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the covariance: what :class:`AIREML` is for."""
        for effect in self.effects().values():
            yield from effect.g.parameters()
        if isinstance(self.residual, Matrix):
            yield from self.residual.parameters()

    def network_parameters(self) -> Iterator[nn.Parameter]:
        """All other parameters."""
        own = {id(p) for p in self.covariance_parameters()}
        return (p for p in self.parameters() if id(p) not in own)

    def effects(self) -> dict[str, RandomEffect]:
        """The random effects by name."""
        return dict(self.random.items())

    # ------------------------------------------------------------------ likelihood

    def forward(self, batch: Batch) -> Tensor:
        """What the network yields: the mean (n,), or features (n, p) with head ``"gls"``."""
        x = _part(batch, "x")
        _check_inputs(x)
        try:
            found = self.mean(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"`mean` fails for batch['x'], {described(x)}: {reason}; expected what the network "
                "takes, in its shape, dtype and device"
            ) from error
        check_instance("mean(x)", found, Tensor)
        if self.head == "gls":
            if found.dim() != 2:
                raise ValueError(
                    f"`mean` yields {tuple(found.shape)}: expected features (n, p) with head 'gls'"
                )
            return found
        if found.dim() == 2 and found.shape[1] == 1:
            found = found[:, 0]
        if found.dim() != 1:
            raise ValueError(
                f"`mean` yields {tuple(found.shape)}: expected (n,) or (n, 1) with head 'ml'; "
                "with head 'gls' it may yield features (n, p)"
            )
        return found

    def loss(self, batch: Batch) -> Tensor:
        """Negative (restricted) log-likelihood of the batch, divided by its rows.

        A batch of whole groups is a part of the likelihood of independent groups; one
        that cuts groups is a composite likelihood.

        Raises:
            ValueError: if the batch is empty, a group is missing, a code is out of range,
                shapes do not fit or the network yields NaN: the message says what to do.
        """
        return self.loss_of(self(batch), batch)

    def loss_of(self, output: Tensor, batch: Batch) -> Tensor:
        """The same for what the network has yielded."""
        loss, y, X = self.data(output, batch)
        return loss(y, X)

    @torch.no_grad()
    def outputs(self, x: Any, rows: int) -> Tensor:
        """What the network yields, ``rows`` at a time, without recording and without dropout."""
        _check_inputs(x)
        rows = check_count("rows", rows, 1)
        with _eval(self):
            return torch.cat([self({"x": part}) for part in _split(x, rows)])

    def objective(self, batch: Batch, output: Tensor | None = None) -> Objective:
        """The likelihood in the covariance parameters alone, for an optimizer.

        Args:
            batch: the data.
            output: what the network has yielded for them, if it is known.
        """
        with torch.no_grad():
            loss, y, X = self.data(self(batch) if output is None else output, batch)
            return loss.objective(y, X)

    def backward_in_parts(
        self,
        batch: Batch,
        rows: int,
        own: slice = slice(None),
        gather: Callable[[Tensor, int], Tensor] = lambda output, n: output,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> Tensor:
        """Accumulate the exact gradient of the loss in the memory of a few rows.

        A first pass without recording yields the network's output for all rows, the
        likelihood its derivative by each of them, and a second pass, ``rows`` at a time,
        takes it back through the network.

        Args:
            batch: the data.
            rows: rows that the network sees at a time.
            own: rows that it sees at all, where several processes share them.
            gather: makes all processes' outputs of theirs.
            backward: takes the place of ``Tensor.backward``.

        Returns:
            The loss.
        """
        x, y, rows = _part(batch, "x"), _part(batch, "y"), check_count("rows", rows, 1)
        _check_inputs(x)
        check_tensor("y", y, ("n",), "floating", False)
        parts = _split(take(x, own), rows)
        devices = {t.device for t in self.parameters() if t.is_cuda}
        # Random numbers as before, so that both passes draw the same dropout.
        with torch.no_grad(), torch.random.fork_rng(devices):
            outputs = torch.cat([self({"x": x}) for x in parts])
        outputs.requires_grad_()
        loss = self.loss_of(gather(outputs, len(y)), batch)
        backward(loss)
        assert outputs.grad is not None
        for x, part in zip(parts, outputs.grad.split(rows), strict=True):
            self({"x": x}).backward(part)
        return loss.detach()

    def data(self, output: Tensor, batch: Batch) -> tuple[REMLLoss, Tensor, Tensor]:
        """The likelihood of a batch with its y and X, the mean taken off y with head ``"ml"``."""
        y = _part(batch, "y")
        check_tensor(
            "output", output, ("n", "p")[: 2 if self.head == "gls" else 1], "floating", False
        )
        n = len(output)
        if not n:
            raise ValueError("the batch is empty: drop it, or use drop_last=True")
        check_tensor("y", y, kind="floating", finite=False)
        if y.dim() != 1 or len(y) != n:
            raise ValueError(
                f"`y` has shape {tuple(y.shape)} but `mean` yields {n} rows: expected ({n},); "
                "a column is made a vector by y[:, 0]"
            )
        if not bool(torch.isfinite(output.detach()).all()):
            raise ValueError(
                "the network's output is not finite: lower the learning rate, clip gradients "
                "or look for NaN in `x`; expected finite numbers"
            )
        loss = self._loss(batch, n)
        dtype = torch.promote_types(y.dtype, output.dtype)
        if dtype != y.dtype:
            raise ValueError(
                f"`y` is {y.dtype} but `mean` yields {output.dtype}: make y as precise, by "
                f"y.to({dtype}), or the network less"
            )
        y, output = y.to(dtype), output.to(dtype)
        if self.head == "gls":
            return loss, y, output
        return loss, y - output, output.new_zeros(n, 0)

    def _loss(self, batch: Batch, n: int) -> REMLLoss:
        """The likelihood for the batch's groups; kept while they are the same tensors."""
        pairs = [self._group(name, effect, batch, n) for name, effect in self.effects().items()]
        tensors = [t for pair in pairs for t in pair if t is not None]
        fixed = isinstance(self.residual, Matrix) and not any(t.requires_grad for t in tensors)
        if fixed and self._kept is not None:
            kept = self._kept[0]
            if len(kept) == len(tensors) and all(map(_same, kept, tensors)):
                return self._kept[1]
        parts: dict[str, Matrix] = {}
        for (name, effect), (codes, values) in zip(self.effects().items(), pairs, strict=True):
            z = DummyMatrix.from_codes(codes, effect.levels, values)
            operand = operand_name(name, {"residual"})
            parts[operand] = CovariancePropagation(z=z, g=effect.g)
        parts["residual"] = self._residual(batch, n)
        loss = REMLLoss(Sum(parts), self.method, self.solver)
        self._kept = (tensors, loss) if fixed else None
        return loss

    def _group(
        self, name: str, effect: RandomEffect, batch: Batch, n: int
    ) -> tuple[Tensor, Tensor | None]:
        """Codes and values of one random effect."""
        groups = _part(batch, "groups")
        check_mapping("batch['groups']", groups)
        if name not in groups:
            raise ValueError(
                f"the batch has no group {name!r}: expected batch['groups'][{name!r}] with the "
                f"level codes; it has {sorted(groups)}"
            )
        codes = groups[name]
        check_instance(f"batch['groups'][{name!r}]", codes, Tensor, f"a tensor of {n} integers")
        if codes.shape != (n,) or codes.is_floating_point() or codes.is_complex() or codes.is_meta:
            raise ValueError(f"group {name!r} is {described(codes)}: expected {n} integers")
        if codes.dtype == torch.bool:
            raise TypeError(f"group {name!r} is {described(codes)}: expected {n} integers")
        if n and not (int(codes.min()) >= -1 and int(codes.max()) < effect.levels):
            worst = int(codes.max()) if int(codes.max()) >= effect.levels else int(codes.min())
            raise ValueError(
                f"group {name!r} has the code {worst}: expected 0 to {effect.levels - 1}, or -1 "
                "for a level that is not known"
            )
        if effect.features is not None:
            return codes, effect.features(batch["x"])
        given = batch.get("values", {})
        check_mapping("batch['values']", given)
        values = given.get(name)
        if values is None and effect.effects > 1:
            raise ValueError(
                f"random effect {name!r} has {effect.effects} effects: expected their values as "
                f"batch['values'][{name!r}], ({n}, {effect.effects})"
            )
        if values is not None:
            check_instance(f"batch['values'][{name!r}]", values, Tensor, "a tensor")
            if values.shape != (n, effect.effects):
                raise ValueError(
                    f"values of {name!r} have shape {tuple(values.shape)}: "
                    f"expected {(n, effect.effects)}"
                )
            check_tensor(f"batch['values'][{name!r}]", values)
        return codes, values

    def _residual(self, batch: Batch, n: int) -> Matrix:
        if isinstance(self.residual, Matrix):
            return KroneckerProduct(rows=IdentityMatrix(n), residual=self.residual)
        scale = (self.residual(batch["x"]).reshape(n) / 2).exp()
        unit = ScalarMatrix(n).to(scale.dtype)
        unit.fix("sigma^2", 0.0)
        codes = torch.arange(n, device=scale.device)
        return CovariancePropagation(z=DummyMatrix.from_codes(codes, n, scale), g=unit)

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def update(self, batch: Batch, output: Tensor | None = None) -> None:
        """Compute BLUPs and their variances from all rows at the present parameters.

        They are stored in buffers and travel with the checkpoint. With head ``"gls"`` so
        do the coefficients.

        Args:
            batch: the data.
            output: what the network has yielded for them, if it is known.
        """
        with _eval(self):
            loss, y, X = self.data(self(batch) if output is None else output, batch)
            objective = loss.objective(y, X)
        evaluation, fixed = objective.evaluate(), objective.problem.fixed
        for effects in evaluation.random_effects():
            effect = self.effects()[user_name(effects.name)]
            effect.blup.copy_(effects.values.reshape(effect.blup.shape))
            effect.variance.copy_(effects.variances.reshape(effect.variance.shape))
        at = torch.tensor(fixed.columns, dtype=torch.long, device=y.device)
        p = X.shape[1]
        basis = fixed.y.new_zeros(p, len(at))
        basis[at] = fixed.T
        if self.head == "gls":
            beta = fixed.y.new_zeros(p)
            beta[at] = fixed.coefficients(evaluation.gamma)
            self.beta = beta
            self.beta_covariance = (
                basis @ torch.cholesky_inverse(evaluation.gamma_factor) @ basis.mT
            )
        self._update_joint(batch, fixed.Q, basis)

    def _update_joint(self, batch: Batch, Q: Tensor, basis: Tensor) -> None:
        n, factors = len(Q), []
        for name, effect in self.effects().items():
            codes, values = self._group(name, effect, batch, n)
            G = effect.prior() if effect.is_per_level else effect.g()
            design = IndexedDesign(codes, values, effect.levels)
            factors.append(Factor(design, G.to(Q), effect.is_per_level))
        with _eval(self):
            variance = self._residual_variance(batch, n).to(Q)
        self.joint.update(factors, Q, 1 / variance, basis)

    def _residual_variance(self, batch: Batch, n: int) -> Tensor:
        """Variance of the residual of each row (n,)."""
        if isinstance(self.residual, Matrix):
            return self.residual().reshape(1).expand(n)
        return self.residual(batch["x"]).reshape(n).exp()

    def blups(self) -> pd.DataFrame:
        """BLUPs as a table: group, level, effect, blup, and std_error, the root of the
        prediction-error variance."""
        parts = []
        for name, effect in self.effects().items():
            q, k = effect.blup.shape
            spread = effect.variance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
            columns = {
                "group": name,
                "level": np.repeat(effect.names or range(q), k),
                "effect": np.tile(np.array(effect.effect_names, dtype=object), q),
                "blup": effect.blup.flatten().numpy(force=True),
                "std_error": spread.flatten().numpy(force=True),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def intercepts(self) -> list[RandomEffect]:
        """Random effects that are independent intercepts."""
        effects = self.effects().values()
        return [e for e in effects if e.effects == 1 and e.features is None and e.is_per_level]

    def random_part(self, batch: Batch) -> Tensor:
        r""":math:`\sum_t z_t^\top \hat b_t` of each row (n,), zero for unknown levels."""
        groups = _part(batch, "groups")
        check_mapping("batch['groups']", groups, Tensor)
        n = next((len(codes) for codes in groups.values() if codes.dim()), 0)
        total = self.effects()[next(iter(self.random))].blup.new_zeros(n)
        for name, effect in self.effects().items():
            codes, values = self._group(name, effect, batch, n)
            z = total.new_ones(n, 1) if values is None else values.to(total)
            total = total + effect._contribution(codes, z)
        return total

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Mean and variance of new observations, for known and for unknown levels.

        The variance counts every covariance, of BLUPs of different factors and of coefficients
        with BLUPs, where beside the widest factor of independent levels there are at most 2,000
        effects and coefficients. With more, a warning says that it takes them as independent.
        Before :meth:`update` it is that of the priors.

        Raises:
            ValueError: as in :meth:`loss`, or before :meth:`update` with head ``"gls"``.
        """
        with _eval(self):
            output = self(batch)
            n = len(output)
            if self.head == "gls":
                p = len(self.beta)
                if not p:
                    raise ValueError("there are no coefficients yet: call update() with the data")
                X = output[:, :p].to(self.beta)
                population = X @ self.beta
            else:
                population = output.double()
                X = population.new_zeros(n, 0)
            mean, variance = population.clone(), torch.zeros_like(population)
            designs = []
            for name, effect in self.effects().items():
                codes, values = self._group(name, effect, batch, n)
                z = mean.new_ones(n, 1) if values is None else values.to(mean)
                mean = mean + effect._contribution(codes, z)
                unknown = (codes < 0) | ~self.joint.is_known
                prior = torch.einsum("nk,kl,nl->n", z, effect.prior().to(z), z)
                variance = variance + torch.where(unknown, prior, 0)
                known = torch.where(unknown, -1, codes)
                designs.append(IndexedDesign(known, z, effect.levels))
            variance = variance + self._error_variance(designs, X)
            variance = variance + self._residual_variance(batch, n)
        return Prediction(mean, variance, population)

    def _error_variance(self, designs: list[IndexedDesign], X: Tensor) -> Tensor:
        """Variance of the error of the coefficients and of the BLUPs of known levels (n,)."""
        if bool(self.joint.is_exact):
            return self.joint.variance(designs, X).to(X)
        if bool(self.joint.is_known):
            warnings.warn(
                "predictive variances take random effects of different factors, and coefficients, "
                "as independent: there are too many for their joint covariance",
                RuntimeWarning,
                stacklevel=3,
            )
        found = X.new_zeros(len(X))
        if self.head == "gls":
            found = torch.einsum("np,pq,nq->n", X, self.beta_covariance, X)
        for design, effect in zip(designs, self.effects().values(), strict=True):
            assert design.values is not None
            spread = effect.variance[design.codes].to(X)
            found = found + torch.einsum("nk,nkl,nl->n", design.values, spread, design.values)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The number of coefficients is known only once there are features.
        for name in ("beta", "beta_covariance"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _part(batch: Batch, key: str) -> Any:
    """A part of a batch that must be there."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"`batch` is {described(batch)}: expected a dict with 'x', 'y' and 'groups'"
        )
    if key not in batch:
        raise ValueError(f"`batch` has no {key!r}: expected it beside {list(map(str, batch))}")
    return batch[key]


def _check_inputs(x: Any) -> None:
    """Refuse what no network takes; one may have inputs of a class of its own."""
    if isinstance(x, Mapping | tuple | list) and len(x):
        for part in x.values() if isinstance(x, Mapping) else x:
            _check_inputs(part)
        return
    kinds = Mapping | tuple | list | np.ndarray | pd.DataFrame | str | bytes | complex | float | int
    if x is None or isinstance(x, kinds | type):
        raise TypeError(
            f"`batch['x']` is {described(x)}: expected a tensor, or a tuple, list or dict of them"
        )
    if isinstance(x, Tensor) and x.is_meta:
        raise ValueError(f"`batch['x']` is {described(x)}, which holds no values: expected some")


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """Without dropout and the like, for a while."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def take(x: Any, rows: slice | Tensor) -> Any:
    """Some rows of a tensor, or of each in a tuple, list or dict."""
    if isinstance(x, Mapping):
        return {key: take(value, rows) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(take(value, rows) for value in x)
    return x[rows]


def _split(x: Any, rows: int) -> list[Any]:
    """Some rows at a time."""
    first = x
    while not isinstance(first, Tensor):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return [take(x, slice(i, i + rows)) for i in range(0, max(len(first), 1), rows)]


def _same(kept: Tensor, given: Tensor) -> bool:
    return kept is given
