"""Structures said in a formula are the covariances that their definitions give, entry by entry."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer

from openreml_nn import InputError, REMLLoss, glmm, lmm, restricted_log_likelihood
from openreml_nn.covariance import Pedigree
from openreml_nn.datasets import table_path
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from openreml_nn.model.relations import relations_of
from openreml_nn.model.structures import labels_of, linear_model
from openreml_nn.report import blup_table
from openreml_nn.support.errors import NumericalError
from openreml_nn.table import Encoder, Learned, parse_formula, parse_residual


def made(seed=0):
    rng = np.random.default_rng(seed)
    cells = [(g, t) for g in range(9) for t in (1, 2, 4, 5)]
    table = pd.DataFrame(cells * 2, columns=["g", "time"]).sample(60, random_state=1)
    table = table.reset_index(drop=True)
    table["env"] = np.array(list("abde"))[table["time"].map({1: 0, 2: 1, 4: 2, 5: 3})]
    table["g"] = "g" + table["g"].astype(str)
    table["x"] = rng.normal(size=60)
    table["east"], table["north"] = rng.integers(0, 5, 60) / 2.0, rng.integers(0, 4, 60) * 1.5
    table["w"] = rng.uniform(0.5, 2.0, 60)
    table["y"] = rng.normal(size=60)
    return table


TABLE = made()
NAMES = [*sorted(TABLE["g"].unique(), reverse=True), "other"]
ROOT = np.random.default_rng(5).normal(size=(len(NAMES), len(NAMES)))
KERNEL = pd.DataFrame(ROOT @ ROOT.T / 9 + np.eye(len(NAMES)), index=NAMES, columns=NAMES)
PEDIGREE = pd.DataFrame(
    {
        "animal": [f"g{i}" for i in range(9)],
        "sire": [None, "s1", "s1", "g1", "g1", "g3", None, "g6", "g6"],
        "dam": [None, None, "g0", "g2", "g0", "g4", "g2", "g5", "g4"],
    }
)


def ar1(rho, places):
    return rho ** np.abs(np.subtract.outer(places, places))


def cs(n, rho):
    return (1 - rho) * np.eye(n) + rho


def lower(values, k, m=None):
    L = np.zeros((k, k if m is None else m))
    L[np.tril_indices(k, 0, L.shape[1])] = values
    return L


def toeplitz(partial):
    """Correlations by lag from partial ones, by their definition: between two positions, given all
    that are between them."""
    rho = np.array([])
    for p in partial:
        R = by_lag(rho[:-1]) if len(rho) else np.zeros((0, 0))
        near, far = rho, rho[::-1]
        known = near @ np.linalg.solve(R, far) if len(rho) else 0.0
        left = 1 - near @ np.linalg.solve(R, near) if len(rho) else 1.0
        rho = np.append(rho, known + p * left)
    return by_lag(rho)


def by_lag(rho):
    return np.array([1, *rho])[np.abs(np.subtract.outer(range(len(rho) + 1), range(len(rho) + 1)))]


def ante(sigma, rho):
    n = len(sigma)
    R = [[np.prod(rho[min(i, j) : max(i, j)]) for j in range(n)] for i in range(n)]
    return np.outer(sigma, sigma) * np.array(R)


def outer(sd):
    return np.outer(sd, sd)


TIMES = np.array([1, 2, 4, 5])

EFFECTS = {
    "us(0 + env | g)": lambda v: lower(v, 4) @ lower(v, 4).T,
    "(0 + env | g)": lambda v: lower(v, 4) @ lower(v, 4).T,
    "diag(0 + env | g)": np.diag,
    "idv(0 + env | g)": lambda v: v[0] * np.eye(4),
    "cs(0 + env | g)": lambda v: outer(v[:4]) * cs(4, v[4]),
    "homcs(0 + env | g)": lambda v: v[0] * cs(4, v[1]),
    "ar1(0 + env | g)": lambda v: v[0] * ar1(v[1], range(4)),
    "ar1(0 + time | g)": lambda v: v[0] * ar1(v[1], TIMES),
    "ar1(time | g)": lambda v: v[0] * ar1(v[1], TIMES),
    "hetar1(0 + time | g)": lambda v: outer(v[:4]) * ar1(v[4], TIMES),
    "toep(0 + env | g)": lambda v: v[0] * toeplitz(v[1:]),
    "hettoep(0 + env | g)": lambda v: outer(v[:4]) * toeplitz(v[4:]),
    "ante(0 + time | g)": lambda v: ante(v[:4], v[4:]),
    "fa(0 + env | g)": lambda v: outer(v[:4]) + np.diag(v[4:]),
    "fa(0 + env | g, 2)": lambda v: (L := lower(v[:7], 4, 2)) @ L.T + np.diag(v[7:]),
}


def at_random(V, seed=3):
    """Put a tree at a random point; returns its free parameters on the natural scale."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.copy_(torch.tensor(rng.uniform(-0.4, 0.4, parameter.shape)))
        return V.build_params(include_fixed=False).numpy()


def covariance_of(encoded):
    return linear_model(encoded).covariance(encoded.batch())


def encoded_by(formula, table=TABLE, **options):
    relations = relations_of(options.pop("pedigree", None), options.pop("kernels", None))
    return Encoder(formula, relations=relations, **options).fit(table)


def assert_is(encoded, V, expected):
    """The tree is this matrix, and the likelihood of the chosen solver that of a dense one."""
    torch.testing.assert_close(V().detach(), torch.tensor(expected), rtol=1e-10, atol=1e-12)
    loss = REMLLoss(V, reduction="sum")(encoded.y, encoded.X)
    dense = restricted_log_likelihood(encoded.y, encoded.X, torch.tensor(expected))
    assert abs(float(loss) + float(dense)) < 1e-8


