"""Parts of a batch that a model does not read, or that are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from openreml_nn.families import Family
from openreml_nn.model.batch import Batch, by_effect, check_values, named_tensors
from openreml_nn.model.random_effect import RandomEffect
from openreml_nn.model.residual import structure_of
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = ["refuse_elsewhere", "refuse_unread"]

#: What some models read and others do not.
_OPTIONAL = frozenset({"values", "places", "residual", "covariate", "weights", "zi"})


def refuse_unread(
    batch: Batch,
    effects: Callable[[], Mapping[str, RandomEffect]],
    residual: nn.Module,
    responses: int,
    factors: int,
) -> None:
    """Refuse what has no effect in a model. Codes of other factors, as in one batch for several models,
    are said in a warning.

    Args:
        batch: the rows.
        effects: yields the model's random effects by name, where the batch has something for some.
        residual: of a row, as :func:`structure_of` takes it, or a family.
        responses: how many a row has.
        factors: how many random effects the model has.

    Raises:
        TypeError, InputError: if the batch has such a part, naming it.
    """
    groups = batch.get("groups")
    if isinstance(groups, Mapping) and len(groups) > factors:
        names = list(effects())
        unknown = ", ".join(repr(name) for name in groups if name not in names)
        warn(
            f"batch['groups'] has {unknown}, of which the model has no random effect: they are {names}",
            UserWarning,
        )
    if batch.keys().isdisjoint(_OPTIONAL):
        return  # as most do
    known = effects()
    check_values(batch, known)
    for name, value in by_effect(batch, "values").items():
        if known[name].features is not None:
            why = "as the effect has features, which yield its values"
            _refuse(f"batch['values'][{name!r}]", value, why)
    for name, value in by_effect(batch, "places").items():
        if known[name].places is None:
            _refuse(f"batch['places'][{name!r}]", value, "as levels have no places")
    for key, (beside, why) in _unread(residual, responses).items():
        _refuse(f"batch['{key}']", batch.get(key), why, beside)
    if batch.get("zi") is not None:
        if not isinstance(residual, Family):
            raise InputError("`batch['zi']` is given but the response is Gaussian: leave it out")
        if type(residual).with_inputs is Family.with_inputs:
            residual.with_inputs(batch["zi"], batch["zi"])  # which refuses them


def _unread(residual: nn.Module, responses: int) -> dict[str, tuple[str, str]]:
    """Keys that a residual, or a family in its place, does not read: beside what, and why."""
    if isinstance(residual, Family):
        return {
            "residual": (" beside a family", "as it has the residual's place"),
            "covariate": (" beside a family", "as it has the residual's place"),
        }
    takes = structure_of(residual).takes
    found = {}
    if responses > 1:
        found["residual"] = (" beside several responses", "as these are the cells of a row")
    elif "residual" not in takes:
        found["residual"] = (
            " beside independent residuals",
            "as no rows share a group of cells",
        )
    if "covariate" not in takes:
        found["covariate"] = (" beside the model's residual", "as its variance depends on none")
    return found


def _refuse(name: str, value: Any, why: str, beside: str = "") -> None:
    if value is not None:
        raise InputError(f"`{name}` is {described(value)}{beside}: expected none, {why}")


def refuse_elsewhere(batch: Batch, device: torch.device) -> None:
    """Refuse a part that is elsewhere than the model; of ``x`` the network says so.

    Args:
        batch: the data.
        device: where the model is.

    Raises:
        InputError: naming the part.
    """
    for key, value in batch.items():
        if key not in ("x", "extra"):
            for name, x in named_tensors(f"batch[{key!r}]", value):
                if x.device != device and not (x.is_meta or device.type == "meta"):
                    raise InputError(
                        f"`{name}` is on {x.device} but the model on {device}: move one of them"
                    )
