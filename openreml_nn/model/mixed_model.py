r"""Mixed models: a mean, linear or a network, with random effects for the grouping.

.. math:: y = f(x) + \sum_t Z_t b_t + e,\qquad b_t \sim N(0, G_t(\theta)),\quad e \sim N(0, R(\theta))

The covariance is the tree of :mod:`openreml_nn.covariance`, built from the
batch; the loss is the likelihood of :class:`REMLLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from openreml_nn.covariance import DummyMatrix, Matrix, Operator, ScalarMatrix, Sum
from openreml_nn.covariance.params import operand_name
from openreml_nn.families import Family
from openreml_nn.likelihood import LaplaceLoss, REMLLoss
from openreml_nn.likelihood.effects import Coefficients, RandomEffects
from openreml_nn.likelihood.fixed import estimable
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import check_solver
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.dense import check_method
from openreml_nn.model.batch import (
    Batch,
    check_inputs,
    part,
    row_values,
    rows_of,
    split,
    take,
)
from openreml_nn.model.random_effect import Effects, RandomEffect
from openreml_nn.model.residual import ResidualStructure, structure_of
from openreml_nn.result.equations import Equations
from openreml_nn.result.joint import JointErrors
from openreml_nn.result.prediction import (
    KnownEffect,
    Prediction,
    log_predictive,
    lowered,
    normal_interval,
    on_response,
    predicted,
)
from openreml_nn.result.result import FixedEffects
from openreml_nn.result.tables import table_of_blups
from openreml_nn.support.checks import (
    check_choice,
    check_count,
    check_instance,
    check_mapping,
    check_tensor,
)
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.terms.kernel import private, same_content
from openreml_nn.terms.term import Term

__all__ = ["HEADS", "MixedModel"]

HEADS = ("ml", "gls")

_Coded = Mapping[str, tuple[Tensor, Tensor | None]]


class MixedModel(nn.Module):
    r"""A mixed model: a linear mean or any network, with random effects.

    A batch is a dict: ``x``, what the mean takes; ``y`` (n,); ``groups``, a
    dict from the name of each random effect to the level codes (n,), -1 for an
    unknown level, which in the likelihood is a level of its own each time; and, where they are
    needed, ``values``, a dict to the values (n, k) of effects other than intercepts; ``weights``
    (n,), by which the residual variance of each row is divided; ``offset`` (n,), a known part of the
    mean; and ``residual`` (n,), cells of the rows for a residual within groups.

    Args:
        mean: any network; it yields the mean, (n,) or (n, 1), with head ``"ml"``,
            and features (n, p) with head ``"gls"``. A linear mixed model has ``nn.Identity()``, with
            the model matrix as ``x``.
        random: random effects by name.
        residual: covariance of the residual of a row, a (1, 1) matrix; or that (T, T) of the
            positions within a group of rows, where ``batch["residual"]`` is the cell of each
            row, its group times T plus its position; or a network that yields the log-variance (n,)
            or (n, 1) of each row from ``x``. One variance by default.
        head: ``"ml"``: the network is the mean. ``"gls"``: the features are X, whose coefficients are
            profiled out by generalised least squares.
        family: of the response given the linear predictor, which then is what the network and the
            random effects yield; it has the residual's place. Gaussian by default.
        method: ``"reml"``, the restricted likelihood, or ``"ml"``, the full one; by default the
            first with head ``"gls"`` and the second with head ``"ml"``, which has no coefficients
            to correct for, and with a family.
        solver: see :class:`REMLLoss`, with a family :class:`LaplaceLoss`.
        quadrature: see :class:`LaplaceLoss`.

    Raises:
        TypeError: if an argument is of another kind.
        InputError: if an option is unknown, or does not fit the others.

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
    aliases: Tensor

    def __init__(
        self,
        mean: nn.Module,
        random: Mapping[str, RandomEffect],
        residual: Matrix | nn.Module | None = None,
        head: str = "ml",
        family: Family | None = None,
        *,
        method: str | None = None,
        solver: str | Solver = "auto",
        quadrature: int = 1,
    ) -> None:
        super().__init__()
        check_instance("mean", mean, nn.Module, "a network, an nn.Module")
        check_mapping("random", random, RandomEffect)
        check_choice("head", head, HEADS)
        check_instance("family", family, (Family, NoneType), "a Family, or None")
        if family is not None and residual is not None:
            raise InputError(
                f"`residual` is {described(residual)} beside a family, which has its own: leave it out"
            )
        if family is None and quadrature != 1:
            raise InputError(f"`quadrature` is {quadrature} without a family: leave it out")
        if method is None:
            method = "reml" if head == "gls" and family is None else "ml"
        check_method(method)
        if head == "ml" and method == "reml":
            raise InputError(
                "`method` is 'reml' with head 'ml': expected 'ml', because REML corrects for "
                "coefficients, which head 'gls' has"
            )
        check_solver(solver)
        if family is not None:
            LaplaceLoss(ScalarMatrix(1), family, method, quadrature, solver)  # refuses its options
        if not random and residual is None and (head == "ml" or family is not None):
            raise InputError(
                "`random` is empty: expected a RandomEffect for each grouping factor, or head 'gls'"
            )
        self.mean = mean
        self.random = Effects(random)
        self.quadrature = quadrature
        if residual is None:
            residual = ScalarMatrix(1).double() if family is None else family
        self.residual = residual
        if family is None:
            structure_of(residual)
        self.head = head
        self.method = method
        self.solver = solver
        none = torch.zeros(0, 0, dtype=torch.float64)
        self.register_buffer("beta", none.reshape(0))
        self.register_buffer("beta_covariance", none)
        self.register_buffer("aliases", none)
        self.joint = JointErrors()
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What was prepared for some rows can be had again; a copy need not carry it.
        return {**self.__dict__, "_kept": None}

    @property
    def family(self) -> Family | None:
        """The family of the response, which has the residual's place; None for a Gaussian one."""
        return self.residual if isinstance(self.residual, Family) else None

    def covariance_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the covariance: what :class:`AIREML` is for."""
        for effect in self.effects().values():
            yield from effect.g.parameters()
        if isinstance(self.residual, Matrix | ResidualStructure):
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
        x = part(batch, "x")
        check_inputs(x)
        try:
            found = self.mean(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"`mean` fails for batch['x'], {described(x)}: {reason}; expected what the network "
                "takes, in its shape, dtype and device"
            ) from error
        check_instance("mean(x)", found, Tensor)
        if self.head == "gls":
            if found.dim() != 2:
                raise InputError(
                    f"`mean` yields {tuple(found.shape)}: expected features (n, p) with head 'gls'"
                )
            return found
        if found.dim() == 2 and found.shape[1] == 1:
            found = found[:, 0]
        if found.dim() != 1:
            raise InputError(
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
        if self.family is not None:
            marginal, y, eta, X = self.marginal(output, batch)
            return marginal(y, eta, X) / len(eta)
        loss, y, X = self.data(output, batch)
        return loss(y, X)

    @torch.no_grad()
    def outputs(self, x: Any, rows: int) -> Tensor:
        """What the network yields, ``rows`` at a time, without recording and without dropout."""
        check_inputs(x)
        rows = check_count("rows", rows, 1)
        with evaluating(self):
            return torch.cat([self({"x": some}) for some in split(x, rows)])

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
        x, y, rows = part(batch, "x"), part(batch, "y"), check_count("rows", rows, 1)
        check_inputs(x)
        check_tensor("y", y, ("n",), "floating", False)
        parts = split(take(x, own), rows)
        devices = {t.device for t in self.parameters() if t.is_cuda}
        # Random numbers as before, so that both passes draw the same dropout.
        with torch.no_grad(), torch.random.fork_rng(devices):
            outputs = torch.cat([self({"x": x}) for x in parts])
        outputs.requires_grad_()
        loss = self.loss_of(gather(outputs, len(y)), batch)
        backward(loss)
        assert outputs.grad is not None
        for x, cotangent in zip(parts, outputs.grad.split(rows), strict=True):
            self({"x": x}).backward(cotangent)
        return loss.detach()

    def data(self, output: Tensor, batch: Batch) -> tuple[REMLLoss, Tensor, Tensor]:
        """The likelihood of a batch with its y and X, the mean taken off y with head ``"ml"``."""
        if self.family is not None:
            raise InputError(
                "`family` is not Gaussian: the likelihood is that of marginal(), and no "
                "average-information steps are taken on it"
            )
        y = part(batch, "y")
        check_tensor(
            "output", output, ("n", "p")[: 2 if self.head == "gls" else 1], "floating", False
        )
        n = len(output)
        if not n:
            raise InputError("the batch is empty: drop it, or use drop_last=True")
        check_tensor("y", y, kind="floating", finite=False)
        if y.dim() != 1 or len(y) != n:
            raise InputError(
                f"`y` has shape {tuple(y.shape)} but `mean` yields {n} rows: expected ({n},); "
                "a column is made a vector by y[:, 0]"
            )
        if not bool(torch.isfinite(output.detach()).all()):
            raise InputError(
                "the network's output is not finite: lower the learning rate, clip gradients "
                "or look for NaN in `x`; expected finite numbers"
            )
        dtype = torch.promote_types(y.dtype, output.dtype)
        if dtype != y.dtype:
            raise InputError(
                f"`y` is {y.dtype} but `mean` yields {output.dtype}: make y as precise, by "
                f"y.to({dtype}), or the network less"
            )
        loss = self._loss(batch, n)
        assert isinstance(loss, REMLLoss)
        offset = row_values(batch, "offset", n)
        y, output = y.to(dtype), output.to(dtype)
        if offset is not None:
            y = y - offset.to(y)
        if self.head == "gls":
            return loss, y, output
        return loss, y - output, output.new_zeros(n, 0)

    def marginal(
        self, output: Tensor, batch: Batch
    ) -> tuple[LaplaceLoss, Tensor, Tensor, Tensor | None]:
        """The likelihood of a batch by the family, with what it takes: y, the known part of the linear
        predictor, and X with head ``"gls"``."""
        assert self.family is not None
        y, n = part(batch, "y"), len(output)
        if batch.get("weights") is not None:
            raise InputError(
                f"`weights` is {described(batch['weights'])} beside a family: expected none, as they "
                "divide the residual variance of a Gaussian response"
            )
        if not n:
            raise InputError("the batch is empty: drop it, or use drop_last=True")
        if not bool(torch.isfinite(output.detach()).all()):
            raise InputError(
                "the network's output is not finite: lower the learning rate, clip gradients "
                "or look for NaN in `x`; expected finite numbers"
            )
        loss = self._loss(batch, n)
        assert isinstance(loss, LaplaceLoss)
        offset = row_values(batch, "offset", n)
        known = output.new_zeros(n) if offset is None else offset.to(output)
        if self.head == "gls":
            return loss, y, known, output
        return loss, y, known + output, None

    def covariance(self, batch: Batch) -> Matrix:
        r"""The covariance :math:`V = \sum_t Z_t G_t Z_t^\top + R` of the rows of a batch, a tree
        with this model's parameters.

        Its operands are the random effects by name and, after them, ``residual``, which with a family
        is none.

        Raises:
            TypeError, InputError: as :meth:`loss`.
        """
        return self._tree(batch, self._coded(batch, n := rows_of(batch)), n)

    def _coded(self, batch: Batch, n: int) -> _Coded:
        """Codes and values of each random effect."""
        return {name: effect.coded(name, batch, n) for name, effect in self.effects().items()}

    def _tree(self, batch: Batch, coded: _Coded, n: int) -> Matrix:
        parts: dict[str, Matrix] = {}
        for name, effect in self.effects().items():
            operand = operand_name(name, {"residual"})
            parts[operand] = effect.covariance(name, *coded[name])
        if self.family is not None:
            return Sum(parts)
        return Sum(parts | structure_of(self.residual).operands(batch, n))

    def _loss(self, batch: Batch, n: int) -> REMLLoss | LaplaceLoss:
        """The likelihood for the batch's rows, the last one where theirs are the same."""
        coded = self._coded(batch, n)
        own = [effect.g for effect in self.effects().values()]
        modules: list[object] = [
            *own,
            self.residual,
            *map(type, (*own, self.residual)),
            self.method,
            self.solver,
        ]
        modules += [self.quadrature]
        rows = [t for pair in coded.values() for t in pair]
        rows += [batch.get("weights"), batch.get("residual")]
        moves = any(t is not None and t.requires_grad for t in rows)
        kept = self._kept
        if kept is not None and not moves and kept.is_of(modules, rows):
            return kept.loss
        if not moves:
            # Copies, which nobody else can change.
            rows = [None if t is None else private(t) for t in rows]
            pairs = iter(rows)
            coded = {name: (next(pairs), next(pairs)) for name in coded}  # type: ignore[misc]
        tree = self._tree(batch, coded, n)
        loss: REMLLoss | LaplaceLoss
        if self.family is None:
            loss = REMLLoss(tree, self.method, self.solver)
        else:
            loss = LaplaceLoss(tree, self.family, self.method, self.quadrature, self.solver)
        fixed = not moves and isinstance(self.residual, Matrix | Family)
        self._kept = _Kept(modules, rows, loss) if fixed else None
        return loss

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
        with evaluating(self):
            output = self(batch) if output is None else output
            if self.family is not None:
                self._update_marginal(*self.marginal(output, batch))
                return
            loss, y, X = self.data(output, batch)
            objective = loss.objective(y, X)
        evaluation, fixed = objective.evaluate(), objective.problem.fixed
        self.remember(evaluation.random, evaluation.fixed, fixed.aliases)
        basis = fixed.T.new_zeros(len(fixed.aliases), len(fixed.T))
        basis[fixed.columns] = fixed.T
        self.remember_errors(loss.covariance, lambda: (fixed.Q, basis), len(fixed.T))

    def _update_marginal(self, loss: LaplaceLoss, y: Tensor, eta: Tensor, X: Tensor | None) -> None:
        """The same with a family: modes and their conditional variances."""
        found = loss.evaluate(y, eta, X)
        p = 0 if X is None else X.shape[1]
        fixed = Coefficients(found.coefficients, found.coefficient_covariance, tuple(range(p)))
        self.remember(found.random, fixed, found.coefficients.new_zeros(p, 0))
        basis = torch.eye(p).to(found.coefficients)
        features = found.predictor.new_zeros(len(y), 0) if X is None else X.to(basis)
        self.remember_errors(loss.covariance, lambda: (features, basis), p, found.residual)

    @torch.no_grad()
    def remember(
        self, random: Sequence[RandomEffects], fixed: Coefficients | FixedEffects, aliases: Tensor
    ) -> None:
        """Take up BLUPs and coefficients.

        Args:
            random: BLUPs of each random effect.
            fixed: coefficients of the kept columns of X, with their covariance.
            aliases: (p, d) the null space of X with all its columns.
        """
        effects = {operand_name(name, {"residual"}): e for name, e in self.effects().items()}
        for found in random:
            if found.name not in effects:
                continue  # of the rows' own errors
            effect = effects[found.name]
            q, k = effect.blup.shape
            # Rows of no known level had levels of their own, which come after the others.
            effect.blup.copy_(found.values.reshape(-1, k)[:q])
            effect.variance.copy_(found.variances.reshape(-1, k, k)[:q])
        at, p = torch.tensor(fixed.columns, dtype=torch.long, device=aliases.device), len(aliases)
        self.beta = aliases.new_zeros(p).index_copy(0, at, fixed.estimate.to(aliases))
        self.beta_covariance = aliases.new_zeros(p, p)
        self.beta_covariance[at[:, None], at] = fixed.covariance.to(aliases)
        self.aliases = aliases.clone()

    @torch.no_grad()
    def remember_errors(
        self,
        covariance: Matrix,
        fixed: Callable[[], tuple[Tensor, Tensor]],
        r: int,
        residual: Term | None = None,
    ) -> None:
        """Take up what the variances of predictions need, which is computed when one is asked for.

        Args:
            covariance: of the rows, as :meth:`covariance` makes it.
            fixed: yields X in an orthonormal basis, Q (n, r), and the basis (p, r).
            r: number of coefficients.
            residual: what stands for the residual where a family has its place.
        """
        assert isinstance(covariance, Sum)
        parts = list(covariance.operands.values())
        own = [part for part in parts[len(self.random) :] if isinstance(part, Matrix)]
        terms = [term.detach() for part in own for term in part.terms()]
        if residual is not None:
            terms = [residual]
        random = [part for part in parts[: len(self.random)] if isinstance(part, Operator)]
        pairs = [part.operands.values() for part in random]
        designs = [z.design for z, _ in pairs if isinstance(z, DummyMatrix)]
        self.joint.update(
            [lowered(g).map(Tensor.detach) for _, g in pairs if isinstance(g, Matrix)],
            [(design.levels, design.effects) for design in designs],
            r,
            lambda: Equations.of(designs, terms, *fixed()),
        )

    def blups(self) -> pd.DataFrame:
        """BLUPs as a table: group, level, effect, blup, and std_error, the root of the
        prediction-error variance."""
        return table_of_blups(
            (name, effect.names or range(effect.levels), effect.effect_names, *effect.known())
            for name, effect in self.effects().items()
        )

    def intercepts(self) -> list[RandomEffect]:
        """Random effects that are independent intercepts."""
        effects = self.effects().values()
        return [e for e in effects if e.effects == 1 and e.features is None and e.is_per_level]

    def random_part(self, batch: Batch) -> Tensor:
        r""":math:`\sum_t z_t^\top \hat b_t` of each row (n,), zero for unknown levels."""
        n = rows_of(batch)
        total = self.joint.covariance.new_zeros(n)
        for name, (codes, values) in self._coded(batch, n).items():
            effect = self.effects()[name]
            z = total.new_ones(n, 1) if values is None else values
            total = total + effect.contribution(codes, z.to(effect.blup))
        return total

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Mean and variance of new observations, for known and for unknown levels.

        The variance counts every covariance, of BLUPs of different factors and of coefficients
        with BLUPs, where beside the widest factor of independent levels there are at most 2,000
        effects and coefficients. With more, a warning says that it takes them as independent. The
        residual of a new observation is independent of those of the data; its variance is divided
        by the row's weight where the batch has weights. Before :meth:`update` the variance is that
        of the priors. With a family all is on the scale of the response: means are expectations over the
        random effects, given the data or, of the population, without them. Where x is a model matrix, of a mean without parameters, the mean is NaN for a
        row whose expectation the data do not say.

        Raises:
            TypeError, InputError: as in :meth:`loss`, or before :meth:`update` with head ``"gls"``.
        """
        return self.interval(batch)[0]

    @torch.no_grad()
    def interval(self, batch: Batch, level: float = 0.95) -> tuple[Prediction, Tensor, Tensor]:
        """Predictions with the lower and the upper end of an interval for each row, (n,) each.

        For a Gaussian response it holds a new observation with the probability ``level``; with a
        family, the mean of new observations of the row.

        Raises:
            TypeError, InputError: as in :meth:`predict`, or if the level is not between 0 and 1.
        """
        found, effects = self._predictor(batch)
        if self.family is not None:
            return on_response(self.family, found, effects, level)
        return found, *normal_interval(found.mean, found.variance, level)

    @torch.no_grad()
    def log_density(self, batch: Batch) -> Tensor:
        r"""Logarithm of the predictive density of each row's response (n,), at the parameters'
        estimates: Gaussian with the mean and variance of :meth:`predict`; with a family
        :math:`E\,p(y \mid a)` over the predictor a.

        Raises:
            TypeError, InputError: as in :meth:`predict`, or if ``y`` does not fit.
        """
        found, _ = self._predictor(batch)
        y = part(batch, "y").to(found.mean)
        if len(y) != len(found.mean):
            raise InputError(f"`y` has {len(y)} rows but `mean` yields {len(found.mean)}")
        if self.family is not None:
            self.family.check(y)
            return log_predictive(self.family, y, found)
        return -((2 * torch.pi * found.variance).log() + (y - found.mean) ** 2 / found.variance) / 2

    def _predictor(self, batch: Batch) -> tuple[Prediction, list[KnownEffect]]:
        """Predictions of the response, or of its linear predictor, and what is known of effects."""
        with evaluating(self):
            output = self(batch)
            n = len(output)
            if self.head == "gls":
                if not bool(self.joint.is_known):
                    raise InputError("there are no coefficients yet: call update() with the data")
                X = output[:, : len(self.beta)].to(self.beta)
                population = X @ self.beta
                if not any(True for _ in self.mean.parameters()):
                    population = torch.where(estimable(X, self.aliases), population, torch.nan)
            else:
                population = output.double()
                X = population.new_zeros(n, 0)
            offset = row_values(batch, "offset", n)
            if offset is not None:
                population = population + offset.to(population)
            effects = []
            for name, (codes, values) in self._coded(batch, n).items():
                effect = self.effects()[name]
                z = population.new_ones(n, 1) if values is None else values
                known = KnownEffect(codes, z, effect.blup, effect.variance, effect.prior_in_basis)
                effects.append(known)
            residual = population.new_zeros(n)
            if self.family is None:
                residual = structure_of(self.residual).variances(batch, n)
            found = predicted(population, X, self.beta_covariance, effects, self.joint, residual)
            return found, effects

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The number of coefficients is known only once there are features.
        for name in ("beta", "beta_covariance", "aliases"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


@dataclass(frozen=True)
class _Kept:
    """The likelihood of the last batch, with what it was made of."""

    modules: Sequence[object]
    rows: Sequence[Tensor | None]
    loss: REMLLoss | LaplaceLoss

    def is_of(self, modules: Sequence[object], rows: Sequence[Tensor | None]) -> bool:
        """Whether it was made of these modules and of rows of the same content."""
        if len(rows) != len(self.rows) or len(modules) != len(self.modules):
            return False
        same = all(a is b or a == b for a, b in zip(modules, self.modules, strict=True))
        return same and all(map(same_content, rows, self.rows))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout and the like, for a while."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