@pytest.mark.parametrize("term", EFFECTS)
def test_structure_among_effects(term):
    encoded = encoded_by(f"y ~ x + {term}")
    V = covariance_of(encoded)
    values = at_random(V)
    sigma = np.asarray(EFFECTS[term](values[:-1]))
    e, g = pd.factorize(TABLE["env"], sort=True)[0], TABLE["g"].to_numpy()
    expected = sigma[np.ix_(e, e)] * (g[:, None] == g) + values[-1] * np.eye(60)
    assert_is(encoded, V, expected)
    assert labels_of(encoded)["g"].group == "g"


def relationship(pedigree):
    """A by the recursion of its definition, parents before offspring."""
    rows = {a: [p for p in parents if isinstance(p, str)] for a, *parents in pedigree.to_numpy()}
    names = sorted({p for parents in rows.values() for p in parents if p not in rows})
    for _ in rows:
        names += [a for a in rows if a not in names and set(rows[a]) <= set(names)]
    A = pd.DataFrame(0.0, index=names, columns=names)
    for i, a in enumerate(names):
        parents = rows.get(a, [])
        for b in names[:i]:
            A.loc[a, b] = A.loc[b, a] = sum(A.loc[p, b] for p in parents) / 2
        A.loc[a, a] = 1 + (A.loc[parents[0], parents[1]] / 2 if len(parents) == 2 else 0)
    return A


@pytest.mark.parametrize("given", ["table", "pedigree", "kernel", "inverse", "file"])
def test_known_relations_of_levels(given, tmp_path):
    options, group = {}, "vm(g, K)"
    if given in ("table", "pedigree"):
        K, group = relationship(PEDIGREE), "ped(g)"
        columns = (PEDIGREE[c] for c in ("animal", "sire", "dam"))
        options["pedigree"] = Pedigree.of(*columns) if given == "pedigree" else PEDIGREE
    else:
        K = KERNEL
        options["kernels"] = {"K": KERNEL}
    if given == "inverse":
        inverse = np.linalg.inv(KERNEL)
        options["kernels"]["K"] = pd.DataFrame((inverse + inverse.T) / 2, NAMES, NAMES)
        group = "vm(g, K, inverse = TRUE)"
    if given == "file":
        KERNEL.to_csv(tmp_path / "k.csv")
        options["kernels"]["K"] = tmp_path / "k.csv"
    known = K.loc[TABLE["g"], TABLE["g"]].to_numpy()
    for effects, values_of in {
        "1": np.ones((60, 1)),
        "1 + x": np.c_[np.ones(60), TABLE["x"]],
    }.items():
        encoded = encoded_by(f"y ~ x + ({effects} | {group})", **options)
        V = covariance_of(encoded)
        values = at_random(V)
        k = values_of.shape[1]
        sigma = values[:1, None] if k == 1 else lower(values[:3], 2) @ lower(values[:3], 2).T
        expected = known * (values_of @ sigma @ values_of.T) + values[-1] * np.eye(60)
        assert_is(encoded, V, expected)
        assert set(encoded.random[0].levels) == set(K.index)
        assert encoded.random[0].group == "g"


def distances(*columns):
    x = TABLE[list(columns)].to_numpy()
    return np.sqrt(((x[:, None] - x) ** 2).sum(2))


