"""The covariance and the likelihood of some rows, kept for when the next rows are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance import Matrix, Sum
from openreml_nn.covariance.params import operand_name
from openreml_nn.families import Family
from openreml_nn.likelihood import LaplaceLoss, REMLLoss
from openreml_nn.likelihood.fixed import check_data
from openreml_nn.likelihood.loss import loss_of
from openreml_nn.likelihood.prepared import Likelihood, LikelihoodOptions, precision_of
from openreml_nn.model.batch import Batch, check_outputs
from openreml_nn.model.random_effect import Coded, RandomEffect, coded_effects
from openreml_nn.model.residual import structure_of
from openreml_nn.model.responses import of_gaussian
from openreml_nn.support.errors import InputError
from openreml_nn.support.modes import in_full_precision
from openreml_nn.terms.kernel import private, same_content
from openreml_nn.terms.term import Term

__all__ = ["LastLikelihood", "covariance_of", "terms_of"]


def covariance_of(
    effects: Mapping[str, RandomEffect], residual: nn.Module, batch: Batch, coded: Coded, n: int
) -> Sum:
    """The tree of the covariance of n rows, see :meth:`MixedModel.covariance`.

    Args:
        effects: random effects by name.
        residual: of a row, as :func:`structure_of` takes it, or a family.
        batch: has what the residual takes.
        coded: codes and values of each random effect.
        n: number of rows.
    """
    parts: dict[str, Matrix] = {}
    for name, effect in effects.items():
        parts[operand_name(name, {"residual"})] = effect.covariance(name, *coded[name])
    if isinstance(residual, Family):
        return Sum(parts)
    return Sum(parts | structure_of(residual).operands(batch, n))


def terms_of(
    effects: Mapping[str, RandomEffect],
    residual: nn.Module,
    batch: Batch,
    coded: Coded,
    n: int,
    dtype: torch.dtype,
) -> list[Term]:
    """The terms of the tree of :func:`covariance_of`, without the tree, computed in a precision."""
    device = next((codes.device.type for codes, _ in coded.values()), "cpu")
    with in_full_precision(device):
        found = [term for name, e in effects.items() for term in e.terms(name, *coded[name], dtype)]
    return found + structure_of(residual).terms(batch, n, dtype)


class LastLikelihood:
    """The likelihood of the last batch, with what it was made of.

    Attributes:
        prepared: what is prepared for the last batch, which losses of the same content share.
    """

    def __init__(self) -> None:
        self._modules: Sequence[object] = ()
        self._rows: Sequence[Tensor | None] = ()
        self._loss: REMLLoss | LaplaceLoss | None = None
        self.prepared = Likelihood()

    def __reduce__(self) -> tuple[Any, ...]:
        # What was prepared for some rows can be had again; a copy need not carry it.
        return LastLikelihood, ()

    def of(
        self,
        effects: Mapping[str, RandomEffect],
        residual: nn.Module,
        options: LikelihoodOptions,
        quadrature: int,
        batch: Batch,
        n: int,
    ) -> REMLLoss | LaplaceLoss:
        """The likelihood for n rows of a batch, the last one where theirs are the same.

        Args:
            effects, residual: as :func:`covariance_of` takes them.
            options, quadrature: of the likelihood.
            batch, n: the rows.
        """
        coded = coded_effects(effects, batch, n)
        own = [*(effect.g for effect in effects.values()), residual]
        modules = [*own, *map(type, own), *options, quadrature]
        rows = [t for pair in coded.values() for t in pair]
        rows += [batch.get(key) for key in ("weights", "residual", "covariate")]
        moves = any(t is not None and t.requires_grad for t in rows)
        if self._loss is not None and not moves and self._is_of(modules, rows):
            return self._loss
        if not moves:
            # Copies, which nobody else can change.
            rows = [None if t is None else private(t) for t in rows]
            pairs = iter(rows)
            coded = {name: (next(pairs), next(pairs)) for name in coded}  # type: ignore[misc]
        tree = covariance_of(effects, residual, batch, coded, n)
        loss: REMLLoss | LaplaceLoss
        if isinstance(residual, Family):
            loss = LaplaceLoss(tree, residual, options.method, quadrature, options.solver)
        else:
            loss = REMLLoss(tree, options.method, options.solver)
            loss.likelihood = self.prepared
        is_kept = not moves and isinstance(residual, Matrix | Family)
        self._modules, self._rows, self._loss = (modules, rows, loss) if is_kept else ((), (), None)
        return loss

    def loss(
        self,
        effects: Mapping[str, RandomEffect],
        residual: nn.Module,
        options: LikelihoodOptions,
        batch: Batch,
        output: Tensor,
        head: str,
    ) -> Tensor:
        """The Gaussian loss of a batch; only what listens to it makes a tree.

        Args:
            effects, residual, options, batch: as :meth:`of` takes them.
            output: of the network.
            head: see :class:`MixedModel`.
        """
        y, X = of_gaussian(output, batch, head)
        n = y.shape[0]
        coded = coded_effects(effects, batch, n)
        dtype = precision_of([*(effect.g for effect in effects.values()), residual], y)
        terms = terms_of(effects, residual, batch, coded, n, dtype)

        def check(y: Tensor, X: Tensor) -> None:
            try:
                check_data(y, X)
            except InputError:
                check_outputs(output, batch)
                raise

        def tree() -> Sum:
            return covariance_of(effects, residual, batch, coded, n)

        with in_full_precision(y.device.type):
            return loss_of(self.prepared.ready(y, X, terms, options, check=check), n, tree)

    def _is_of(self, modules: Sequence[object], rows: Sequence[Tensor | None]) -> bool:
        """Whether it was made of these modules and of rows of the same content."""
        if len(rows) != len(self._rows) or len(modules) != len(self._modules):
            return False
        same = all(a is b or a == b for a, b in zip(modules, self._modules, strict=True))
        return same and all(map(same_content, rows, self._rows))
