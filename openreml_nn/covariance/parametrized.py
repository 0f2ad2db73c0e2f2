"""The values of a module's parameters: its own, or those that a call is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openreml_nn.covariance.named import Named
from openreml_nn.covariance.owner import tensors_of
from openreml_nn.support.checks import check_flag, found
from openreml_nn.support.errors import InputError

__all__ = ["FreeParams", "Given", "Parametrized", "Recorded", "widest_dtype"]


class Recorded(NamedTuple):
    """Free parameters to be used with plain autograd instead of the closed forms.

    With ``natural`` the values are already transformed: estimation evaluates
    the tree at them, because a variance of zero is an ordinary number on that
    scale but minus infinity before the transform.
    """

    values: Tensor
    natural: bool = False


FreeParams = Tensor | Mapping[str, Tensor] | Recorded | None


class Given(NamedTuple):
    """What a leaf takes for its own free parameters while a call lasts.

    Attributes:
        values: the free parameters.
        natural: whether they are transformed.
        untransformed: where a user's formula is called with what gives natural
            values when transformed, this.
    """

    values: Tensor
    natural: bool = False
    untransformed: Tensor | None = None


class Parametrized(Named):
    """A module whose parameters have values: its own, or what stands in for them.

    Attributes:
        stand_in: what a leaf takes for its free parameters while a call lasts; see :meth:`given`.
    """

    stand_in: Given | None = None

    def leaves(self) -> Mapping[str, Parametrized]:
        return {"": self}

    def free_values(self) -> Tensor:
        """The leaf's free parameters, untransformed, or what stands in for them, 1-D."""
        given = self.stand_in
        if given is None:
            own = self.own_values()
            return self.no_params() if own is None else own
        if given.untransformed is not None:
            return given.untransformed
        return self.transformed_by("inverse", given.values) if given.natural else given.values

    def transformed_by(self, method: str, values: Tensor) -> Tensor:
        return self.arrangement().of_free.apply(method, values)

    @contextmanager
    def given(self, free_params: FreeParams) -> Iterator[None]:
        """Let values stand in for the free parameters within the context."""
        natural = isinstance(free_params, Recorded) and free_params.natural
        leaves = list(self.leaves().values())
        before = [leaf.stand_in for leaf in leaves]
        values = self.flat_params(free_params)
        sizes = [len(leaf.arrangement().free) for leaf in leaves]
        try:
            for leaf, part in zip(leaves, values.split(sizes), strict=True):
                leaf.__dict__["stand_in"] = Given(part, natural)
            yield
        finally:
            for leaf, old in zip(leaves, before, strict=True):
                leaf.__dict__["stand_in"] = old

    @contextmanager
    def computed_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Let what is computed within the context be computed in a precision.

        Parameters are widened, or rounded, before anything is made of them, and known numbers follow
        them; gradients come back in the precision of each parameter.
        """
        if self._is_all_of(dtype):
            yield
            return
        none = torch.empty(0, dtype=dtype, device=self.reference().device)
        leaves = list(self.leaves().values())
        before = [leaf.stand_in for leaf in leaves]
        try:
            for leaf, old in zip(leaves, before, strict=True):
                if old is None:
                    own = leaf.own_values() if leaf.arrangement().free else None
                    found = Given(none if own is None else own.to(dtype))
                else:
                    plain = None if old.untransformed is None else old.untransformed.to(dtype)
                    found = Given(old.values.to(dtype), old.natural, plain)
                leaf.__dict__["stand_in"] = found
            yield
        finally:
            for leaf, old in zip(leaves, before, strict=True):
                leaf.__dict__["stand_in"] = old

    def _is_all_of(self, dtype: torch.dtype) -> bool:
        """Whether every number of the tree is of a dtype, and nothing stands in for one."""
        nodes: list[nn.Module] = [self]
        has_some = False
        while nodes:
            node = nodes.pop()
            own = node.__dict__
            if own.get("stand_in") is not None:
                return False
            for store in ("_parameters", "_buffers"):
                for tensor in own[store].values():
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    if tensor.dtype != dtype:
                        return False
                    has_some = True
            nodes += [child for child in node._modules.values() if child is not None]
        return has_some

    def flat_params(self, free_params: FreeParams) -> Tensor:
        """Free parameters as a checked 1-D tensor in the order of :attr:`free_param_names`."""
        if isinstance(free_params, Recorded):
            return free_params.values
        leaves = self.leaves().values()
        if free_params is None:
            own = [leaf for leaf in leaves if leaf.arrangement().free or leaf.stand_in is not None]
            parts = [leaf.free_values() for leaf in own]
            if len(parts) == 1:
                return parts[0]
            return torch.cat(parts) if parts else self.no_params()
        if isinstance(free_params, Tensor):
            count = sum(len(leaf.arrangement().free) for leaf in leaves)
            if free_params.dim() != 1 or free_params.shape[0] != count:
                raise InputError(
                    f"`free_params` has shape {tuple(free_params.shape)}: expected "
                    f"({count},), one number for each of {self.free_param_names}"
                )
            if not free_params.is_floating_point():
                raise TypeError(
                    f"`free_params` is {free_params.dtype}: expected floating-point numbers"
                )
            return free_params
        if not isinstance(free_params, Mapping):
            raise TypeError(
                f"`free_params` is a {type(free_params).__name__}: expected a tensor or a dict"
            )
        names = self.free_param_names
        missing = [name for name in names if name not in free_params]
        unexpected = [name for name in free_params if name not in names]
        if missing or unexpected:
            raise InputError(
                f"`free_params` lacks {missing} and has unexpected {unexpected}: "
                f"expected exactly {names}"
            )
        for name in names:
            value = free_params[name]
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"`free_params[{name!r}]` is a {type(value).__name__}: expected a tensor"
                )
            if value.shape not in ((), (1,)):
                raise InputError(
                    f"`free_params[{name!r}]` has shape {tuple(value.shape)}: expected (1,)"
                )
        return torch.cat([free_params[n].reshape(1) for n in names]) if names else self.no_params()

    def no_params(self) -> Tensor:
        like = self.reference()
        return torch.empty(0, dtype=like.dtype, device=like.device)

    def reference(self) -> Tensor:
        """A tensor whose dtype and device an evaluation without free parameters follows."""
        for store in ("_parameters", "_buffers"):
            for tensor in tensors_of(self, store):
                if tensor.is_floating_point():
                    return tensor
        return torch.empty(0)

    def build_params(
        self,
        free_params: FreeParams = None,
        include_fixed: bool = True,
        trans: bool = True,
        out_format: str = "tensor",
    ) -> Any:
        """Parameters in the order of :attr:`param_names`, fixed ones merged in.

        Args:
            free_params: nothing (the module's own parameters), a 1-D tensor in
                the order of :attr:`free_param_names`, or a dict by those names.
            include_fixed: whether fixed parameters are part of the result.
            trans: whether values are transformed.
            out_format: ``"tensor"`` or ``"dict"`` (name to tensor of shape (1,)).

        Raises:
            InputError: if ``out_format`` is something else, or as in calling the matrix.
        """
        arrangement = self.arrangement()
        plain = include_fixed is True and trans is True and out_format == "tensor"
        if plain and free_params is None and self.stand_in is None and arrangement.is_whole:
            # The most frequent call: a leaf's own values.
            return arrangement.of_free.apply("__call__", self.free_values())
        if not isinstance(out_format, str) or out_format not in ("tensor", "dict"):
            raise InputError(f"`out_format` is {found(out_format)}: expected 'tensor' or 'dict'")
        check_flag("include_fixed", include_fixed)
        check_flag("trans", trans)
        if len(leaves := self.leaves()) == 1 and leaves.get("") is self:
            values = self._own_params(free_params, include_fixed, trans)
        else:
            with nullcontext() if free_params is None else self.given(free_params):
                parts = [leaf._own_params(None, include_fixed, trans) for leaf in leaves.values()]
            parts = [part for part in parts if part.numel()]
            values = torch.cat(parts) if parts else self.no_params()
        if out_format == "tensor":
            return values
        names = self.param_names if include_fixed else self.free_param_names
        return dict(zip(names, values.split(1), strict=True)) if names else {}

    def _own_params(self, free_params: FreeParams, include_fixed: bool, trans: bool) -> Tensor:
        """:meth:`build_params` of a leaf."""
        arrangement, given = self.arrangement(), self.stand_in
        if isinstance(free_params, Recorded):
            with self.given(free_params):
                return self._own_params(None, include_fixed, trans)
        stand_in = given is not None and (free_params is None or free_params is given.untransformed)
        if stand_in and trans and given is not None and given.natural:
            values = given.values
        else:
            values = self.flat_params(free_params)
            if trans:
                values = arrangement.of_free.apply("__call__", values)
        if include_fixed and arrangement.merged is not None:
            fixed = torch.cat([self.stored(name) for name in arrangement.fixed]).to(values)
            if trans:
                fixed = arrangement.of_fixed.apply("__call__", fixed)
            values = torch.cat([values, fixed])[arrangement.merged]
        return values


def widest_dtype(module: nn.Module) -> torch.dtype:
    """The widest of the dtypes of all parameters of a module and of what stands in for them, of fixed
    ones, and of networks in it; where it has none, of its known numbers. float32 at least."""
    found, has_some = torch.float32, False
    nodes = [module]
    while nodes:
        node = nodes.pop()
        tensors: list[Tensor | None] = [*node._parameters.values()]
        if isinstance(node, Parametrized):
            tensors += [node._buffers.get(name) for name in node.own_trans]
            tensors += [] if node.stand_in is None else [node.stand_in.values]
        for tensor in tensors:
            if tensor is not None and tensor.is_floating_point():
                has_some = True
                if tensor.dtype != found:
                    found = torch.promote_types(found, tensor.dtype)
        nodes += [child for child in node._modules.values() if child is not None]
    if not has_some:
        for tensor in tensors_of(module, "_buffers"):
            if tensor.is_floating_point():
                found = torch.promote_types(found, tensor.dtype)
    return found