KERNELS = {
    "exponential(east, north)": lambda d, scale: np.exp(-d / scale),
    "gaussian(east, north)": lambda d, scale: np.exp(-(d**2) / (2 * scale**2)),
    "matern(east, north)": lambda d, s: (1 + 3**0.5 * d / s) * np.exp(-(3**0.5) * d / s),
    "matern(east, north, nu = 0.5)": lambda d, scale: np.exp(-d / scale),
    "spherical(east, north)": lambda d, s: np.where(d < s, 1 - 1.5 * d / s + 0.5 * (d / s) ** 3, 0),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_coordinates(kernel):
    encoded = encoded_by(f"y ~ x + (1 | {kernel})")
    V = covariance_of(encoded)
    variance, scale, rest = at_random(V)
    d = distances("east", "north")
    assert_is(encoded, V, variance * KERNELS[kernel](d, scale) + rest * np.eye(60))


def test_splines_are_p_splines():
    encoded = encoded_by("y ~ x + (1 | spline(x, segments = 7))")
    V = covariance_of(encoded)
    variance, rest = at_random(V)
    # A penalty on second differences of the coefficients of equally spaced B-splines.
    from scipy.interpolate import BSpline

    x = TABLE["x"].to_numpy()
    knots = x.min() + (x.max() - x.min()) / 7 * np.arange(-3, 11)
    B = BSpline.design_matrix(np.clip(x, x.min(), x.max() - 1e-12), knots, 3).toarray()
    D = np.diff(np.eye(10), 2, axis=0)
    penalised = B @ np.linalg.pinv(D.T @ D) @ B.T
    np.testing.assert_allclose(V().detach(), variance * penalised + rest * np.eye(60), atol=1e-8)


def test_splines_of_two_columns_have_five_parts():
    parts = parse_formula("y ~ east * north + (1 | spline(east, north))").random
    assert [part.group for part in parts] == [
        "spline(east)", "spline(north)", "spline(east):north", "east:spline(north)",
        "spline(east):spline(north)",
    ]  # fmt: skip
    encoded = encoded_by("y ~ east * north + (1 | spline(east, north))")
    Z = {d.group: d.values.numpy() for d in encoded.random}
    east = (TABLE["east"] - 1.0) / 1.0  # from -1 to 1
    np.testing.assert_allclose(
        Z["east:spline(north)"], east.to_numpy()[:, None] * Z["spline(north)"], atol=1e-12
    )
    both = Z["spline(east):spline(north)"]
    rows = np.einsum("ij,ik->ijk", Z["spline(east)"], Z["spline(north)"]).reshape(60, -1)
    np.testing.assert_allclose(both, rows, atol=1e-12)


def test_a_spline_predicts_and_goes_on_straight():
    x = np.linspace(0, 1, 40)
    table = pd.DataFrame({"x": x, "y": np.sin(6 * x)})
    encoder = Encoder("y ~ x + (1 | spline(x))")
    inside = encoder.fit(table).random[0].values
    again = encoder.transform(table.iloc[[3, 7]]).random[0]
    torch.testing.assert_close(again.values, inside[[3, 7]])
    beyond = encoder.transform(pd.DataFrame({"x": [1.0, 1.5, 2.0]})).random[0]
    torch.testing.assert_close(beyond.values[0] + beyond.values[2], 2 * beyond.values[1])
    assert beyond.codes.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------- residuals

PLOTS = pd.DataFrame(
    [(s, r, c) for s in "AB" for r in (1, 2, 3, 5) for c in (2, 4, 6)],
    columns=["site", "row", "col"],
)
PLOTS["y"] = np.random.default_rng(2).normal(size=len(PLOTS))
PLOTS["w"] = np.random.default_rng(3).uniform(0.5, 2, len(PLOTS))
FIELD = PLOTS[PLOTS["site"] == "A"].sample(frac=1, random_state=1).reset_index(drop=True)
LONG = TABLE.drop_duplicates(["g", "time"]).reset_index(drop=True)


def same(table, *columns):
    """Whether two rows are of one group."""
    n = len(table)
    found = np.ones((n, n), dtype=bool)
    for column in columns:
        values = table[column].to_numpy()
        found &= values[:, None] == values
    return found


def at_places(matrix, table, column):
    """A matrix of the positions for the rows."""
    at = pd.factorize(table[column], sort=True)[0]
    return np.asarray(matrix)[np.ix_(at, at)]


def two_fields(v):
    row, col = (PLOTS[name].to_numpy() for name in ("row", "col"))
    first = v[0] * ar1(v[1], row) * ar1(v[2], col / 2)
    second = v[3] * ar1(v[4], row) * ar1(v[5], col / 2)
    return np.where(same(PLOTS, "site"), np.where(PLOTS["site"] == "A", first, second), 0)


def times(name="time"):
    return LONG[name].to_numpy()


def arma(n, phi, theta):
    """Correlations from the first 2,000 coefficients of the moving average."""
    psi = np.r_[1, (phi + theta) * phi ** np.arange(2000)]
    gamma = np.array([psi[: len(psi) - k] @ psi[k:] for k in range(n)])
    return gamma / gamma[0]


RESIDUALS = {
    "ar1(time | g)": (LONG, lambda v: v[0] * ar1(v[1], times()) * same(LONG, "g")),
    "car1(time | g)": (LONG, lambda v: v[0] * ar1(v[1], times()) * same(LONG, "g")),
    "car1(x | g)": (LONG, lambda v: v[0] * ar1(v[1], times("x")) * same(LONG, "g")),
    "hetar1(time | g)": (
        LONG,
        lambda v: at_places(outer(v[:4]), LONG, "time") * ar1(v[4], times()) * same(LONG, "g"),
    ),
    "us(env | g)": (
        LONG,
        lambda v: at_places(lower(v, 4) @ lower(v, 4).T, LONG, "env") * same(LONG, "g"),
    ),
    "cs(env | g)": (LONG, lambda v: v[0] * at_places(cs(4, v[1]), LONG, "env") * same(LONG, "g")),
    "homcs(env | g)": (LONG, lambda v: v[0] * at_places(cs(4, v[1]), LONG, "env") * same(LONG, "g")),
    "ante(time | g)": (LONG, lambda v: at_places(ante(v[:4], v[4:]), LONG, "time") * same(LONG, "g")),
    "toep(time | g)": (
        LONG,
        lambda v: v[0] * toeplitz(v[1:])[np.ix_(times() - 1, times() - 1)] * same(LONG, "g"),
    ),
    "hettoep(time | g)": (
        LONG,
        lambda v: (
            at_places(outer(v[:4]), LONG, "time")
            * toeplitz(v[4:])[np.ix_(times() - 1, times() - 1)]
            * same(LONG, "g")
        ),
    ),
    "arma(time | g)": (
        LONG,
        lambda v: (
            v[0]
            * arma(5, v[1], v[2])[np.abs(np.subtract.outer(times(), times()))]
            * same(LONG, "g")
        ),
    ),
    "exponential(x | g)": (
        LONG,
        lambda v: v[0] * np.exp(-np.abs(np.subtract.outer(times("x"), times("x"))) / v[1]) * same(LONG, "g"),
    ),
    "diag(env)": (LONG, lambda v: np.diag(v[pd.factorize(LONG["env"], sort=True)[0]])),
    "power(x)": (LONG, lambda v: np.diag(v[0] * np.abs(times("x")) ** (2 * v[1]))),
    "exp(x)": (LONG, lambda v: np.diag(v[0] * np.exp(2 * v[1] * times("x")))),
    "power(x):ar1(time | g)": (
        LONG,
        lambda v: v[1] * ar1(v[2], times()) * same(LONG, "g") * outer(np.abs(times("x")) ** v[0]),
    ),
    "us(env | g):exp(x)": (
        LONG,
        lambda v: (
            at_places(lower(v[1:], 4) @ lower(v[1:], 4).T, LONG, "env")
            * same(LONG, "g")
            * outer(np.exp(v[0] * times("x")))
        ),
    ),
    "diag(env):power(x)": (
        LONG,
        lambda v: np.diag(v[1:][pd.factorize(LONG["env"], sort=True)[0]] * np.abs(times("x")) ** (2 * v[0])),
    ),
    "ar1(row):ar1(col):power(w)": (
        FIELD,
        lambda v: (
            v[1] * ar1(v[2], FIELD["row"].to_numpy()) * ar1(v[3], FIELD["col"].to_numpy() / 2)
            * outer(FIELD["w"].to_numpy() ** v[0])
        ),
    ),
    "exp(w):diag(site):ar1(row):ar1(col)": (
        PLOTS, lambda v: two_fields(v[1:]) * outer(np.exp(v[0] * PLOTS["w"].to_numpy())),
    ),
    "ar1(row):ar1(col)": (
        FIELD,
        lambda v: v[0] * ar1(v[1], FIELD["row"].to_numpy()) * ar1(v[2], FIELD["col"].to_numpy() / 2),
    ),
    "matern(row, col, nu = 2.5)": (
        FIELD,
        lambda v: (
            v[0]
            * (lambda s: (1 + s + s * s / 3) * np.exp(-s))(
                5**0.5
                * np.hypot(*(np.subtract.outer(x, x) for x in FIELD[["row", "col"]].to_numpy().T))
                / v[1]
            )
        ),
    ),
    "id(site):ar1(row):ar1(col)": (
        PLOTS,
        lambda v: (
            v[0]
            * ar1(v[1], PLOTS["row"].to_numpy())
            * ar1(v[2], PLOTS["col"].to_numpy() / 2)
            * same(PLOTS, "site")
        ),
    ),
    "diag(site):ar1(row):ar1(col)": (PLOTS, two_fields),
}  # fmt: skip


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_structure_of_residuals(residual, weights):
    table, expected = RESIDUALS[residual]
    encoded = encoded_by("y ~ 1", table, residual=residual, weights=weights)
    V = covariance_of(encoded)
    values = at_random(V)
    scale = 1 / np.sqrt(table["w"].to_numpy()) if weights else np.ones(len(table))
    assert_is(encoded, V, np.asarray(expected(values), dtype=float) * outer(scale))


@pytest.mark.parametrize("residual", ["ar1(row):ar1(col)", "diag(site):ar1(row):ar1(col)"])
def test_a_nugget_stands_beside(residual):
    table, expected = RESIDUALS[residual]
    encoded = encoded_by("y ~ 1", table, residual=f"{residual} + units")
    V = covariance_of(encoded)
    *values, nugget = at_random(V)
    assert_is(encoded, V, expected(np.array(values)) + nugget * np.eye(len(table)))
    labels = labels_of(encoded)
    assert labels["units"].group == "Residual"
    assert labels["residual"].group == residual


def test_a_table_of_one_stratum_alone_has_one_variance():
    """As a subset of the rows may have: the fit is the scalar one, its component named by the
    stratum."""
    rows = LONG[LONG["env"] == LONG["env"].iloc[0]]
    found, plain = (lmm("y ~ x", rows, residual=r) for r in ("diag(env)", None))
    assert found.log_likelihood == plain.log_likelihood
    assert found.components[-1].effects == (rows["env"].iloc[0],)
    assert [p.name for p in found.parameters] == ["residual/sigma^2"]
    pd.testing.assert_frame_equal(found.predict(LONG), plain.predict(LONG))


@pytest.mark.parametrize("residual", ["power(x)", "power(x):ar1(time | g)", "diag(env):power(x)"])
def test_a_power_is_that_of_a_covariate_in_any_unit(residual):
    """Far from 1 as well, where the variance at 1 is another by orders of magnitude."""
    fits = [
        lmm("y ~ env", LONG.assign(x=(LONG["x"].abs() + 0.1) * unit), residual=residual)
        for unit in (1.0, 300.0, 1e-4)
    ]
    for fit in fits:
        assert fit.converged
        assert fit.iterations < 40
        assert fit.log_likelihood == pytest.approx(fits[0].log_likelihood, abs=1e-7)
    delta = [next(p.value for p in f.parameters if p.name.endswith("delta")) for f in fits]
    assert delta == pytest.approx([delta[0]] * 3, rel=1e-4, abs=1e-6)


def test_plots_may_be_missing_and_rows_in_any_order():
    kept = FIELD.iloc[:9]
    encoded = encoded_by("y ~ 1", kept, residual="ar1(row):ar1(col)")
    V = covariance_of(encoded)
    v = at_random(V)
    row, col = kept["row"].to_numpy(), kept["col"].to_numpy() / 2
    assert_is(encoded, V, v[0] * ar1(v[1], row) * ar1(v[2], col))
    fits = [lmm("y ~ 1", t, residual="ar1(row):ar1(col)") for t in (PLOTS.iloc[:12], FIELD)]
    assert abs(fits[0].log_likelihood - fits[1].log_likelihood) < 1e-8


def test_fits_agree_where_one_structure_is_another():
    """The same covariance said in two ways has one likelihood, in each unit of the response."""
    table = pd.read_csv(table_path("oats"))
    base = lmm("`yield` ~ nitro + (1 | Block) + (1 | Block:Variety)", table)
    other = lmm("`yield` ~ nitro + (1 | Block)", table, residual="cs(Block:Variety)")
    assert abs(base.log_likelihood - other.log_likelihood) < 1e-7
    units = table.assign(**{"yield": table["yield"] / 1000})
    scaled = lmm("`yield` ~ nitro + homcs(0 + Variety | Block)", units)
    shift = (len(table) - 2) * np.log(1000)
    assert abs(base.log_likelihood + shift - scaled.log_likelihood) < 1e-6
    identity = pd.DataFrame(np.eye(6), *[sorted(table["Block"].unique())] * 2)
    known = lmm(
        "`yield` ~ nitro + (1 | vm(Block, K)) + (1 | Block:Variety)", table, kernels={"K": identity}
    )
    assert abs(base.log_likelihood - known.log_likelihood) < 1e-7


def test_results_name_what_the_formula_says():
    found = lmm("y ~ x + us(1 + x | ped(g)) + (1 | spline(x))", TABLE, pedigree=PEDIGREE)
    assert [c.group for c in found.components] == ["g", "spline(x)", "Residual"]
    assert found.components[0].effects == ("(Intercept)", "x")
    table = blup_table(found)
    assert set(table.loc[table["group"] == "g", "level"]) == set(relationship(PEDIGREE).index)
    assert "11 of one variance" not in found.summary() or "spline(x)" in found.summary()
    field = lmm("y ~ 1", FIELD, residual="ar1(row):ar1(col)")
    assert [c.group for c in field.components] == ["Residual"]
    assert not field.random
    torch.testing.assert_close(field.fitted, field.fixed.estimate.expand(12))


def test_a_learned_formula_builds_the_same_shapes():
    encoder = Encoder(
        "y ~ x + us(1 + x | ped(g)) + (1 | exponential(east, north)) + ar1(time | env)",
        residual="ar1(time | g)",
        relations=relations_of(PEDIGREE),
    )
    table = LONG
    encoded = encoder.fit(table)
    encoder.learned = Learned.from_dict(encoder.learned.to_dict())
    built = encoder.skeleton(len(table), 2)
    before, after = covariance_of(encoded), covariance_of(built)
    assert before.param_names == after.param_names
    after.load_state_dict(before.state_dict(), strict=False)
    assert after.shape == before.shape


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("formula", "options", "message"),
    [
        ("y ~ us(x)", {}, "'us(x)' has no place here: expected a structure of effects as a term"),
        ("y ~ exponential(x)", {}, "has no place here"),
        ("y ~ x + gp(1 | g)", {}, "gp() is no structure of effects: expected one of us, diag"),
        ("y ~ x + us(1 + x || g)", {}, "us() takes effects | group"),
        ("y ~ x + fa(0 + env | g, 1.5)", {}, "`factors` is 1.5: expected a whole number, 1 or more"),
        ("y ~ x + fa(0 + env | g, k = 2)", {}, "fa() has no option 'k = 2': it has factors"),
        ("y ~ x + fa(0 + env | g, 4)", {}, "4 factors for 4 effects: expected at most 3"),
        ("y ~ x + ar1(x + env | g)", {}, "ar1() is among the levels of one factor in order"),
        ("y ~ x + cs(1 | g)", {}, "has one effect, '(Intercept)': cs() needs two or more"),
        ("y ~ x + toep(0 + late | g)", {}, "no two are 4 apart: toep() has a correlation for each"),
        ("y ~ x + ar1(0 + east | g)", {}, "is 0.5 in '0.5': expected whole numbers"),
        ("y ~ x + (1 | ped(g))", {}, "ped(g) needs `pedigree`: there is none"),
        ("y ~ x + (1 | vm(g, K))", {}, "vm(g, K) needs a matrix 'K' in `kernels`: there is none"),
        ("y ~ x + (1 | vm(g))", {}, "expected vm(level, K), K a name in `kernels`"),
        ("y ~ x + (1 | g)", {"pedigree": PEDIGREE}, "`pedigree` is not in the formula"),
        ("y ~ x + (1 | g)", {"kernels": {"K": KERNEL}}, "`kernels` has 'K', which is not in"),
        ("y ~ x + (1 | ped(env))", {"pedigree": PEDIGREE}, "'env' has the level"),
        (
            "y ~ x + (1 | vm(g, K))",
            {"kernels": {"K": KERNEL.iloc[1:, 1:]}},
            "which kernel 'K' has not",
        ),
        (
            "y ~ x + (1 | vm(g, K))",
            {"kernels": {"K": KERNEL - 5 * np.eye(len(NAMES))}},
            "kernel 'K' is not positive semi-definite",
        ),
        (
            "y ~ x + (1 | vm(g, K))",
            {"kernels": {"K": KERNEL + np.triu(np.ones(KERNEL.shape), 1)}},
            "kernel 'K' is not symmetric",
        ),
        ("y ~ x + (1 | vm(g, K))", {"kernels": {"K": np.eye(3)}}, "is 3 x 3 without names"),
        ("y ~ x + (1 | exponential(env))", {}, "column 'env' is not numeric: found"),
        ("y ~ x + (1 | matern(east, nu = 2))", {}, "`nu` is 2: expected 0.5, 1.5 or 2.5"),
        ("y ~ x + (1 | spline(east, north, x))", {}, "has 3 columns: expected one or two"),
        ("y ~ x + (1 + x | spline(x))", {}, "expected (1 | spline(x))"),
        ("y ~ x", {"residual": "ar1(east | g)"}, "expected whole numbers"),
        ("y ~ x", {"residual": "power(x):ar1(time | g) + units"}, "beside units is not supported"),
        ("y ~ x", {"residual": "power(x, 2)"}, "takes one numeric column, or fitted for the fitted"),
        ("y ~ 1", {"residual": "exp(fitted)"}, "the fitted values are all"),
        ("y ~ x", {"residual": "ar1(row):ar1(col | g)"}, "a product has no '|'"),
        ("y ~ x", {"residual": "units"}, "expected one of us(…)"),
        ("y ~ x", {"residual": "diag(env) + units"}, "units are independent errors beside"),
        ("y ~ x", {"residual": "id(env)"}, "id() is a prefix of a product"),
        ("y ~ x", {"residual": "us(g):hetar1(time)"}, "on one side only: found us and hetar1"),
        ("y ~ x", {"residual": "power(zero)"}, "is 0 in row 1: expected a number other than zero"),
    ],
)  # fmt: skip
def test_what_is_not_supported_says_so_in_one_line(formula, options, message):
    table = LONG.assign(late=LONG["time"].replace(5, 9), zero=0.0, row=1, col=LONG.index)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        lmm(formula, table, **options)
    assert "\n" not in str(caught.value)


