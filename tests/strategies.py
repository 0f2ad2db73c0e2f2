"""Hypothesis strategies and helpers that several test files share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from openreml_nn.covariance import (
    Adapter,
    AntedependenceMatrix,
    AR1Matrix,
    ARMAMatrix,
    Augment,
    BlockDiagonal,
    CARMatrix,
    CompoundSymmetricMatrix,
    ContinuousAR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    EqualEntryMatrix,
    EquicorrelationMatrix,
    ExponentialMatrix,
    GaussianMatrix,
    Gram,
    HadamardProduct,
    Heteroscedastic,
    ICARMatrix,
    IdentityMatrix,
    Inverse,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    LinearMatrix,
    LowerTriangularMatrix,
    MaternCorrelation,
    MaternMatrix,
    Matrix,
    Pedigree,
    Product,
    RandomWalkMatrix,
    RationalQuadraticMatrix,
    ScalarMatrix,
    SimpleMatrix,
    SphericalMatrix,
    Stack,
    StationaryMatrix,
    Sum,
    ToeplitzMatrix,
    Transpose,
    UnconstrainedMatrix,
    UnstructuredMatrix,
    VarianceFunction,
    VecchiaMatrix,
    factor_analytic,
    heterogeneous_ar1,
    heterogeneous_compound_symmetry,
)
from openreml_nn.covariance.params import free_specs


def distances(n: int) -> torch.Tensor:
    """Distances of n points of a plane."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    apart = x[:, None] - x
    return (apart * apart).sum(-1).sqrt()


def line(n: int) -> torch.Tensor:
    """Distances of n points of a line."""
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return (x - x.mT).abs()


