"""Heat maps of every matrix, drawn when the documentation is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pictures import heat_map

from openreml_nn import covariance as cov

N = 8
POINTS = torch.cartesian_prod(torch.linspace(0, 1, 4), torch.linspace(0, 1, 2))
DISTANCE = torch.cdist(POINTS, POINTS)
PEDIGREE = cov.Pedigree.of(
    list("efghij"), ["a", "a", "c", "e", "e", "h"], ["b", "b", "d", "g", "f", "i"]
)


def at(matrix: cov.Matrix, *values: float) -> torch.Tensor:
    """The matrix at some untransformed parameters."""
    return matrix(torch.tensor(values)).detach()


def seeded(matrix: cov.Matrix, scale: float = 0.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = scale * torch.randn(matrix.num_free_params, generator=generator)
    return matrix(x).detach()


AR1 = cov.AR1Matrix(4)
PAIRS = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [3, 4], [4, 5], [5, 6], [6, 7], [7, 4]])
LOWER = cov.LowerTriangularMatrix(4, 2)
PICTURES: dict[str, Callable[[], torch.Tensor]] = {
    "IdentityMatrix": lambda: cov.IdentityMatrix(N)(),
    "ScalarMatrix": lambda: at(cov.ScalarMatrix(N), 0.4),
    "DiagonalMatrix": lambda: seeded(cov.DiagonalMatrix(N)),
    "EqualEntryMatrix": lambda: at(cov.EqualEntryMatrix(N), 0.0),
    "EquicorrelationMatrix": lambda: at(cov.EquicorrelationMatrix(N), 0.3),
    "CompoundSymmetricMatrix": lambda: at(cov.CompoundSymmetricMatrix(N), 0.2, 0.3),
    "AR1Matrix": lambda: at(cov.AR1Matrix(N), 0.0, 1.8),
    "ToeplitzMatrix": lambda: at(cov.ToeplitzMatrix(N, bands=4), 0.0, 1.2, 0.2, -0.6),
    "AntedependenceMatrix": lambda: seeded(cov.AntedependenceMatrix(N), 1.0),
    "LowerTriangularMatrix": lambda: seeded(cov.LowerTriangularMatrix(N, 5)),
    "UnconstrainedMatrix": lambda: seeded(cov.UnconstrainedMatrix(N), 0.3),
    "UnstructuredMatrix": lambda: seeded(cov.UnstructuredMatrix(N), 0.4),
    "DummyMatrix": lambda: cov.DummyMatrix(list("abacbcca"))(),
    "MembershipMatrix": lambda: cov.MembershipMatrix(
        torch.tensor([[0, 1], [2, 1], [1, 1], [0, 2], [2, 0], [2, 2], [1, 0], [0, 0]]), 3
    )(),
    "SimpleMatrix": lambda: at(cov.SimpleMatrix(2, lambda t: torch.outer(t, t)), 1.0, -0.5),
    "Adapter": lambda: at(
        cov.Adapter(
            cov.DiagonalMatrix(N),
            cov.SimpleMatrix(2, torch.diag).param_specs,
            lambda theta: theta[0] + theta[1] * torch.linspace(-1, 1, N),
        ),
        0.0,
        0.8,
    ),
    "ExponentialMatrix": lambda: at(cov.ExponentialMatrix(DISTANCE), 0.0, -0.7),
    "GaussianMatrix": lambda: at(cov.GaussianMatrix(DISTANCE), 0.0, -0.7),
    "MaternMatrix": lambda: at(cov.MaternMatrix(DISTANCE, nu=1.5), 0.0, -0.7),
    "SphericalMatrix": lambda: at(cov.SphericalMatrix(DISTANCE), 0.0, -0.2),
    "VecchiaMatrix": lambda: at(
        cov.VecchiaMatrix(torch.arange(0.0, N)[:, None], cov.MaternCorrelation(1.5), 2), 0.0, 0.7
    ),
    "RandomWalkMatrix": lambda: at(cov.RandomWalkMatrix(N), 0.0),
    "CARMatrix": lambda: at(cov.CARMatrix(PAIRS), 0.0, 3.0),
    "ICARMatrix": lambda: at(cov.ICARMatrix(PAIRS), 0.0),
    "StationaryMatrix": lambda: at(cov.StationaryMatrix(N), 0.0, 1.8, *[-0.5] * (N - 2)),
    "LinearMatrix": lambda: at(cov.LinearMatrix(DISTANCE), 0.0, -0.2),
    "RationalQuadraticMatrix": lambda: at(cov.RationalQuadraticMatrix(DISTANCE), 0.0, -0.7),
    "ContinuousAR1Matrix": lambda: at(cov.ContinuousAR1Matrix(DISTANCE), 0.0, -1.5),
    "ARMAMatrix": lambda: at(cov.ARMAMatrix(N), 0.0, 1.8, -0.5),
    "VarianceFunction": lambda: at(cov.VarianceFunction(torch.arange(1.0, N + 1)), 0.0, -0.4),
    "KnownMatrix": lambda: at(cov.KnownMatrix(torch.exp(-DISTANCE)), 0.0),
    "KnownInverseMatrix": lambda: at(cov.KnownInverseMatrix(PEDIGREE.inverse), 0.0),
    "Sum": lambda: at(cov.Sum(cov.AR1Matrix(N), cov.ScalarMatrix(N)), 0.0, 1.8, -0.3),
    "BlockDiagonal": lambda: at(cov.BlockDiagonal(AR1, cov.EqualEntryMatrix(4)), 0.0, 1.8, -0.3),
    "CovariancePropagation": lambda: at(
        cov.CovariancePropagation(z=cov.DummyMatrix(list("aaabbccc")), g=cov.AR1Matrix(3)),
        0.0,
        1.0,
    ),
    "KroneckerProduct": lambda: at(
        cov.KroneckerProduct(cov.CompoundSymmetricMatrix(2), AR1), 0.0, 0.5, 0.0, 1.8
    ),
    "Heteroscedastic": lambda: at(
        cov.Heteroscedastic(
            variance=cov.VarianceFunction(torch.arange(1.0, N + 1)), matrix=cov.AR1Matrix(N)
        ),
        0.0,
        -0.4,
        0.0,
        1.8,
    ),
    "HadamardProduct": lambda: at(
        cov.HadamardProduct(
            cov.AR1Matrix(N), cov.DummyMatrix(list("aabbbbcc"))() @ torch.ones(3, N)
        ),
        0.0,
        1.8,
    ),
    "Product": lambda: at(cov.Product(AR1, torch.tril(torch.ones(4, 4))), 0.0, 1.8),
    "Transpose": lambda: seeded(cov.Transpose(LOWER)),
    "Gram": lambda: seeded(cov.Gram(LOWER, gram_type="xxt")),
    "Augment": lambda: at(cov.Augment(AR1, torch.zeros(4, 2)), 0.0, 1.8),
    "Stack": lambda: at(cov.Stack(AR1, torch.zeros(2, 4)), 0.0, 1.8),
    "Inverse": lambda: at(cov.Inverse(cov.AR1Matrix(N)), 0.0, 1.8),
    "heterogeneous": lambda: seeded(cov.heterogeneous(cov.EquicorrelationMatrix(N)), 0.4),
    "heterogeneous_ar1": lambda: seeded(cov.heterogeneous_ar1(N), 0.4),
    "heterogeneous_compound_symmetry": lambda: seeded(cov.heterogeneous_compound_symmetry(N), 0.4),
    "factor_analytic": lambda: cov.factor_analytic(N, 2)().detach(),
    "ar1_field": lambda: at(cov.ar1_field(2, 4), 0.0, 1.0, 1.8),
    "kron": lambda: at(cov.kron(AR1, torch.ones(2, 2)), 0.0, 1.8),
    "within": lambda: at(cov.within(list("aaabbbbc"), cov.AR1Matrix(4)), 0.0, 1.8),
    "stratified": lambda: at(cov.stratified(list("uvuvuuvv")), 0.0, -0.5),
    "weighted": lambda: at(cov.weighted(torch.arange(1.0, 9.0)), 0.0),
}


def draw(folder: Path) -> None:
    """Write one PNG for each matrix, and the page that shows them all."""
    folder.mkdir(exist_ok=True)
    lines = [
        "# Gallery of matrices",
        "",
        "Each picture shows one matrix at chosen parameters; blue is positive, red negative.",
        "",
    ]
    for name, make in PICTURES.items():
        heat_map(make(), folder / f"{name}.png", inches=2.6, dpi=120)
        lines += [
            f"```{{figure}} {name}.png",
            ":width: 100%",
            ":figclass: gallery",
            "",
            f"{{py:obj}}`~openreml_nn.covariance.{name}`",
            "```",
            "",
        ]
    (folder / "gallery.md").write_text("\n".join(lines), encoding="utf-8")