def test_prefixes_and_options_of_residuals_are_parsed():
    part = parse_residual("diag(site):ar1(row):ar1(col) + units")
    assert part.strata == ("site",)
    assert part.nugget
    assert [f.positions for f in part.factors] == [("row",), ("col",)]
    assert parse_residual("us(trait | unit)").group == ("unit",)
    assert parse_residual("matern(east, north | site, nu = 0.5)").factors[0].structure.options == {
        "nu": 0.5
    }


def test_levels_and_places_that_the_fit_did_not_see():
    """A new place has no level, but comes with its coordinates, is predicted by its neighbours and so
    not told of; the levels of a known matrix are all known."""
    encoder = Encoder("y ~ x + (1 | exponential(east))")
    encoder.fit(TABLE)
    found = encoder.transform(pd.DataFrame({"x": [0.0, 0.0], "east": [0.5, 99.0]}))
    assert found.random[0].codes.tolist() == [1, -1]
    assert found.batch()["places"]["east"].tolist() == [[0.5], [99.0]]
    assert not found.unseen
    known = Encoder("y ~ x + (1 | vm(g, K))", relations=relations_of(None, {"K": KERNEL}))
    known.fit(TABLE)
    found = known.transform(pd.DataFrame({"x": [0.0], "g": ["other"]}))
    assert found.random[0].codes.tolist() == [NAMES.index("other")]


