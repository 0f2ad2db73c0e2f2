"""Objects from configs: only those that are allowed."""

from __future__ import annotations

from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from openreml_nn.support.errors import InputError

__all__ = ["build"]

#: A config runs code by naming it; these packages' classes are what a config is for.
ALLOWED = ("openreml_nn", "torch", "lightning", "torchmetrics")


def build(config: Any, what: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate what ``_target_`` names, if it is a class of an allowed package.

    Args:
        config: the config.
        what: what messages call it.
        *args, **kwargs: arguments beside those of the config.

    Raises:
        InputError: if a target is not allowed or cannot be made from its arguments.
    """
    plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    _check(plain, what)
    try:
        return hydra.utils.instantiate(plain, *args, **kwargs)
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise InputError(f"config {what!r}: {reason}") from error


def _check(config: Any, what: str) -> None:
    if isinstance(config, dict | DictConfig):
        if "_target_" in config:
            _check_target(config["_target_"], what)
        for value in config.values():
            _check(value, what)
    elif isinstance(config, list | tuple | ListConfig):
        for value in config:
            _check(value, what)


def _check_target(target: Any, what: str) -> None:
    problem = f"config {what!r}: `_target_` {target!r} is not a class of {', '.join(ALLOWED)}"
    # Looked at before anything is imported, and again where it really lives: a module
    # of an allowed package also holds what it imported from elsewhere.
    if not isinstance(target, str) or target.split(".")[0] not in ALLOWED:
        raise InputError(problem)
    try:
        found = hydra.utils.get_object(target)
    except Exception:
        raise InputError(f"config {what!r}: `_target_` {target!r} does not exist") from None
    home = getattr(found, "__module__", "") or ""
    if not isinstance(found, type) or home.split(".")[0] not in (*ALLOWED, "lightning_fabric"):
        raise InputError(problem)
