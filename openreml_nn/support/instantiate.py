"""Objects from configs: what a config names is checked before any of it is made."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from omegaconf import OmegaConf

from openreml_nn.support.errors import InputError, NumericalError

__all__ = ["build", "unwrapped"]

#: Bounds of a config, which may come from a stranger's checkpoint: no config of use is near them.
_DEEPEST, _LARGEST = 50, 10_000
#: What Hydra gives a meaning in a config, beside ``_target_`` and ``_args_``, and the values that
#: say what is done here anyway: all of the config is made, at once, from plain values.
_HYDRA = {
    "_partial_": (False,),
    "_recursive_": (True,),
    "_convert_": ("all", "object", "partial"),
}


def build(
    config: Any, what: str, wants: type, *args: Any, nested: tuple[type, ...] = (), **kwargs: Any
) -> Any:
    """Make the object that ``_target_`` names, if it is what its place wants.

    A config runs code by naming it, and configs travel in checkpoints. Each class is therefore
    looked at before any is called: it is a subclass of ``wants`` and lives in the package where
    ``wants`` does (networks in ``torch.nn.modules``, optimizers in ``torch.optim``) or in this
    one. The same holds for the ``_target_`` of each argument, however deep: a network holds
    networks, a covariance covariances, and nothing else. Of Hydra's other words ``_args_`` are
    positional arguments; ``_partial_`` and ``_recursive_: false`` are refused. Interpolations are
    resolved where the config is Hydra's; in the text of a plain dictionary they are text.

    Args:
        config: the config, a mapping with ``_target_``.
        what: what messages call it.
        wants: the class that the object is one of.
        *args, **kwargs: arguments beside those of the config, which they replace.
        nested: what arguments may be one of, besides ``wants``.

    Raises:
        InputError: if a class is not what its place wants, or cannot be made of its arguments.
    """
    config = unwrapped(config)
    if not isinstance(config, Mapping) or "_target_" not in config:
        raise InputError(f"config {what!r} is {config!r}: expected a mapping with `_target_`")
    planned = _planned(config, what, (wants,), (wants, *nested), count(), 0)
    assert isinstance(planned, _Call)
    return _made(_Call(planned.kind, (*args, *planned.args), {**planned.kwargs, **kwargs}), what)


def unwrapped(value: Any) -> Any:
    """A config of Hydra's as Python's own containers, its interpolations resolved; another value as
    it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


@dataclass(frozen=True)
class _Call:
    """A class that has been looked at, and what it will be called with."""

    kind: type
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _planned(
    node: Any,
    what: str,
    wants: tuple[type, ...],
    nested: tuple[type, ...],
    size: Iterator[int],
    depth: int,
) -> Any:
    """A config with a :class:`_Call` in the place of each ``_target_``; nothing is made yet."""
    if depth > _DEEPEST or next(size) > _LARGEST:
        raise InputError(
            f"config {what!r} is too large: expected at most {_DEEPEST} levels and "
            f"{_LARGEST} values"
        )

    def inner(value: Any) -> Any:
        return _planned(value, what, nested, nested, size, depth + 1)

    if isinstance(node, list | tuple):
        return [inner(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    found = {key: inner(value) for key, value in node.items()}
    if "_target_" not in found:
        return found
    kind = _class(found.pop("_target_"), what, wants)
    for key, taken in _HYDRA.items():
        if (value := found.pop(key, taken[0])) not in taken:
            raise InputError(f"config {what!r}: `{key}` is {value!r}: expected {taken[0]!r}")
    args = found.pop("_args_", [])
    if not isinstance(args, list):
        raise InputError(f"config {what!r}: `_args_` is {args!r}: expected a list of arguments")
    if odd := [key for key in found if not isinstance(key, str)]:
        raise InputError(f"config {what!r}: {odd[0]!r} is no name of an argument")
    return _Call(kind, tuple(args), found)


def _made(node: Any, what: str) -> Any:
    if isinstance(node, list):
        return [_made(value, what) for value in node]
    if isinstance(node, dict):
        return {key: _made(value, what) for key, value in node.items()}
    if not isinstance(node, _Call):
        return node
    args = [_made(value, what) for value in node.args]
    kwargs = {key: _made(value, what) for key, value in node.kwargs.items()}
    try:
        return node.kind(*args, **kwargs)
    except NumericalError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"config {what!r}: {node.kind.__name__}: {reason}") from error


def _class(target: Any, what: str, wants: tuple[type, ...]) -> type:
    """The class of a name, which is a class of its place."""
    expected = " or ".join(f"{kind.__name__} of {_package(kind)} or openreml_nn" for kind in wants)
    problem = InputError(
        f"config {what!r}: `_target_` is {target!r}, which is not a class that may stand there: "
        f"expected a {expected}"
    )
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    # Names with an underscore are nobody's to use; `openreml_nn.__main__` runs when it is imported.
    if not module or any(not part or part.startswith("_") for part in target.split(".")):
        raise problem
    homes = [("openreml_nn", *((_package(kind),) if _package(kind) else ())) for kind in wants]
    if module not in sys.modules and not any(_within(module, home) for home in homes):
        raise problem  # what is imported runs
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        found = None
    if found is None:
        raise InputError(f"config {what!r}: `_target_` {target!r} does not exist")
    for kind, home in zip(wants, homes, strict=True):
        if isinstance(found, type) and kind in found.__mro__ and _within(found.__module__, home):
            return found
    raise problem


def _package(kind: type) -> str:
    """The package that a class lives in."""
    return kind.__module__.rpartition(".")[0]


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