def test_a_field_with_a_nugget_has_an_effect_of_each_place():
    """The BLUP of a place, by the dense formula."""
    found = lmm("y ~ 1", FIELD, residual="ar1(row):ar1(col) + units")
    (effects,) = found.random
    v = {p.name.rsplit("/", 2)[-2] + p.name[-4:]: p.value for p in found.parameters}
    row, col = FIELD["row"].to_numpy(), FIELD["col"].to_numpy() / 2
    C = v["rowma^2"] * ar1(v["row/rho"], row) * ar1(v["col/rho"], col)
    V = C + v["unitsma^2"] * np.eye(12)
    rest = FIELD["y"].to_numpy() - float(found.fixed.estimate[0])
    table = blup_table(found).set_index("level")["blup"]
    places = [f"{r}:{c}" for r, c in zip(FIELD["row"], FIELD["col"], strict=True)]
    np.testing.assert_allclose(table.loc[places], C @ np.linalg.solve(V, rest), atol=1e-8)
    assert effects.variances.shape == (15, 1, 1)
    assert found.components[-1].group == "Residual"
    assert found.residual_variance == pytest.approx(v["unitsma^2"])


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        ("y ~ x + (1 | ped(g))", {"pedigree": PEDIGREE}),
        ("y ~ x + (1 | vm(g, K))", {"kernels": {"K": KERNEL}}),
    ],
)
def test_a_module_fits_predicts_and_is_loaded_as_lmm_does(formula, options, tmp_path):
    fit = lmm(formula, TABLE, **options)
    module = MixedModule(formula)
    data = MixedModelDataModule(TABLE, formula, **options)
    trainer = Trainer(
        max_epochs=60, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert module.result.log_likelihood == pytest.approx(fit.log_likelihood, abs=1e-6)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    loaded = MixedModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    found, expected = loaded.predict(TABLE.head()), fit.predict(TABLE.head())
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), atol=1e-4)


