"""``openreml-nn report``: runs gathered into one page of HTML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from openreml_nn.program.options import Options
from openreml_nn.program.reporting import reported, shown

__all__ = ["write_page"]


def write_page(config: DictConfig, imported: Callable[[], None]) -> None:
    """Write the page of the runs below a folder.

    Args:
        config: the options.
        imported: what is called when all is imported.
    """
    with reported():
        from openreml_nn.report import write_report

        imported()
        options = Options(config)
        folder, page = str(options["path"]), Path(str(options["output"]))
        options.check_all_read()
        count = write_report(folder, page)
        runs = "run" if count == 1 else "runs"
        print(f"report of {count} {runs} written to {shown(page.absolute())}")
