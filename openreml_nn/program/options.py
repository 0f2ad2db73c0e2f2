"""Options of the program: as typed, as values of a kind, and as read by a run."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from openreml_nn.support.errors import InputError

__all__ = ["Options", "by_parameter", "flags_first", "flattened", "quoted", "references"]

#: Options whose values are free text; Hydra's grammar would trip over brackets and bars.
_TEXT = re.compile(
    r"\+{0,2}(model\.formula|model\.residual|model\.zi|data\.formula|data\.separator|data\.decimal|data\.comment"
    r"|data\.path|checkpoint|resume|path|output|model\.pedigree|model\.kernels\.\w+)=(.*)",
    re.DOTALL,
)
#: Sections whose keys are names of covariance parameters, such as ``animal/g/sigma^2``.
_PARAMETERS = ("model.constraints", "model.starts")
_PARAMETER = re.compile(r"\+{0,2}(model\.(?:constraints|starts))\.([^=]+)=(.*)", re.DOTALL)
_CHOICE = re.compile(r"choice\((\s*[\"'].*[\"']\s*)\)", re.DOTALL)
#: Hydra's own flags; those with a value may have it as the next argument.
_WITH_VALUE = re.compile(
    r"(--cfg|-c|--package|-p|--config-path|-cp|--config-name|-cn|--config-dir|-cd|--info|-i"
    r"|--experimental-rerun)"
)
_FLAG = re.compile(
    _WITH_VALUE.pattern
    + r"(=.*)?|-h|--help|--hydra-help|--version|--resolve|-r|--run|-m|--multirun"
    r"|-sc|--shell-completion"
)
#: Keys that a run of any kind takes.
_ALWAYS = ("hydra", "plots", "seed", "trainer.enable_progress_bar")


def quoted(argument: str) -> str:
    """An override whose free text is quoted for Hydra, unless the user has done so.

    >>> quoted("model.formula=y ~ x + (1 | g)")
    "model.formula='y ~ x + (1 | g)'"
    """
    parameter = _PARAMETER.fullmatch(argument)
    if parameter:
        section, name, value = parameter.groups()
        # Hydra's grammar has no '/' and '^' in a key, see by_parameter().
        name = re.sub(r"[^\w$]", lambda found: f"${ord(found[0]):02X}", name)
        argument = f"++{section}.{name}={value}"
        return argument if _parses(argument) else f"++{section}.{name}='{value}'"
    if argument.startswith("model.kernels."):
        argument = f"++{argument}"  # a name of the user's own, which no config has
    found = _TEXT.fullmatch(argument)
    if found and (choices := _CHOICE.fullmatch(found[2])):
        # Hydra takes the quotes off what choice() holds, and then fails to parse it.
        return f"{argument[: found.start(2)]}{choices[1]}"
    if not found or not found[2] or found[2][0] in "'\"" or found[2] == "null":
        return argument
    is_path = found[1].endswith(("path", "checkpoint", "resume", "output", "pedigree"))
    is_path = is_path or found[1].startswith("model.kernels.")
    if (is_path or found[2][0] == "{") and _parses(argument):
        return argument  # a sweep over files stays one, and a config of a network
    text = re.sub(r"(\\*)'", r"\1\1\\'", found[2])
    trailing = len(text) - len(text.rstrip("\\"))
    return f"{argument[: found.start(2)]}'{text}{chr(92) * trailing}'"


def by_parameter(config: DictConfig) -> DictConfig:
    """A config in which the names of covariance parameters are spelled as results spell them; in
    an override :func:`quoted` has encoded what Hydra does not take in a key."""
    found = copy.deepcopy(config)
    with open_dict(found):
        for section in _PARAMETERS:
            node = OmegaConf.select(found, section)
            if isinstance(node, DictConfig) and node:
                named = {
                    re.sub(r"\$([0-9A-F]{2})", lambda x: chr(int(x[1], 16)), str(key)): value
                    for key, value in node.items()
                }
                OmegaConf.update(found, section, named, merge=False)
    return found


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with Hydra's flags before all overrides ``key=value``, between which Hydra
    reads none.

    Raises:
        InputError: naming an argument that is neither.

    >>> flags_first(["seed=1", "--cfg", "job", "profile=true"])
    ['--cfg', 'job', 'seed=1', 'profile=true']
    """
    flags, overrides, is_value = [], [], False
    for argument in arguments:
        if is_value and (argument.startswith("-") or "=" in argument):
            is_value = False  # --info stands alone too
        if is_value:
            is_value = False
            flags.append(argument)
        elif argument.startswith("-"):
            if not _FLAG.fullmatch(argument):
                raise InputError(f"option {argument!r} is not known: see --help and --hydra-help")
            is_value = bool(_WITH_VALUE.fullmatch(argument))
            flags.append(argument)
        else:
            keyless = not argument.lstrip("+~").partition("=")[0].strip("@ ")
            if keyless or not _parses(argument):
                hint = ", without quotes around a value that has quotes" * ('="' in argument)
                raise InputError(f"option {argument!r} cannot be read: expected key=value{hint}")
            overrides.append(argument)
    return [*flags, *overrides]


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


