"""``openreml-nn``: fit a model to a table, and leave a run."""

from __future__ import annotations

import inspect
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from openreml_nn.program.direct import Direct, Fitted, needs_trainer
from openreml_nn.program.options import Options, by_parameter
from openreml_nn.program.reporting import costs_nothing, reported, shown
from openreml_nn.program.rundir import RunDirectory
from openreml_nn.program.tables import chosen_pedigree, chosen_table
from openreml_nn.support.display import plain_console, visible
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

if TYPE_CHECKING:
    from rich.console import Console
__all__ = ["Fitted", "InChunks", "InMemory", "Ways", "fit_table", "is_first_process", "prepared"]


def fit_table(config: DictConfig, imported: Callable[[], None]) -> float:
    """Fit a model to a table and write the run's directory.

    Args:
        config: the options.
        imported: what is called when all is imported.

    Returns:
        What a sweep minimises: the negative log density of the rows held out, or the deviance.
    """
    path, config = Path(HydraConfig.get().runtime.output_dir), by_parameter(config)
    with reported(_advice(config)), RunDirectory(path, is_first_process()) as directory:
        options = Options(config)
        _seed(options["seed"])
        fit = prepared(options)
        imported()
        is_profiled = options["profile"]
        is_drawn = options["plots"] is not False  # a config of the user's own may lack it
        fit.read()
        directory.begin(config, fit.resumed)
        found = fit.run()
        if not is_first_process():
            if isinstance(fit, InMemory):
                fit.save(path / "model.ckpt")  # in which all processes have a part
            return 0.0
        result = found.result
        if not result.converged:
            is_cut = result.iterations >= options["trainer.max_epochs"]
            warn(
                f"not converged after {result.iterations} iterations: score norm "
                f"{result.score_norm:.3g} standard errors"
                f"{'; raise trainer.max_epochs' if is_cut else ''}"
            )
        _write(found, fit, path, is_profiled, is_drawn)
        return found.validation.get("val_negative_log_density", result.deviance)
    raise AssertionError("unreachable")


def prepared(options: Options) -> Ways:
    """The way to fit that the options choose, which has read them, and has made all but the table.

    Raises:
        InputError: if an option is wrong, or has no effect.
    """
    chunks = options["data.chunk_rows"]
    fit: Ways
    if chunks is not None:
        fit = InChunks(options)
    elif needs_trainer(options):
        fit = InMemory(options)
    else:
        formula, names = _formula(options), _names(options["data.categorical"])
        genotypes = _genotypes(options["heritability"], formula)
        fit = Direct(options, formula, names, _has_bar(options), genotypes)
    if fit.keeps_rows:
        _ = options["profile"]
    options.check_all_read("in this run" if chunks is None else f"with data.chunk_rows={chunks}")
    return fit


