"""What a user holds, bounds or ties of the parameters of a model, and where they start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance.owner import Entry, Owner
from openreml_nn.covariance.params import check_value
from openreml_nn.covariance.transform import (
    Transform,
    TransformChain,
    TransformExp,
    TransformScaleShift,
    TransformSigmoid,
)
from openreml_nn.families import Family
from openreml_nn.model.batch import Batch
from openreml_nn.model.mixed_model import MixedModel
from openreml_nn.support.checks import check_mapping, found
from openreml_nn.support.errors import InputError
from openreml_nn.support.names import stands_for

__all__ = ["Constraint", "Constraints", "constrain", "start_at"]

#: A value at which a parameter is held, the ends between which it is estimated, or the name of
#: another parameter to which it is equal.
Constraint = float | Sequence[float | None] | str


def constrain(
    model: nn.Module, entries: Sequence[Entry], constraints: Mapping[str, Constraint] | None
) -> dict[str, Constraint]:
    """Hold, bound and tie covariance parameters, all on the natural scale.

    A parameter that is held is fixed, and no longer estimated. One with bounds has a transform
    that reaches what lies between them; both ends are ordinary points, where the fit may end.
    Parameters that are tied are one ``nn.Parameter``.

    Args:
        model: with the modules that own the parameters.
        entries: the parameters of the covariance of its rows.
        constraints: a number, a pair of ends (None or infinite where there is none), or another
            parameter's name, by name. A name may leave out what stands between the first and the
            last part of a path, as summaries do: ``g/rho`` for ``g/g/effects/rho``.

    Returns:
        The constraints by the full names.

    Raises:
        TypeError: if a constraint is of another kind.
        InputError: if a name is unknown or stands for several, or a value is out of range.
    """
    check_mapping("constraints", {} if constraints is None else constraints, None)
    at = _Named(model, entries, "constraints")
    full = {at.full(name): value for name, value in (constraints or {}).items()}
    if len(full) < len(constraints or {}):
        raise InputError("`constraints` names a parameter twice")
    ties = {name: at.full(value) for name, value in full.items() if isinstance(value, str)}
    for name, other in ties.items():
        at.tie(name, other)
    for name, value in full.items():
        if name in ties:
            continue
        if isinstance(value, Real) and not isinstance(value, bool):
            full[name] = at.hold(name, float(value))
        else:
            full[name] = at.bound(name, value)
    return full | ties


def start_at(
    model: nn.Module, entries: Sequence[Entry], starts: Mapping[str, float] | None
) -> None:
    """Set covariance parameters to starting values, on the natural scale.

    Args:
        model, entries: see :func:`constrain`.
        starts: values by names, as in :func:`constrain`.

    Raises:
        TypeError, InputError: as :func:`constrain` does.
    """
    check_mapping("starts", {} if starts is None else starts, None)
    at = _Named(model, entries, "starts")
    for name, value in (starts or {}).items():
        at.start(at.full(name), value)


class Constraints:
    """The constraints and starts that a user gives for a formula, and what they became in its model.

    Args:
        constraints: see :func:`constrain`.
        starts: see :func:`start_at`.

    Attributes:
        held: the constraints by full names, after :meth:`applied`.

    Raises:
        TypeError: if one is no dict by names.
    """

    def __init__(
        self, constraints: Mapping[str, Constraint] | None, starts: Mapping[str, float] | None
    ) -> None:
        check_mapping("constraints", {} if constraints is None else constraints)
        check_mapping("starts", {} if starts is None else starts)
        self._constraints, self.starts = dict(constraints or {}), dict(starts or {})
        self.held: dict[str, Constraint] = {}

    def __bool__(self) -> bool:
        return bool(self._constraints or self.starts)

    def applied(self, model: MixedModel, batch: Batch) -> MixedModel:
        """The model with its covariance parameters held, bounded and tied.

        Raises:
            TypeError, InputError: as :func:`constrain` does.
        """
        if self._constraints:
            given = _named(model, self._constraints, "constraints")
            self.held = constrain(model, _entries(model, batch), given)
        return model

    def begin(self, model: MixedModel, batch: Batch) -> None:
        """Set the parameters to their starts.

        Raises:
            TypeError, InputError: as :func:`start_at` does.
        """
        if self.starts:
            start_at(model, _entries(model, batch), _named(model, self.starts, "starts"))


def _entries(model: MixedModel, batch: Batch) -> list[Entry]:
    """The parameters of the covariance of the rows, and those of the model's family."""
    found = model.covariance(batch).entries()
    if model.family is not None:
        for leaf in model.family.modules():
            if isinstance(leaf, Family):
                found += [Entry(local, leaf, local) for local in leaf.own_trans]
    return found


def _named(model: MixedModel, given: Mapping[str, Any], option: str) -> dict[str, Any]:
    """Values by parameters, where a family has other names in results."""
    return dict(given) if model.family is None else model.family.by_parameters(given, option)


