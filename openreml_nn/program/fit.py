"""``openreml-nn``: fit a model to a table, and leave a run."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from openreml_nn.program.options import Options
from openreml_nn.program.reporting import costs_nothing, reported, shown
from openreml_nn.program.rundir import RunDirectory
from openreml_nn.program.tables import chosen_table
from openreml_nn.support.display import plain_console, visible
from openreml_nn.support.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from openreml_nn.inference import Profile
    from openreml_nn.program.outputs import Run
    from openreml_nn.result import Result

__all__ = ["InChunks", "InMemory", "fit_table", "is_first_process", "prepared"]


def fit_table(config: DictConfig) -> float:
    """Fit a model to a table and write the run's directory.

    Returns:
        What a sweep minimises: the negative log density of the rows held out, or the deviance.
    """
    path = Path(HydraConfig.get().runtime.output_dir)
    with reported(_advice(config)), RunDirectory(path, is_first_process()) as directory:
        import lightning

        options = Options(config)
        lightning.seed_everything(options["seed"], workers=True, verbose=False)
        is_profiled = options["profile"]
        fit = prepared(options)
        fit.read()
        directory.begin(config, fit.resumed)
        run = fit.run()
        if not is_first_process():
            fit.save(path / "model.ckpt")  # in which all processes have a part
            return 0.0
        if not run.result.converged:
            warnings.warn(
                f"not converged after {run.result.iterations} iterations: score norm "
                f"{run.result.score_norm:.3g} standard errors; raise trainer.max_epochs",
                RuntimeWarning,
                stacklevel=1,
            )
        _write(run, fit, path, is_profiled)
        return run.validation.get("val_negative_log_density", run.result.deviance)
    raise AssertionError("unreachable")


def prepared(options: Options) -> InMemory | InChunks:
    """The way to fit that the options choose, which has read them, and has made all but the table.

    Raises:
        InputError: if an option is wrong, or has no effect.
    """
    chunks = options["data.chunk_rows"]
    fit = InMemory(options) if chunks is None else InChunks(options)
    options.check_all_read("in this run" if chunks is None else f"with data.chunk_rows={chunks}")
    return fit


def is_first_process() -> bool:
    """Whether this process is the one of its run that writes."""
    return not any(int(os.environ.get(n) or 0) for n in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _write(run: Run, fit: InMemory | InChunks, path: Path, is_profiled: bool) -> None:
    """Write and print a run: all files of the fit, then ``result.json``, then what takes long."""
    from openreml_nn.program.outputs import (
        write_plots,
        write_profile,
        write_record,
        write_tables,
    )
    from openreml_nn.support.files import replacing

    with replacing(path / "model.ckpt") as temporary:
        fit.save(temporary)
    write_tables(run, path)
    write_plots(run, path)
    write_record(run, path)
    console = plain_console()
    _print(run, console)
    if is_profiled:
        with costs_nothing("profile"):
            write_profile(_profiled(run.result, fit.has_bar), path)
        write_record(run, path)
    console.print(f"written to {shown(path)}", soft_wrap=True)


def _print(run: Run, console: Console) -> None:
    from openreml_nn.inference import diagnose
    from openreml_nn.result.summary import tables

    for part in tables(run.result, run.formula):
        console.print(part, soft_wrap=isinstance(part, str))
    for sentence in diagnose(run.result):
        console.print(visible(sentence), soft_wrap=True)
    if run.validation:
        values = ", ".join(
            f"{name.removeprefix('val_')} {value:.5g}" for name, value in run.validation.items()
        )
        console.print(f"held out: {values.replace('_', ' ')}", soft_wrap=True)


def _profiled(result: Result, has_bar: bool) -> Profile:
    from openreml_nn.inference import profile

    with _bar("profile", has_bar) as advance:
        return profile(result, progress=advance)


@contextmanager
def _bar(title: str, is_shown: bool) -> Iterator[Any]:
    """A progress bar on standard error; yields a function of what is done, of how many, and what."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    console = plain_console(stderr=True)
    with Progress(*columns, console=console, disable=not is_shown) as bar:
        task = bar.add_task(title, total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {visible(name)}", completed=done, total=total)

        yield advance


# ---------------------------------------------------------------------- ways to fit


class InMemory:
    """A table that is read whole, and a model trained by Lightning."""

    def __init__(self, options: Options) -> None:
        import lightning
        from lightning.fabric.plugins import ClusterEnvironment
        from lightning.pytorch.loggers import Logger
        from lightning.pytorch.plugins import Precision
        from lightning.pytorch.profilers import Profiler
        from lightning.pytorch.strategies import Strategy

        from openreml_nn.lightning import MixedModelDataModule
        from openreml_nn.support.instantiate import build

        self.resumed = _resumed(options)
        self.has_bar = _has_bar(options)
        self.formula = _formula(options)
        self.module = _module(options, options.keys("model"))
        structure = {}
        if options["model.network"] is None:
            structure = {"residual": options["model.residual"], "weights": options["model.weights"]}
        share, split = options["data.validation"], {}
        if share:
            by = options["data.split_by"]
            split = {"split": options["data.split"], "split_by": None if by is None else str(by)}
        self.data = MixedModelDataModule(
            chosen_table(options),
            self.formula,
            _names(options["data.categorical"]),
            **structure,
            validation=share,
            **split,
            seed=options["seed"],
        )
        callbacks = [
            build(part, f"callbacks.{name}", lightning.Callback)
            for name, part in (options["callbacks"] or {}).items()
            if part and (self.has_bar or not str(part["_target_"]).endswith("ProgressBar"))
        ]
        loggers = [
            build(part, f"logger.{name}", Logger)
            for name, part in (options["logger"] or {}).items()
            if part
        ]
        self.trainer = build(
            options["trainer"],
            "trainer",
            lightning.Trainer,
            nested=(Strategy, Precision, Profiler, ClusterEnvironment),
            callbacks=callbacks,
            logger=loggers,
        )

    def read(self) -> None:
        self.data.setup("fit")

    def run(self) -> Run:
        from openreml_nn.program.outputs import Run

        start = time.perf_counter()
        self.trainer.fit(self.module, self.data, ckpt_path=self.resumed, weights_only=True)
        metrics = self.trainer.callback_metrics
        return Run(
            self.module.result,
            self.formula,
            self.data.encoded.dropped_rows,
            type(self.trainer.optimizers[0]).__name__,
            time.perf_counter() - start,
            {name: float(value) for name, value in metrics.items() if name.startswith("val_")},
            getattr(self.module, "places", None),
        )

    def save(self, path: Path) -> None:
        self.trainer.save_checkpoint(path, weights_only=False)


class InChunks:
    """A file larger than memory, of which only sums are kept, and a linear model."""

    resumed = None

    def __init__(self, options: Options) -> None:
        import lightning

        options.read_if("model.solver", ("auto", "blocked"))
        self.has_bar = _has_bar(options)
        self.formula = _formula(options)
        self.module = _module(options, ["method"])
        self.table, self.rows = chosen_table(options), options["data.chunk_rows"]
        self.names = _names(options["data.categorical"])
        self.method, self.epochs = options["model.method"], options["trainer.max_epochs"]
        self.trainer = lightning.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_model_summary=False,
            enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        self.start = time.perf_counter()

    def read(self) -> None:
        from openreml_nn.model.stream import accumulate

        self.start = time.perf_counter()
        self.found = accumulate(self.formula, self.table, self.rows, self.names)

    def run(self) -> Run:
        from openreml_nn.program.outputs import Run

        result = self.found.fit(self.method, self.epochs)
        self.module.adopt(self.found.encoder, self.found.skeleton, result)
        seconds = time.perf_counter() - self.start
        return Run(result, self.formula, self.found.dropped_rows, "AIREML", seconds)

    def save(self, path: Path) -> None:
        self.trainer.strategy.connect(self.module)
        self.trainer.save_checkpoint(path, weights_only=False)


# ---------------------------------------------------------------------- parts of a run


def _module(options: Options, names: list[str]) -> Any:
    """The model as a Lightning module, with what some keys of the section ``model`` give it."""
    from openreml_nn.lightning import MixedModelModule, TabularMixedModule

    kind: Any = MixedModelModule if options["model.network"] is None else TabularMixedModule
    taken = set(inspect.signature(kind).parameters)
    if kind is TabularMixedModule:
        taken |= {"training", "rows", "scheduler", "clip", "covariance_optimizer"}
    given = {n: options[f"model.{n}"] for n in names if n in taken and n != "formula"}
    optimizer = options["optimizer"] if "solver" in names else None
    if kind is TabularMixedModule:
        given["seed"] = options["seed"]
        if str(optimizer.get("_target_", "")).endswith("AIREML"):
            raise InputError(
                "optimizer aireml is for the covariance, where it is the default: the network needs "
                "another, such as optimizer=adam"
            )
        if any("StopWhenConverged" in str(part) for part in (options["callbacks"] or {}).values()):
            raise InputError(
                "callbacks=default stops linear models: use callbacks=neural, or experiment=neural, "
                "which chooses all that a network needs"
            )
    try:
        return kind(
            _formula(options),
            categorical=_names(options["data.categorical"]),
            optimizer=optimizer,
            **given,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _formula(options: Options) -> str:
    bundled = options["data.name"] is not None and options["data.path"] is not None
    if bundled and not options.is_given("model.formula"):
        raise InputError(
            f"model.formula is not given for file {str(options['data.path'])!r}: "
            "expected one such as model.formula='y ~ x + (1 | group)'"
        )
    return str(options["model.formula"])


def _names(columns: Any) -> list[str]:
    return [
        str(column) for column in ([columns] if isinstance(columns, str | int) else columns or ())
    ]


def _has_bar(options: Options) -> bool:
    return bool(options["trainer.enable_progress_bar"])


def _resumed(options: Options) -> str | None:
    """The checkpoint to go on from."""
    path = options["resume"]
    if path is None:
        return None
    if not Path(str(path)).is_file():
        raise InputError(f"resume {str(path)!r} does not exist: expected a checkpoint")
    return str(path)


def _advice(config: DictConfig) -> str:
    """What to do where memory does not suffice."""
    chunks = OmegaConf.select(config, "data.chunk_rows")
    if chunks is not None:
        return f"a smaller data.chunk_rows than {chunks} holds fewer rows at a time"
    if OmegaConf.select(config, "model.network") is not None:
        return "model.training=parts with a smaller model.rows runs the network on fewer rows"
    return "data.chunk_rows=100000 reads a file a part at a time"
