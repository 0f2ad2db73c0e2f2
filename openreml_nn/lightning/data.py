"""A table as a Lightning data module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from openreml_nn.covariance import Pedigree
from openreml_nn.families import Family
from openreml_nn.lightning.sharing import check_same, share
from openreml_nn.model import take
from openreml_nn.model.batch import Batch
from openreml_nn.model.response import EncodedResponse
from openreml_nn.model.structures import relations_of
from openreml_nn.support.checks import (
    check_choice,
    check_count,
    check_names,
    check_number,
    check_table,
    check_text,
)
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
        formula: an lme4-style formula.
        categorical: numeric columns to be taken as factors.
        predict_table: what ``trainer.predict`` predicts; the same table by default.
        residual, weights: structure of the residuals and column of weights, as in :func:`lmm`.
        validation: share of the rows that are held out for validation.
        split: which: ``"random"`` ones; ``"group"``, the share of each level of
            ``split_by``, so that training knows all levels; or ``"unseen"``, all rows of a
            share of its levels, which training then does not know.
        split_by: columns, ``a`` or ``a:b``; the first grouping factor by default.
        seed: of the split.
        pedigree, kernels: relations of levels that the formula names, as in :func:`lmm`.
        family: of the response, or its name, by which categories and ``cbind(successes, failures)``
            are read, as in :func:`glmm`.

    Attributes:
        encoder: what the formula makes of a table.
        response: the same with the response as the family takes it.
        table: the training rows, after :meth:`setup`.
        encoded: the same encoded.
        held_out: the validation rows encoded, None if there are none.

    Raises:
        InputError: if the formula, the table or the split is at fault.
    """

    table: pd.DataFrame
    encoded: Encoded
    held_out: Encoded | None

    def __init__(
        self,
        table: pd.DataFrame | str | os.PathLike[str],
        formula: str,
        categorical: Sequence[str] = (),
        predict_table: pd.DataFrame | str | os.PathLike[str] | None = None,
        residual: str | None = None,
        weights: str | None = None,
        validation: float = 0.0,
        split: str = "random",
        split_by: str | None = None,
        seed: int = 0,
        pedigree: pd.DataFrame | Pedigree | str | os.PathLike[str] | None = None,
        kernels: Mapping[str, Any] | None = None,
        family: str | Family | None = None,
    ) -> None:
        super().__init__()
        check_table("table", table)
        check_text("formula", formula)
        check_names("categorical", categorical)
        if predict_table is not None:
            check_table("predict_table", predict_table)
        for name, value in (("residual", residual), ("weights", weights), ("split_by", split_by)):
            if value is not None:
                check_text(name, value)
        check_number("validation", validation, least=0, below=1)
        check_choice("split", split, ("random", "group", "unseen"))
        check_count("seed", seed)
        named = isinstance(table, pd.DataFrame)
        source = "the table" if named else f"file {str(table)!r}"
        relations = relations_of(pedigree, kernels)
        self.response = EncodedResponse(
            formula,
            family,
            categorical,
            source,
            residual=residual,
            weights=weights,
            relations=relations,
        )
        self.encoder = self.response.encoder
        self._table = table
        self._predict_table = predict_table
        self._validation, self._split, self._split_by = validation, split, split_by
        self._seed = seed
        self._division: Division | None = None
        self._order_seed = 0
        self._moved: tuple[Any, torch.device, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, split and encode the table, once."""
        if hasattr(self, "encoded"):
            return
        table = _frame(self._table)
        self.held_out = None
        if self._validation:
            out = self._chosen(table)
            self.encoded, self.table = self.response.fit(table[~out])
            self.held_out = self.response.held_out(table[out])
        else:
            self.encoded, self.table = self.response.fit(table)

    def _chosen(self, table: pd.DataFrame) -> np.ndarray:
        """Which rows are held out."""
        rng, n = np.random.default_rng(self._seed), len(table)
        if self._split == "random":
            out = rng.permutation(n) < round(self._validation * n)
        else:
            out = self._by_level(table, rng)
        if not out.any():
            raise InputError(
                f"`validation` is {self._validation}: no row of {n} is held out; raise it"
            )
        return out

    def _by_level(self, table: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
        groups = [":".join(part.factors) for part in self.encoder.formula.random]
        by = self._split_by or (groups[0] if groups else None)
        if by is None:
            raise InputError(f"split {self._split!r}: `split_by` names no column to split by")
        columns = by.split(":")
        for column in columns:
            if column not in table.columns:
                raise InputError(f"{self.encoder.source} has no column {column!r} to split by")
        level = table.groupby(columns, sort=False, dropna=False).ngroup().to_numpy()
        levels = int(level.max()) + 1
        if self._split == "unseen":
            return (rng.permutation(levels) < round(self._validation * levels))[level]
        order = rng.permutation(len(table))
        place = pd.Series(order).groupby(level).rank().to_numpy() - 1
        size = np.bincount(level)[level]
        return place < np.minimum(np.round(self._validation * size), size - 1)

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


def attached(
    module: LightningModule, encoder: Encoder, family: str | None = None
) -> MixedModelDataModule:
    """The data module that a module is fitted with.

    Raises:
        InputError: if it is of another kind, or was made with another formula or structure.
    """
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, MixedModelDataModule):
        raise InputError(
            f"the trainer was given {'a loader' if data is None else described(data)}: expected a "
            f"MixedModelDataModule, with which a {type(module).__name__} of a formula trains"
        )
    if data.encoder.formula != encoder.formula:
        raise InputError(
            f"the data module's formula is {data.encoder.formula.text!r} but the model's "
            f"{encoder.formula.text!r}"
        )
    if data.response.family != family:
        raise InputError(
            f"the data module's `family` is {data.response.family!r} but the model's {family!r}"
        )
    for name in ("residual", "weights", "categorical"):
        own, given = getattr(encoder, name), getattr(data.encoder, name)
        if own != given:
            raise InputError(f"the data module's `{name}` is {given!r} but the model's {own!r}")
    return data


def _frame(table: pd.DataFrame | str | os.PathLike[str]) -> pd.DataFrame:
    if isinstance(table, TableFile):
        return table.read()
    return table if isinstance(table, pd.DataFrame) else read_table(table)


def _whole(batch: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
