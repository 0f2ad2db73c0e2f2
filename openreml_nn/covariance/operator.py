"""The base class of matrices made from matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import (
    FreeParams,
    Matrix,
    Recorded,
    _check_name,
    _Entry,
)

__all__ = ["Operator"]


class Operator(Matrix):
    r"""A matrix :math:`V = f(A_0, A_1, \dots)` of operand matrices.

    Operands are submodules under their names: ``op_0``, ``op_1``, … when
    positional, otherwise those of the dict or the keyword arguments. Plain
    tensors are allowed and become buffers. The parameter ``sigma^2`` of
    operand ``g`` is called ``g/sigma^2``. A module used in two places is one
    set of parameters, named after its first place.

    A subclass implements :meth:`_infer_shape`, :meth:`combine` and the
    derivatives :meth:`combine_vjp` and :meth:`combine_jvp`, all on evaluated
    operands; the chain rule through the tree is written here once.

    Raises:
        ValueError: if positional and keyword operands are mixed, their number
            or shapes do not fit, or a name is empty or holds ``/`` or ``.``.
        TypeError: if an operand is neither a Matrix nor a tensor, or none is
            a Matrix.
    """

    #: How many operands make sense; None where there is no limit.
    least_operands = 1
    most_operands: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args and kwargs:
            raise ValueError("operands are given by position and by keyword: use one of the two")
        if len(args) == 1 and isinstance(args[0], Mapping):
            operands = dict(args[0])
        else:
            operands = {f"op_{i}": arg for i, arg in enumerate(args)} or kwargs
        self._check_count(len(operands))
        self._check_operands(operands)
        shapes = [tuple(operand.shape) for operand in operands.values()]
        super().__init__(self._infer_shape(shapes), {})
        self._operand_names = list(operands)
        for name, operand in operands.items():
            # Not add_module: it refuses names such as "type" or "half", which factors may have.
            if isinstance(operand, Matrix):
                self._modules[name] = operand
            else:
                self._buffers[name] = operand

    def _check_count(self, count: int) -> None:
        least, most = self.least_operands, self.most_operands
        if count < least or (most is not None and count > most):
            expected = f"{least}" if least == most else f"at least {least}"
            raise ValueError(f"got {count} operands: {type(self).__name__} needs {expected}")

    def _check_operands(self, operands: Mapping[str, Any]) -> None:
        for name, operand in operands.items():
            _check_name(name, "operand")
            if not isinstance(operand, Matrix | Tensor):
                raise TypeError(
                    f"operand {name!r} is a {type(operand).__name__}: expected a Matrix or a tensor"
                )
            if operand.ndim != 2 if isinstance(operand, Tensor) else len(operand.shape) != 2:
                raise ValueError(f"operand {name!r} has shape {tuple(operand.shape)}: expected 2-D")
        if not any(isinstance(operand, Matrix) for operand in operands.values()):
            raise TypeError(f"{type(self).__name__} has no Matrix among its operands")

    # ------------------------------------------------------------------ to be implemented

    def _infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the result; raises ValueError where the operands do not fit."""
        raise NotImplementedError

    def combine(self, operands: Sequence[Tensor]) -> Tensor:
        """The result from evaluated operands."""
        raise NotImplementedError

    def combine_vjp(self, cotangent: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        """Cotangent of each operand."""
        raise NotImplementedError

    def combine_jvp(self, index: int, tangent: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Derivative of the result along ``tangent`` of operand ``index`` alone."""
        raise NotImplementedError

    # ------------------------------------------------------------------ evaluation

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return self.combine(self.build_operands(free_params))

    def build_operands(self, free_params: FreeParams = None) -> list[Tensor]:
        """Evaluated operands, in the order of :attr:`operands`."""
        return [
            operand(self._sub(name, free_params)) if isinstance(operand, Matrix) else operand
            for name, operand in self._typed_operands(free_params).items()
        ]

    def _typed_operands(self, free_params: FreeParams) -> dict[str, Matrix | Tensor]:
        """Operands, tensors among them on the dtype and device of the parameters."""
        like = self._flat(free_params)
        return {
            name: operand if isinstance(operand, Matrix) else operand.to(like)
            for name, operand in self.operands.items()
        }

    def _sub(self, name: str, free_params: FreeParams) -> FreeParams:
        """The part of the free parameters that belongs to operand ``name``."""
        values = self._flat(free_params)
        part = values[self._positions(name)]
        return Recorded(part, free_params.natural) if isinstance(free_params, Recorded) else part

    def _positions(self, name: str) -> slice | list[int]:
        """Where the free parameters of operand ``name`` stand among those of the whole."""
        index = {(id(e.leaf), e.local): i for i, e in enumerate(self._free_entries())}
        operand = self.operands[name]
        assert isinstance(operand, Matrix)
        positions = [index[id(e.leaf), e.local] for e in operand._entries() if e.free]
        if positions == list(range(positions[0], positions[-1] + 1)) if positions else True:
            return slice(positions[0], positions[-1] + 1) if positions else slice(0, 0)
        return positions

    def _entries(self) -> list[_Entry]:
        entries: dict[tuple[int, str], _Entry] = {}
        for name, operand in self.operands.items():
            if isinstance(operand, Matrix):
                for e in operand._entries():
                    entries.setdefault((id(e.leaf), e.local), e._replace(name=f"{name}/{e.name}"))
        return list(entries.values())

    def _free_entries(self) -> list[_Entry]:
        return [e for e in self._entries() if e.free]

    @property
    def operands(self) -> dict[str, Matrix | Tensor]:
        """Operands by name."""
        found: dict[str, Any] = {**self._modules, **self._buffers}
        return {name: found[name] for name in self._operand_names}

    # ------------------------------------------------------------------ gradients

    def operands_grad(
        self, free_params: FreeParams = None
    ) -> list[tuple[Tensor | None, list[str]]]:
        """Jacobian of each operand as by :meth:`Matrix.grad`; ``(None, [])`` for a tensor."""
        return [
            operand.grad(self._sub(name, self._flat(free_params)))
            if isinstance(operand, Matrix)
            else (None, [])
            for name, operand in self.operands.items()
        ]

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        values = self._flat(free_params)
        if not values.numel():
            return None, []
        built = self.build_operands(values)
        jacobian = values.new_zeros((values.numel(), *self.shape))
        for i, (name, (part, _)) in enumerate(
            zip(self.operands, self.operands_grad(values), strict=True)
        ):
            if part is not None:
                moved = torch.stack([self.combine_jvp(i, tangent, built) for tangent in part])
                where = torch.arange(values.numel(), device=values.device)[self._positions(name)]
                jacobian = jacobian.index_add(0, where, moved)
        return jacobian, self.free_param_names

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        values = self._flat(free_params)
        pulled = self.combine_vjp(cotangent, self.build_operands(values))
        total = torch.zeros_like(values)
        for (name, operand), part in zip(self.operands.items(), pulled, strict=True):
            if isinstance(operand, Matrix) and operand.num_free_params:
                where = self._positions(name)
                sub = operand.pull_back(part, values[where])
                index = torch.arange(values.numel(), device=values.device)[where]
                total = total.index_add(0, index, sub)
        return total

    def push_forward(self, tangent: Tensor, free_params: Tensor) -> Tensor:
        built = self.build_operands(free_params)
        total = None
        for i, (name, operand) in enumerate(self.operands.items()):
            if isinstance(operand, Matrix) and operand.num_free_params:
                where = self._positions(name)
                sub = operand.push_forward(tangent[where], free_params[where])
                moved = self.combine_jvp(i, sub, built)
                total = moved if total is None else total + moved
        assert total is not None
        return total

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {"operands": self.operands}
