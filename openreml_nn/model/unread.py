"""Parts of a batch that a model does not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from openreml_nn.families import Family
from openreml_nn.model.batch import Batch, by_effect, check_values
from openreml_nn.model.random_effect import RandomEffect
from openreml_nn.model.residual import structure_of
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError

__all__ = ["refuse_unread"]


def refuse_unread(
    batch: Batch, effects: Mapping[str, RandomEffect], residual: nn.Module, responses: int
) -> None:
    """Refuse what has no effect in a model.

    Args:
        batch: the rows.
        effects: the model's random effects by name.
        residual: of a row, as :func:`structure_of` takes it, or a family.
        responses: how many a row has.

    Raises:
        TypeError, InputError: if the batch has such a part, naming it.
    """
    check_values(batch, effects)
    for name, value in by_effect(batch, "values").items():
        if effects[name].features is not None:
            why = "as the effect has features, which yield its values"
            _refuse(f"batch['values'][{name!r}]", value, why)
    for name, value in by_effect(batch, "places").items():
        if effects[name].places is None:
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
            "weights": (
                " beside a family",
                "as weights divide the residual variance of a Gaussian response",
            ),
        }
    if responses > 1:
        return {"residual": (" beside several responses", "as these are the cells of a row")}
    if not structure_of(residual).takes_cells:
        why = "as no rows share a group of cells"
        return {"residual": (" beside independent residuals", why)}
    return {}


def _refuse(name: str, value: Any, why: str, beside: str = "") -> None:
    if value is not None:
        raise InputError(f"`{name}` is {described(value)}{beside}: expected none, {why}")