class Options:
    """The values of a config, which know by whom they were asked for.

    A run reads what it uses; what was given and not read has no effect, and is refused.

    Args:
        config: of the run.
        pristine: the same without what the user gave; composed anew by default.

    Raises:
        InputError: if a value is of another kind than its key's, or a key that every run needs is
            taken out.
    """

    def __init__(self, config: DictConfig, pristine: DictConfig | None = None) -> None:
        self._config = config
        self._given = flattened(config)
        self._default = flattened(_pristine(config) if pristine is None else pristine)
        _check_needed(self._given, self._default)
        _check_kinds(config)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """The value of a key, resolved: a section is a dictionary. None where it is missing."""
        self._read.add(key)
        found = OmegaConf.select(self._config, key, throw_on_missing=True)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found

    def read_if(self, key: str, values: Sequence[Any]) -> None:
        """Count a key as read where its value is what happens anyway."""
        if OmegaConf.select(self._config, key) in values:
            self._read.add(key)

    def keys(self, section: str) -> list[str]:
        """The keys of a section, which are not read by being asked for."""
        node = OmegaConf.select(self._config, section)
        return [str(key) for key in node] if OmegaConf.is_dict(node) else []

    def given(self, section: str) -> list[str]:
        """The keys within a section, or the key itself, whose values are others than the default's."""
        known = dict.fromkeys([*self._given, *self._default])
        return [key for key in known if _within(key, section) and self.is_given(key)]

    def is_given(self, key: str) -> bool:
        """Whether a value, or what it refers to, is another than the default's."""
        value = self._given.get(key)
        if self._default.get(key) != value:
            return True
        return any(self.is_given(other) for other in references(str(value), key))

    def check_all_read(self, where: str = "in this run") -> None:
        """Refuse what was given and has no effect.

        Raises:
            InputError: naming each such key, and what it is.
        """
        used = set(self._read)
        while new := {r for key in self._leaves(used) for r in self._references(key)} - used:
            used |= new
        read = set(self._leaves(used))
        unread = {}
        for key, value in self._given.items():
            is_read = key in read or any(_within(key, each) for each in _ALWAYS)
            if not is_read and value not in ({}, []) and self._default.get(key, ...) != value:
                unread[key.removesuffix("._target_")] = value
        if unread:
            named = ", ".join(f"{key}={value}" for key, value in unread.items())
            raise InputError(f"no effect {where}: {named}; leave it out")

    def _leaves(self, keys: set[str]) -> Iterator[str]:
        """The given keys that are among some, or in a section that is."""
        return (key for key in self._given if any(_within(key, each) for each in keys))

    def _references(self, key: str) -> list[str]:
        return references(str(self._given[key]), key)


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _pristine(config: DictConfig) -> DictConfig:
    """The config of this run's data and model, without what else the user gave."""
    if not HydraConfig.get().overrides.task and HydraConfig.get().job.config_name == "config":
        return config  # composing takes a while
    choices = HydraConfig.get().runtime.choices
    own, groups = HydraConfig.get().job.config_name, ("data", "model")
    # A config of the user's own is a thing that was given.
    name = own if own in ("predict", "report") else "config"
    return hydra.compose(name, [f"{g}={choices[g]}" for g in groups if choices.get(g)])


