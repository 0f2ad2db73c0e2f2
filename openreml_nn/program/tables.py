"""The table and the pedigree that the options name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openreml_nn.program.options import Options

if TYPE_CHECKING:
    from openreml_nn.covariance import Relationship

__all__ = ["chosen_pedigree", "chosen_table", "table_file"]


def chosen_table(options: Options) -> Any:
    """The file of the table, or a simulated one."""
    from openreml_nn.datasets import SIMULATED, table_path

    if options["data.path"] is not None:
        return table_file(options)
    name = options["data.name"]
    if name in SIMULATED:
        simulate: Any = SIMULATED[name]
        return simulate()
    return str(table_path(name))


def table_file(options: Options) -> Any:
    """The table in a file, read as the options of text say."""
    from openreml_nn.table import TableFile

    missing = options["data.missing"]
    separator = options["data.separator"]
    return TableFile(
        str(options["data.path"]),
        separator="\t" if separator == "\\t" else separator,
        decimal=options["data.decimal"],
        encoding=options["data.encoding"],
        missing=[
            str(m) for m in (missing if isinstance(missing, list) else [missing]) if m is not None
        ],
        comment=options["data.comment"],
    )


def chosen_pedigree(options: Options) -> Relationship | None:
    """The pedigree of the options, None without one."""
    from openreml_nn.model.relations import read_pedigree

    path = options["model.pedigree"]
    if path is None:
        return None
    groups, hermaphrodite = options["model.pedigree_groups"], options["model.hermaphrodite"]
    variance = options["model.group_variance"] if groups else 1.0
    return read_pedigree(str(path), [str(name) for name in groups], variance, hermaphrodite)
