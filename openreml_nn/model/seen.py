"""Rows of a response that is not Gaussian, kept so that others can be added to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from openreml_nn.covariance import DummyMatrix, Matrix, MembershipMatrix, Operator, Sum
from openreml_nn.covariance.params import operand_name
from openreml_nn.families import Family
from openreml_nn.likelihood import LaplaceLoss
from openreml_nn.likelihood.laplace_evaluation import LaplaceEvaluation
from openreml_nn.likelihood.solver import Solver
from openreml_nn.model.random_effect import Coded, RandomEffect
from openreml_nn.support.errors import InputError

__all__ = ["SeenRows"]


@dataclass(frozen=True)
class SeenRows:
    """The rows of the last update of a model with a family.

    The equations of a Gaussian response add up over rows, and modes do not, so that the rows
    themselves are kept.

    Attributes:
        options: method, quadrature and solver of :class:`LaplaceLoss`.
        columns: the columns of X that have coefficients.
        y, known, X, weights: as :class:`LaplaceLoss` takes them; X has no columns with head ``"ml"``.
        coded: for each random effect the codes of the rows' levels, -1 for an unknown one, and the
            values of the effects, None where these are all one.
    """

    options: tuple[str, int, Solver | str]
    columns: tuple[int, ...]
    y: Tensor
    known: Tensor
    X: Tensor
    weights: Tensor | None
    coded: Coded

    @classmethod
    def of(
        cls,
        options: tuple[str, int, Solver | str],
        columns: Sequence[int],
        covariance: Matrix,
        effects: Mapping[str, RandomEffect],
        data: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    ) -> Self:
        """The rows of a likelihood.

        Args:
            options, columns: the attributes of these names.
            covariance: of the rows, as :meth:`MixedModel.covariance` makes it.
            effects: the model's random effects.
            data: y, the known part of the linear predictor, X and weights.
        """
        assert isinstance(covariance, Sum)
        coded: dict[str, tuple[Tensor, Tensor | None]] = {}
        for (name, effect), part in zip(
            effects.items(), covariance.operands.values(), strict=False
        ):
            assert isinstance(part, Operator)
            z = part.operands["z"]
            assert isinstance(z, DummyMatrix | MembershipMatrix)
            values = z.values() if isinstance(z, DummyMatrix) else z.values
            codes = torch.where(z.codes < effect.levels, z.codes, -1)  # those on their own
            coded[name] = codes, None if values is None else values.detach()
        y, known, X, weights = data
        X = known.new_zeros(len(known), 0) if X is None else X
        own = y.detach(), known.detach(), X.detach(), weights
        return cls(options, tuple(columns), *own, coded)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # its tensors are never changed in place

    def joined(
        self, data: tuple[Tensor, Tensor, Tensor | None, Tensor | None], coded: Coded
    ) -> SeenRows:
        """These rows and then others.

        Raises:
            InputError: if their responses are of another shape.
        """
        y, known, X, weights = data
        before, factors = self.y, self.weights
        if y.dim() != before.dim():
            # Where all proportions are 0 or 1 no response says that its weights are trials.
            y, weights = _counted(y, weights)
            before, factors = _counted(before, factors)
        if y.shape[1:] != before.shape[1:]:
            raise InputError(
                f"`batch['y']` has {y[0].numel()} numbers in a row: expected {before[0].numel()}, as the rows "
                "before have"
            )
        if weights is not None or factors is not None:
            weights = _cat(_or_ones(factors, self.known), _or_ones(weights, known))
        parts = {}
        for name, (codes, values) in coded.items():
            own, entries = self.coded[name]
            if values is not None or entries is not None:
                values = _cat(_or_ones(entries, own[..., None]), _or_ones(values, codes[..., None]))
            parts[name] = _cat(own, codes), values
        X = known.new_zeros(len(known), 0) if X is None else X
        whole = _cat(before, y), _cat(self.known, known), _cat(self.X, X), weights
        return SeenRows(self.options, self.columns, *whole, parts)

    def evaluate(
        self, family: Family, effects: Mapping[str, RandomEffect], levels: Sequence[int]
    ) -> tuple[LaplaceEvaluation, Sum]:
        """The likelihood of the rows at the present parameters, and the covariance, where the effects
        have so many levels.

        Raises:
            NumericalError: if the mode is not found.
        """
        parts: dict[str, Matrix] = {}
        for (name, effect), q in zip(effects.items(), levels, strict=True):
            parts[operand_name(name, {"residual"})] = effect.covariance(name, *self.coded[name], q)
        tree = Sum(parts)
        method, quadrature, solver = self.options
        loss = LaplaceLoss(tree, family, method, quadrature, solver)
        X = self.X[:, list(self.columns)]
        return loss.evaluate(self.y, self.known, X, weights=self.weights), tree


def _counted(y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Responses of 0 and 1 with their trials as successes and failures, and no weights: they have the same
    likelihood. Other responses as they are."""
    if y.dim() != 1 or weights is None:
        return y, weights
    return torch.stack([y, 1 - y], 1).to(weights) * weights[:, None], None


def _cat(one: Tensor, other: Tensor) -> Tensor:
    """Rows and then others, where the others are and in the precision of the first."""
    return torch.cat([one.to(other.device), other.detach().to(one.dtype)])


def _or_ones(given: Tensor | None, like: Tensor) -> Tensor:
    """What is given or, where it is None, ones, in double precision so that they round nothing beside them."""
    if given is not None:
        return given
    return torch.ones(like.shape, dtype=torch.float64, device=like.device)