def flattened(config: DictConfig) -> dict[str, Any]:
    """Values as they are written, not resolved, by dotted keys."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                yield from walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, node

    return dict(walk(OmegaConf.to_container(config, resolve=False), ""))


def references(text: str, key: str) -> list[str]:
    """The keys that the text of a value refers to by ``${…}``; ``key`` is where it stands."""
    found = []
    for dots, name in re.findall(r"\$\{\s*(\.*)([^${}:\s]+)\s*\}", text):
        parents = key.split(".")[: -len(dots)] if dots else []
        found.append(".".join([*parents, name]))
    return found


# ---------------------------------------------------------------------- kinds


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_node(value: Any) -> bool:
    return OmegaConf.is_dict(value) and "_target_" in value


_Kind = tuple[Callable[[Any], bool], str]
_SEED: _Kind = (lambda v: _is_whole(v) and v < 2**32, "a whole number from 0 to 4294967295")
_COUNT: _Kind = (lambda v: _is_whole(v) and v > 0, "a whole number, 1 or more")
_ROWS: _Kind = (lambda v: v is None or _COUNT[0](v), "a whole number, 1 or more, or null")
_SHARE: _Kind = (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 up to below 1")
_POSITIVE: _Kind = (lambda v: _is_number(v) and v > 0, "a number above 0")
_FLAG_KIND: _Kind = (lambda v: isinstance(v, bool), "true or false")
_FLAG_OR_NONE: _Kind = (lambda v: v is None or isinstance(v, bool), "true, false or null")
_TEXT_KIND: _Kind = (lambda v: isinstance(v, str), "text")
_TEXT_OR_NONE: _Kind = (lambda v: v is None or isinstance(v, str), "text, or null")
_NAME: _Kind = (lambda v: v is None or isinstance(v, str | int), "a name, or null")
_NAMES: _Kind = (lambda v: not OmegaConf.is_dict(v), "names of columns")
_NODE: _Kind = (_is_node, "a config with _target_")
_NODES: _Kind = (
    lambda v: not v or (OmegaConf.is_dict(v) and all(not p or _is_node(p) for p in v.values())),
    "configs with _target_ by names",
)
_NODE_OR_NONE: _Kind = (lambda v: v is None or _is_node(v), "a config with _target_, or null")
_STRUCTURE: _Kind = (
    lambda v: v is None or isinstance(v, str) or _is_node(v),
    "a structure such as ar1(time | group), a config with _target_, or null",
)
_PATHS: _Kind = (
    lambda v: v is None or (OmegaConf.is_dict(v) and all(isinstance(p, str) for p in v.values())),
    "paths of known matrices by name; a covariance by distance stands in the formula, such as "
    "(1 | matern(east, north))",
)
_BY_PARAMETER: _Kind = (
    lambda v: v is None or OmegaConf.is_dict(v),
    "values by names of parameters, or null",
)
#: What options must be that reach no class of ours through ``_target_``, which checks its own.
_KINDS: dict[str, _Kind] = {
    "seed": _SEED,
    "profile": _FLAG_KIND,
    "plots": _FLAG_KIND,
    "heritability": _NAME,
    "resume": _NAME,
    "trainer": _NODE,
    "trainer.max_epochs": _COUNT,
    "trainer.enable_progress_bar": _FLAG_KIND,
    "optimizer": _NODE,
    "callbacks": _NODES,
    "logger": _NODES,
    "data.categorical": _NAMES,
    "data.chunk_rows": _ROWS,
    "data.validation": _SHARE,
    "data.separator": _NAME,
    "data.decimal": _TEXT_KIND,
    "data.encoding": _TEXT_KIND,
    "data.comment": _NAME,
    "data.split": _TEXT_KIND,
    "data.split_by": _NAME,
    "model.formula": _TEXT_KIND,
    "model.method": _TEXT_OR_NONE,
    "model.solver": _TEXT_KIND,
    "model.family": _TEXT_OR_NONE,
    "model.link": _TEXT_OR_NONE,
    "model.quadrature": _COUNT,
    "model.zi": _TEXT_OR_NONE,
    "model.residual": _STRUCTURE,
    "model.weights": _NAME,
    "model.head": _TEXT_KIND,
    "model.network": _NODE,
    "model.kernels": _PATHS,
    "model.pedigree": _NAME,
    "model.pedigree_groups": _NAMES,
    "model.group_variance": _POSITIVE,
    "model.hermaphrodite": _FLAG_OR_NONE,
    "model.constraints": _BY_PARAMETER,
    "model.starts": _BY_PARAMETER,
    "model.training": _TEXT_OR_NONE,
    "model.rows": _COUNT,
    "model.scheduler": _NODE_OR_NONE,
}


#: What no run is without: a default in the place of what was taken out would go unnoticed.
_NEEDED = ("data", "model", "optimizer", "seed", "trainer")


def _check_needed(given: Mapping[str, Any], default: Mapping[str, Any]) -> None:
    for key in _NEEDED:
        there, known = (any(_within(own, key) for own in kept) for kept in (given, default))
        if known and not there:
            raise InputError(
                f"~{key} leaves the run without {key}: expected {key}=VALUE, or the default"
            )


def _check_kinds(config: DictConfig) -> None:
    for key, (fits, expected) in _KINDS.items():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if not OmegaConf.is_dict(node):
            if parent not in config:
                continue
            raise InputError(f"{parent} is {node!r}: expected a config")
        if name in node and not fits(node[name]):
            raise InputError(f"{key} is {node[name]!r}: expected {expected}")
