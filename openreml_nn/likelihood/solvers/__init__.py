"""The solvers, a file each."""

from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.blocked import Blocked
from openreml_nn.likelihood.solvers.dense import Dense
from openreml_nn.likelihood.solvers.grid import Grid
from openreml_nn.likelihood.solvers.krylov import Krylov
from openreml_nn.likelihood.solvers.sparse import Sparse
from openreml_nn.likelihood.solvers.spectral import Spectral

__all__ = ["SOLVERS", "Blocked", "Dense", "Grid", "Krylov", "Sparse", "Spectral"]

#: By name. Where two cost the same, the first is taken.
SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver for solver in (Dense, Spectral, Grid, Blocked, Sparse, Krylov)
}
