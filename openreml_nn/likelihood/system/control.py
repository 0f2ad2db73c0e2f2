"""What is known of the errors of random signs."""

from __future__ import annotations

import torch
from torch import Tensor

from openreml_nn.likelihood.system.conjugate import conjugate_gradients, log_samples
from openreml_nn.likelihood.system.listed import Levels
from openreml_nn.likelihood.system.scaled import ScaledSystem

__all__ = ["Control", "is_every"]


def is_every(q: int, count: int) -> bool:
    """Whether so many signs are as many as there are patterns of q, 2^q."""
    return count.bit_length() > q


class Control:
    """The errors of probes in the log-determinant of the kernels' inverses, which is known.

    Args:
        others: the levels of the terms, with their kernels.
        z: (q, m) the probes.
        tolerance: of the solves.

    Attributes:
        errors: (m,); None where there are no kernels, or no errors.
    """

    def __init__(self, others: Levels, z: Tensor, tolerance: float) -> None:
        self.errors: Tensor | None = None
        self._probes = z.shape[1]
        if not others.are_related:
            return
        none = [z.new_zeros(levels, k, k) for levels, k in others.grids]
        alone = ScaledSystem(others, torch.zeros_like, none, none)
        _, T = conjugate_gradients(alone.times, z, torch.zeros_like(z), tolerance)
        errors = log_samples(T, len(z)) + alone.log_det + others.log_det
        if float(errors.var()) > 0:
            self.errors = errors

    def controlled(self, samples: Tensor) -> Tensor:
        """Samples (probes, …) less what goes with the errors that are known."""
        control = self.errors
        if control is None:
            return samples
        centred = control - control.mean()
        slope = torch.tensordot(centred, samples, dims=([0], [0])) / (centred @ centred)
        return samples - control.reshape(-1, *[1] * (samples.dim() - 1)) * slope

    def shares(self, like: Tensor) -> Tensor:
        """The share of each probe in the mean of :meth:`controlled`, (m,)."""
        even = like.new_full((self._probes,), 1 / self._probes)
        if self.errors is None:
            return even
        control = self.errors.to(like)
        centred = control - control.mean()
        return even - control.mean() * centred / (centred @ centred)
