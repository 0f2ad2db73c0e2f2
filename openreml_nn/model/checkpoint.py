"""A fit as the checkpoint of a module that was not there: what :class:`openreml_nn.lightning.MixedModule`
loads, written without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openreml_nn.families import Ordinal
from openreml_nn.support.errors import InputError

if TYPE_CHECKING:
    from openreml_nn.model.mixed_model import MixedModel
    from openreml_nn.result import Result

__all__ = ["bases_in", "checkpoint_of"]


def checkpoint_of(result: Result, options: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint of a fit by :func:`lmm` or :func:`glmm`, from which ``load_from_checkpoint``
    makes a module that predicts, and a trainer goes on.

    Args:
        result: the fit, of a formula.
        options: those of the fit that :class:`openreml_nn.lightning.MixedModule` takes too, of Python's own
            numbers, strings and containers.

    Raises:
        InputError: if the result has no formula, and so cannot predict.
    """
    model = result.model
    if result.formula is None or model is None:
        raise InputError("`result` has no formula: expected one of a fit by lmm() or glmm()")
    return {
        "epoch": result.iterations,
        "global_step": result.iterations,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        # Nothing of a trainer's: it begins where the parameters are, which is the optimum.
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hyper_parameters": {**options, "model": result.formula},
        "table": {
            "encoder": result.encoder.learned.to_dict(),
            "columns": len(result.fixed.aliases),
            "bases": bases_in(model),
            "has_network": False,
            "has_family": model.family is not None,
            "categories": model.family.levels if isinstance(model.family, Ordinal) else 2,
        },
    }


def bases_in(model: MixedModel) -> dict[str, Tensor]:
    """The bases of random effects but the identity, in which most are."""
    found = {name: effect.basis for name, effect in model.effects().items()}
    return {name: B for name, B in found.items() if not torch.equal(B, torch.eye(len(B)).to(B))}
