"""A table as a Lightning data module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from openreml_nn.data import Encoded, Encoder, read_table

__all__ = ["MixedModelDataModule"]


class MixedModelDataModule(LightningDataModule):
    """A table, encoded by a formula, as one batch.

    The restricted likelihood does not fall apart into rows, so an epoch is
    one step on all of them.

    Args:
        table: a data frame, or the path of a CSV or Parquet file.
        formula: an lme4-style formula.
        categorical: numeric columns to be taken as factors.
        predict_table: what ``trainer.predict`` predicts; the same table by default.
        residual, weights: structure of the residuals and column of weights, as in :func:`lmm`.

    Attributes:
        encoder: what the formula makes of a table.
        encoded: the encoded table, after :meth:`setup`.

    Raises:
        InputError: if the formula or the table is at fault.
    """

    encoded: Encoded

    def __init__(
        self,
        table: pd.DataFrame | str | os.PathLike[str],
        formula: str,
        categorical: Sequence[str] = (),
        predict_table: pd.DataFrame | str | os.PathLike[str] | None = None,
        residual: str | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        named = isinstance(table, pd.DataFrame)
        source = "the table" if named else f"file {str(table)!r}"
        self.encoder = Encoder(formula, categorical, source, residual, weights)
        self._table = table
        self._predict_table = predict_table
        self._moved: tuple[Any, torch.device, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the table, once."""
        if not hasattr(self, "encoded"):
            self.encoded = self.encoder.fit(_frame(self._table))

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move the batch once: the loss keeps what it prepared for tensors that it has seen."""
        if self._moved is None or self._moved[0] is not batch or self._moved[1] != device:
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
            self._moved = (batch, device, moved)
        return self._moved[2]

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch of all rows: y and X."""
        assert self.encoded.y is not None
        return _whole({"y": self.encoded.y, "X": self.encoded.X})

    def predict_dataloader(self) -> DataLoader[Any]:
        """One batch of all rows: X, and for each random effect its codes and values."""
        encoded = self.encoded
        if self._predict_table is not None:
            encoded = self.encoder.transform(_frame(self._predict_table))
        return _whole(encoded.batch())


def _frame(table: pd.DataFrame | str | os.PathLike[str]) -> pd.DataFrame:
    return table if isinstance(table, pd.DataFrame) else read_table(table)


def _whole(batch: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
