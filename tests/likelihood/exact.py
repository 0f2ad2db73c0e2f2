"""Mixed models in long double, from the parameters and by dense algebra: nothing here is ours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from openreml_nn import covariance as c

LONG = np.longdouble
#: The exponent has 64 bits of mantissa where this holds; elsewhere long double is double.
IS_LONG = bool(np.finfo(LONG).eps < 1e-18)
Array = np.ndarray


class Exact:
    """Values of matrices from their parameters, some of them moved.

    Args:
        moved: by the id of a parameter, what is added to its untransformed value.
    """

    def __init__(self, moved: dict[int, LONG] | None = None) -> None:
        self.moved = moved or {}

    def value(self, matrix: c.Matrix, name: str) -> LONG:
        tensor = matrix._parameters.get(name, matrix._buffers.get(name))
        return LONG(float(tensor.detach())) + self.moved.get(id(tensor), LONG(0))

    def variance(self, matrix: c.Matrix, name: str = "sigma^2") -> LONG:
        return np.exp(2 * self.value(matrix, name))

    def between(self, matrix: c.Matrix, low: LONG) -> LONG:
        return low + (1 - low) / (1 + np.exp(-self.value(matrix, "rho")))

    def __call__(self, m: c.Matrix | torch.Tensor) -> Array:
        if isinstance(m, torch.Tensor):
            return long(m)
        n = m.shape[0]
        lags = abs(np.subtract.outer(np.arange(n), np.arange(n)))
        eye, ones = np.eye(n, dtype=LONG), np.ones((n, n), dtype=LONG)
        least = LONG(-1) / (n - 1) if n > 1 else LONG(-1)
        match m:
            case c.IdentityMatrix():
                return eye
            case c.ScalarMatrix():
                return self.variance(m) * eye
            case c.DiagonalMatrix():
                names = list(m.param_names)
                if names[0].startswith("sigma^2"):
                    return np.diag([self.variance(m, name) for name in names])
                return np.diag([np.exp(self.value(m, name)) for name in names])
            case c.EquicorrelationMatrix():
                return self.between(m, least) * (ones - eye) + eye
            case c.CompoundSymmetricMatrix():
                return self.variance(m) * (self.between(m, least) * (ones - eye) + eye)
            case c.AR1Matrix():
                return self.variance(m) * self.between(m, LONG(-1)) ** lags
            case c.UnstructuredMatrix():
                L = np.zeros((n, n), dtype=LONG)
                for i in range(n):
                    for j in range(i + 1):
                        x = self.value(m, f"L_{i}_{j}")
                        L[i, j] = np.exp(x) if i == j else x
                return L @ L.T
            case c.LowerTriangularMatrix():
                L = np.zeros(m.shape, dtype=LONG)
                for name in m.param_names:
                    i, j = map(int, name.split("_")[1:])
                    L[i, j] = self.value(m, name)
                return L
            case c.KnownMatrix():
                return self.variance(m) * long(m.matrix)
            case c.KnownInverseMatrix():
                return self.variance(m) * inverse(long(m.inverse.to_dense()))
            case c.CARMatrix():
                Q = np.zeros((n, n), dtype=LONG)
                rho, between = self.between(m, LONG(-1)), m._between.numpy()
                for i, j, own, weight in zip(
                    m.precision.row, m.precision.column, m._own.numpy(), between, strict=True
                ):
                    Q[i, j] = Q[j, i] = own if i == j else -rho * weight
                return self.variance(m) * inverse(Q)
            case c.VecchiaMatrix():
                at = long(m.places) / np.exp(self.value(m, "lengthscale"))
                apart = np.sqrt(((at[:, None] - at) ** 2).sum(-1))
                s = np.sqrt(LONG(2 * m.correlation.nu)) * apart
                C = np.exp(-s) if m.correlation.nu == 0.5 else (1 + s) * np.exp(-s)
                G = np.eye(n, dtype=LONG)
                done: list[int] = []
                for i in m.order.tolist():
                    near = [j for j in m.precision.neighbours[i].tolist() if j != i]
                    b = inverse(C[np.ix_(near, near)]) @ C[near, i]
                    G[done, i] = G[i, done] = G[np.ix_(done, near)] @ b
                    done.append(i)
                return self.variance(m) * G
            case c.ExponentialMatrix() | c.GaussianMatrix() | c.MaternMatrix():
                r = long(m.distance) / np.exp(self.value(m, "lengthscale"))
                if isinstance(m, c.ExponentialMatrix):
                    shape = np.exp(-r)
                elif isinstance(m, c.GaussianMatrix):
                    shape = np.exp(-(r * r) / 2)
                else:
                    r = np.sqrt(LONG(2 * m.nu)) * r
                    shape = {0.5: 1 + 0 * r, 1.5: 1 + r, 2.5: 1 + r + r * r / 3}[m.nu] * np.exp(-r)
                return self.variance(m) * shape
            case c.DummyMatrix():
                values = m.values()
                values = np.ones((n, 1), dtype=LONG) if values is None else long(values)
                k = values.shape[1]
                Z = np.zeros(m.shape, dtype=LONG)
                for row, code in enumerate(m.codes.tolist()):
                    Z[row, code * k : code * k + k] = values[row]
                return Z
        parts = [self(operand) for operand in m.operands.values()]
        match m:
            case c.Sum():
                return sum(parts[1:], parts[0])
            case c.KroneckerProduct():
                found = parts[0]
                for part in parts[1:]:
                    found = np.kron(found, part)
                return found
            case c.HadamardProduct():
                return parts[0] * parts[1]
            case c.Gram():
                return parts[0] @ parts[0].T if m.gram_type == "xxt" else parts[0].T @ parts[0]
            case c.CovariancePropagation():
                return parts[0] @ parts[1] @ parts[0].T
            case c.BlockDiagonal():
                found = np.zeros(m.shape, dtype=LONG)
                at = 0
                for part in parts:
                    found[at : at + len(part), at : at + len(part)] = part
                    at += len(part)
                return found
        raise NotImplementedError(type(m).__name__)


def long(x: torch.Tensor) -> Array:
    return x.detach().double().cpu().numpy().astype(LONG)


def cholesky(A: Array) -> Array:
    L = np.zeros_like(A)
    for j in range(len(A)):
        rest = A[j:, j] - L[j:, :j] @ L[j, :j]
        L[j:, j] = rest / np.sqrt(rest[0])
    return L


def triangular_inverse(L: Array) -> Array:
    X = np.zeros_like(L)
    for i in range(len(L)):
        X[i] = -(L[i, :i] @ X[:i]) / L[i, i]
        X[i, i] += 1 / L[i, i]
    return X


def inverse(A: Array) -> Array:
    X = triangular_inverse(cholesky(A))
    return X.T @ X


@dataclass
class Answer:
    """What the textbook says of a model."""

    log_likelihood: LONG
    gradient: dict[str, LONG]
    rounding: dict[str, LONG]  # of the gradient
    beta: Array
    beta_sd: Array
    effects: dict[str, tuple[Array, Array]]  # BLUPs and the whole prediction-error variance


def answer(V: c.Matrix, y: torch.Tensor, X: torch.Tensor, method: str) -> Answer:
    """A Sum of residuals and of random terms, which are propagated from ``z`` and ``g``.

    By Henderson's equations, where no digits of the residual are lost.
    """
    y, X = long(y), long(X)
    n, p = X.shape
    at = Exact()
    random = {
        name: (at(operand.operands["z"]), at(operand.operands["g"]))
        for name, operand in V.operands.items()
        if name.startswith("t")
    }
    R = sum(at(operand) for name, operand in V.operands.items() if name not in random)
    white = triangular_inverse(cholesky(R))
    Z = [white @ z for z, _ in random.values()]
    W = np.concatenate([white @ X, *Z], 1)
    C = W.T @ W
    log_det = -2 * np.log(np.diagonal(white)).sum()
    start = p
    ends, priors = [], []
    for z, (_, G) in zip(Z, random.values(), strict=True):
        ends.append(slice(start, start + z.shape[1]))
        priors.append(triangular_inverse(cholesky(G)))
        C[ends[-1], ends[-1]] += priors[-1].T @ priors[-1]
        log_det -= 2 * np.log(np.diagonal(priors[-1])).sum()
        start += z.shape[1]
    log_det += 2 * np.log(np.diagonal(cholesky(C[p:, p:]))).sum()
    spread = inverse(C)
    effects = spread @ (W.T @ (white @ y))
    effects += spread @ (W.T @ (white @ y) - C @ effects)
    left = white @ y - W @ effects
    total = left @ left
    for at_term, prior in zip(ends, priors, strict=True):
        total += ((prior @ effects[at_term]) ** 2).sum()
    if method == "reml" and p:
        log_det -= 2 * np.log(np.diagonal(cholesky(spread[:p, :p]))).sum()
    rank = n - p if method == "reml" else n
    value = -(rank * np.log(2 * LONG(np.pi)) + log_det + total) / 2
    found = {
        name: (effects[at_term], spread[at_term, at_term])
        for name, at_term in zip(random, ends, strict=True)
    }
    # Scores by the entries of R and of each G: u u' - Z' P Z, with u = Z' P y = G^-1 b.
    known = spread
    if method == "ml":
        known = np.zeros_like(spread)
        known[p:, p:] = inverse(C[p:, p:])
    e = white.T @ left
    S_R = np.outer(e, e) - white.T @ (np.eye(n, dtype=LONG) - W @ known @ W.T) @ white
    scores = {}
    for name, at_term, prior in zip(random, ends, priors, strict=True):
        G_inverse = prior.T @ prior
        u = G_inverse @ effects[at_term]
        own = known[at_term, at_term]
        scores[name] = np.outer(u, u) - G_inverse + G_inverse @ own @ G_inverse
    gradient, rounding = {}, {}
    for name, tensor in V.named_parameters():
        part = name.split(".")[0]
        moved = V.operands[part]
        if part in random:
            moved = moved.operands["g"]
        dG = derivative(moved, tensor)
        gradient[name] = (scores.get(part, S_R) * dG).sum() / 2
        rounding[name] = LONG(0)
        if part in random:
            G = random[part][1]
            size = np.linalg.cond(G.astype(float)) * 4 * np.finfo(LONG).eps
            rounding[name] = size * (abs(inverse(G)) * abs(dG)).sum()
    return Answer(value, gradient, rounding, effects[:p], np.sqrt(np.diagonal(spread)[:p]), found)


def derivative(m: c.Matrix, tensor: torch.Tensor) -> Array:
    """By one untransformed parameter, a difference of sixth order."""
    h, found = LONG(2) ** -9, LONG(0)
    for k, w in ((1, LONG(45)), (2, LONG(-9)), (3, LONG(1))):
        up, down = (Exact({id(tensor): s * k * h})(m) for s in (1, -1))
        found = found + w * (up - down) / (60 * h)
    return found
