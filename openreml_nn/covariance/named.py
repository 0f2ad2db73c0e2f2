"""Parameters by their names: how they are listed, and how they are changed."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, Self

import torch
from torch import Tensor, nn

from openreml_nn.covariance.owner import Entry, Owner
from openreml_nn.covariance.params import Spec, check_value
from openreml_nn.covariance.transform import Transform
from openreml_nn.support.checks import found
from openreml_nn.support.errors import InputError

__all__ = ["Named"]


class Named(Owner):
    """A module whose parameters are listed and changed by name."""

    def _entry(self, name: str) -> Entry:
        for entry in self.entries() if isinstance(name, str) else ():
            if entry.name == name:
                return entry
        raise InputError(f"`name` is {found(name)}: expected one of {self.param_names}")

    # ------------------------------------------------------------------ changing them

    def fix(self, name: str, value: float | Tensor | None = None, natural: bool = False) -> Self:
        """Make a parameter fixed, optionally at a value; returns ``self``.

        Args:
            name: one of :attr:`param_names`.
            value: where to fix it, untransformed; its present value by default.
            natural: whether ``value`` is on the natural scale: a variance and not half its logarithm.

        Raises:
            TypeError: if ``value`` is no number.
            InputError: if there is no such parameter, or ``value`` is not finite or
                not in the range of the transform.

        >>> from openreml_nn.covariance import ScalarMatrix
        >>> ScalarMatrix(1).fix("sigma^2", 4.0, natural=True)()
        tensor([[4.]])
        """
        entry = self._entry(name)
        self._refuse_moved(entry)
        with torch.no_grad():
            fixed = entry.tensor.detach().clone()
            if value is not None:
                fixed.copy_(check_value(name, value, entry.trans, natural))
        entry.leaf._parameters.pop(entry.local, None)
        entry.leaf._buffers[entry.local] = fixed
        return self

    def free(self, name: str) -> Self:
        """Make a fixed parameter free, from its present value; returns ``self``."""
        entry = self._entry(name)
        self._refuse_moved(entry)
        if not entry.free:
            value = entry.leaf._buffers.pop(entry.local)
            assert value is not None
            entry.leaf._parameters[entry.local] = nn.Parameter(value)
        return self

    def set_value(self, name: str, value: float | Tensor, natural: bool = False) -> Self:
        """Set a parameter, free or fixed; returns ``self``.

        Args:
            name: one of :attr:`param_names`.
            value: the value, untransformed.
            natural: whether ``value`` is on the natural scale.

        Raises:
            TypeError, InputError: as in :meth:`fix`.

        >>> from openreml_nn.covariance import ScalarMatrix
        >>> ScalarMatrix(1).set_value("sigma^2", 4.0, natural=True)().detach()
        tensor([[4.]])
        """
        entry = self._entry(name)
        self._refuse_moved(entry)
        with torch.no_grad():
            entry.tensor.copy_(check_value(name, value, entry.trans, natural))
        return self

    @staticmethod
    def _refuse_moved(entry: Entry) -> None:
        if not entry.free and entry.local not in entry.leaf._buffers:
            raise InputError(
                f"`name` is {entry.name!r}: it is parametrized or pruned by torch.nn.utils, "
                "which must be removed first"
            )

    def set_param_specs(self, *args: Any, **kwargs: Any) -> None:
        """Specifications are not assigned to.

        Raises:
            TypeError: always; the message names what to call.
        """
        raise TypeError(
            "specifications are read-only: fix(name, value), free(name) and "
            "set_value(name, value) change a parameter"
        )

    def set_start(self, name: str, value: Tensor) -> bool:
        """Set a parameter, if a fit may move it, to what its transform shall yield, within its range;
        whether it may."""
        parameter = self._parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            return False
        if parameter.is_meta:  # it has no value yet
            return True
        trans = self.own_trans[name]
        low, high = trans.codomain
        value = value.detach().reshape(1)
        if not bool((low <= value) & (value <= high)):
            # Bounds that a user has set: near the end that is nearer.
            room = (high - low) / 100 if high - low < inf else 1.0
            value = value.clamp(low + room, high - room)
        with torch.no_grad():
            parameter.copy_(trans.inverse(value))
        return True

    # ------------------------------------------------------------------ lists

    @property
    def param_specs(self) -> Mapping[str, Mapping[str, Any]]:
        """The specifications as they are now, read-only; :meth:`fix`, :meth:`free` and
        :meth:`set_value` change them."""
        return _Specs(
            (e.name, Spec(fixed=not e.free, default=e.tensor.detach(), trans=e.trans))
            for e in self.entries()
        )

    @property
    def param_names(self) -> list[str]:
        """Names of all parameters."""
        return [prefix + name for prefix, leaf in self.leaves().items() for name in leaf.own_trans]

    @property
    def free_param_names(self) -> list[str]:
        """Names of the free parameters."""
        return [
            prefix + name
            for prefix, leaf in self.leaves().items()
            for name in leaf.arrangement().free
        ]

    @property
    def fixed_param_names(self) -> list[str]:
        """Names of the fixed parameters."""
        return [e.name for e in self.entries() if not e.free]

    @property
    def estimated_param_names(self) -> list[str]:
        """Names of the parameters that a fit moves: free, and not frozen by
        ``requires_grad_(False)``."""
        return [e.name for e in self.entries() if e.estimated]

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(len(leaf.own_trans) for leaf in self.leaves().values())

    @property
    def num_free_params(self) -> int:
        """Number of free parameters."""
        return sum(len(leaf.arrangement().free) for leaf in self.leaves().values())

    @property
    def num_fixed_params(self) -> int:
        """Number of fixed parameters."""
        return self.num_params - self.num_free_params

    @property
    def free_param_index(self) -> list[int]:
        """Positions of the free parameters among all."""
        return self.parameter_entries().free_index

    @property
    def fixed_param_index(self) -> list[int]:
        """Positions of the fixed parameters among all."""
        return self.parameter_entries().fixed_index

    @property
    def param_defaults(self) -> dict[str, Tensor]:
        """Present untransformed values by name."""
        return {e.name: e.tensor.detach() for e in self.entries()}

    @property
    def free_param_defaults(self) -> dict[str, Tensor]:
        """Present untransformed values of the free parameters."""
        return {e.name: e.tensor.detach() for e in self.entries() if e.free}

    @property
    def fixed_param_defaults(self) -> dict[str, Tensor]:
        """Untransformed values of the fixed parameters."""
        return {e.name: e.tensor.detach() for e in self.entries() if not e.free}

    @property
    def param_trans(self) -> dict[str, Transform]:
        """Transforms by parameter name."""
        return {e.name: e.trans for e in self.entries()}

    @property
    def free_param_trans(self) -> dict[str, Transform]:
        """Transforms of the free parameters."""
        return {e.name: e.trans for e in self.entries() if e.free}

    @property
    def fixed_param_trans(self) -> dict[str, Transform]:
        """Transforms of the fixed parameters."""
        return {e.name: e.trans for e in self.entries() if not e.free}


class _Specs(Spec):
    """All specifications of a tree."""
