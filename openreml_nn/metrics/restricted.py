"""The restricted log-likelihood of independent batches."""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor
from torchmetrics import Metric

from openreml_nn.likelihood.problem import cholesky
from openreml_nn.metrics.sums import check_covariance
from openreml_nn.support.checks import check_choice, check_count, check_tensor

__all__ = ["RestrictedLogLikelihood"]


class RestrictedLogLikelihood(Metric):
    r"""Restricted log-likelihood of batches that are independent of each other, such as whole
    groups: exactly :func:`openreml_nn.restricted_log_likelihood` of all rows, fixed effects in
    common included.

    :math:`\log|V|, X^\top V^{-1}X, X^\top V^{-1}y` and :math:`y^\top V^{-1}y` add up over them.

    Args:
        fixed_effects: columns of X.
        method: ``"reml"`` or ``"ml"``.
        **options: of ``torchmetrics.Metric``.

    Raises:
        InputError: if ``method`` is unknown or shapes do not fit.
        NotPositiveDefiniteError: if V, or X'V^-1 X of all rows, is not positive definite.
    """

    full_state_update = False
    higher_is_better = True
    parts: Tensor
    cross: Tensor

    def __init__(self, fixed_effects: int, method: str = "reml", **options: object) -> None:
        super().__init__(**options)
        check_count("fixed_effects", fixed_effects)
        check_choice("method", method, ("reml", "ml"))
        self.method = method
        zero = torch.zeros(fixed_effects + 1, fixed_effects + 1, dtype=torch.float64)
        self.add_state("parts", zero.new_zeros(2), dist_reduce_fx="sum")
        self.add_state("cross", zero, dist_reduce_fx="sum")

    def update(self, y: Tensor, X: Tensor, V: Tensor) -> None:
        """Take a batch in: y (n,), X (n, p) and V (n, n)."""
        check_tensor("y", y, ("n",))
        n, p = len(y), len(self.cross) - 1
        check_tensor("X", X, (n, p))
        check_tensor("V", V, (n, n))
        check_covariance("V", V)
        L = cholesky(V.double(), "V")
        W = torch.linalg.solve_triangular(L, torch.cat([X, y[:, None]], 1).double(), upper=False)
        found = torch.stack([2 * L.diagonal().log().sum(), L.new_tensor(float(n))])
        self.parts = self.parts + found
        self.cross = self.cross + W.mT @ W

    def compute(self) -> Tensor:
        """The log-likelihood of what was seen."""
        log_det, n = self.parts
        p = len(self.cross) - 1
        L = cholesky(self.cross, "X'V^-1 X of all batches, or the residual,")
        value = log_det + L[-1, -1] ** 2
        if self.method == "ml":
            return -(value + n * log(2 * pi)) / 2
        return -(value + 2 * L.diagonal()[:p].log().sum() + (n - p) * log(2 * pi)) / 2