def test_a_generalised_model_takes_structures():
    """With a kernel that is the identity, the levels are independent."""
    table = TABLE.assign(high=TABLE["y"] > 0)
    identity = pd.DataFrame(np.eye(9), *[sorted(table["g"].unique())] * 2)
    one = glmm("high ~ x + (1 | g)", table, family="binomial")
    other = glmm("high ~ x + (1 | vm(g, K))", table, family="binomial", kernels={"K": identity})
    assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-8)


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_a_correlation_for_each_lag_is_fitted_at_the_edge_of_what_is_positive_definite(method):
    """A season of four: lag 2 is all that there is, and its optimum is where a correlation matrix
    ends. No correlation matrix with one value for each lag is better."""
    rng = np.random.default_rng(4)
    phase = rng.uniform(0, 2 * np.pi, 30)
    cells = [(g, t) for g in range(30) for t in range(4)]
    table = pd.DataFrame(cells * 2, columns=["g", "t"])
    table["y"] = np.cos(table["t"] * np.pi / 2 + phase[table["g"]]) + 0.3 * rng.normal(size=240)
    found = lmm("y ~ 1 + toep(0 + t | g)", table, method=method)
    assert found.converged
    (sigma, *_) = found.components
    R = sigma.correlation.numpy()
    np.testing.assert_allclose(R, by_lag(R[0, 1:]), atol=1e-12)
    assert np.linalg.eigvalsh(R)[0] > -1e-12
    free = lmm("y ~ 1 + us(0 + factor(t) | g)", table, method=method)
    assert free.log_likelihood >= found.log_likelihood
    encoded = encoded_by("y ~ 1 + toep(0 + t | g)", table)
    best = -np.inf
    for lags in np.random.default_rng(0).normal(R[0, 1:], 0.02, size=(200, 3)):
        other = by_lag(lags)
        if np.linalg.eigvalsh(other)[0] < 0:
            continue
        at, e = table["t"].to_numpy(), float(found.residual_variance)
        V = float(sigma.covariance[0, 0]) * other[np.ix_(at, at)] * same(table, "g")
        V = torch.tensor(V + e * np.eye(240))
        if method == "ml":
            value = torch.distributions.MultivariateNormal(
                encoded.X @ found.fixed.estimate, V
            ).log_prob(encoded.y)
        else:
            value = restricted_log_likelihood(encoded.y, encoded.X, V)
        best = max(best, float(value))
    assert best <= found.log_likelihood + 1e-9


