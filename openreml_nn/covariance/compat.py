"""Names of torch_openreml that have no other home here; docs/torch_openreml.md maps the rest."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import Transform
from openreml_nn.support.errors import InputError

__all__ = ["Intermediates", "simple_param_specs"]


class Intermediates:
    """By-products of an evaluation that a matrix may keep."""

    _intermediates: tuple[Tensor, Any] | None = None

    def set_intermediates(self, params: Tensor, intermediates: Any) -> None:
        """Keep a by-product of an evaluation, to be had again at exactly these parameters.

        Nothing is kept while autograd records or a ``torch.func`` transform
        runs: a kept graph would be freed by the first backward.
        """
        traced = torch._C._functorch.is_functorch_wrapped_tensor(params)
        if traced or (params.requires_grad and torch.is_grad_enabled()) or not params.numel():
            return
        self._intermediates = (params.detach().clone(), intermediates)

    def get_intermediates(self, params: Tensor) -> Any:
        """What :meth:`set_intermediates` kept at these parameters, dtype and device, or None."""
        if self._intermediates is None or torch._C._functorch.is_functorch_wrapped_tensor(params):
            return None
        key, kept = self._intermediates
        same = key.dtype == params.dtype and key.device == params.device
        return kept if same and torch.equal(key, params.detach()) else None

    def reset_intermediates(self) -> None:
        """Forget what :meth:`set_intermediates` kept."""
        self._intermediates = None


def simple_param_specs(
    n: int, default: Tensor | None = None, trans: Transform | None = None
) -> dict[str, dict[str, Any]]:
    """Specifications of free parameters ``theta_0``, ``theta_1``, … that are alike.

    Args:
        n: number of parameters, not negative.
        default: untransformed value of each, of shape (1,); 0 by default.
        trans: transform of each; the identity by default.

    Raises:
        TypeError: if an argument has the wrong type.
        InputError: if ``n`` is negative or ``default`` has another shape (a ValueError).

    >>> import torch
    >>> from openreml_nn.covariance import transform
    >>> specs = simple_param_specs(2, torch.tensor([1.5]), transform.TransformExp())
    >>> {name: spec["default"].item() for name, spec in specs.items()}
    {'theta_0': 1.5, 'theta_1': 1.5}
    >>> specs["theta_0"]["trans"], specs["theta_0"]["fixed"]
    (TransformExp(), False)
    """
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"`n` is {n!r}: expected an int")
    if n < 0:
        raise InputError(f"`n` is {n}: expected a number of parameters, at least 0")
    if default is not None and not isinstance(default, Tensor):
        raise TypeError(f"`default` is {default!r}: expected a tensor of shape (1,)")
    if default is not None and default.shape != (1,):
        raise InputError(f"`default` has shape {tuple(default.shape)}: expected (1,)")
    if trans is not None and not isinstance(trans, Transform):
        raise TypeError(f"`trans` is {trans!r}: expected a Transform")
    specs = free_specs([f"theta_{i}" for i in range(n)], trans=trans)
    if default is not None:
        for spec in specs.values():
            spec["default"] = default.detach().clone()
    return specs
