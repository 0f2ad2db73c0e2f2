"""A model without a network, fitted without a trainer."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from openreml_nn.program.options import Options
from openreml_nn.program.tables import chosen_pedigree, chosen_table
from openreml_nn.support.files import replacing, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from openreml_nn.result import Result

__all__ = ["Direct", "Fitted", "needs_trainer"]

#: Options of a model that :func:`lmm` and :func:`glmm` have too.
_SHARED = ("method", "solver", "residual", "weights", "family", "link", "quadrature", "zi",
           "constraints", "starts")  # fmt: skip
_RELATIONS = ("pedigree", "pedigree_groups", "group_variance", "hermaphrodite", "kernels")
#: What a trainer alone does; of it a fit without one takes no more than what is there by default.
_TRAINING = ("trainer", "callbacks", "optimizer", "resume", "data.validation")


def needs_trainer(options: Options) -> bool:
    """Whether a run is one of Lightning's: it trains a network, holds rows out, goes on from a
    checkpoint, or is asked for something of a trainer, a callback, a logger or an optimizer."""
    from openreml_nn.families.named import as_asked

    given = [key for section in _TRAINING for key in options.given(section)]
    if any(key != "trainer.enable_progress_bar" for key in given):
        return True
    if options["logger"] and options.given("logger"):
        return True
    known = {"formula", *_SHARED, *_RELATIONS}
    others = [key for key in options.keys("model") if key not in known]
    if any(options.given(f"model.{key}") or key == "network" for key in others):
        return True
    residual, family = options["model.residual"], options["model.family"]
    if isinstance(residual, Mapping):
        return True
    # What is for the one kind of response is refused, beside the other, there.
    if as_asked(family, options["model.link"])[0] is not None:
        return residual is not None
    linked = options["model.link"] not in (None, "identity")
    return linked or options["model.quadrature"] != 1 or options["model.zi"] is not None


@dataclass(frozen=True)
class Fitted:
    """What comes out of a fit.

    Attributes:
        result: the fitted model.
        validation: metrics of the rows held out, by name.
        places: where the rows are (n, k), of a spatial model.
    """

    result: Result
    validation: Mapping[str, float] = field(default_factory=dict)
    places: Tensor | None = None


class Direct:
    """A table that is read whole, and a model without a network.

    :func:`lmm` or :func:`glmm` fits it. Lightning, which takes longer to import than such a fit takes, would
    come to the same optimum.

    Args:
        options: of the run.
        formula: of the model.
        categorical: numeric columns to be taken as factors.
        bar: whether the screen shows that a fit is under way.
        heritability: grouping factor of genotypes, if there is to be a heritability.
    """

    resumed = None

    def __init__(
        self,
        options: Options,
        formula: str,
        categorical: Sequence[str],
        bar: bool,
        heritability: str | None,
    ) -> None:
        from openreml_nn.families.named import as_asked

        self.has_bar, self.heritability = bar, heritability
        self._formula = formula
        given = {key: options[f"model.{key}"] for key in _SHARED}
        given["family"], given["link"] = as_asked(given["family"], given["link"])
        self._options = {**given, "categorical": list(categorical)}
        self._relations = {
            "pedigree": chosen_pedigree(options),
            "kernels": options["model.kernels"] or None,
        }
        self._table = chosen_table(options)
        self._steps = options["trainer.max_epochs"]
        for section in _TRAINING:
            _ = options[section]  # what is there by default
        self._loggers = options["logger"] or {}

    def read(self) -> None:
        """Read the table and fit the model, before anything of an earlier run is touched."""
        from openreml_nn.support.display import status

        with warnings.catch_warnings(), status("fitting", self.has_bar):
            # The program and its diagnosis say so themselves.
            for said in ("the fit did not converge", "the data cannot tell apart"):
                warnings.filterwarnings("ignore", said, RuntimeWarning)
            self.result = self._fitted()

    def _fitted(self) -> Result:
        from openreml_nn import glmm, lmm

        given = {key: value for key, value in self._options.items() if value not in (None, {}, [])}
        given |= self._relations | {"max_iterations": self._steps}
        if "family" in given:
            return glmm(self._formula, self._table, **given)
        del given["quadrature"]
        return lmm(self._formula, self._table, **given)

    def run(self) -> Fitted:
        """Log the steps of the fit; what it has found."""
        self._log()
        return Fitted(self.result, places=self._places())

    def _places(self) -> Tensor | None:
        """Where the rows are (n, k), of levels at places; None without such."""
        from openreml_nn.terms.design import IndexedDesign

        model, source = self.result.model, self.result.source
        assert model is not None and source is not None
        places = {name: effect.places for name, effect in model.effects().items()}
        found = None
        for term in source.covariance.terms():
            at = places.get(term.name)
            if at is not None and isinstance(term.design, IndexedDesign):
                found = at[term.design.codes]
        return found

    def _log(self) -> None:
        """Write the likelihood and the covariance parameters of each step, as CSV and for
        TensorBoard."""
        rows = [
            {
                "epoch": i,
                "step": i,
                "train_loss": -record.log_likelihood / self.result.rows,
                "log_likelihood": record.log_likelihood,
                **record.parameters,
            }
            for i, record in enumerate(self.result.history)
        ]
        options = OmegaConf.to_yaml({"model": self._formula, **self._options})
        for name, logger in self._loggers.items():
            folder = Path(logger["save_dir"], logger["name"], logger["version"])
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "hparams.yaml", options)
            {"csv": _write_csv, "tensorboard": _write_events}[name](rows, folder)

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        import torch

        from openreml_nn.model.checkpoint import checkpoint_of

        torch.save(checkpoint_of(self.result, self._options), path)


def _write_csv(rows: Sequence[Mapping[str, float]], folder: Path) -> None:
    with (
        replacing(folder / "metrics.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)


def _write_events(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for row in rows:
            for name in sorted(row.keys() - {"step"}):
                writer.add_scalar(name, row[name], row["step"])
