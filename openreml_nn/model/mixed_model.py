r"""Mixed models: a mean, linear or a network, with random effects for the grouping.

.. math:: y = f(x) + \sum_t Z_t b_t + e,\qquad b_t \sim N(0, G_t(\theta)),\quad e \sim N(0, R(\theta))

The covariance is the tree of :mod:`openreml_nn.covariance`, built from the
batch; the loss is the likelihood of :class:`REMLLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import NoneType

import torch
from torch import Tensor, nn

from openreml_nn.covariance import Matrix, ScalarMatrix, UnstructuredMatrix
from openreml_nn.families import Family
from openreml_nn.likelihood import LaplaceLoss, REMLLoss
from openreml_nn.likelihood.fixed import check_data
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import check_solver
from openreml_nn.likelihood.prepared import LikelihoodOptions
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.dense import check_method
from openreml_nn.model.batch import (
    Batch,
    adjusted,
    check_inputs,
    check_outputs,
    part,
    rows_of,
    with_responses,
)
from openreml_nn.model.likelihoods import LastLikelihood, covariance_of
from openreml_nn.model.means import evaluating, gradient_in_parts, mean_of
from openreml_nn.model.predictor import Predictor
from openreml_nn.model.random_effect import RandomEffect, coded_effects
from openreml_nn.model.residual import structure_of
from openreml_nn.model.responses import (
    of_family,
    of_gaussian,
    remember_family,
    remember_gaussian,
)
from openreml_nn.model.several import refuse_copied_columns
from openreml_nn.support.checks import (
    check_choice,
    check_count,
    check_instance,
    check_mapping,
    check_tensor,
)
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError

__all__ = ["HEADS", "MixedModel"]

HEADS = ("ml", "gls")

# The likelihood by a family, with y, the known part of the linear predictor, X, and weights.
Marginal = tuple[LaplaceLoss, Tensor, Tensor, Tensor | None, Tensor | None]


class MixedModel(Predictor):
    r"""A mixed model: a linear mean or any network, with random effects.

    A batch is a dict: ``x``, what the mean takes; ``y`` (n,), NaN for a row without a response, which
    adds nothing to the likelihood and is counted in a warning; ``groups``, a dict from the name of
    each random effect to the level codes (n,), -1 for an unknown level, which in the likelihood is a
    level of its own each time, or of rows of m levels each to (n, m) and values (n, m, k); and, where
    they are needed, ``values``, a dict to the values (n, k) of effects other than intercepts;
    ``weights`` (n,), by which the residual variance of each row is divided, or, with a family, its
    log-density multiplied; ``offset`` (n,), a known part of the mean; ``residual`` (n,), cells of the rows for a residual within groups; ``covariate`` (n,), on which
    residual variances depend; ``extra``, the user's own.

    Args:
        mean: any network; it yields the mean, (n,) or (n, 1), with head ``"ml"``,
            and features (n, p) with head ``"gls"``. A linear mixed model has ``nn.Identity()``, with
            the model matrix as ``x``.
        random: random effects by name.
        residual: variance of the residual of a row, a (1, 1) matrix; or the covariance (T, T) of the
            positions within a group of rows, where ``batch["residual"]`` is the cell of each row, its
            group times T plus its position; or a network that yields the log-variance (n,) or (n, 1)
            of each row from ``x``. One variance by default.
        head: ``"ml"``: the network is the mean. ``"gls"``: the features are X, whose coefficients are
            profiled out by generalised least squares.
        family: of the response given the linear predictor, which then is what the network and the
            random effects yield; it has the residual's place. Gaussian by default.
        method: ``"reml"``, the restricted likelihood, or ``"ml"``, the full one; by default the
            first with head ``"gls"``, the second with head ``"ml"``, without coefficients, and families.
        solver: see :class:`REMLLoss`, with a family :class:`LaplaceLoss`.
        quadrature: see :class:`LaplaceLoss`.
        responses: t, how many a row has; by default as many as a random effect says. Then ``y`` is
            (n, t), NaN where one is missing, the network yields (n, t) with head ``"ml"``, a feature has a
            coefficient for each, the residual is a covariance (t, t) among those of a row, any by
            default, and predictions are (n, t), with covariances (n, t, t).

    Raises:
        TypeError, InputError: if an argument is of another kind, or does not fit the others.

    Reference:
        Simchoni and Rosset, Journal of Machine Learning Research 24 (2023), eq. 3.

    Example::

        model = MixedModel(network, {"user": RandomEffect(1000)})
        loss = model.loss({"x": x, "y": y, "groups": {"user": codes}})
        loss.backward()
        model.update({"x": x, "y": y, "groups": {"user": codes}})
        model.predict({"x": new_x, "groups": {"user": new_codes}}).mean
    """

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
        responses: int | None = None,
    ) -> None:
        if method is None:
            method = "reml" if head == "gls" and family is None else "ml"
        _check_parts(mean, random, residual, head, family)
        _check_options(method, solver, quadrature, head, family)
        t = _responses_of(responses, random, residual, family)
        super().__init__(mean, random, _residual_of(residual, family, t), head, t)
        self.method = method
        self.solver = solver
        self.quadrature = quadrature
        self._last = LastLikelihood()

    def forward(self, batch: Batch) -> Tensor:
        """What the network yields: the mean, (n,) or (n, t), or features (n, p) with head ``"gls"``."""
        return mean_of(self.mean, part(batch, "x"), self.head, self.responses)

    def loss(self, batch: Batch) -> Tensor:
        """Negative (restricted) log-likelihood of the batch, divided by its rows; with several
        responses of a row, by how many responses there are.

        A batch of whole groups is a part of the likelihood of independent groups; one that cuts
        groups is a composite likelihood. Rows without a response are not in it.

        Raises:
            TypeError, InputError: if a part of the batch is invalid, or the network yields NaN.
        """
        batch, _ = with_responses(batch, None, self.responses > 1)
        return self._loss_of(self(batch), batch)

    def loss_of(self, output: Tensor, batch: Batch) -> Tensor:
        """The loss of a batch, see :meth:`loss`, for what the network has yielded for it."""
        if self.family is None and self.responses == 1:
            batch, output = with_responses(batch, output)
        return self._loss_of(output, batch)

    def _loss_of(self, output: Tensor, batch: Batch) -> Tensor:
        """The loss of rows that have a response."""
        if self.family is not None:
            marginal, y, eta, X, weights = self.marginal(output, batch)
            return marginal(y, eta, X, weights=weights) / len(eta)
        self.check(batch)
        if self.responses > 1:
            batch, output = with_responses(*self.single(batch, output, is_data=True))
        options = LikelihoodOptions(self.method, self.solver)
        return self._last.loss(self.effects(), self.residual, options, batch, output, self.head)

    def objective(self, batch: Batch, output: Tensor | None = None) -> Objective:
        """The likelihood in the covariance parameters alone, for an optimizer; ``output`` is what the
        network has yielded for the batch, if it is known."""
        batch, output = with_responses(batch, output, self.responses > 1)
        with torch.no_grad():
            loss, y, X = self.data(self(batch) if output is None else output, batch)
            return loss.objective(y, X)

    def backward_in_parts(self, batch: Batch, rows: int) -> Tensor:
        """The loss; its exact gradient is accumulated in the memory of a few rows.

        The network's output for all rows is had without recording, the likelihood yields its
        derivative by each, and a second pass, ``rows`` at a time, takes it back. Errors as :meth:`loss`.

        Args:
            batch: the data.
            rows: rows that the network sees at a time.
        """
        rows = check_count("rows", rows, 1)
        batch, _ = with_responses(batch, None, self.responses > 1)
        x, y = part(batch, "x"), part(batch, "y")
        check_inputs(x)
        check_tensor("y", y, ("n", "t")[: 1 + (self.responses > 1)], "floating", False)
        return gradient_in_parts(
            lambda x: self({"x": x}),
            x,
            rows,
            lambda outputs: self.loss_of(outputs, batch),
            {t.device for t in self.parameters() if t.is_cuda},
        )

    def data(self, output: Tensor, batch: Batch) -> tuple[REMLLoss, Tensor, Tensor]:
        """The likelihood of a batch with its y and X, the mean taken off y with head ``"ml"``."""
        if self.family is not None:
            raise InputError(
                "`family` is not Gaussian: it has marginal(), and no average-information steps"
            )
        self.check(batch)
        rows, found = with_responses(*self.single(batch, output, is_data=True))
        y, X = of_gaussian(found, rows, self.head)
        check_outputs(found, rows)
        loss = self._likelihood(rows, len(y))
        assert isinstance(loss, REMLLoss)
        loss.check = _check_of(self, batch, output)
        return loss, y, X

    def marginal(self, output: Tensor, batch: Batch) -> Marginal:
        """The likelihood of a batch, with y, the known predictor, X with head ``"gls"``, and weights."""
        self.check(batch)
        batch, output = with_responses(batch, output)
        y, known, X, weights = of_family(self.family, output, batch, self.head)
        loss = self._likelihood(batch, len(y))
        assert isinstance(loss, LaplaceLoss)
        return loss, y, known, X, weights

    def covariance(self, batch: Batch) -> Matrix:
        r"""The covariance :math:`V = \sum_t Z_t G_t Z_t^\top + R` of the rows of a batch, a tree
        with this model's parameters.

        Its operands are the random effects by name and then, without a family, ``residual``.

        Raises:
            TypeError, InputError: as :meth:`loss`.
        """
        self.check(batch)
        batch = self.stacked(batch, True) if self.responses > 1 else batch
        effects, n = self.effects(), rows_of(batch)
        return covariance_of(effects, self.residual, batch, coded_effects(effects, batch, n), n)

    def _likelihood(self, batch: Batch, n: int) -> REMLLoss | LaplaceLoss:
        options = LikelihoodOptions(self.method, self.solver)
        return self._last.of(self.effects(), self.residual, options, self.quadrature, batch, n)

    @torch.no_grad()
    def update(self, batch: Batch, output: Tensor | None = None) -> None:
        """Compute BLUPs and their variances from all rows at the present parameters.

        They are stored in buffers and travel with the checkpoint, with ``"gls"`` coefficients too;
        ``output`` is what the network has yielded for the rows, if it is known.

        Raises:
            TypeError, InputError, NumericalError: as :meth:`loss`.
        """
        self.check_loaded()
        batch, output = with_responses(batch, output, self.responses > 1)
        with evaluating(self):
            output = self(batch) if output is None else output
            if self.family is None:
                remember_gaussian(self, *self.data(output, batch))
            else:
                remember_family(self, *self.marginal(output, batch))


def _check_of(model: MixedModel, batch: Batch, output: Tensor) -> Callable[[Tensor, Tensor], None]:
    """What refuses data of a batch that the likelihood has not seen yet: beside what any data are
    refused for, responses that tell each other, where their covariance is any."""
    if model.responses == 1 or not isinstance(model.residual, UnstructuredMatrix):
        return check_data
    y = part(batch, "y")
    if not isinstance(y, Tensor) or y.shape != (len(output), model.responses):
        return check_data  # and it is refused
    Y, x = adjusted(batch, len(output), model.responses), output.detach()

    def check(y: Tensor, X: Tensor) -> None:
        check_data(y, X)
        refuse_copied_columns(Y, x if model.head == "gls" else None)

    return check


def _check_parts(
    mean: nn.Module,
    random: Mapping[str, RandomEffect],
    residual: nn.Module | None,
    head: str,
    family: Family | None,
) -> None:
    check_instance("mean", mean, nn.Module, "a network, an nn.Module")
    check_mapping("random", random, RandomEffect)
    check_choice("head", head, HEADS)
    check_instance("family", family, (Family, NoneType), "a Family, or None")
    if family is not None and residual is not None:
        raise InputError(
            f"`residual` is {described(residual)} beside a family, which has its own: leave it out"
        )
    if not random and residual is None and (head == "ml" or family is not None):
        raise InputError(
            "`random` is empty: expected a RandomEffect for each grouping factor, or head 'gls'"
        )
    if residual is not None:
        structure_of(residual)


def _residual_of(given: nn.Module | None, family: Family | None, responses: int) -> nn.Module:
    """The residual, by default one variance, or a covariance among the responses."""
    known = family or given
    if known is not None:
        return known
    own = ScalarMatrix(1) if responses == 1 else UnstructuredMatrix(responses)
    return own.double()


def _responses_of(
    given: int | None,
    random: Mapping[str, RandomEffect],
    residual: nn.Module | None,
    family: Family | None,
) -> int:
    """How many responses a row has."""
    known = {name: effect.responses for name, effect in random.items() if effect.responses > 1}
    t = max(known.values(), default=1) if given is None else check_count("responses", given, 1)
    for name, own in known.items():
        if own != t:
            raise InputError(
                f"random effect {name!r} has {own} responses: expected 1, which they share, or {t}"
            )
    if t > 1 and family is not None:
        raise InputError(
            f"`responses` is {t} with the family {type(family).__name__}: expected 1, as only "
            "Gaussian responses can be several"
        )
    sizes = ((1, 1), (t, t))
    if t > 1 and isinstance(residual, Matrix) and residual.shape not in sizes:
        raise InputError(f"`residual` is {residual.shape}: expected (1, 1) or {(t, t)}")
    return t


def _check_options(
    method: str, solver: str | Solver, quadrature: int, head: str, family: Family | None
) -> None:
    if family is None and quadrature != 1:
        raise InputError(f"`quadrature` is {quadrature} without a family: leave it out")
    check_method(method)
    if head == "ml" and method == "reml":
        raise InputError(
            "`method` is 'reml' with head 'ml': expected 'ml', because REML corrects for "
            "coefficients, which head 'gls' has"
        )
    check_solver(solver)
    if family is not None:
        LaplaceLoss(ScalarMatrix(1), family, method, quadrature, solver)  # refuses its options
