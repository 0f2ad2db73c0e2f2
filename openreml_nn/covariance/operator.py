"""The base class of matrices made from matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.matrix import FreeParams, Matrix, Recorded
from openreml_nn.covariance.params import Entry, Layout, check_name

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
            check_name(name, "operand")
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
        """Derivative of the result along ``tangent`` of operand ``index`` alone.

        Several tangents are stacked in front, (m, …), and so are their results.
        """
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

    def _positions(self, name: str) -> slice | np.ndarray:
        """Where the free parameters of operand ``name`` stand among those of the whole."""
        return self._layout().positions[name]

    def _layout(self) -> _OperatorLayout:
        kept = self._layout_kept
        if not isinstance(kept, _OperatorLayout) or kept.made != Layout.changes:
            self._layout_kept = kept = _OperatorLayout(self._entries(), self.operands)
        return kept

    def _entries(self) -> list[Entry]:
        entries: dict[tuple[int, str], Entry] = {}
        for name, operand in self.operands.items():
            if isinstance(operand, Matrix):
                for e in operand._layout().entries:
                    entries.setdefault(e.key, e._replace(name=f"{name}/{e.name}"))
        return list(entries.values())

    @property
    def operands(self) -> dict[str, Matrix | Tensor]:
        """Operands by name."""
        modules: dict[str, Any] = self._modules
        buffers: dict[str, Any] = self._buffers
        return {n: modules[n] if n in modules else buffers[n] for n in self._operand_names}

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
        names = list(self.operands)
        parts = {
            names[i]: self.combine_jvp(i, part, built)
            for i, (part, _) in enumerate(self.operands_grad(values))
            if part is not None
        }
        return self._gathered(parts, values), self.free_param_names

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        values = self._flat(free_params)
        pulled = self.combine_vjp(cotangent, self.build_operands(values))
        parts = {
            name: operand.pull_back(part, values[self._positions(name)])
            for (name, operand), part in zip(self.operands.items(), pulled, strict=True)
            if isinstance(operand, Matrix) and operand.num_free_params
        }
        return self._gathered(parts, values)

    def _gathered(self, parts: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """Put the operands' parts, along their free parameters, in the order of the whole.

        Parameters of a module that stands in several places get their sum.
        """
        if not parts:
            return values
        if self._layout().partitioned:
            found = list(parts.values())
            return torch.cat(found) if len(found) > 1 else found[0]
        shape = next(iter(parts.values())).shape[1:]
        total = values.new_zeros(values.numel(), *shape)
        place = torch.arange(values.numel(), device=values.device)
        for name, part in parts.items():
            total = total.index_add(0, place[self._positions(name)], part)
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


class _OperatorLayout(Layout):
    """A layout that also knows which parameters belong to which operand.

    Attributes:
        positions: for each operand, where its free parameters stand among
            those of the whole.
        partitioned: whether the operands' parameters follow one another
            without overlap, so that no module stands in two places.
    """

    def __init__(self, entries: Sequence[Entry], operands: Mapping[str, Matrix | Tensor]) -> None:
        super().__init__(entries)
        index = {e.key: i for i, e in enumerate(self.free)}
        self.positions: dict[str, slice | np.ndarray] = {}
        count = 0
        for name, operand in operands.items():
            free = operand._layout().free if isinstance(operand, Matrix) else ()
            places = [index[e.key] for e in free]
            count += len(places)
            start = places[0] if places else 0
            run = places == list(range(start, start + len(places)))
            self.positions[name] = slice(start, start + len(places)) if run else np.array(places)
        self.partitioned = count == len(self.free)
