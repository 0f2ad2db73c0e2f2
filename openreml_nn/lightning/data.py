"""A table as a Lightning data module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from openreml_nn.covariance import Relationship
from openreml_nn.families import Family
from openreml_nn.families.named import as_asked
from openreml_nn.lightning.formula import FormulaOptions
from openreml_nn.lightning.sharing import check_same, share
from openreml_nn.lightning.split import Split
from openreml_nn.model import take
from openreml_nn.model.batch import Batch
from openreml_nn.model.relations import relations_of
from openreml_nn.model.response import EncodedResponse
from openreml_nn.support.checks import check_names, check_table, check_text
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoded, Encoder, TableFile, read_table

__all__ = ["MixedModelDataModule", "attached"]

Division = Callable[[Batch], Callable[[torch.Generator], list[Tensor]]]


class MixedModelDataModule(LightningDataModule):
    """A table, encoded by a formula, for a :class:`MixedModule`.

    The likelihood of correlated rows does not fall apart into rows, so a fit takes them as one
    batch, unless the module's way of training divides them.

    Args:
        table: a data frame, or the path of a CSV or Parquet file.
        formula: an lme4-style formula. Where it, ``categorical``, ``residual``, ``weights`` or
            ``family`` is left out, the data module takes that of the module that is trained.
        categorical: numeric columns to be taken as factors.
        predict_table: what ``trainer.predict`` predicts; the same table by default.
        residual: structure of the residuals, as in :func:`lmm`.
        weights: column of weights, as in :func:`lmm`.
        validation: share of the rows that are held out for validation.
        split: how these rows are chosen: ``"random"``; ``"group"``, the share of each level of
            ``split_by``, so that training knows all levels; or ``"unseen"``, all rows of a
            share of its levels, which training then does not know.
        split_by: columns, ``a`` or ``a:b``; the first grouping factor by default.
        seed: a whole number; the same seed holds out the same rows.
        pedigree: the pedigree of ``ped(…)`` in the formula, as in :func:`lmm`.
        kernels: the matrices of ``vm(…)`` in the formula by their names, as in :func:`lmm`.
        family: the distribution of the response, or its name, by which categories and
            ``cbind(successes, failures)`` are read, as in :func:`glmm`.

    Attributes:
        response: what the formula makes of a table; without a ``formula`` after :meth:`setup`.
        table: the training rows, after :meth:`setup`.
        encoded: the training rows encoded.
        held_out: the validation rows encoded, None if there are none.

    Raises:
        InputError: if the formula, the table or the split is invalid, or the module that is
            trained says something else.
    """

    response: EncodedResponse
    table: pd.DataFrame
    encoded: Encoded
    held_out: Encoded | None

    def __init__(
        self,
        table: pd.DataFrame | str | os.PathLike[str],
        formula: str | None = None,
        categorical: Sequence[str] = (),
        predict_table: pd.DataFrame | str | os.PathLike[str] | None = None,
        residual: str | None = None,
        weights: str | None = None,
        validation: float = 0.0,
        split: str = "random",
        split_by: str | None = None,
        seed: int = 0,
        pedigree: pd.DataFrame | Relationship | str | os.PathLike[str] | None = None,
        kernels: Mapping[str, Any] | None = None,
        family: str | Family | None = None,
    ) -> None:
        super().__init__()
        check_table("table", table)
        if formula is not None:
            check_text("formula", formula)
        check_names("categorical", categorical)
        if predict_table is not None:
            check_table("predict_table", predict_table)
        for name, value in (("residual", residual), ("weights", weights)):
            if value is not None:
                check_text(name, value)
        names = (categorical,) if isinstance(categorical, str) else tuple(categorical)
        self._options = FormulaOptions(formula, as_asked(family)[0], names, residual, weights)
        self._relations = relations_of(pedigree, kernels)
        self._table = table
        self._predict_table = predict_table
        self._split = Split(validation, split, split_by, seed)
        self._division: Division | None = None
        self._order_seed = 0
        self._moved: tuple[Any, torch.device, Any] | None = None
        self._is_fitted = False
        if formula is not None:
            self.response = self._unlearned()

    @property
    def encoder(self) -> Encoder:
        """What the formula makes of a table."""
        return self.response.encoder

    def complete(self, options: FormulaOptions) -> None:
        """Take from a model what was left to it.

        Raises:
            InputError: if the two say different things.
        """
        completed = self._options.completed(options)
        if completed != self._options:
            self._options, self._is_fitted = completed, False

    def _unlearned(self) -> EncodedResponse:
        named = isinstance(self._table, pd.DataFrame)
        source = "the table" if named else f"file {str(self._table)!r}"
        return self._options.response(source, self._relations)

    def setup(self, stage: str | None = None) -> None:
        """Read, split and encode the table, once.

        What a fit learns is learned from the table. What a model predicts that was fitted or
        loaded is encoded by what it learned.
        """
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        options, learned = getattr(module, "formula_options", None), None
        if isinstance(options, FormulaOptions):
            self.complete(options)
            if stage != "fit" and hasattr(module, "model"):
                learned = module.encoder
        if learned is None:
            self._fit()
        elif not hasattr(self, "response") or self.encoder is not learned:
            self._apply(learned)

    def _fit(self) -> None:
        """Encode by what is learned from the training rows."""
        if self._is_fitted:
            return
        self.response = self._unlearned()
        rows, held_out = self._divided()
        self.encoded, self.table = self.response.fit(rows)
        self.held_out = None if held_out is None else self.response.held_out(held_out)
        self._is_fitted = True

    def _apply(self, encoder: Encoder) -> None:
        """Encode by what a model has learned elsewhere."""
        self.response = self._unlearned()
        self.response.encoder = encoder
        self.table, held_out = self._divided()
        self.held_out = None
        if held_out is not None:
            if self.response.family is not None:
                raise InputError(
                    "`validation` of a model with a family is by the data module of its fit: leave "
                    "it out"
                )
            self.held_out = self.response.held_out(held_out)
        self.encoded = encoder.transform(self.table)
        self._is_fitted = False

    def _divided(self) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        """The rows for training, and those that are held out."""
        table = _frame(self._table)
        if not self._split.validation:
            return table, None
        groups = [":".join(part.factors) for part in self.encoder.formula.random]
        out = self._split.held_out(table, groups, self.encoder.source)
        return table[~out], table[out]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move the batch once: the loss keeps what it prepared for tensors that it has seen."""
        if self._moved is None or self._moved[0] is not batch or self._moved[1] != device:
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
            self._moved = (batch, device, moved)
        return self._moved[2]

    def divide(self, division: Division | None, seed: int) -> None:
        """Divide the training rows into mini-batches.

        Args:
            division: makes of a batch a function that draws an epoch's mini-batches, lists of
                rows; None for all rows at once.
            seed: of their order, beside the number of the epoch, so that a resumed run takes
                that of an uninterrupted one.
        """
        self._division, self._order_seed = division, seed

    def train_dataloader(self) -> Any:
        """Batches of the training rows, see :meth:`Encoded.batch`.

        Raises:
            InputError: if the processes of a distributed fit hold other tables.
        """
        batch = self.encoded.batch()
        if self._division is None:
            return _whole(batch)
        check_same(batch)
        draw = self._division(batch)
        return _Epochs(batch, draw, self._order_seed, lambda: self.trainer.current_epoch)  # type: ignore[union-attr]

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """One batch of the rows that are held out, if there are any."""
        return [] if self.held_out is None else _whole(self.held_out.batch())

    def predict_dataloader(self) -> DataLoader[Any]:
        """One batch of all rows to predict."""
        encoded = self.encoded
        if self._predict_table is not None:
            encoded = self.encoder.transform(_frame(self._predict_table))
        return _whole(encoded.batch())


class _Epochs:
    """Mini-batches of a table, in another order each epoch; processes share the rows of each."""

    def __init__(
        self,
        batch: Batch,
        draw: Callable[[torch.Generator], list[Tensor]],
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self._batch, self._draw, self._seed, self._epoch = batch, draw, seed, epoch

    def _rows(self, epoch: int) -> list[Tensor]:
        return self._draw(torch.Generator().manual_seed(self._seed * 1_000_003 + epoch))

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._rows(self._epoch()):
            yield take(self._batch, rows[share()])

    def __len__(self) -> int:
        return len(self._rows(0))


def attached(module: LightningModule) -> MixedModelDataModule:
    """The data module that a module of a formula is fitted with.

    Raises:
        InputError: if it is of another kind.
    """
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, MixedModelDataModule):
        raise InputError(
            f"the trainer was given {'a loader' if data is None else described(data)}: expected a "
            f"MixedModelDataModule, with which a {type(module).__name__} of a formula trains"
        )
    return data


def _frame(table: pd.DataFrame | str | os.PathLike[str]) -> pd.DataFrame:
    if isinstance(table, TableFile):
        return table.read()
    return table if isinstance(table, pd.DataFrame) else read_table(table)


def _whole(batch: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
