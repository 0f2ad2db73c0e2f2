"""Small fits of every structure, hard ones among them, for what holds of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from openreml_nn.covariance import (
    AntedependenceMatrix,
    AR1Matrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    EqualEntryMatrix,
    EquicorrelationMatrix,
    ExponentialMatrix,
    GaussianMatrix,
    Gram,
    HadamardProduct,
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    LowerTriangularMatrix,
    MaternMatrix,
    Matrix,
    Pedigree,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
    ToeplitzMatrix,
    UnconstrainedMatrix,
    UnstructuredMatrix,
    ar1_field,
    factor_analytic,
    heterogeneous_ar1,
    heterogeneous_compound_symmetry,
    stratified,
    weighted,
    within,
)


@dataclass(frozen=True)
class Case:
    """A model and data for it; ``covariance`` makes the model anew."""

    name: str
    covariance: Callable[[], Matrix]
    y: torch.Tensor
    X: torch.Tensor


def battery(seed: int = 0) -> list[Case]:
    """One case of each kind; other seeds have other data."""
    rng = np.random.default_rng(seed)
    return [make(name, build, rng) for name, build in _KINDS.items()]


def _dense(matrix: Matrix) -> np.ndarray:
    with torch.no_grad():
        return matrix().double().numpy()


def make(name: str, build: Callable[..., Callable[[], Matrix]], rng: np.random.Generator) -> Case:
    covariance, truth, p = build(rng)  # type: ignore[misc]
    V = _dense(truth)
    n = len(V)
    values, vectors = np.linalg.eigh(V)
    y = vectors @ (np.sqrt(values.clip(0)) * rng.standard_normal(n))
    columns = np.ones(n), *rng.standard_normal((p - 1 if isinstance(p, int) else 0, n))
    X = np.column_stack(columns) if isinstance(p, int) else p
    y = y + X @ rng.standard_normal(X.shape[1])
    return Case(name, lambda: covariance().double(), torch.tensor(y), torch.tensor(X))


def at(matrix: Matrix, **values: float) -> Matrix:
    """The matrix with natural values of its parameters, by the end of their names."""
    matrix.double()
    for entry in matrix.parameter_entries().entries:
        for end, value in values.items():
            if entry.name.replace("^", "").endswith(end):
                with torch.no_grad():
                    natural = torch.tensor([value], dtype=torch.float64)
                    entry.tensor.copy_(entry.trans.inverse(natural))
    return matrix


def _labels(rng: np.random.Generator, n: int, q: int) -> list[int]:
    return [int(i) for i in np.concatenate([np.arange(q), rng.integers(0, q, n - q)])]


def _intercept(variance: float, n: int = 60, q: int = 10):
    def build(rng):
        labels = _labels(rng, n, q)

        def model():
            z = DummyMatrix(labels)
            return Sum(g=CovariancePropagation(z=z, g=ScalarMatrix(q)), residual=ScalarMatrix(n))

        truth = model()
        at(truth.operands["g"], sigma2=max(variance, 1e-12))
        return model, truth, 2

    return build


def _slopes(G, structure, n=100, q=12):
    def build(rng):
        labels = _labels(rng, n, q)
        x = torch.tensor(np.column_stack([np.ones(n), rng.uniform(0, 9, n)]))

        def model(inner=None):
            z = DummyMatrix(labels, covariates=x[:, : len(G)])
            g = KroneckerProduct(IdentityMatrix(q), inner or structure())
            return Sum(g=CovariancePropagation(z=z, g=g), residual=ScalarMatrix(n))

        truth = model(KnownMatrix(torch.tensor(G) + 1e-12 * torch.eye(len(G)).double()))
        return model, truth.double(), np.column_stack([np.ones(n), x[:, 1].numpy()])

    return build


def _crossed(nested: bool):
    def build(rng):
        n = 96
        a, b = np.arange(n) % 8, (np.arange(n) // 8) % 6
        second = [f"{i}:{j}" for i, j in zip(a, b)] if nested else [int(j) for j in b]

        def model():
            za, zb = DummyMatrix([int(i) for i in a]), DummyMatrix(second)
            return Sum(
                a=CovariancePropagation(z=za, g=ScalarMatrix(za.shape[1])),
                b=CovariancePropagation(z=zb, g=ScalarMatrix(zb.shape[1])),
                residual=ScalarMatrix(n),
            )

        return model, model().double(), 2

    return build


def _within(structure, truth, groups=20, size=4, intercept=False):
    def build(rng):
        subject = np.repeat(np.arange(groups), size)

        def model(matrix=None):
            R = within(subject, matrix or structure())
            if not intercept:
                return R
            z = DummyMatrix(subject)
            return Sum(g=CovariancePropagation(z=z, g=ScalarMatrix(groups)), residual=R)

        return model, model(truth()).double(), 2

    return build


def _effects(structure, truth, q=25, k=4, each=2):
    def build(rng):
        cell = np.repeat(np.arange(q * k), each)
        n = len(cell)

        def model(matrix=None):
            z = DummyMatrix.from_codes(torch.tensor(cell), q * k)
            g = KroneckerProduct(IdentityMatrix(q), matrix or structure())
            return Sum(g=CovariancePropagation(z=z, g=g), residual=ScalarMatrix(n))

        return model, model(truth()).double(), np.eye(k)[cell % k]

    return build


def _field(rho_row, rho_column, nugget, genotype=0.0, rows=12, columns=9, random=True):
    def build(rng):
        n = rows * columns
        variety = rng.permutation(np.arange(n) % (n // 4))

        def model():
            parts = {"field": ar1_field(rows, columns)}
            if genotype and random:
                z = DummyMatrix(variety)
                parts["gen"] = CovariancePropagation(z=z, g=ScalarMatrix(z.shape[1]))
            if nugget is not None:
                parts["units"] = ScalarMatrix(n)
            return Sum(**parts)

        truth = model().double()
        at(truth.operands["field"], sigma2=4.0)
        at(truth.operands["field"].operands["row"], sigma2=4.0, rho=rho_row)
        at(truth.operands["field"].operands["column"], sigma2=1.0, rho=rho_column)
        if nugget is not None:
            at(truth.operands["units"], sigma2=max(nugget, 1e-9))
        if genotype and random:
            at(truth.operands["gen"], sigma2=genotype)
        return model, truth, 1

    return build


def _kernel(cls, length, nugget, n=70):
    def build(rng):
        place = torch.tensor(rng.uniform(0, 10, (n, 2)))
        d = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")

        def model():
            return Sum(field=cls(d), units=ScalarMatrix(n))

        truth = model().double()
        at(truth, **{"field/sigma2": 2.0, "lengthscale": length, "units/sigma2": nugget})
        return model, truth, 1

    return build


def _pedigree(rng):
    names = [f"a{i}" for i in range(80)]
    sires = [None] * 20 + [f"a{int(rng.integers(0, i // 2 + 1))}" for i in range(20, 80)]
    dams = [None] * 20 + [f"a{int(rng.integers(i // 2 + 1, i))}" for i in range(20, 80)]
    pedigree = Pedigree.of(names, sires, dams)

    def model():
        z = DummyMatrix.from_codes(torch.arange(80), 80)
        g = KnownInverseMatrix(pedigree.inverse)
        return Sum(animal=CovariancePropagation(z=z, g=g), residual=ScalarMatrix(80))

    return model, model().double(), 2


def _repeated_animal(rng):
    # Repeated records: animal with a pedigree, permanent environment, residual.
    names = [f"a{i}" for i in range(40)]
    sires = [None] * 10 + [f"a{int(rng.integers(0, i // 2 + 1))}" for i in range(10, 40)]
    dams = [None] * 10 + [f"a{int(rng.integers(i // 2 + 1, i))}" for i in range(10, 40)]
    pedigree = Pedigree.of(names, sires, dams)
    codes = torch.arange(120) % 40

    def model():
        z = DummyMatrix.from_codes(codes, 40)
        return Sum(
            animal=CovariancePropagation(z=z, g=KnownInverseMatrix(pedigree.inverse)),
            pe=CovariancePropagation(z=DummyMatrix.from_codes(codes, 40), g=ScalarMatrix(40)),
            residual=ScalarMatrix(120),
        )

    return model, model().double(), 2


def _whole(structure, truth=None, p=1):
    def build(rng):
        return structure, (truth or structure)().double(), p

    return build


def _user_kernel():
    lag = (torch.arange(40.0)[:, None] - torch.arange(40.0)).abs().double()
    eye = torch.eye(40).double()

    def entries(t):
        return torch.exp(t[0]) * torch.exp(-lag * torch.exp(-t[1])) + torch.exp(t[2]) * eye

    return SimpleMatrix(3, entries)


def _weighted(rng):
    w = torch.tensor(rng.uniform(0.2, 5, 60))
    labels = _labels(rng, 60, 8)

    def model():
        z = DummyMatrix(labels)
        return Sum(g=CovariancePropagation(z=z, g=ScalarMatrix(8)), residual=weighted(w))

    return model, model().double(), 2


def _stratified(rng):
    labels, strata = _labels(rng, 90, 10), np.arange(90) % 3

    def model():
        z = DummyMatrix(labels)
        return Sum(g=CovariancePropagation(z=z, g=ScalarMatrix(10)), residual=stratified(strata))

    return model, model().double(), 2


def _animal_by_trait(rng):
    K = torch.tensor(np.cov(rng.standard_normal((30, 90)))) + 0.1 * torch.eye(30).double()
    codes = torch.arange(120) % 60

    def model():
        g = KroneckerProduct(KnownMatrix(K), UnstructuredMatrix(2))
        z = DummyMatrix.from_codes(codes, 60)
        return Sum(g=CovariancePropagation(z=z, g=g), residual=stratified(np.arange(120) % 2))

    return model, model().double(), np.eye(2)[np.arange(120) % 2]


_ANTE = {
    "sigma_0": 1.0,
    "sigma_1": 1.5,
    "sigma_2": 2.0,
    "sigma_3": 2.5,
    "rho_0": 0.7,
    "rho_1": 0.4,
    "rho_2": 0.8,
}


def _us(k=4):
    A = np.random.default_rng(5).standard_normal((k, k + 2))
    return lambda: KnownMatrix(torch.tensor(A @ A.T / k))


_KINDS = {
    "intercept": _intercept(1.0),
    "intercept, ratio 1e6": _intercept(1e6),
    "intercept, ratio 1e-2": _intercept(1e-2),
    "intercept, none": _intercept(0.0),
    "intercept, large none": _intercept(0.0, 400, 40),
    "slopes": _slopes(np.array([[4.0, 0.5], [0.5, 0.3]]), lambda: UnstructuredMatrix(2)),
    "slopes, singular": _slopes(np.array([[1.0, 0.3], [0.3, 0.09]]), lambda: UnstructuredMatrix(2)),
    "slopes, none": _slopes(np.zeros((2, 2)), lambda: UnstructuredMatrix(2)),
    "slopes, free entries": _slopes(
        np.array([[4.0, 0.5], [0.5, 0.3]]), lambda: UnconstrainedMatrix(2)
    ),
    "slopes, independent": _slopes(np.diag([4.0, 0.3]), lambda: DiagonalMatrix(2)),
    "slopes, Gram": _slopes(
        np.array([[4.0, 0.5], [0.5, 0.3]]),
        lambda: Gram(LowerTriangularMatrix(2, 2), gram_type="xxt"),
    ),
    "crossed": _crossed(False),
    "nested": _crossed(True),
    "residual AR1": _within(lambda: AR1Matrix(4), lambda: at(AR1Matrix(4), rho=0.6)),
    "residual AR1, rho .97": _within(lambda: AR1Matrix(8), lambda: at(AR1Matrix(8), rho=0.97)),
    "residual AR1, negative": _within(lambda: AR1Matrix(6), lambda: at(AR1Matrix(6), rho=-0.7)),
    "intercept and AR1": _within(
        lambda: AR1Matrix(6), lambda: at(AR1Matrix(6), rho=0.5), 15, 6, True
    ),
    "residual CS": _within(
        lambda: CompoundSymmetricMatrix(4), lambda: at(CompoundSymmetricMatrix(4), rho=0.5)
    ),
    "residual CS, negative": _within(
        lambda: CompoundSymmetricMatrix(4), lambda: at(CompoundSymmetricMatrix(4), rho=-0.25)
    ),
    "residual US": _within(lambda: UnstructuredMatrix(4), _us()),
    "residual free entries": _within(lambda: UnconstrainedMatrix(4), _us(), 40),
    "residual Toeplitz": _within(
        lambda: ToeplitzMatrix(4), lambda: at(ToeplitzMatrix(4), rho_1=0.6, rho_2=0.3, rho_3=0.2)
    ),
    "residual ante": _within(
        lambda: AntedependenceMatrix(4), lambda: at(AntedependenceMatrix(4), **_ANTE)
    ),
    "residual het AR1": _within(
        lambda: heterogeneous_ar1(4),
        lambda: at(heterogeneous_ar1(4), sigma_0=1.0, sigma_1=2.0, sigma_2=3.0, rho=0.6),
    ),
    "residual het CS": _within(
        lambda: heterogeneous_compound_symmetry(4),
        lambda: at(heterogeneous_compound_symmetry(4), sigma_0=1.0, sigma_3=3.0, rho=0.4),
    ),
    "residual FA": _within(lambda: factor_analytic(4, 1), _us(), 40),
    "effects AR1": _effects(lambda: AR1Matrix(4), lambda: at(AR1Matrix(4), rho=0.6)),
    "effects CS": _effects(
        lambda: CompoundSymmetricMatrix(4), lambda: at(CompoundSymmetricMatrix(4), rho=0.6)
    ),
    "effects US": _effects(lambda: UnstructuredMatrix(4), _us()),
    "effects het AR1": _effects(
        lambda: heterogeneous_ar1(4), lambda: at(heterogeneous_ar1(4), sigma_1=2.0, rho=0.7)
    ),
    "effects Toeplitz": _effects(
        lambda: ToeplitzMatrix(4), lambda: at(ToeplitzMatrix(4), rho_1=0.6, rho_2=0.3, rho_3=0.2)
    ),
    "effects ante": _effects(
        lambda: AntedependenceMatrix(4), lambda: at(AntedependenceMatrix(4), **_ANTE)
    ),
    "effects FA1": _effects(lambda: factor_analytic(4, 1), _us()),
    "effects FA2": _effects(lambda: factor_analytic(6, 2), _us(6), 40, 6),
    "field": _field(0.5, 0.8, None),
    "field, rho .95": _field(0.95, 0.9, None),
    "field and nugget": _field(0.5, 0.8, 1.0),
    "field, small nugget": _field(0.4, 0.6, 0.05),
    "field, large nugget": _field(0.9, 0.9, 8.0),
    "field, smooth": _field(0.97, 0.95, 0.5),
    "genotype, field, nugget": _field(0.5, 0.8, 1.0, 2.0),
    "exponential": _kernel(ExponentialMatrix, 2.0, 0.5),
    "exponential, short": _kernel(ExponentialMatrix, 0.3, 0.2),
    "gaussian": _kernel(GaussianMatrix, 1.5, 0.5),
    "matern": _kernel(MaternMatrix, 1.5, 0.3),
    "matern, long": _kernel(MaternMatrix, 8.0, 0.3),
    "pedigree": _pedigree,
    "pedigree, repeated": _repeated_animal,
    "kernel by traits": _animal_by_trait,
    "weighted": _weighted,
    "stratified": _stratified,
    "Hadamard": _whole(
        lambda: Sum(
            s=HadamardProduct(AR1Matrix(50), EquicorrelationMatrix(50)), e=ScalarMatrix(50)
        ),
        lambda: at(Sum(a=AR1Matrix(50), e=ScalarMatrix(50)), rho=0.8),
    ),
    "common effect": _whole(
        lambda: Sum(
            block=KroneckerProduct(IdentityMatrix(10), EqualEntryMatrix(5)), e=ScalarMatrix(50)
        )
    ),
    "user kernel": _whole(_user_kernel),
}
