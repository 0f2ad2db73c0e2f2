"""The marginal likelihood of the data of one call: its mode, its value, its derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openreml_nn.likelihood.laplace_layout import Stacked
from openreml_nn.likelihood.laplace_mode import Mode, Rows, find_mode
from openreml_nn.likelihood.laplace_quadrature import by_quadrature
from openreml_nn.likelihood.laplace_recorded import recorded
from openreml_nn.likelihood.laplace_sparse import SparseFactor, SparsePoint
from openreml_nn.likelihood.laplace_system import BlockedPoint
from openreml_nn.likelihood.laplace_task import (
    Kept,
    Task,
    constants_of,
    factors_of,
    with_tensors,
)
from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.kernel import private

__all__ = ["Integral"]

#: Steps to the coefficients of X by maximum likelihood, at most.
_MOST_STEPS = 100


class Integral:
    """The negative marginal log-likelihood of the data of a call.

    Args:
        task: the data with their terms; it is given the coefficients of X by maximum likelihood.
        kept: where the effects stand, and where the search begins.
        method: ``"ml"`` or ``"reml"``.
        quadrature: points for each effect of a level; 1 is Laplace's approximation.
        near: whether it is enough to be near it, see :meth:`LaplaceLoss.nearby`.
    """

    def __init__(
        self, task: Task, kept: Kept, method: str, quadrature: int, near: bool = False
    ) -> None:
        self._task, self._kept, self._near = task, kept, near
        self._method, self._quadrature = method, quadrature

    def joint_mode(self, beta: Tensor | None = None, rough: bool = False) -> Mode:
        """The mode of the random effects and the coefficients of X together, where the search of the
        next call then begins.

        Args:
            beta: where the search for the coefficients begins; where the last ended by default.
            rough: see :func:`find_mode`.
        """
        kept, data = self._kept, self._task.rows
        point = kept.space.at(self._task.terms)
        plain = replace(data, eta=data.eta.detach(), X=data.X.detach())
        mode = find_mode(
            plain,
            point,
            kept.start_of(plain),
            kept.beta_of(plain) if beta is None else beta.to(plain.eta),
            *kept.factor_of(plain, self._task.terms),
            rough,
        )
        kept.start, kept.beta = private(mode.u), private(mode.beta)
        kept.keep_factor(None if point.is_cheap else mode.factor, plain, self._task.terms)
        return mode

    def mode(self) -> Mode:
        """The mode of the random effects, at the coefficients of X of the method."""
        kept, mode = self._kept, self.joint_mode(rough=self._near)
        if self._method == "reml" or not len(mode.beta):
            if self._near and isinstance(mode.point, SparsePoint):
                assert isinstance(mode.factor, SparseFactor)
                near = mode.point.nearby(mode.weights, mode.rows.X, mode.factor)
                return replace(mode, factor=near)
            return mode
        mode = self._profiled(mode)
        kept.start, kept.beta = private(mode.u), private(self._task.beta)
        kept.keep_factor(None, mode.rows, self._task.terms)
        return mode

    def _profiled(self, bordered: Mode) -> Mode:
        """The mode at the coefficients of maximum likelihood, which the task then holds."""
        beta, S = bordered.beta, bordered.factor.fixed_covariance()
        plain, start = bordered.rows, bordered.u
        X = plain.X
        none = replace(plain, X=plain.X[:, :0])
        before = float("inf")
        for _ in range(_MOST_STEPS):
            rows = replace(none, eta=plain.eta + X @ beta)
            mode = find_mode(rows, bordered.point, start)
            slope = X.mT @ self.of_predictor(mode)
            move = S @ slope
            gain = float(move @ slope)
            floor = 1e-20 if X.dtype == torch.float64 else 1e-8
            if gain <= floor or (gain < floor**0.5 and gain > before / 4):
                self._task.beta = beta
                return mode
            before, beta, start = gain, beta - move, mode.u
        raise NumericalError(
            f"the coefficients of X were not found in {_MOST_STEPS} steps: the last was "
            f"{gain**0.5:.3g} standard errors long"
        )

    def of_predictor(self, mode: Mode) -> Tensor:
        """The derivative of the value by each row's linear predictor, (n,)."""
        if self._quadrature == 1:
            return mode.of_predictor()
        eta = mode.rows.eta.detach().requires_grad_()
        rows = replace(mode.rows, eta=eta)
        with torch.enable_grad():
            value = self._by_quadrature(mode, rows)
            return torch.autograd.grad(value, eta)[0]

    def value(self, mode: Mode) -> Tensor:
        """The negative log-likelihood at a mode."""
        if self._quadrature == 1:
            return mode.value
        return self._by_quadrature(mode, mode.rows)

    def _by_quadrature(self, mode: Mode, rows: Rows) -> Tensor:
        layout = _layout(mode)
        covariances = [self._task.terms[i].detach().covariance for i in layout.order]
        return by_quadrature(mode, rows, layout.designs, covariances, self._quadrature)

    def with_derivatives(
        self, recording: bool, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The value and its derivatives by the inputs, None for those that require none."""
        data, terms = self._task.rows, self._task.terms
        with torch.no_grad():
            mode = self.mode()
            if not recording:
                return self.value(mode), [None] * len(inputs)
            constants = constants_of(terms)
            wanted = [x.requires_grad for x in inputs]
            if self._task.is_recorded(self._method, self._quadrature):
                return self._by_recording(mode, inputs)
            y = inputs[2]
            of_family = mode.of_family(y, [x for x in data.family.parameters() if x.requires_grad])
            of_eta = mode.of_predictor()
            of_X = of_eta[:, None] * self._task.beta if len(self._task.beta) else None
            found: list[Tensor | None] = [of_eta, of_X, None, *mode.of_matrices()]
            found += [None] * (len(factors_of(terms)) + len(constants))
            own = iter(of_family)
            found[2] = next(own) if y.requires_grad else None
            found += [next(own) if x.requires_grad else None for x in data.family.parameters()]
            return mode.value, [g if w else None for g, w in zip(found, wanted, strict=True)]

    def _by_recording(
        self, mode: Mode, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        data, y = self._task.rows, inputs[2]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() if x.requires_grad else x for x in inputs]
            eta, X, own_y, *rest = leaves
            own = iter(rest)
            matrices = [next(own) for _ in self._task.terms]
            factors = [next(own) for _ in factors_of(self._task.terms)]
            terms = with_tensors(self._task.terms, matrices, iter(factors), own)
            parameters = list(data.family.parameters())
            # The family's own parameters are leaves already.
            leaves[len(leaves) - len(parameters) :] = parameters
            own_y = own_y.to(eta) if y.requires_grad else data.y
            rows = replace(data, y=own_y, eta=eta, X=X, constant=0.0)
            if self._method == "ml" and X.shape[1]:
                rows = replace(rows, eta=eta + X @ self._task.beta, X=X[:, :0])
            layout = _layout(mode)
            designs = layout.of_designs(terms)
            covariances = [terms[i].covariance for i in layout.order]
            if self._quadrature == 1:
                value = recorded(mode, rows, designs, covariances)
            else:
                value = by_quadrature(mode, rows, designs, covariances, self._quadrature)
            wanted = [i for i, x in enumerate(inputs) if x.requires_grad]
            parts = torch.autograd.grad(
                value, [leaves[i] for i in wanted], allow_unused=True, materialize_grads=True
            )
        found: list[Tensor | None] = [None] * len(inputs)
        for i, part in zip(wanted, parts, strict=True):
            found[i] = part
        if self._quadrature > 1:
            # The derivative by a variance of zero, whose root has none: both ways share the limit.
            for i, (matrix, part) in enumerate(zip(matrices, mode.of_matrices(), strict=True), 3):
                mine = found[i]
                if mine is not None and (matrix.dim() == 1 or len(matrix) == 1):
                    found[i] = torch.where(matrix > 0, mine, part)
        return value.detach(), found


def _layout(mode: Mode) -> Stacked:
    """Where the effects stand, of a mode by blocks."""
    assert isinstance(mode.point, BlockedPoint)
    return mode.point.layout
