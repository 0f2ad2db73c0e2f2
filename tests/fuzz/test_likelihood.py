"""Random models against dense algebra in long double: every digit, or an error that says why not.

A short run is part of the tests; a long one looks for new counterexamples and reports figures:

    python -m tests.fuzz.test_likelihood 2000
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from openreml_nn import NumericalError, REMLLoss
from openreml_nn import covariance as c
from openreml_nn.likelihood import Krylov
from openreml_nn.likelihood.solvers import SOLVERS
from openreml_nn.likelihood.system.roles import Roles, separated
from tests.likelihood.exact import IS_LONG, LONG, Answer, Exact, answer, cholesky
from tests.likelihood.test_krylov import EVERY_SIGN
from tests.strategies import distances, kinship, path, pedigree, places

pytestmark = pytest.mark.fuzz

#: Largest relative errors.
TOLERANCE = {"log-likelihood": 1e-8, "gradient": 2e-6, "BLUP": 1e-6, "PEV": 1e-5, "beta": 1e-6}
#: In at most one model of so many no digits can be had.
ERRORS = 40
_KERNELS = ["known", "pedigree", "exponential", "matern", "neighbours", "conditional"]
LEAVES = ["scalar", "diag", "us", "cs", "ar1", "fa", "hetar1", "hetcs"]


@dataclass
class Model:
    V: c.Sum
    y: torch.Tensor
    X: torch.Tensor
    method: str
    text: str


class Maker:
    """A random model from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one_of(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape))

    def leaf(self, n: int, kind: str) -> c.Matrix:
        if n == 1:
            kind = "scalar"
        match kind:
            case "scalar":
                return c.ScalarMatrix(n)
            case "diag":
                return c.DiagonalMatrix(n)
            case "us":
                return c.UnstructuredMatrix(n)
            case "cs":
                return c.CompoundSymmetricMatrix(n)
            case "ar1":
                return c.AR1Matrix(n)
            case "fa":
                return c.factor_analytic(n, 1)
            case "hetar1":
                return c.heterogeneous_ar1(n)
            case "hetcs":
                return c.heterogeneous_compound_symmetry(n)
            case "known":
                return c.KnownMatrix(kinship(n))
            case "pedigree":
                return c.KnownInverseMatrix(pedigree(n).inverse)
            case "neighbours":
                correlation = c.MaternCorrelation(self.one_of([0.5, 1.5]))
                return c.VecchiaMatrix(places(n), correlation, self.one_of([2, n]))
            case "conditional":
                return c.CARMatrix(path(n))
            case "exponential":
                return c.ExponentialMatrix(distances(n))
            case "matern":
                return c.MaternMatrix(distances(n), nu=self.one_of([0.5, 1.5]))
        raise ValueError(kind)

    def covariance(self, q: int, k: int) -> c.Matrix:
        """Of q levels of k effects."""
        kind = self.one_of(["levels"] * 4 + ["solid", "kernel", "kron", "blocks", "hadamard"])
        if kind == "levels" and k > 1:
            return c.KroneckerProduct(c.IdentityMatrix(q), self.leaf(k, self.one_of(LEAVES)))
        if kind == "kernel" and q > 1:
            K = self.leaf(q, self.one_of(_KERNELS))
            if k == 1:
                return K
            K.fix("sigma^2", 0.0)
            return c.KroneckerProduct(K, self.leaf(k, self.one_of(["us", "diag", "cs"])))
        if kind == "kron" and q > 1 and k > 1:
            side = self.leaf(q, self.one_of(["ar1", "cs", "us" if q < 6 else "ar1"]))
            return c.KroneckerProduct(side, self.leaf(k, self.one_of(["us", "diag", "cs", "ar1"])))
        if kind == "blocks" and q > 2:
            split = q // 2 * k
            return c.BlockDiagonal(self.leaf(split, "ar1"), self.leaf(q * k - split, "scalar"))
        if kind == "hadamard" and q * k > 1:
            return c.HadamardProduct(self.leaf(q * k, "ar1"), c.EquicorrelationMatrix(q * k))
        if kind == "solid" and 1 < q * k <= 8:
            return self.leaf(q * k, self.one_of(LEAVES))
        return self.one_of([c.ScalarMatrix, c.DiagonalMatrix])(q * k)

    def residual(self, n: int, group: np.ndarray) -> dict[str, c.Matrix]:
        kind = self.one_of(["one"] * 6 + ["weights", "strata", "within", "nugget", "each"])
        if kind == "weights":
            return {"residual": c.weighted(torch.from_numpy(self.rng.uniform(0.1, 5, n)))}
        if kind == "strata":
            return {"residual": c.stratified(self.rng.integers(0, 3, n).tolist())}
        if kind in ("within", "nugget"):
            size = int(np.bincount(group).max()) + 1
            matrix = self.leaf(
                size, self.one_of(["ar1", "cs", "us"] if size < 7 else ["ar1", "cs"])
            )
            parts = {"residual": c.within(group.tolist(), matrix)}
            return parts if kind == "within" else {**parts, "nugget": c.ScalarMatrix(n)}
        return {"residual": c.DiagonalMatrix(n) if kind == "each" else c.ScalarMatrix(n)}

    def set(self, matrix: c.Matrix, log_sd: float) -> None:
        """Random parameters of a matrix of about this standard deviation."""
        scaled = False
        for module in matrix.modules():
            if not isinstance(module, c.Matrix):
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                x = 0.5 * float(self.rng.standard_normal())
                if name.startswith("sigma"):
                    x += 0.0 if scaled else log_sd
                elif name.startswith("L_"):
                    i, j = name.split("_")[1:]
                    if isinstance(module, c.UnstructuredMatrix) and i == j:
                        x += 0.0 if scaled else log_sd
                    else:
                        x *= 1.0 if scaled else float(np.exp(log_sd))
                with torch.no_grad():
                    parameter.fill_(x)
            # The first side of a Kronecker or Hadamard product has the scale.
            if isinstance(matrix, c.KroneckerProduct | c.HadamardProduct):
                scaled = scaled or any(
                    name.startswith(("sigma", "L_"))
                    for name in dict(module.named_parameters(recurse=False))
                )

    def relatives(self, n: int, unit: float) -> tuple[dict[str, c.Matrix], list[str]]:
        """A kernel over the rows, of one trait or of two."""
        t = 2 if n % 2 == 0 and self.chance(0.5) else 1
        K = self.leaf(n // t, self.one_of(["known", "pedigree", "exponential"]))
        if isinstance(K, c.ExponentialMatrix):
            K = c.KnownMatrix(K.double()().detach())
        if t == 2:
            K.fix("sigma^2", 0.0)
            K = c.KroneckerProduct(K, c.UnstructuredMatrix(2))
        log_sd = float(self.rng.uniform(-8, 12))
        self.set(K, unit + log_sd)
        codes = torch.from_numpy(self.rng.permutation(n))
        z = c.DummyMatrix.from_codes(codes, n)
        return {"t0": c.CovariancePropagation(z=z, g=K)}, [
            f"kernel {n // t} x {t} at {log_sd:+.1f}"
        ]

    def model(self) -> Model:
        rng = self.rng
        n = int(rng.integers(9, 36))
        outer = rng.integers(0, self.one_of([1, 2, 4, 6]), n)
        inner = outer * 3 + rng.integers(0, 3, n)
        factors = [outer, inner, rng.integers(0, self.one_of([2, 5, 9]), n)]
        unit = float(rng.uniform(np.log(1e-4), np.log(1e4)))
        parts: dict[str, c.Matrix] = {}
        text = []
        for i in range(int(rng.integers(0, 4))):
            codes = np.unique(self.one_of(factors), return_inverse=True)[1]
            q, k = int(codes.max()) + 1, int(self.one_of([1, 1, 2, 3]))
            extra = int(rng.integers(0, 2))  # a level without rows
            values = self.normal(n, k) if k > 1 or self.chance(0.3) else None
            if values is not None and k > 1 and self.chance(0.7):
                values[:, 0] = 1
            z = c.DummyMatrix.from_codes(torch.from_numpy(codes), q + extra, values)
            g = self.covariance(q + extra, k)
            log_sd = unit + float(rng.uniform(-8, 12))
            self.set(g, log_sd)
            parts[f"t{i}"] = c.CovariancePropagation(z=z, g=g)
            text.append(f"{_named(g)} of {q + extra} x {k} at {log_sd - unit:+.1f}")
        related = self.chance(0.08)
        if related:
            parts, text = self.relatives(n, unit)
        elif self.chance(0.12):
            r = self.one_of([2, 3, 4])
            n_grid = n // r * r
            if n_grid == n:
                field = c.ar1_field(r, n // r)
                self.set(field, unit + float(rng.uniform(-2, 4)))
                parts["field"] = field
                text.append(f"field {r} x {n // r}")
        left = self.residual(n, inner if self.chance(0.5) else np.arange(n) // 3)
        if "field" in parts or related:
            left = {"residual": c.ScalarMatrix(n)}
        for name, matrix in left.items():
            self.set(matrix, unit)
            parts[name] = matrix
            text.append(_named(matrix))
        V = c.Sum(parts).double()
        names = list(V.param_names)
        if self.chance(0.4):
            for name in names:
                if self.chance(0.4) and name in V.free_param_names:
                    V.fix(name)
        p = int(self.one_of([0, 1, 1, 2, 3]))
        X = self.normal(n, p) * torch.from_numpy(np.exp(rng.uniform(np.log(1e-4), np.log(1e4), p)))
        if p and self.chance(0.7):
            X[:, 0] = 1
        noise = rng.standard_normal(n).astype(LONG)
        y = cholesky(Exact()(V)) @ noise if self.chance(0.7) else np.exp(LONG(unit)) * noise
        if p and self.chance(0.5):
            y = y + np.exp(LONG(unit)) * 10 * X.numpy()[:, 0]
        y = torch.from_numpy(y.astype(np.float64))
        return Model(V, y, X, self.one_of(["reml", "ml"]), "; ".join(text))


def _named(g: c.Matrix) -> str:
    name = type(g).__name__.removesuffix("Matrix")
    if isinstance(g, c.Operator):
        return f"{name}({', '.join(_named(op) for op in g.operands.values() if isinstance(op, c.Matrix))})"
    return name


def solvers(m: Model) -> list[str]:
    """Those that fit."""
    terms = m.V.terms()
    found = [name for name, solver in SOLVERS.items() if solver().obstacle(terms) is None]
    if Krylov.name in found:
        parts = separated(terms)
        # With every pattern of signs it is exact.
        if sum(parts[i].design.shape[1] for i in Roles.of(parts).rest) > 6:
            found.remove(Krylov.name)
    return ["auto", *found]


def errors(m: Model, solver: str, expected: Answer) -> dict[str, float]:
    """Relative errors of each quantity; raises NumericalError where it is refused."""
    V = m.V
    loss = REMLLoss(V, m.method, solver, reduction="sum")
    V.zero_grad()
    value = loss(m.y, m.X)
    found = {
        "log-likelihood": abs(float(-LONG(value.item()) - expected.log_likelihood))
        / max(1.0, abs(float(expected.log_likelihood)))
    }
    if value.requires_grad:
        value.backward()
        exact = np.array([float(g) for g in expected.gradient.values()])
        own = np.array([-float(p.grad) for p in V.parameters()])
        # Of nearly singular G the reference itself has not all digits.
        unsure = np.array([float(g) for g in expected.rounding.values()])
        off = (np.abs(own - exact) - unsure).max(initial=0)
        found["gradient"] = off / max(1.0, np.abs(exact).max(initial=0))
    evaluation = loss.evaluate(m.y, m.X)
    assert evaluation.log_likelihood.item() == pytest.approx(-value.item(), rel=1e-8)
    # What is nearly zero is known to a fraction of its standard error.
    off = np.abs(evaluation.fixed.estimate.numpy() - expected.beta.astype(float))
    size = np.maximum(np.abs(expected.beta), expected.beta_sd).astype(float)
    found["beta"] = (off / size).max(initial=0)
    for effects in evaluation.random:
        if effects.name not in expected.effects:
            continue
        b, spread = (part.astype(float) for part in expected.effects[effects.name])
        q, k = effects.values.shape
        size = max(np.abs(b).max(), np.sqrt(np.diagonal(spread)).max())
        error = np.abs(effects.values.numpy().reshape(-1) - b).max() / size
        found["BLUP"] = max(found.get("BLUP", 0.0), error)
        blocks = spread.reshape(q, k, q, k)[np.arange(q), :, np.arange(q)]
        sd = np.sqrt(np.diagonal(blocks, axis1=1, axis2=2))
        scale = sd[:, :, None] * sd[:, None, :]
        error = (np.abs(effects.variances.numpy() - blocks) / scale).max()
        found["PEV"] = max(found.get("PEV", 0.0), float(error))
    return found


def examine(seed: int) -> tuple[Model, dict[str, dict[str, float] | str]]:
    """A model, and what each solver made of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = Maker(seed).model()
        expected = answer(m.V, m.y, m.X, m.method)
        found: dict[str, dict[str, float] | str] = {}
        for solver in solvers(m):
            try:
                made = EVERY_SIGN if solver == Krylov.name else solver
                found[solver] = errors(m, made, expected)
            except NumericalError as error:
                found[solver] = str(error)
    return m, found


def misses(found: dict[str, dict[str, float] | str]) -> list[str]:
    return [
        f"{solver}: {key} off by {error:.1e}"
        for solver, made in found.items()
        if isinstance(made, dict)
        for key, error in made.items()
        if not error <= TOLERANCE[key]
    ]


@pytest.mark.skipif(not IS_LONG, reason="long double is double here")
@pytest.mark.parametrize("start", range(0, 60, 10))
def test_random_models_keep_their_digits(start):
    refused = 0
    for seed in range(start, start + 10):
        m, found = examine(seed)
        assert not misses(found), f"seed {seed}: {m.text}: {misses(found)}"
        refused += isinstance(found["auto"], str)
    assert refused <= 1


def report(count: int, first: int = 0) -> None:
    worst: dict[tuple[str, str], tuple[float, int]] = defaultdict(lambda: (0.0, -1))
    refused: dict[str, int] = defaultdict(int)
    tried: dict[str, int] = defaultdict(int)
    wrong = 0
    for seed in range(first, first + count):
        try:
            m, found = examine(seed)
        except Exception as error:  # a fault of ours must not end the run
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            wrong += 1
            continue
        bad = misses(found)
        if bad:
            wrong += 1
            print(f"seed {seed}: {m.method}, n = {len(m.y)}, {m.text}: {bad}", flush=True)
        for solver, made in found.items():
            tried[solver] += 1
            if isinstance(made, str):
                refused[solver] += 1
                continue
            for key, error in made.items():
                worst[solver, key] = max(worst[solver, key], (error, seed))
    print(f"{count} models, {wrong} with a fault")
    for solver, of in tried.items():
        print(f"{solver}: {of} models, {refused[solver]} NumericalErrors")
        for key in TOLERANCE:
            error, seed = worst[solver, key]
            print(f"    {key:15} worst {error:.1e} (seed {seed})")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    report(
        int(sys.argv[1]) if len(sys.argv) > 1 else 2000,
        int(sys.argv[2]) if len(sys.argv) > 2 else 0,
    )
