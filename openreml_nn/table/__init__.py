"""From a file or data frame and a formula to numbers and levels, and back to names."""

from openreml_nn.table.encoded import Encoded, Positions, RandomDesign, ResidualDesign, Stratum
from openreml_nn.table.encoder import Encoder
from openreml_nn.table.formula import MixedFormula, parse_formula
from openreml_nn.table.learned import Learned
from openreml_nn.table.reading import TableFile, read_table
from openreml_nn.table.relation import Graph, Known, Places, Walk, read_kernel
from openreml_nn.table.structure import Structure, parse_residual
from openreml_nn.table.writing import write_table

__all__ = [
    "Encoded",
    "Encoder",
    "Graph",
    "Known",
    "Learned",
    "MixedFormula",
    "Places",
    "Positions",
    "RandomDesign",
    "ResidualDesign",
    "Stratum",
    "Structure",
    "TableFile",
    "Walk",
    "parse_formula",
    "parse_residual",
    "read_kernel",
    "read_table",
    "write_table",
]