RELATIONS = {
    "g": (lambda: np.eye(9), {}),
    "ped(g)": (
        lambda: relationship(PEDIGREE).loc[LEVELS, LEVELS].to_numpy(), {"pedigree": PEDIGREE},
    ),
    "vm(g, K)": (lambda: KERNEL.loc[LEVELS, LEVELS].to_numpy(), {"kernels": {"K": KERNEL}}),
}  # fmt: skip
LEVELS = sorted(TABLE["g"].unique())
MIXED = {
    None: lambda v: np.full(60, v[0]),
    "diag(env)": lambda v: v[pd.factorize(TABLE["env"], sort=True)[0]],
    "exp(x)": lambda v: v[0] * np.exp(2 * v[1] * TABLE["x"].to_numpy()),
    "power(w)": lambda v: v[0] * TABLE["w"].to_numpy() ** (2 * v[1]),
    "diag(env):exp(x)": lambda v: (
        MIXED["diag(env)"](v[1:]) * np.exp(2 * v[0] * TABLE["x"].to_numpy())
    ),
}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(EFFECTS)), min_size=1, max_size=2, unique=True),
    st.sampled_from(sorted(RELATIONS)),
    st.sampled_from([*MIXED]),
    st.booleans(),
    st.sampled_from(["reml", "ml"]),
    st.integers(0, 1000),
)
def test_mixes_of_structures_are_sums_of_products(terms, group, residual, weighted, method, seed):
    """Each term is its structure among effects times the relation of its levels, whatever stands
    beside it; the likelihood and its gradient of the chosen solver are the dense ones."""
    matrix, options = RELATIONS[group]
    formula = " + ".join(["y ~ x", *(term.replace("| g", f"| {group}") for term in terms)])
    weights = "w" if weighted else None
    encoded = encoded_by(formula, residual=residual, weights=weights, **options)
    V = covariance_of(encoded)
    values = dict(zip(V.free_param_names, at_random(V, seed), strict=True))
    e, g = pd.factorize(TABLE["env"], sort=True)[0], TABLE["g"].map(LEVELS.index).to_numpy()
    expected = np.zeros((60, 60))
    for i, term in enumerate(terms):
        name = encoded.random[i].name
        own = np.array([v for key, v in values.items() if key.startswith(f"{name}/")])
        sigma = np.asarray(EFFECTS[term](own))
        expected += sigma[np.ix_(e, e)] * matrix()[np.ix_(g, g)]
    own = np.array([v for key, v in values.items() if key.startswith("residual/")])
    scale = 1 / TABLE["w"].to_numpy() if weighted else 1.0
    expected += np.diag(MIXED[residual](own) * scale)
    torch.testing.assert_close(V().detach(), torch.tensor(expected), rtol=1e-9, atol=1e-11)
    parameters = list(V.parameters())
    found = {}
    for solver in ("auto", "dense"):
        loss = REMLLoss(V, method, solver, reduction="sum")(encoded.y, encoded.X)
        found[solver] = loss, torch.cat(torch.autograd.grad(loss, parameters))
    torch.testing.assert_close(found["auto"], found["dense"], rtol=1e-8, atol=1e-8)
    if method == "reml":
        dense = restricted_log_likelihood(encoded.y, encoded.X, torch.tensor(expected))
        assert abs(float(found["dense"][0].detach() + dense)) < 1e-8


@pytest.mark.parametrize("unit", [1e-4, 1e12])
def test_times_whose_unit_leaves_car1_no_digits_are_refused(unit):
    table = LONG.assign(x=LONG["x"] * unit)
    with pytest.raises(InputError, match=r"apart \(their median\).*exponential"):
        lmm("y ~ 1", table, residual="car1(x | g)")


def _series(phi, gap=None, seed=0):
    """Six times of each of ten groups, of a correlation phi at a distance of 1; with a gap one more."""
    draw = np.random.default_rng(seed)
    t = np.arange(6.0) if gap is None else np.r_[np.arange(6.0), gap]
    d = np.abs(t[:, None] - t)
    V = np.sign(phi) ** d * abs(phi) ** d if gap is None else abs(phi) ** d
    y = draw.standard_normal((10, len(t))) @ np.linalg.cholesky(V).T
    groups = np.repeat([f"g{i}" for i in range(10)], len(t))
    return pd.DataFrame({"g": groups, "t": np.tile(t, 10), "y": y.ravel()})