class _Named:
    """The parameters that may be estimated by their names, with the leaves that own them."""

    def __init__(self, model: nn.Module, entries: Sequence[Entry], option: str) -> None:
        self._model, self._option = model, option
        self._entries = {entry.name: entry for entry in entries}

    def full(self, name: object) -> str:
        """The parameter that a name, perhaps shortened, stands for."""
        if not isinstance(name, str):
            raise TypeError(f"`{self._option}` has the name {found(name)}: expected text")
        matches = [known for known in self._entries if stands_for(name, known)]
        free = [known for known, entry in self._entries.items() if entry.free]
        # A scale that the model holds at one is not what a user means.
        matches = [known for known in matches if known in free] or matches
        if name in self._entries:
            matches = [name]
        if not matches:
            raise InputError(
                f"`{self._option}` names {name!r}: expected one of {', '.join(free) or 'none'}"
            )
        if len(matches) > 1:
            raise InputError(
                f"`{self._option}` names {name!r}, which may be {', '.join(matches)}: expected one"
            )
        if not self._entries[matches[0]].free:
            raise InputError(
                f"`{self._option}` names {matches[0]!r}, which the model holds already: expected one "
                f"of {', '.join(free) or 'none'}"
            )
        return matches[0]

    def _owners(self, name: str) -> Iterator[tuple[Owner, str]]:
        """All leaves that have the parameter, and its name there."""
        entry = self._entries[name]
        tensor, known = entry.tensor, set()
        for module in (*self._model.modules(), entry.leaf):
            if isinstance(module, Owner) and id(module) not in known:
                known.add(id(module))
                for local in module.own_trans:
                    if module._parameters.get(local) is tensor:
                        yield module, local

    def hold(self, name: str, value: float) -> float:
        entry = self._entries[name]
        held = None if isinstance(entry.leaf, Family) else _at_end(value, entry.trans)
        if held is None:
            held = check_value(name, value, entry.trans, natural=True, option=self._option)
        for leaf, local in list(self._owners(name)):
            # A matrix of another size that stands for it in the tree may share its dictionaries.
            fixed = leaf._parameters.pop(local, None)
            if fixed is not None:
                leaf._buffers[local] = fixed.detach().clone().copy_(held)
        return value

    def bound(self, name: str, ends: object) -> tuple[float, float]:
        entry = self._entries[name]
        low, high = _ends(name, ends, entry.trans)
        if (low, high) == entry.trans.codomain:
            return low, high
        trans = _between(low, high)
        inside = low if isfinite(low) else high
        inside = (low + high) / 2 if isfinite(low) and isfinite(high) else inside
        if not (isfinite(low) and isfinite(high)):
            inside += 1.0 if isfinite(low) else -1.0
        now = float(entry.trans(entry.tensor.detach()))
        value = trans.inverse(torch.tensor([now if low < now < high else inside]).double())
        with torch.no_grad():
            entry.tensor.copy_(value)
        for leaf, local in list(self._owners(name)):
            leaf.retransform(local, trans)
        return low, high

    def tie(self, name: str, other: str) -> None:
        one, two = self._entries[name], self._entries[other]
        if name == other:
            raise InputError(f"`constraints` ties {name!r} to itself: expected another parameter")
        if isinstance(one.leaf, Family) != isinstance(two.leaf, Family):
            raise InputError(
                f"`constraints` ties {name!r} to {other!r}, one of which is of the family: expected both "
                "of it, or none"
            )
        if one.trans != two.trans:
            raise InputError(
                f"`constraints` ties {name!r} to {other!r}, of another range: {one.trans} and "
                f"{two.trans}"
            )
        shared = two.leaf._parameters[two.local]
        for leaf, local in list(self._owners(name)):
            leaf._parameters[local] = shared

    def start(self, name: str, value: object) -> None:
        entry = self._entries[name]
        with torch.no_grad():
            found = check_value(name, value, entry.trans, natural=True, option=self._option)
            entry.tensor.copy_(found)


def _at_end(value: float, trans: Transform) -> Tensor | None:
    """The untransformed value of an end of a bounded range, such as a correlation of 1, which an
    estimate may have reached; None for any other value."""
    if value not in trans.codomain or not all(map(isfinite, trans.codomain)):
        return None
    ends = (torch.tensor([end], dtype=torch.float64) for end in (-inf, inf))
    return next((end for end in ends if float(trans(end)) == value), None)


def _ends(name: str, ends: object, trans: Transform) -> tuple[float, float]:
    """The ends between which a parameter is estimated, within its own range."""
    if isinstance(ends, str | Mapping) or not isinstance(ends, Sequence):
        raise TypeError(
            f"`constraints` has {found(ends)} for {name!r}: expected a number, a pair (low, high) or "
            "the name of another parameter"
        )
    numbers: list[Any] = list(ends)
    good = all(e is None or (isinstance(e, Real) and not isinstance(e, bool)) for e in numbers)
    if len(numbers) != 2 or not good:
        raise InputError(f"`constraints` has {ends!r} for {name!r}: expected a pair (low, high)")
    least, most = trans.codomain
    low = least if numbers[0] is None else max(float(numbers[0]), -inf)
    high = most if numbers[1] is None else float(numbers[1])
    low, high = (least if low == -inf else low), (most if high == inf else high)
    if not least <= low < high <= most:
        raise InputError(
            f"`constraints` has {ends!r} for {name!r}: expected low < high, within "
            f"({least:g}, {most:g})"
        )
    return low, high


def _between(low: float, high: float) -> Transform:
    """A transform onto an interval."""
    if isfinite(low) and isfinite(high):
        return TransformChain([TransformSigmoid(), TransformScaleShift(high - low, low)])
    if isfinite(low):
        return TransformChain([TransformExp(), TransformScaleShift(1.0, low)])
    return TransformChain([TransformExp(), TransformScaleShift(-1.0, high)])
