"""The console program ``openreml-nn``: a Hydra app that fits a table, predicts for one, or gathers
runs into a report."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openreml_nn.support.errors import InputError, NumericalError
from openreml_nn.support.files import replacing, write_text

if TYPE_CHECKING:
    from openreml_nn.lightning import MixedModelModule, TabularMixedModule
    from openreml_nn.table import TableFile

__all__ = ["main", "quoted"]

#: Options whose values are free text; Hydra's grammar would trip over brackets and bars.
_TEXT = re.compile(
    r"\+{0,2}(model\.formula|model\.residual|data\.formula|data\.separator|data\.decimal|data\.comment"
    r"|data\.path|checkpoint|resume|path|output)=(.*)",
    re.DOTALL,
)
_CHOICE = re.compile(r"choice\((\s*[\"'].*[\"']\s*)\)", re.DOTALL)
#: What the disk or the user's rights can do to a run; all else is a fault of ours.
_DISK = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENOTDIR}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit with 0 (done), 2 (the input is at fault) or 1 (a fault of ours).

    Args:
        arguments: as on the command line, those of the process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = "config"
    task: Callable[[DictConfig], float | None] = fit
    if given[:1] in (["predict"], ["report"]):
        name, given = given[0], given[1:]
        task = {"predict": predict, "report": report}[name]
    sys.argv = [sys.argv[0], *map(quoted, given)]
    # Hydra then raises what it would print and swallow.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _quiet()
    with _reported():
        for argument in sys.argv[1:]:
            _check(argument)
        hydra.main(version_base="1.3", config_path=str(_configs()), config_name=name)(task)()


def quoted(argument: str) -> str:
    """An override whose free text is quoted for Hydra, unless the user has done so.

    >>> quoted("model.formula=y ~ x + (1 | g)")
    "model.formula='y ~ x + (1 | g)'"
    """
    found = _TEXT.fullmatch(argument)
    if found and (choices := _CHOICE.fullmatch(found[2])):
        # Hydra takes the quotes off what choice() holds, and then fails to parse it.
        return f"{argument[: found.start(2)]}{choices[1]}"
    if not found or not found[2] or found[2][0] in "'\"" or found[2] == "null":
        return argument
    if found[1].endswith(("path", "checkpoint", "resume", "output")) and _parses(argument):
        return argument  # a sweep over files stays one
    text = re.sub(r"(\\*)'", r"\1\1\\'", found[2])
    trailing = len(text) - len(text.rstrip("\\"))
    return f"{argument[: found.start(2)]}'{text}{chr(92) * trailing}'"


def fit(config: DictConfig) -> float:
    """Fit a model to a table and write the run's directory.

    Returns:
        What a sweep minimises: the negative log density of the rows held out, or the deviance.
    """
    with _reported(Path(HydraConfig.get().runtime.output_dir)):
        return _fit(config, Path(HydraConfig.get().runtime.output_dir))
    raise AssertionError("unreachable")


def predict(config: DictConfig) -> None:
    """Predict for a table from a checkpoint and write ``predictions.csv``."""
    with _reported(Path(HydraConfig.get().runtime.output_dir)):
        _predict(config, Path(HydraConfig.get().runtime.output_dir))


def report(config: DictConfig) -> None:
    """Gather runs into one page of HTML."""
    with _reported():
        from openreml_nn.report import write_report

        path = Path(config.output)
        count = write_report(str(config.path), path)
        runs = "run" if count == 1 else "runs"
        print(f"report of {count} {runs} written to {_shown(path.absolute())}")


def _fit(config: DictConfig, directory: Path) -> float:
    import lightning
    from rich.console import Console

    from openreml_nn.inference import diagnose
    from openreml_nn.lightning import MixedModelDataModule
    from openreml_nn.report import Run, write_plots, write_tables
    from openreml_nn.report.run import costs_nothing
    from openreml_nn.result.summary import tables
    from openreml_nn.support.instantiate import build

    _check_kinds(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    formula, categorical = _formula(config), _names(config.data.categorical)
    model = _linear(config) if "method" in config.model else _neural(config)
    start = time.perf_counter()
    if config.data.chunk_rows is not None:
        trainer = build(config.trainer, "trainer", logger=False)
        dropped, name = _fit_chunks(config, model), "AIREML"
        trainer.strategy.connect(model)
    else:
        structure = {}
        if "method" in config.model:
            structure = {"residual": config.model.residual, "weights": config.model.weights}
        data = MixedModelDataModule(
            _table(config),
            formula,
            categorical,
            **structure,
            validation=config.data.validation,
            split=config.data.split,
            split_by=None if config.data.split_by is None else str(config.data.split_by),
            seed=config.seed,
        )
        data.setup("fit")
        bar = config.trainer.get("enable_progress_bar", True)
        callbacks = [
            build(part, "callbacks")
            for part in (config.callbacks or {}).values()
            if part and (bar or not str(part.get("_target_")).endswith("ProgressBar"))
        ]
        loggers = [build(part, "logger") for part in (config.logger or {}).values() if part]
        trainer = build(config.trainer, "trainer", callbacks=callbacks, logger=loggers)
        start = time.perf_counter()
        trainer.fit(model, data, ckpt_path=_resumed(config), weights_only=True)
        dropped, name = data.encoded.dropped_rows, type(trainer.optimizers[0]).__name__
    if not trainer.is_global_zero:
        trainer.save_checkpoint(directory / "model.ckpt", weights_only=False)
        return 0.0  # the first process writes
    assert model.result is not None
    validation = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
    seconds = time.perf_counter() - start
    curves = None
    if config.profile:
        from openreml_nn.inference import profile

        with costs_nothing("profile"):
            curves = profile(model.result)
    places = getattr(model, "places", None)
    run = Run(model.result, formula, dropped, name, seconds, validation, curves, places)
    if not model.result.converged:
        warnings.warn(
            f"not converged after {model.result.iterations} iterations: score norm "
            f"{model.result.score_norm:.3g} standard errors; raise trainer.max_epochs",
            RuntimeWarning,
            stacklevel=1,
        )
    # Results first: nothing that comes after them, what is printed and drawn, can cost them.
    write_text(directory / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    write_tables(run, directory)
    with replacing(directory / "model.ckpt") as temporary:
        trainer.save_checkpoint(temporary, weights_only=False)
    console = Console()
    for part in tables(model.result, formula):
        console.print(part, soft_wrap=isinstance(part, str))
    for sentence in diagnose(model.result):
        console.print(sentence, soft_wrap=True, highlight=False)
    if validation:
        values = ", ".join(f"{key.removeprefix('val_')} {v:.5g}" for key, v in validation.items())
        console.print(f"held out: {values.replace('_', ' ')}", highlight=False)
    write_plots(run, directory)
    console.print(f"written to {_shown(directory)}", soft_wrap=True, highlight=False)
    return validation.get("val_negative_log_density", model.result.deviance)


def _linear(config: DictConfig) -> MixedModelModule:
    from openreml_nn.lightning import MixedModelModule

    model = config.model
    return MixedModelModule(
        _formula(config),
        _names(config.data.categorical),
        model.method,
        model.solver,
        _plain(config.optimizer),
        model.residual,
        model.weights,
    )


def _neural(config: DictConfig) -> TabularMixedModule:
    from openreml_nn.lightning import TabularMixedModule

    optimizer, model = _plain(config.optimizer), _plain(config.model)
    if str(optimizer.get("_target_", "")).endswith("AIREML"):
        raise InputError(
            "optimizer aireml is for the covariance, where it is the default: the network needs "
            "another, such as optimizer=adam"
        )
    if config.data.chunk_rows is not None:
        raise InputError("data.chunk_rows is for linear models: leave it out with model=neural")
    if any("StopWhenConverged" in str(part) for part in (config.callbacks or {}).values()):
        raise InputError(
            "callbacks=default stops linear models: use callbacks=neural, or experiment=neural, "
            "which chooses all that a network needs"
        )
    names = ("head", "residual", "kernels", "solver", "training", "rows", "scheduler", "clip")
    try:
        return TabularMixedModule(
            _formula(config),
            model["network"],
            categorical=_names(config.data.categorical),
            covariance_optimizer=model["covariance_optimizer"],
            optimizer=optimizer,
            seed=config.seed,
            **{name: model[name] for name in names},
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _fit_chunks(config: DictConfig, model: MixedModelModule | TabularMixedModule) -> int:
    """Fit a file chunk by chunk, give the module the estimates; returns the rows left out."""
    from openreml_nn.lightning import MixedModelModule
    from openreml_nn.model.stream import accumulate

    assert isinstance(model, MixedModelModule)

    if config.model.residual is not None or config.model.weights is not None:
        raise InputError(
            "data.chunk_rows is for residuals of one variance: leave out model.residual and "
            "model.weights"
        )
    found = accumulate(
        _formula(config), _table(config), config.data.chunk_rows, _names(config.data.categorical)
    )
    result = found.fit(config.model.method, config.trainer.max_epochs)
    model.adopt(found.encoder, found.skeleton, result)
    return found.dropped_rows


def _predict(config: DictConfig, directory: Path) -> None:
    from openreml_nn.table import write_table

    table = _file(config.data)
    model = _load(str(config.checkpoint))
    model.encoder.source = f"file {str(table)!r}"
    found = model.predict(table.read())
    write_table(found, directory / "predictions.csv", index_label="row")
    print(f"{len(found)} predictions written to {_shown(directory / 'predictions.csv')}")


# ---------------------------------------------------------------------- helpers


def _configs() -> Path:
    """The folder of configs: inside the package when installed, else beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _table(config: DictConfig) -> Any:
    """The file of the table, or a simulated one."""
    from openreml_nn.datasets import SIMULATED, table_path

    if config.data.path is not None:
        return _file(config.data)
    if config.data.name in SIMULATED:
        simulate: Any = SIMULATED[config.data.name]
        return simulate()
    try:
        return str(table_path(config.data.name))
    except ValueError as error:
        raise InputError(str(error)) from None


