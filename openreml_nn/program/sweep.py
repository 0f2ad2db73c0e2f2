"""The table of the runs of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from openreml_nn.support.display import plain_console, visible
from openreml_nn.support.errors import InputError

__all__ = ["SweepTable"]


class SweepTable(Callback):
    """Writes ``sweep.csv`` when a sweep ends, prints it, and names the best run."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Collect the runs that have a result."""
        from openreml_nn.report.runs import best, collect
        from openreml_nn.table import write_table

        folder = Path(config.hydra.sweep.dir)
        try:
            table = collect(folder)
        except InputError:
            return  # every run has said what is wrong with it
        write_table(table, folder / "sweep.csv")
        console = plain_console(soft_wrap=True)
        console.print(table.map(_seen).rename(columns=_seen).to_string(index=False))
        if (found := best(table)) is not None:
            console.print(f"best run by {found[1]}: {visible(folder / found[0])}")
        console.print(f"written to {visible(folder / 'sweep.csv')}")


def _seen(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value
