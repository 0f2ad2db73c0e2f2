"""The base class of matrices made from matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.nodes import (
    Kind,
    check_result,
    has_values,
    is_opaque,
    is_ours,
    kind_of,
    of_user,
)
from openreml_nn.covariance.params import check_name, module_name
from openreml_nn.covariance.tree import Tree
from openreml_nn.support.checks import found
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.term import Term

__all__ = ["Operator"]


class Operator(Matrix):
    r"""A matrix :math:`V = f(A_0, A_1, \dots)` of operand matrices.

    Operands are submodules under their names: ``op_0``, ``op_1``, … when
    positional, otherwise those of the dict or the keyword arguments. The
    parameter ``sigma^2`` of operand ``g`` is called ``g/sigma^2``. A module
    used in two places is one set of parameters, named after its first place.

    Tensors are operands too: a plain one is a buffer, an ``nn.Parameter`` a
    parameter of the operator, each under the operand's name. Such a parameter
    is trained like any other of a module; it is no covariance parameter and
    has no place in :attr:`param_names`.

    A name that a module uses itself, such as ``type`` or ``shape``, is percent-encoded
    in ``state_dict()`` and ``named_parameters()``, and nowhere else.

    A subclass writes its formula as :meth:`combine`; that is all it needs. Its
    shape is then that of the result. With :meth:`combine_vjp` and
    :meth:`combine_jvp` it also has closed-form derivatives; the chain rule
    through the tree is written here once.

    Raises:
        InputError: if positional and keyword operands are mixed, their number
            or shapes do not fit, or a name is empty or holds ``/`` or ``.``.
        TypeError: if an operand is neither a Matrix nor a tensor, none is
            a Matrix, or ``combine`` does not take one value for each operand.

    >>> from openreml_nn.covariance import ScalarMatrix
    >>> class Difference(Operator):
    ...     def combine(self, a, b):
    ...         return a - b / 2
    >>> Difference(ScalarMatrix(2), ScalarMatrix(2))().detach()
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """

    #: How many operands make sense; None where there is no limit.
    least_operands = 1
    most_operands: int | None = None
    #: Whether the derivatives do not depend on the operands' values, which are then not given.
    linear = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args and kwargs:
            raise InputError("operands are given by position and by keyword: use one of the two")
        if len(args) == 1 and isinstance(args[0], Mapping):
            operands = dict(args[0])
        else:
            operands = {f"op_{i}": arg for i, arg in enumerate(args)} or kwargs
        operands = self._ordered(operands)
        self._check_count(len(operands))
        for name, operand in operands.items():
            check_name(name, "operand")
            self._check_operand(name, operand)
        if not any(isinstance(operand, Matrix) for operand in operands.values()):
            raise TypeError(f"{type(self).__name__} has no Matrix among its operands")
        self._check_formula(len(operands))
        shapes = [tuple(operand.shape) for operand in operands.values()]
        given = type(self).infer_shape is not Operator.infer_shape
        super().__init__(self.infer_shape(shapes) if given else (1, 1), {})
        if not given:
            self.known_shape = None
        self.operand_shapes = shapes
        # In a dict of names as a user writes them to names as the module keeps them.
        self.operand_keys: dict[str, str] = {}
        for name, operand in operands.items():
            kept = self.operand_keys[name] = module_name(name, self)
            # Not add_module: it would refuse a name that is an instance's attribute.
            if isinstance(operand, Matrix):
                self._modules[kept] = operand
            elif isinstance(operand, nn.Parameter):
                self._parameters[kept] = operand
            else:
                self._buffers[kept] = operand

    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dict__.get("operand_keys") or {}
        super().__setattr__(names.get(name, name), value)

    def _ordered(self, operands: dict[str, Any]) -> dict[str, Any]:
        """The operands in the order of :meth:`combine`."""
        return operands

    def _check_count(self, count: int) -> None:
        least, most = self.least_operands, self.most_operands
        if count < least or (most is not None and count > most):
            expected = f"{least}" if least == most else f"at least {least}"
            raise InputError(f"got {count} operands: {type(self).__name__} needs {expected}")

    def _check_operand(self, name: str, operand: Any) -> None:
        if not isinstance(operand, Matrix | Tensor):
            raise TypeError(
                f"operand {name!r} is a {type(operand).__name__}: expected a Matrix or a tensor"
            )
        if len(operand.shape) != 2:
            raise InputError(f"operand {name!r} has shape {tuple(operand.shape)}: expected 2-D")
        if isinstance(operand, Tensor):
            if not operand.is_floating_point():
                raise TypeError(
                    f"operand {name!r} is {operand.dtype}: expected floating-point numbers"
                )
            if has_values(operand) and not bool(torch.isfinite(operand.detach()).all()):
                raise InputError(f"operand {name!r} has an entry that is not finite")
            if not operand.numel():
                raise InputError(f"operand {name!r} has shape {tuple(operand.shape)}: it is empty")

    def _check_formula(self, count: int) -> None:
        cls = type(self)
        if cls.combine is Operator.combine:
            if cls.forward is Operator.forward and cls.__call__ is Matrix.__call__:
                raise TypeError(
                    f"{cls.__name__} has no formula: an Operator needs combine(*values)"
                )
            return
        try:
            if kind_of(self).ours:
                _bind(cls.combine, count)
            else:
                signature(self.combine).bind(*range(count))
        except TypeError:
            raise TypeError(
                f"{cls.__name__}.combine{signature(self.combine)} does not take the values of its "
                f"{count} operands one by one: expected combine(self, *values)"
            ) from None

    # ------------------------------------------------------------------ to be implemented

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the result; raises InputError where the operands do not fit."""
        raise NotImplementedError

    def combine(self, *values: Tensor) -> Tensor:
        """The result from the operands' values, in the order of :attr:`operands`."""
        raise NotImplementedError

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> Sequence[Tensor | None]:
        """Cotangent of each operand; None where it has no free parameters."""
        raise NotImplementedError

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        """Derivative of the result along ``tangent`` of operand ``index`` alone.

        Several tangents are stacked in front, (m, …), and so are their results.
        """
        raise NotImplementedError

    def formed_operands(self) -> list[bool]:
        """For each operand whether its value is formed; None stands for one that is not."""
        return [True] * len(self.operand_keys)

    # ------------------------------------------------------------------ evaluation

    @property
    def shape(self) -> tuple[int, ...]:
        if self.known_shape is None:
            with torch.no_grad():
                value = self()
            check_result(self, value)
            self.known_shape = tuple(value.shape)
        return self.known_shape

    @property
    def operands(self) -> dict[str, Matrix | Tensor]:
        """Operands by name."""
        modules: dict[str, Any] = self._modules
        return {
            name: modules[kept] if kept in modules else self.stored(kept)
            for name, kept in self.operand_keys.items()
        }

    def checked_operands(self) -> list[Matrix | Tensor]:
        """Operands as they are now.

        Raises:
            TypeError: if one has been replaced by something that is no operand.
            InputError: if one has been replaced by another shape.
        """
        modules: dict[str, Any] = self._modules
        found: list[Matrix | Tensor] = []
        for (name, kept), shape in zip(self.operand_keys.items(), self.operand_shapes, strict=True):
            operand = modules.get(kept)
            if operand is None:
                operand = self.stored(kept)
            elif not isinstance(operand, Matrix):
                self._check_operand(name, operand)
            if operand.shape != shape:
                raise InputError(
                    f"operand {name!r} is now {tuple(operand.shape)}: {self._get_name()} was made "
                    f"of one of shape {shape}"
                )
            found.append(operand)
        return found

    def terms(self, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> list[Term]:
        self.checked_operands()  # one of another shape would be taken for what it is not
        return super().terms(rows, dtype)

    def lowered(self) -> dict[str, list[Term]]:
        """Terms of each operand, by its name."""
        found = {}
        for name, operand in self.operands.items():
            if isinstance(operand, Matrix):
                found[name] = operand.terms()
            else:
                whole = DenseCovariance(operand.to(self.no_values()))
                found[name] = [Term(IdentityDesign(operand.shape[0]), whole)]
        return found

    def forward(self, free_params: FreeParams = None) -> Tensor:
        values = self._evaluated(free_params, self.formed_operands())
        with of_user(self, self.no_values()):
            return self.combine(*values)

    def build_operands(self, free_params: FreeParams = None) -> list[Tensor]:
        """Evaluated operands, in the order of :attr:`operands`."""
        return self._evaluated(free_params, [True] * len(self.operand_keys))

    def _evaluated(self, free_params: FreeParams, formed: Sequence[bool]) -> list[Any]:
        with nullcontext() if free_params is None else self.given(free_params):
            like = self.no_values()
            found: list[Any] = []
            for operand, is_formed in zip(self.checked_operands(), formed, strict=True):
                if isinstance(operand, Tensor):
                    found.append(operand.to(like))
                elif not is_formed:
                    found.append(None)
                else:
                    found.append(operand() if operand.num_free_params else operand(like))
            return found

    def no_values(self) -> Tensor:
        """No parameters, in the precision and on the device of the evaluation."""
        for leaf in self.leaves().values():
            if leaf.stand_in is not None:
                return leaf.stand_in.values[:0]
        return self.no_params()

    def leaves(self) -> dict[str, Matrix]:
        found: dict[str, Matrix] = {}
        seen: set[int] = set()
        stack: list[tuple[str, Matrix]] = [("", self)]
        while stack:
            prefix, node = stack.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if not isinstance(node, Operator):
                found[prefix] = node
                continue
            for name, operand in reversed(node.operands.items()):
                if isinstance(operand, Matrix):
                    stack.append((f"{prefix}{name}/", operand))
        return found

    @classmethod
    def node_kind(cls) -> Kind:
        opaque = cls.__call__ is not Matrix.__call__ or cls.forward is not Operator.forward
        own = (cls.combine_vjp, cls.combine_jvp)
        closed = Operator.combine_vjp not in own and Operator.combine_jvp not in own
        return Kind(operator=True, opaque=opaque, ours=is_ours(cls.combine), closed=closed)

    def has_closed_form(self) -> bool:
        return not is_opaque(self) and Tree(self).closed[-1]

    def has_jacobian(self) -> bool:
        cls = type(self)
        own = (cls.combine_vjp, cls.combine_jvp)
        standard = Operator.combine_vjp not in own and Operator.combine_jvp not in own
        return standard or cls.manual_grad is not Operator.manual_grad

    # ------------------------------------------------------------------ gradients

    def operands_grad(
        self, free_params: FreeParams = None
    ) -> tuple[list[Tensor | None], list[list[str]]]:
        """Jacobian of each operand as by :meth:`Matrix.grad`, and the names of its slices.

        Returns:
            Two lists, with an element for each operand: the Jacobians, None for
            a tensor or where all is fixed, and the names of their parameters
            as they are called here.
        """
        slices: list[Tensor | None] = []
        names: list[list[str]] = []
        with nullcontext() if free_params is None else self.given(free_params):
            for name, operand in self.operands.items():
                part, own = operand.grad() if isinstance(operand, Matrix) else (None, [])
                slices.append(part)
                names.append([f"{name}/{parameter}" for parameter in own])
        return slices, names

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        tree, parts = self._tree(free_params)
        if tree is None:
            return self.auto_grad(free_params)
        if not parts:
            return None, []
        found = tree.jacobian(parts)
        n, m = self.shape
        slices = [
            found[i] if i in found else part.new_zeros(len(part), n, m)
            for i, part in zip(tree.leaves, parts, strict=True)
        ]
        return torch.cat(slices) if len(slices) > 1 else slices[0], self.free_param_names

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        right = isinstance(cotangent, Tensor) and cotangent.is_floating_point()
        if not right or tuple(cotangent.shape) != self.shape:
            raise InputError(
                f"`cotangent` is {found(cotangent)}: expected a tensor of {self.shape}"
            )
        tree, parts = self._tree(free_params)
        if tree is None:
            _, pull, *_ = torch.func.vjp(self.recorded_value, self.flat_params(free_params))
            return pull(cotangent)[0]
        if not parts:
            return self.flat_params(free_params)
        return torch.cat(tree.pull_back(cotangent, parts))

    def _tree(self, free_params: FreeParams) -> tuple[Tree | None, list[Tensor]]:
        """The tree with its parameters; no tree where a node in it must be called as a module.

        Raises:
            NotImplementedError: if the operator's own formula has no derivatives.
        """
        kind = type(self)
        if Operator.combine_vjp is kind.combine_vjp or Operator.combine_jvp is kind.combine_jvp:
            raise NotImplementedError(f"{kind.__name__} has no combine_vjp and combine_jvp")
        if is_opaque(self):
            return None, []
        tree = Tree(self)
        return (None, []) if any(tree.opaque) else (tree, tree.parts(free_params))

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {"operands": self.operands}


@cache
def _bind(combine: Any, count: int) -> None:
    """Raise TypeError unless a formula of the package takes so many values."""
    signature(combine).bind(None, *range(count))