@pytest.mark.parametrize("phi", [0.6, -0.6])
def test_car1_is_one_model_in_any_unit_of_time(phi):
    # Of negative correlation the best is none at all, at the boundary.
    table = _series(phi)
    best = lmm("y ~ 1", table, residual="car1(t | g)")
    (rho,) = (p.value for p in best.parameters if p.name.endswith("rho"))
    assert (rho == 0) == (phi < 0)
    for unit in (0.03, 0.5, 1e3, 1e6):
        found = lmm("y ~ 1", table.assign(t=table["t"] * unit), residual="car1(t | g)")
        assert found.converged and found.iterations < 15
        assert abs(found.log_likelihood - best.log_likelihood) < 1e-8
        (value,) = (p.value for p in found.parameters if p.name.endswith("rho"))
        # The digits that are left of 1 - rho are lost.
        assert value**unit == pytest.approx(rho, rel=1e-6 + 1e-15 * unit**2)


def test_rho_of_times_of_different_sites_can_be_tied():
    table = pd.concat([_series(0.6), _series(0.6, seed=1)], ignore_index=True)
    table["site"] = np.repeat(["a", "b"], 60)
    table["t"] = np.tile(np.arange(60.0), 2) * np.repeat([1.0, 1.5], 60)
    free = lmm("y ~ 1", table, residual="diag(site):car1(t)")
    one, other = (p.name for p in free.parameters if p.name.endswith("rho"))
    tied = lmm("y ~ 1", table, residual="diag(site):car1(t)", constraints={other: one})
    value = {p.name: p.value for p in tied.parameters}
    assert tied.converged and tied.log_likelihood < free.log_likelihood
    assert value.get(other, value[one]) == value[one]


def test_car1_whose_correlation_ends_within_near_duplicates_says_the_unit_that_it_needs():
    table = _series(1e-300, gap=1e-3)
    expected = lmm("y ~ 1", table, residual="exponential(t | g)")
    with pytest.raises(NumericalError, match=r"`rho`.*is below 4e-139.*unit nearer"):
        lmm("y ~ 1", table, residual="car1(t | g)")
    finer = lmm("y ~ 1", table.assign(t=table["t"] * 1e3), residual="car1(t | g)")
    assert finer.converged
    assert abs(finer.log_likelihood - expected.log_likelihood) < 1e-7


@pytest.mark.parametrize("formula", ["y ~ 1", "y ~ 1 + (1 | g)"])
def test_smooth_correlation_begins_as_short_as_near_duplicates_need(formula):
    # Of both the best is one within the near duplicates alone.
    table = _series(0.6, gap=1e-3)
    fits = [lmm(formula, table, residual=f"{s} | g)") for s in ("gaussian(t", "matern(t")]
    assert all(fit.converged for fit in fits)
    assert abs(fits[0].log_likelihood - fits[1].log_likelihood) < 1e-7


def test_residuals_alike_but_for_rounding_leave_effects_their_digits():
    # Two records an animal, of which the residual is all but one: V has digits, R has none.
    draw = np.random.default_rng(0)
    n = 30
    root = draw.standard_normal((n, n))
    kernel = pd.DataFrame(root @ root.T / n + 0.1 * np.eye(n), index=range(n), columns=range(n))
    table = pd.DataFrame({"g": np.repeat(np.arange(n), 2), "t": np.tile([0, 1], n)})
    table["h"] = np.repeat(draw.integers(0, 6, n), 2)
    effects = np.linalg.cholesky(kernel) @ draw.standard_normal((n, 2))
    table["y"] = 2 * effects.ravel() + np.repeat(draw.standard_normal(n), 2)
    fits = []
    for rho in (1e-7 - 1, 1e-12 - 1, 1e-15 - 1):
        fits.append(
            lmm(
                "y ~ t + (t | vm(g, K)) + (1 | h)", table, residual="ar1(t | g)", solver="dense",
                kernels={"K": kernel}, constraints={"residual/g/matrix/rho": rho},
            )
        )  # fmt: skip
    for found in fits[1:]:
        assert found.converged
        assert abs(found.log_likelihood - fits[0].log_likelihood) < 1e-4
        for one, other in zip(found.random, fits[0].random, strict=True):
            torch.testing.assert_close(one.values, other.values, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(one.variances, other.variances, rtol=1e-3, atol=1e-3)


def test_variances_by_a_covariate_with_several_traits_reach_the_optimum():
    """Steps are in logarithms of the diagonal of L, which are below zero without a sign being turned."""
    rng, n = np.random.default_rng(1), 60
    rows = pd.DataFrame({"u": np.repeat(np.arange(n), 2), "trait": np.tile(["a", "b"], n)})
    rows["z"] = rng.uniform(0.5, 3, n).repeat(2)
    of_traits = np.linalg.cholesky([[2, 0.6], [0.6, 1]])
    in_time = np.linalg.cholesky(0.6 ** np.abs(np.subtract.outer(np.arange(n), np.arange(n))))
    e = (in_time @ rng.standard_normal((n, 2)) @ of_traits.T).reshape(-1)
    rows["y"] = 1 + (rows["trait"] == "b") + e * rows["z"] ** 0.7
    found = lmm("y ~ trait", rows, residual="power(z):us(trait):ar1(u)")
    # By SciPy's BFGS from dense matrices.
    assert found.converged
    assert found.log_likelihood == pytest.approx(-179.32822853653, abs=1e-7)
