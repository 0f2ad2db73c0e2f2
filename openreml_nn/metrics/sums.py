"""What several metrics share: the mean over batches, one precision, and the check of a covariance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from openreml_nn.support.errors import InputError

__all__ = ["Mean", "check_covariance", "one_precision"]


class Mean(Metric):
    """A sum over all batches divided by a count; right under any batches and processes.

    Args:
        shape: of the sum.
        **options: of ``torchmetrics.Metric``.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(**options)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero.new_zeros(shape), dist_reduce_fx="sum")
        self.add_state("count", zero, dist_reduce_fx="sum")

    def add(self, total: Tensor, count: int) -> None:
        """Add the sum over some rows, and their number."""
        # Not in place: a validation outside a fit makes tensors of inference mode of them.
        self.total = self.total + total.double()
        self.count = self.count + count

    def compute(self) -> Tensor:
        """The mean of what was seen."""
        return self.total / self.count


def one_precision(*tensors: Tensor) -> list[Tensor]:
    """Tensors in their common precision, at least float32, whole numbers in torch's default one: in
    half precision a sum over many rows would overflow, and a count lose rows."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    dtype = torch.promote_types(dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def check_covariance(name: str, matrix: Tensor) -> None:
    """Refuse a matrix that is not symmetric to five digits.

    Raises:
        InputError: if it is not.
    """
    if not bool(torch.isclose(matrix, matrix.mT, rtol=1e-5, atol=1e-8).all()):
        raise InputError(f"`{name}` is not symmetric: expected a covariance matrix")
