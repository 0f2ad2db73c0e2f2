"""Names of torch_openreml that have no other home here; docs/torch_openreml.md maps the rest."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import Tensor

from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import Transform
from openreml_nn.support.errors import InputError

__all__ = ["simple_param_specs"]


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