def _file(data: DictConfig) -> TableFile:
    """The table in a file, read as the options of text say."""
    from openreml_nn.table import TableFile

    missing = data.missing if OmegaConf.is_list(data.missing) else [data.missing]
    return TableFile(
        str(data.path),
        separator="\t" if data.separator == "\\t" else data.separator,
        decimal=data.decimal,
        encoding=data.encoding,
        missing=[str(mark) for mark in missing if mark is not None],
        comment=data.comment,
    )


def _plain(config: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def _resumed(config: DictConfig) -> str | None:
    """The checkpoint to go on from."""
    if config.resume is None:
        return None
    if not Path(str(config.resume)).is_file():
        raise InputError(f"resume {str(config.resume)!r} does not exist: expected a checkpoint")
    return str(config.resume)


def _names(columns: Any) -> list[str]:
    if columns is None or OmegaConf.is_list(columns):
        return [str(column) for column in columns or ()]
    if OmegaConf.is_dict(columns):
        raise InputError(f"data.categorical is {columns}: expected names of columns")
    return [str(columns)]


def _formula(config: DictConfig) -> str:
    own = OmegaConf.to_container(config.model, resolve=False)
    assert isinstance(own, dict)
    bundled = config.data.get("name") is not None
    if config.data.path is not None and bundled and own["formula"] == "${data.formula}":
        raise InputError(
            f"model.formula is not given for file {str(config.data.path)!r}: "
            "expected one such as model.formula='y ~ x + (1 | group)'"
        )
    return str(config.model.formula)


def _load(checkpoint: str) -> MixedModelModule | TabularMixedModule:
    import torch

    from openreml_nn.lightning import MixedModelModule, TabularMixedModule

    if not Path(checkpoint).is_file():
        raise InputError(f"checkpoint {checkpoint!r} does not exist: expected the file of a run")
    try:
        kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
        kind = TabularMixedModule if "tabular" in kept else MixedModelModule
        load: Any = kind.load_from_checkpoint
        return load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"checkpoint {checkpoint!r} cannot be loaded: {reason}") from error


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_Kind = tuple[Callable[[Any], bool], str]
_SEED: _Kind = (lambda v: _is_whole(v) and v < 2**32, "a whole number from 0 to 4294967295")
_COUNT: _Kind = (lambda v: _is_whole(v) and v > 0, "a whole number, 1 or more")
_ROWS: _Kind = (lambda v: v is None or _COUNT[0](v), "a whole number, 1 or more, or null")
_SHARE: _Kind = (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 up to below 1")
_ABOVE: _Kind = (lambda v: v is None or (_is_number(v) and v > 0), "a number above 0, or null")
_FLAG: _Kind = (lambda v: isinstance(v, bool), "true or false")
_TEXT_KIND: _Kind = (_is_text, "text")
_NAME: _Kind = (lambda v: v is None or isinstance(v, str | int), "a name, or null")
_NODE: _Kind = (lambda v: OmegaConf.is_dict(v) and "_target_" in v, "a config with _target_")
_NODES: _Kind = (
    lambda v: not v or (OmegaConf.is_dict(v) and all(not p or _NODE[0](p) for p in v.values())),
    "configs with _target_ by names",
)
_NODE_OR_NONE: _Kind = (lambda v: v is None or OmegaConf.is_dict(v), "a config, or null")
#: What options must be that reach no class of ours through ``_target_``, which checks its own.
_KINDS: dict[str, _Kind] = {
    "seed": _SEED,
    "profile": _FLAG,
    "resume": _NAME,
    "trainer.max_epochs": _COUNT,
    "optimizer": _NODE,
    "callbacks": _NODES,
    "logger": _NODES,
    "data.chunk_rows": _ROWS,
    "data.validation": _SHARE,
    "data.separator": _NAME,
    "data.decimal": _TEXT_KIND,
    "data.encoding": _TEXT_KIND,
    "data.comment": _NAME,
    "data.split": _TEXT_KIND,
    "data.split_by": _NAME,
    "model.formula": _TEXT_KIND,
    "model.method": _TEXT_KIND,
    "model.solver": _TEXT_KIND,
    "model.weights": _NAME,
    "model.head": _TEXT_KIND,
    "model.network": _NODE,
    "model.kernels": _NODE_OR_NONE,
    "model.training": _TEXT_KIND,
    "model.rows": _COUNT,
    "model.scheduler": _NODE_OR_NONE,
    "model.covariance_optimizer": _NODE_OR_NONE,
    "model.clip": _ABOVE,
}


def _check_kinds(config: DictConfig) -> None:
    kinds = dict(_KINDS)
    is_neural = "network" in (config.model or {})
    kinds["model.residual"] = _NODE_OR_NONE if is_neural else _NAME
    for key, (fits, expected) in kinds.items():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if not OmegaConf.is_dict(node):
            raise InputError(f"{parent} is {node!r}: expected a config")
        if name in node and not fits(node[name]):
            raise InputError(f"{key} is {node[name]!r}: expected {expected}")


def _check(argument: str) -> None:
    keyless = not argument.lstrip("+~").partition("=")[0].strip("@ ")
    if not argument.startswith("-") and (keyless or not _parses(argument)):
        raise InputError(f"option {argument!r} cannot be read: expected key=value")


def _quiet() -> None:
    """Say only what a user of mixed models can act on."""
    # Lightning sets the level of its own loggers when it is imported: filtered, not silenced.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.WARNING)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=RuntimeWarning)
    warnings.showwarning = _warn


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _is_of_hydra(error: Exception) -> bool:
    """Whether an error was raised where Hydra reads options, and so is about them."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return name.split(".")[0] in ("hydra", "omegaconf")


@contextmanager
def _reported(directory: Path | None = None) -> Iterator[None]:
    """Turn an error that the input has caused into one line and exit status 2.

    Args:
        directory: the run's directory, which then goes if it is the run's own.
    """
    fresh = directory is not None and {entry.name for entry in directory.iterdir()} <= {".hydra"}
    try:
        yield
        return
    except (InputError, NumericalError, HydraException, OmegaConfBaseException) as error:
        # What Hydra and OmegaConf add below the first lines is for their developers.
        text = re.split(r"\n\s*(?:full_key|Config search path)", str(error))[0]
        message = " ".join(text.split()) or type(error).__name__
    except BrokenPipeError:
        # What reads the output, such as head, has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        message = f"cannot write {str(error.filename or 'the output')!r}: {error.strerror}"
    except Exception as error:
        if not _is_of_hydra(error):
            raise
        message = f"the options cannot be read: {str(error).partition(' : Override(')[0]}"
    if directory is not None and fresh:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
