"""The runs of a sweep: each on its own, and a table of all."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from openreml_nn.program.reporting import Failed, one_line
from openreml_nn.support.display import plain_console, visible
from openreml_nn.support.errors import InputError

__all__ = ["Subcommand", "SweepTable", "on_its_own"]

#: What a subcommand does by its config; it calls the other argument when it has imported all it needs.
Subcommand = Callable[[DictConfig, Callable[[], None]], Any]


def on_its_own(task: Subcommand, imported: Callable[[], None]) -> Callable[[DictConfig], Any]:
    """A task of which a run that fails costs a sweep no other run.

    The run leaves ``failed.json``, and minimises nothing: what it returns is NaN. A signal ends the
    sweep, as does a pipe that is closed.

    Args:
        task: ends by :func:`reported`.
        imported: what the task calls when it has imported all it needs.
    """

    @wraps(task)
    def run(config: DictConfig) -> Any:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            return task(config, imported)
        try:
            return task(config, imported)
        except Failed as error:
            if error.status > 2:
                raise
            status, message = error.status, error.message
        except Exception as error:
            traceback.print_exc()
            status, message = 1, one_line(f"{type(error).__name__}: {error}")
        _record(status, message)
        return float("nan")

    return run


def _record(status: int, message: str) -> None:
    """Write down how a run has failed."""
    from openreml_nn.program.fit import is_first_process
    from openreml_nn.report.runs import FAILED
    from openreml_nn.support.files import write_text

    if is_first_process():
        hydra = HydraConfig.get()
        path = Path(hydra.runtime.output_dir)
        path.mkdir(parents=True, exist_ok=True)  # a run that has written nothing leaves no folder
        kept = {"status": status, "error": message, "overrides": list(hydra.overrides.task)}
        write_text(path / FAILED, json.dumps(kept))


class SweepTable(Callback):
    """Writes ``sweep.csv`` when a sweep ends, prints where the runs differ, and names the best. Where
    a run has failed its message is printed too, and the exit status is the run's."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Forget what has failed in an earlier sweep of the same folder."""
        from openreml_nn.report.runs import FAILED, status_of

        for left in Path(config.hydra.sweep.dir).rglob(FAILED):
            with suppress(InputError):  # a file of another program stays
                status_of(left)
                left.unlink()

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Collect the runs."""
        from openreml_nn.report.runs import best, collect, compared, failures
        from openreml_nn.table import write_table

        folder = Path(config.hydra.sweep.dir)
        try:
            failed = failures(folder)
            table = collect(folder, with_failed=True)
        except InputError as error:
            print(f"warning: sweep.csv is left out: {one_line(error)}", file=sys.stderr)
            return
        write_table(table, folder / "sweep.csv")
        console = plain_console(soft_wrap=True)
        shown = compared(table).map(_seen).rename(columns=_seen)
        console.print(shown.to_string(index=False, na_rep="", float_format="%.6g"))
        if failed:
            for row in table[table["error"].notna()].to_dict("records"):
                console.print(f"run {visible(row['run'])} failed: {visible(row['error'])}")
        if (found := best(table)) is not None:
            console.print(f"best run by {found[1]}: {visible(folder / found[0])}")
        console.print(f"written to {visible(folder / 'sweep.csv')}")
        if failed:
            print(f"error: {len(failed)} of {len(table)} runs failed", file=sys.stderr)
            sys.exit(min(failed.values()))


def _seen(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value
