"""What rows have said, kept so that others can be added to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from openreml_nn.likelihood.system.crossproducts import Cells, Pattern, Products
from openreml_nn.result.equations import Equations, FixedBasis

__all__ = ["Evidence"]


class Evidence(nn.Module):
    """The equations of the rows of a fit; as buffers they travel with the checkpoint.

    Those with y add up over rows. Equations whose levels have no cells, or that are larger, are
    left out of the checkpoint.

    Args:
        most_numbers: so many are kept at most.
    """

    sizes: Tensor
    counts: Tensor
    cells: Tensor
    products: Tensor
    crossed: Tensor
    squares: Tensor
    basis: Tensor
    offset: Tensor
    total: Tensor

    def __init__(self, most_numbers: int = 10_000_000) -> None:
        super().__init__()
        self.most_numbers = most_numbers
        self._given: Callable[[], Equations | None] | None = None
        self._equations: Equations | None = None
        for name, empty in _empty().items():
            self.register_buffer(name, empty)

    def update(self, equations: Callable[[], Equations | None]) -> None:
        """Take up equations, which are computed when they are asked for."""
        self._given, self._equations = equations, None

    @torch.no_grad()
    def equations(self) -> Equations | None:
        """The equations of the last update, or of a checkpoint; None if there are none."""
        if self._given is not None:
            found, self._given = self._given(), None
            self._keep(found)
            # What is in the buffers need not be held twice.
            self._equations = None if float(self.total[0]) else found
            return found
        if self._equations is None and not self.total.is_meta and float(self.total[0]):
            return self._kept()
        return self._equations

    def _keep(self, equations: Equations | None) -> None:
        """Make buffers of equations."""
        found = _empty() if equations is None else _flat(equations, self.most_numbers)
        where = self.squares.device if equations is None else equations.products.ff.device
        for name, value in found.items():
            setattr(self, name, value.to(where))

    def _kept(self) -> Equations:
        sizes = [(int(q), int(k)) for q, k in self.sizes.tolist()]
        pairs = [(t, u) for t in range(len(sizes)) for u in range(t, len(sizes))]
        counts = self.counts.tolist()
        shapes = [(sizes[t][1], sizes[u][1]) for t, u in pairs]
        at = self.cells.split(counts, 1) if counts else ()
        cells: dict[tuple[int, int], Cells | None] = {
            pair: Cells(own[0], own[1]) for pair, own in zip(pairs, at, strict=True)
        }
        lengths = [count * k * m for count, (k, m) in zip(counts, shapes, strict=True)]
        parts = self.products.split(lengths) if lengths else ()
        zz = {
            pair: part.reshape(count, k, m)
            for pair, part, count, (k, m) in zip(pairs, parts, counts, shapes, strict=True)
        }
        zf = list(self.crossed.split([q * k for q, k in sizes])) if sizes else []
        fixed = FixedBasis(self.basis, self.offset)
        rows, log_det = self.total.tolist()
        products = Products(zz, zf, self.squares)
        return Equations(sizes, Pattern(cells), products, fixed, int(rows), log_det)

    # Whoever looks at the buffers, or moves them, gets those of the last update.

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.equations()
        self._equations = None
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.equations()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.equations()
        return {**self.__dict__, "_equations": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "sizes" in state_dict:
            self._given = self._equations = None
        # The sizes are known only once there were data.
        for name in _empty():
            if prefix + name in state_dict:
                own = getattr(self, name)
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _empty() -> dict[str, Tensor]:
    whole, none = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    return {
        "sizes": whole.reshape(0, 2),
        "counts": whole,
        "cells": whole.reshape(2, 0),
        "products": none,
        "crossed": none.reshape(0, 0),
        "squares": none.reshape(0, 0),
        "basis": none.reshape(0, 0),
        "offset": none,
        "total": torch.zeros(2, dtype=torch.float64),
    }


def _flat(equations: Equations, most: int) -> dict[str, Tensor]:
    """Equations as tensors, by name; empty ones where they cannot be kept."""
    statistics = equations.statistics()
    if statistics is None:
        return _empty()
    products, ff = statistics.products, statistics.products.ff
    pairs = sorted(statistics.cells)
    size = sum(value.numel() for value in products.zz.values())
    if size + sum(part.numel() for part in products.zf) > most:
        return _empty()
    at = [torch.stack(statistics.cells[pair]) for pair in pairs]
    scalars = torch.tensor([statistics.rows, statistics.log_det], dtype=torch.float64)
    fixed = {"squares": ff, "basis": equations.fixed.basis, "offset": equations.fixed.offset}
    if not pairs:
        return _empty() | fixed | {"total": scalars}
    return {
        **fixed,
        "sizes": torch.tensor(statistics.sizes),
        "counts": torch.tensor([part.shape[1] for part in at]),
        "cells": torch.cat(at, 1),
        "products": torch.cat([products.zz[pair].flatten() for pair in pairs]),
        "crossed": torch.cat(products.zf),
        "total": scalars,
    }