def _seed(seed: int) -> None:
    """Set the seed of every random number generator."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def is_first_process() -> bool:
    """Whether this process is the one of its run that writes."""
    return not any(int(os.environ.get(n) or 0) for n in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _write(found: Fitted, fit: Ways, path: Path, is_profiled: bool, is_drawn: bool) -> None:
    """Write and print a run: all files of the fit, then ``result.json``, then what takes long."""
    from openreml_nn.inference import profile
    from openreml_nn.program import outputs
    from openreml_nn.support.files import replacing

    result = found.result
    with replacing(path / "model.ckpt") as temporary:
        fit.save(temporary)
    outputs.write_tables(result, path)
    if is_drawn:
        outputs.write_plots(result, path, found.places)
    outputs.write_record(result, path, found.validation)
    console = plain_console()
    _print(found, console)
    if is_profiled:
        with costs_nothing("profile"):
            outputs.write_profile(profile(result, progress=fit.has_bar), path, is_drawn)
        outputs.write_record(result, path, found.validation)
    if fit.heritability is not None:
        with costs_nothing("heritability"):
            table = outputs.write_heritability(result, fit.heritability, path)
            rows = table[["method", "estimate"]].itertuples(index=False)
            text = ", ".join(f"{method} {estimate:.4f}" for method, estimate in rows)
            console.print(visible(f"heritability of {fit.heritability}: {text}"), soft_wrap=True)
    console.print(f"written to {shown(path)}", soft_wrap=True)


def _print(found: Fitted, console: Console) -> None:
    from openreml_nn.inference import diagnose
    from openreml_nn.result.summary import tables

    for part in tables(found.result, found.result.formula):
        console.print(part, soft_wrap=isinstance(part, str))
    for sentence in diagnose(found.result):
        console.print(visible(sentence), soft_wrap=True)
    if found.validation:
        values = ", ".join(
            f"{name.removeprefix('val_')} {value:.5g}" for name, value in found.validation.items()
        )
        console.print(f"held out: {values.replace('_', ' ')}", soft_wrap=True)


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

        from openreml_nn.families.named import as_asked
        from openreml_nn.lightning import MixedModelDataModule, MixedModule
        from openreml_nn.support.instantiate import build

        lightning.seed_everything(options["seed"], workers=True, verbose=False)
        self.resumed = _resumed(options)
        self.has_bar = _has_bar(options)
        formula, names = _formula(options), _names(options["data.categorical"])
        taken = set(inspect.signature(MixedModule).parameters)
        if not _takes_rows(options):
            taken.remove("rows")
        given = {key: options[f"model.{key}"] for key in options.keys("model") if key in taken}
        given["family"], given["link"] = as_asked(given.get("family"), given.get("link"))
        if given["family"] is None or given.get("network") is not None:
            given["optimizer"] = options["optimizer"]  # a family alone is fitted without
        self.module = MixedModule(formula, **given, categorical=names, seed=options["seed"])
        # Sums by level of mini-batches are not enough for what is computed after the fit.
        self.keeps_rows = self.module.way.needs_all_rows or given["family"] is not None
        asked = options["heritability"] if self.keeps_rows else None
        self.heritability = _genotypes(asked, formula)
        share, split = options["data.validation"], {}
        if share:
            by = options["data.split_by"]
            split = {"split": options["data.split"], "split_by": None if by is None else str(by)}
        self.data = MixedModelDataModule(
            chosen_table(options),
            pedigree=chosen_pedigree(options),
            kernels=options["model.kernels"],
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
        """Read the table."""
        assert self.module.formula_options is not None
        self.data.complete(self.module.formula_options)
        self.data.setup("fit")

    def run(self) -> Fitted:
        start = time.perf_counter()
        self.trainer.fit(self.module, self.data, ckpt_path=self.resumed, weights_only=True)
        assert self.module.result is not None and self.module.table is not None
        result = replace(self.module.result, seconds=time.perf_counter() - start)
        validation: Mapping[str, float] = {}
        if self.data.held_out is not None:
            # The model that is kept, which the last epoch's validation came before.
            (validation,) = self.trainer.validate(self.module, self.data, verbose=False)
        return Fitted(result, validation, self.module.table.places)

    def save(self, path: Path) -> None:
        self.trainer.save_checkpoint(path, weights_only=False)


class InChunks:
    """A file larger than memory, of which only sums are kept, and a linear model."""

    resumed = heritability = None
    keeps_rows = False

    def __init__(self, options: Options) -> None:
        options.read_if("model.solver", ("auto", "blocked"))
        self.has_bar = _has_bar(options)
        self.options = {
            "formula": _formula(options),
            "path": chosen_table(options),
            "chunk_rows": options["data.chunk_rows"],
            "categorical": _names(options["data.categorical"]),
            "weights": options["model.weights"],
            "method": options["model.method"] or "reml",
            "max_iterations": options["trainer.max_epochs"],
            "progress": self.has_bar,
        }

    def read(self) -> None:
        """The file is read when it is fitted."""

    def run(self) -> Fitted:
        from openreml_nn import fit_stream

        start = time.perf_counter()
        found = fit_stream(**self.options)
        self.result = replace(found, seconds=time.perf_counter() - start)
        return Fitted(self.result)

    def save(self, path: Path) -> None:
        import torch

        from openreml_nn.model.checkpoint import checkpoint_of

        given = {name: self.options[name] for name in ("categorical", "weights", "method")}
        torch.save(checkpoint_of(self.result, given), path)


#: The ways to fit: each reads the table, runs, and saves a checkpoint.
Ways = Direct | InMemory | InChunks


# ---------------------------------------------------------------------- parts of a run


def _takes_rows(options: Options) -> bool:
    """Whether the way of training divides the rows."""
    training = options["model.training"]
    if training is None:
        from openreml_nn.families.named import as_asked

        has_family = as_asked(options["model.family"], options["model.link"])[0] is not None
        is_full = options["model.head"] == "gls" or has_family
        return options["model.network"] is not None and not is_full
    return training != "full"


def _formula(options: Options) -> str:
    named = "name" in options.keys("data")
    if named and options["data.path"] is not None and not options.is_given("model.formula"):
        raise InputError(
            f"model.formula is not given for file {str(options['data.path'])!r}: "
            "expected one such as model.formula='y ~ x + (1 | group)'"
        )
    return str(options["model.formula"])


def _genotypes(group: Any, formula: str) -> str | None:
    """The grouping factor of which there is to be a heritability."""
    from openreml_nn.table import parse_formula

    known = [part.group for part in parse_formula(formula).random]
    if group is not None and str(group) not in known:
        raise InputError(f"heritability is {str(group)!r}: expected one of {known}")
    return None if group is None else str(group)


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