def kinship(n: int) -> torch.Tensor:
    x = torch.randn(n, n + 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return x @ x.mT / n


def pedigree(n: int) -> Pedigree:
    """A line of full sibs' descendants, inbred from the third generation on."""
    names = [f"a{i}" for i in range(n)]
    sires = [None if i < 2 else names[i - 2] for i in range(n)]
    dams = [None if i < 2 else names[i - 1] for i in range(n)]
    return Pedigree.of(names, sires, dams)


def places(n: int) -> torch.Tensor:
    """n places in the plane."""
    return 3 * torch.rand(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def path(n: int) -> torch.Tensor:
    """Pairs of neighbours in a line of n."""
    return torch.stack([torch.arange(n - 1), torch.arange(1, n)], 1)


class Quadratic:
    """n values of a quadratic."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, theta: torch.Tensor) -> torch.Tensor:
        at = torch.linspace(-1, 1, self.n, dtype=theta.dtype, device=theta.device)
        return theta[0] + theta[1] * at + theta[2] * at**2


def outer_product(theta: torch.Tensor) -> torch.Tensor:
    return torch.outer(theta, theta.sin())


def outer_product_grad(theta: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    left = eye[:, :, None] * theta.sin()
    right = theta[:, None] * (eye * theta.cos())[:, None, :]
    return left + right, [f"theta_{i}" for i in range(len(theta))]


LEAVES = {
    "identity": IdentityMatrix,
    "scalar": ScalarMatrix,
    "diagonal": DiagonalMatrix,
    "equal": EqualEntryMatrix,
    "equicorrelation": EquicorrelationMatrix,
    "compound symmetric": CompoundSymmetricMatrix,
    "ar1": AR1Matrix,
    "toeplitz": ToeplitzMatrix,
    "stationary": StationaryMatrix,
    "banded": lambda n: ToeplitzMatrix(n, bands=min(n, 2)),
    "antedependence": AntedependenceMatrix,
    "lower": lambda n: LowerTriangularMatrix(n, n),
    "unconstrained": UnconstrainedMatrix,
    "unstructured": UnstructuredMatrix,
    "exponential": lambda n: ExponentialMatrix(distances(n)),
    "gaussian": lambda n: GaussianMatrix(distances(n)),
    "matern 1/2": lambda n: MaternMatrix(distances(n), nu=0.5),
    "matern 3/2": lambda n: MaternMatrix(distances(n), nu=1.5),
    "matern 5/2": lambda n: MaternMatrix(distances(n), nu=2.5),
    "spherical": lambda n: SphericalMatrix(distances(n)),
    "rational": lambda n: RationalQuadraticMatrix(distances(n)),
    "linear": lambda n: LinearMatrix(line(n)),
    "continuous ar1": lambda n: ContinuousAR1Matrix(distances(n)),
    "arma": ARMAMatrix,
    "power": lambda n: VarianceFunction(torch.arange(1.0, n + 1), "power"),
    "power and constant": lambda n: VarianceFunction(torch.arange(1.0, n + 1), "const_power"),
    "exponential variance": lambda n: VarianceFunction(torch.linspace(-1.0, 1.0, n), "exp"),
    "heteroscedastic": lambda n: Heteroscedastic(
        variance=VarianceFunction(torch.linspace(-1.0, 1.0, n), "exp"),
        matrix=EquicorrelationMatrix(n),
    ),
    "neighbours": lambda n: VecchiaMatrix(places(n), MaternCorrelation(1.5), neighbours=2),
    "conditional": lambda n: CARMatrix(path(n)) if n > 1 else ScalarMatrix(1),
    "intrinsic": lambda n: ICARMatrix(path(n)) if n > 1 else ScalarMatrix(1),
    "random walk": lambda n: RandomWalkMatrix(n) if n > 1 else ScalarMatrix(1),
    "known": lambda n: KnownMatrix(kinship(n)),
    "known inverse": lambda n: KnownInverseMatrix(pedigree(n).inverse),
    "simple": lambda n: SimpleMatrix(n, outer_product),
    "simple with a gradient": lambda n: SimpleMatrix(n, outer_product, outer_product_grad),
    "adapter": lambda n: Adapter(DiagonalMatrix(n), free_specs(["a", "b", "c"]), Quadratic(n)),
    "factor analytic": lambda n: factor_analytic(n, max(1, n - 1)),
    "heterogeneous ar1": heterogeneous_ar1,
    "heterogeneous compound symmetry": heterogeneous_compound_symmetry,
}
#: Those that are positive definite wherever their parameters are.
DEFINITE = [
    "scalar",
    "diagonal",
    "equicorrelation",
    "compound symmetric",
    "ar1",
    "antedependence",
    "unstructured",
    "known",
    "known inverse",
    "heterogeneous ar1",
]
OPERATORS = [
    "sum",
    "tied",
    "kronecker",
    "propagation",
    "hadamard",
    "product",
    "transpose",
    "gram",
    "inverse",
    "block diagonal",
    "augment and stack",
]


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


@st.composite
def dummies(draw, n: int, q: int) -> DummyMatrix:
    """A one-hot design (n, q), sometimes with covariates."""
    k = draw(st.sampled_from(divisors(q)))
    levels = list(range(q // k))
    labels = draw(st.lists(st.sampled_from(levels), min_size=n, max_size=n))
    values = None
    if k > 1 or draw(st.booleans()):
        seed = draw(st.integers(0, 99))
        values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return DummyMatrix(labels, levels=levels, covariates=values)


@st.composite
def trees(draw, n: int, depth: int = 4) -> Matrix:
    """A random square matrix of size n, nested to a depth."""
    kind = draw(st.sampled_from([*LEAVES, *(OPERATORS * 2 if depth else [])]))
    if kind in LEAVES:
        return LEAVES[kind](n)

    def sub(size: int = n) -> Matrix:
        return draw(trees(size, depth - 1))

    def split() -> int:
        return draw(st.integers(1, n - 1))

    if kind in ("block diagonal", "augment and stack") and n == 1:
        kind = "sum"
    match kind:
        case "sum":
            return Sum(*[sub() for _ in range(draw(st.integers(2, 3)))])
        case "tied":
            one = sub()
            return Sum(one, sub(), one)
        case "kronecker":
            k = draw(st.sampled_from(divisors(n)))
            return KroneckerProduct(sub(k), sub(n // k))
        case "hadamard":
            return HadamardProduct(sub(), sub())
        case "product":
            return Product(sub(), torch.randn(n, n), sub())
        case "transpose":
            return Transpose(sub())
        case "gram":
            return Gram(sub(), gram_type=draw(st.sampled_from(["xtx", "xxt"])))
        case "inverse":
            return Inverse(LEAVES[draw(st.sampled_from(DEFINITE))](n))
        case "block diagonal":
            k = split()
            return BlockDiagonal(sub(k), sub(n - k))
        case "augment and stack":
            k = split()
            low = EqualEntryMatrix(n - k, k)
            return Augment(Stack(sub(k), low), torch.randn(n, n - k))
        case _:
            q = draw(st.integers(1, 4))
            z = draw(dummies(n, q)) if draw(st.booleans()) else torch.randn(n, q)
            return CovariancePropagation(z=z, g=sub(q))


@st.composite
def points(draw, matrix: Matrix) -> torch.Tensor:
    """Free parameters at which nothing is extreme."""
    seed = draw(st.integers(0, 10_000))
    return 0.5 * torch.randn(matrix.num_free_params, generator=torch.Generator().manual_seed(seed))


@st.composite
def matrices(draw, depth: int = 4, fixed: bool = True) -> Matrix:
    """A tree of random size, some of its parameters fixed."""
    matrix = draw(trees(draw(st.integers(1, 6)), depth)).double()
    if fixed:
        for name in matrix.param_names:
            if draw(st.integers(0, 3)) == 0:
                matrix.fix(name, 0.3)
    return matrix
