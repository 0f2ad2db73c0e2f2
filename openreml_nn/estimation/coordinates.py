"""The parameters of some covariances in the coordinates in which estimation steps."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix, Recorded
from openreml_nn.covariance.owner import Entry, Owner
from openreml_nn.covariance.transform import Transform, TransformIdentity
from openreml_nn.likelihood.loss import Objective
from openreml_nn.support.errors import InputError

__all__ = ["Coordinates", "Loose"]

#: Numbers in parameters of networks and designs of which the whole Hessian is formed.
MOST_LOOSE = 500


class Loose(NamedTuple):
    """A parameter that is no covariance parameter: a weight of a network, loadings in Z.

    Attributes:
        name: path in the tree.
        tensor: the parameter itself.
    """

    name: str
    tensor: Tensor

    @property
    def names(self) -> list[str]:
        """A name for each of its numbers."""
        if self.tensor.numel() == 1:
            return [self.name]
        grid = torch.cartesian_prod(*[torch.arange(size) for size in self.tensor.shape])
        places = grid.reshape(self.tensor.numel(), -1).tolist()
        return [f"{self.name}[{','.join(map(str, place))}]" for place in places]


class Coordinates:
    """The parameters of some covariances that are estimated, in the coordinates of estimation.

    These are the parameters that require a gradient: first those that have a transform,
    in its coordinate, then the others as they are.

    Args:
        objectives: likelihoods whose covariances hold the parameters.
        owned: the parameters to move; all that require a gradient if None.

    Attributes:
        entries: the parameters with a transform, a number each.
        loose: the others, of any shape.
        names: a name for each coordinate.

    Raises:
        InputError: if the others hold more numbers than can be estimated together.
    """

    def __init__(
        self, objectives: Sequence[Objective], owned: Sequence[Tensor] | None = None
    ) -> None:
        wanted = None if owned is None else {id(p) for p in owned}
        self.entries: list[Entry] = []
        self.loose: list[Loose] = []
        self._maps: list[tuple[list[Entry], list[int | None]]] = []
        place: dict[int, int] = {}
        known: set[int] = set()
        for objective in objectives:
            free = list(objective.covariance.parameter_entries().free)
            at: list[int | None] = []
            for e in free:
                key = id(e.tensor)
                known.add(key)
                if e.tensor.requires_grad and (wanted is None or key in wanted):
                    if key not in place:
                        place[key] = len(self.entries)
                        self.entries.append(e)
                    at.append(place[key])
                else:
                    at.append(None)
            self._maps.append((free, at))
        for objective in objectives:
            for name, tensor in objective.covariance.named_parameters():
                key = id(tensor)
                if key in known or not tensor.requires_grad:
                    continue
                known.add(key)
                if wanted is None or key in wanted:
                    self.loose.append(Loose(name.replace(".", "/"), tensor))
        self.names = [e.name for e in self.entries]
        for loose in self.loose:
            if len(self) + loose.tensor.numel() > len(self.entries) + MOST_LOOSE:
                raise InputError(
                    f"parameter {loose.name!r} has {loose.tensor.numel()} numbers: at most "
                    f"{MOST_LOOSE} outside of the covariance parameters are estimated here; train "
                    "it by REMLLoss and an optimizer of torch, or freeze it by requires_grad_(False)"
                )
            self.names += loose.names
        bounds = [e.trans.bounds for e in self.entries]
        ends = [(min(b, default=-inf), max(b, default=inf)) for b in bounds]
        # A standard deviation is bounded on one side only.
        self._low = [low for low, _ in ends] + [-inf] * (len(self) - len(ends))
        self._high = [high if high > low else inf for low, high in ends]
        self._high += [inf] * (len(self) - len(ends))

    def __len__(self) -> int:
        return len(self.names)

    def vanishing(self, like: Tensor) -> Tensor:
        """Which coordinates end at zero, (m,), on the device of a tensor."""
        return torch.tensor([low == 0 for low in self._low], dtype=torch.bool, device=like.device)

    @property
    def quadratic(self) -> list[bool]:
        """In which coordinates covariances are quadratic: standard deviations, and entries of a
        factor, which have no transform."""
        return [
            e.trans.vanishes or isinstance(e.trans, TransformIdentity) for e in self.entries
        ] + [False] * (len(self) - len(self.entries))

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper boundary of each coordinate, infinite where there is none."""
        return like.new_tensor(self._low), like.new_tensor(self._high)

    def on_boundary(self, u: Tensor) -> Tensor:
        """Which coordinates are exactly at a boundary: a variance of 0, a correlation of ±1."""
        low, high = self.ends(u)
        return (u == low) | (u == high)

    def kinks(self, like: Tensor) -> dict[int, Tensor]:
        """By coordinate, in order, where the likelihood may have a kink."""
        found = {}
        for j, e in enumerate(self.entries):
            known = e.leaf.kinks().get(e.local) if isinstance(e.leaf, Matrix) else None
            if known is not None:
                found[j] = e.trans.coordinate(e.trans.inverse(known.to(like)))
        return found

    def read(self, like: Tensor) -> Tensor:
        """Present coordinates, on the dtype and device of ``like``."""
        found = [e.trans.coordinate(e.tensor.detach().to(like)) for e in self.entries]
        found += [loose.tensor.detach().to(like).reshape(-1) for loose in self.loose]
        return torch.cat(found) if found else like.new_empty(0)

    def write(self, u: Tensor) -> None:
        """Set the parameters to coordinates, which are made canonical first."""
        by_leaf: dict[int, tuple[Owner, dict[str, float]]] = {}
        for e, value in zip(self.entries, u.tolist(), strict=False):
            by_leaf.setdefault(id(e.leaf), (e.leaf, {}))[1][e.local] = value
        with torch.no_grad():
            for leaf, values in by_leaf.values():
                for name, value in leaf.canonical(values).items():
                    parameter = leaf._parameters[name]
                    assert parameter is not None
                    number = torch.tensor([value], dtype=u.dtype, device=u.device)
                    parameter.copy_(leaf.own_trans[name].from_coordinate(number))
            at = len(self.entries)
            for loose in self.loose:
                size = loose.tensor.numel()
                loose.tensor.copy_(u[at : at + size].reshape(loose.tensor.shape))
                at += size

    def natural(self, objective: int, u: Tensor) -> Recorded:
        """All free parameters of one objective's covariance, transformed, as a function of u."""
        free, at = self._maps[objective]
        if not free:
            return Recorded(u[:0], natural=True)
        values = [
            e.trans(e.tensor.detach().to(u))
            if i is None
            else self._seen(e, i).at_coordinate(u[i : i + 1])
            for e, i in zip(free, at, strict=True)
        ]
        return Recorded(torch.cat(values), natural=True)

    def _seen(self, e: Entry, i: int) -> Transform:
        """The transform of an entry in its coordinate, which is that of the first that shares it."""
        first = self.entries[i].trans
        return first if e.trans == first else e.trans
