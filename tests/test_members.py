"""Rows of several levels by formula: direct and maternal effects, and mm(a, b)."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, MixedModel, RandomEffect, glmm, lmm
from openreml_nn.covariance import Pedigree
from openreml_nn.inference import heritability, reliability, variance_shares
from openreml_nn.model import exported
from openreml_nn.table import Encoder
from openreml_nn.table.formula import parse_formula

RNG = np.random.default_rng(5)
SIZE = 40
SIRES = [None] * 12 + [f"a{2 * RNG.integers(0, i // 2)}" for i in range(12, SIZE)]
DAMS = [None] * 12 + [f"a{2 * RNG.integers(0, i // 2) + 1}" for i in range(12, SIZE)]
PEDIGREE = pd.DataFrame({"animal": [f"a{i}" for i in range(SIZE)], "sire": SIRES, "dam": DAMS})
A = Pedigree.of(PEDIGREE["animal"], SIRES, DAMS)
K = torch.linalg.inv(A.inverse.to_dense()).numpy()


def calves():
    one = PEDIGREE.iloc[12:]
    table = pd.concat([one, one], ignore_index=True)
    n = len(table)
    rng = np.random.default_rng(6)
    more = {"x": rng.normal(size=n), "t": np.repeat([0, 1], n // 2), "w": rng.uniform(0.5, 2, n)}
    more |= {"half": rng.uniform(0.2, 0.8, n), "u": rng.normal(size=n)}
    table = table.assign(**more, rest=lambda d: 1 - d["half"])
    own = np.linalg.cholesky(K) @ rng.normal(size=(SIZE, 2))
    at = {name: i for i, name in enumerate(A.names)}
    direct = [own[at[a], 0] for a in table["animal"]]
    milk = [own[at[d], 1] for d in table["dam"]]
    return table.assign(y=table["x"] + direct + milk + rng.normal(size=n))


def one_hot(column, levels):
    return (column.to_numpy()[:, None] == np.array(levels)).astype(float)


CALVES = calves()
KERNEL = {"K": pd.DataFrame(K, index=A.names, columns=A.names)}
#: Terms, with what they take, the columns and the covariance of the effects of a level.
TERMS = {
    "us(ped(animal) + ped(dam))": ({"pedigree": PEDIGREE}, ("animal", "dam"), None),
    "diag(vm(animal, K) + vm(dam, K))": ({"kernels": KERNEL}, ("animal", "dam"), None),
    "us((1 + x | ped(animal)) + (1 | ped(dam)))": ({"pedigree": PEDIGREE}, ("animal", "dam"), "x"),
    "(1 | ped(mm(sire, dam)))": ({"pedigree": PEDIGREE}, ("sire", "dam"), None),
    "(1 | mm(sire, dam))": ({}, ("sire", "dam"), None),
    "(1 + x | mm(sire, dam, weights = cbind(half, rest)))": ({}, ("sire", "dam"), "x"),
}  # fmt: skip


def dense_design(term, columns, slope, levels, table):
    """Z (n, q k) by one-hot matrices."""
    ones = np.ones((len(table), 1))
    first, second = (one_hot(table[column], levels) for column in columns)
    with_slope = np.column_stack([ones, table[slope]]) if slope else ones
    parts = [(first, with_slope), (second, ones if term.startswith("us(") else with_slope)]
    if "weights" in term:
        weights = table[["half", "rest"]].to_numpy()
        parts = [(Z * weights[:, j : j + 1], z) for j, (Z, z) in enumerate(parts)]
    blocks = [Z[:, :, None] * z[:, None, :] for Z, z in parts]
    own = term.startswith(("us(", "diag("))  # each column has effects of its own
    return (np.concatenate(blocks, 2) if own else sum(blocks)).reshape(len(table), -1)


@pytest.mark.parametrize(
    ("term", "more"),
    [(term, more) for term in TERMS for more in ("", "weights")]
    + [("us(ped(animal) + ped(dam))", "residual"), ("(1 | mm(sire, dam))", "residual")],
)
def test_a_formula_is_hendersons_equations(term, more):
    options, columns, slope = TERMS[term]
    options = dict(options)
    if more == "weights":
        options["weights"] = "w"
    if more == "residual":
        options["residual"] = "ar1(t | animal)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, as any parameters serve
        fit = lmm(f"y ~ x + {term}", CALVES, **options, max_iterations=2)
    random, labels = fit.random[0], fit.components[0].levels
    Z = dense_design(term, columns, slope, labels, CALVES)
    Sigma = fit.components[0].covariance.double().numpy()
    among = K if "ped" in term or "vm" in term else np.eye(len(labels))
    assert list(labels) == list(A.names) or among is not K
    G = np.kron(among, Sigma)
    sigma2 = fit.residual_variance
    R = sigma2 * np.diag(1 / CALVES["w"] if more == "weights" else np.ones(len(CALVES)))
    if more == "residual":
        rho = next(p.value for p in fit.parameters if p.name.endswith("rho"))
        same = one_hot(CALVES["animal"], CALVES["animal"])
        R = sigma2 * same * rho ** np.abs(np.subtract.outer(*[CALVES["t"].to_numpy()] * 2))
    X, y = np.column_stack([np.ones(len(CALVES)), CALVES["x"]]), CALVES["y"].to_numpy()
    V = Z @ G @ Z.T + R
    Vi = np.linalg.inv(V)
    XVX = X.T @ Vi @ X
    beta = np.linalg.solve(XVX, X.T @ Vi @ y)
    e = y - X @ beta
    value = (len(y) - 2) * np.log(2 * np.pi) + np.linalg.slogdet(V)[1]
    value += np.linalg.slogdet(XVX)[1] + e @ Vi @ e
    assert fit.log_likelihood == pytest.approx(-value / 2, rel=1e-9)
    blup = G @ Z.T @ Vi @ e
    P = Vi - Vi @ X @ np.linalg.solve(XVX, X.T @ Vi)
    pev = G - G @ Z.T @ P @ Z @ G
    k = len(Sigma)
    blocks = np.stack([pev[i : i + k, i : i + k] for i in range(0, len(G), k)])
    np.testing.assert_allclose(random.values.reshape(-1), blup, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(random.variances, blocks, rtol=1e-8, atol=1e-9)
    # Other rows, of the same levels in other pairs.
    new = CALVES.iloc[:9].assign(dam=CALVES["dam"].iloc[-9:].to_numpy(), x=0.5)
    found = fit.predict(new)
    z, x = dense_design(term, columns, slope, labels, new), np.column_stack([np.ones(9), new["x"]])
    left = x - z @ G @ Z.T @ Vi @ X
    variance = np.einsum("ij,jk,ik->i", z, G - G @ Z.T @ Vi @ Z @ G, z)
    variance += np.einsum("ij,jk,ik->i", left, np.linalg.inv(XVX), left)
    variance += sigma2 * (1 / new["w"] if more == "weights" else 1)
    np.testing.assert_allclose(found["mean"], x @ beta + z @ blup, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-8, atol=1e-9)


def held(columns, table, Sigma, **options):
    """A fit at a covariance of two columns' effects, and a residual variance of 0.7."""
    one, other = columns
    L = np.linalg.cholesky(Sigma)
    names = [(i, j) for i in range(len(L)) for j in range(i + 1)]
    constraints = {f"{one}_{other}/effects/L_{i}_{j}": float(L[i, j]) for i, j in names}
    return lmm(f"y ~ x + us(ped({one}) + ped({other}))", table, pedigree=PEDIGREE, constraints=constraints, residual_variance=0.7,
               **options)  # fmt: skip


SIGMA = np.array([[1.4, 0.3], [0.3, 0.8]])


@pytest.fixture(scope="module")
def maternal():
    return held(("animal", "dam"), CALVES, SIGMA)


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_the_order_of_the_columns_and_of_the_rows_leaves_the_effects(maternal, solver):
    turned = held(("dam", "animal"), CALVES.iloc[::-1], SIGMA[::-1, ::-1], solver=solver)
    assert maternal.components[0].group == "animal + dam"
    assert maternal.components[0].effects == ("animal", "dam")
    assert turned.log_likelihood == pytest.approx(maternal.log_likelihood, rel=1e-9)
    one, other = (fit.random[0] for fit in (maternal, turned))
    torch.testing.assert_close(one.values, other.values.flip(1), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(one.variances, other.variances.flip(1, 2), rtol=1e-7, atol=1e-8)


def test_added_rows_are_those_of_one_fit(maternal):
    rest = CALVES.iloc[:6].assign(y=1.0)
    found = maternal.update(rest)
    whole = held(("animal", "dam"), pd.concat([CALVES, rest]), SIGMA)
    torch.testing.assert_close(found.random[0].values, whole.random[0].values, rtol=1e-7, atol=1e-9)
    assert found.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-9)


def test_rows_of_a_level_that_comes_later_are_those_of_one_fit():
    rng = np.random.default_rng(2)
    table = pd.DataFrame(rng.integers(0, 9, (120, 2)), columns=["a", "b"])
    table["y"] = rng.normal(size=9)[table["a"]] + rng.normal(size=120)
    table.loc[100:, "b"] = 99
    first = lmm("y ~ 1 + (1 | mm(a, b))", table[:100])
    found = first.update(table[100:])
    *held, residual = first.parameters
    whole = lmm(
        "y ~ 1 + (1 | mm(a, b))",
        table,
        constraints={p.name: p.value for p in held},
        residual_variance=residual.value,
    )
    assert found.components[0].levels == whole.components[0].levels
    assert found.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-10)
    torch.testing.assert_close(found.random[0].values, whole.random[0].values)


def test_a_level_that_was_not_seen_has_its_prior(maternal):
    new = CALVES.iloc[[0, 0, 0]].assign(animal=["a12", "new", "new"], dam=["new", "a1", "other"])
    with pytest.warns(RuntimeWarning, match=r"animal \+ dam in 3 of 3 rows"):
        found = maternal.predict(new)
    blup = maternal.random[0].values
    at = {name: i for i, name in enumerate(A.names)}
    population = found["population_mean"]
    assert found["mean"].iloc[0] == pytest.approx(population.iloc[0] + float(blup[at["a12"], 0]))
    assert found["mean"].iloc[1] == pytest.approx(population.iloc[1] + float(blup[at["a1"], 1]))
    assert found["mean"].iloc[2] == pytest.approx(population.iloc[2])


def test_inference_knows_both_effects(maternal):
    table = reliability(maternal)
    assert list(table["effect"].unique()) == ["animal", "dam"]
    assert table["reliability"].between(0, 1).all()


@pytest.mark.parametrize("term", ["us(ped(animal) + ped(dam))", "(1 | mm(sire, dam))"])
def test_shares_of_variance_count_what_the_levels_of_a_row_have_in_common(term):
    options, columns, slope = TERMS[term]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = lmm(f"y ~ x + {term}", CALVES, **options, max_iterations=2)
    component = fit.components[0]
    among = np.eye(len(component.levels))
    if "ped" in term:
        among = K - np.diag(np.diag(K)) + among  # inbreeding is left out
    Z = dense_design(term, columns, slope, component.levels, CALVES)
    G = np.kron(among, component.covariance.double().numpy())
    table = variance_shares(fit)
    assert table["variance"].iloc[0] == pytest.approx(np.mean(np.sum(Z @ G * Z, 1)), rel=1e-9)
    assert table["share"].sum() == pytest.approx(1)


def test_direct_and_maternal_heritabilities_are_of_the_variance_of_a_row():
    fit = lmm("y ~ x + diag(ped(animal) + ped(dam))", CALVES, pedigree=PEDIGREE)
    whole = variance_shares(fit)
    total, Sigma = whole["variance"].sum(), fit.components[0].covariance
    found = {name: heritability(fit, effect=name) for name in ("animal", "dam")}
    for j, share in enumerate(found.values()):
        assert share.estimate == pytest.approx(float(Sigma[j, j]) / total, rel=1e-9)
    # Without a covariance they add up to the share of the term, and so do their derivatives.
    assert sum(share.estimate for share in found.values()) == pytest.approx(whole["share"].iloc[0])
    alone = lmm("y ~ x + (1 | ped(animal)) + (1 | ped(dam))", CALVES, pedigree=PEDIGREE)
    for name, share in found.items():
        other = heritability(alone, name)
        assert share.estimate == pytest.approx(other.estimate, rel=1e-4)
        assert share.std_error == pytest.approx(other.std_error, rel=1e-3)
    with pytest.raises(InputError, match="expected one of them as `effect`"):
        heritability(fit)
    with pytest.raises(
        InputError, match=r"`effect` is 'sire': expected one of \['animal', 'dam'\]"
    ):
        heritability(fit, effect="sire")


def test_poisson_rows_of_two_levels_equal_the_same_levels_in_columns():
    rng = np.random.default_rng(1)
    table = CALVES.assign(count=rng.poisson(2.0, len(CALVES)))
    one = glmm("count ~ x + (1 | mm(sire, dam))", table, family="poisson")
    other = glmm("count ~ x + (1 | mm(dam, sire))", table.iloc[::-1], family="poisson")
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
    levels = one.components[0].levels
    assert set(levels) == set(table["sire"]) | set(table["dam"])


def test_numbers_and_text_are_one_set_of_levels_in_their_order():
    table = pd.DataFrame({"y": RNG.normal(size=8), "a": [1, 2, 10, 1, 2, 10, 1, 3]})
    table["b"] = ["2", "10", "1", "3", "3", "2", "10", "1"]
    (design,) = Encoder("y ~ (1 | mm(a, b))", known_residual=True).fit(table).random
    assert design.codes.shape == (8, 2)
    assert [design.levels[i] for i in design.codes[0].tolist()] == ["1", "2"]
    (numbers,) = Encoder("y ~ (1 | mm(a, c))").fit(table.assign(c=table["b"].astype(int))).random
    assert numbers.levels == ("1", "2", "3", "10")


def test_a_batch_of_two_levels_a_row_is_the_formula():
    (design,) = Encoder("y ~ x + (1 | mm(sire, dam))").fit(CALVES).random
    X = torch.tensor(CALVES[["x"]].to_numpy())
    batch = {"x": torch.cat([torch.ones_like(X), X], 1), "y": torch.tensor(CALVES["y"].to_numpy())}
    batch["groups"] = {"parent": design.codes}
    model = MixedModel(torch.nn.Identity(), {"parent": RandomEffect(design.levels)}, head="gls")
    fit = lmm("y ~ x + (1 | mm(sire, dam))", CALVES, constraints={"sire_dam/sigma^2": 1.0},
              residual_variance=1.0)  # fmt: skip
    assert -model.loss(batch).item() * len(X) == pytest.approx(fit.log_likelihood, rel=1e-9)
    model.update(batch)
    torch.testing.assert_close(model.random["parent"].blup, fit.random[0].values)
    with pytest.raises(InputError, match="2 levels a row, which no program takes"):
        exported(model, batch)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            "(1 | ped(animal) + ped(dam))",
            r"is no group: expected us\(ped\(animal\) \+ ped\(dam\)\)",
        ),
        ("str(ped(animal) + ped(dam))", r"str\(\) is no structure: expected us\(ped\(animal\)"),
        ("us(ped(animal) + vm(dam, K))", "of different relations"),
        ("us(ped(animal) + ped(animal))", "expected distinct columns"),
        ("us(ped(animal) + dam)", "has no place here"),
        ("us(ped(animal) + (1 | a:b))", "expected one column, or one relation"),
        ("ar1(ped(animal) + ped(dam))", "has effects in no order"),
        ("us((. | animal) + (1 | dam))", "of the fixed effects only"),
        ("(1 | mm(a))", "expected two or more distinct columns"),
        ("(1 | mm(a, b, weights = w))", "`weights = cbind"),
        ("(1 | mm(a, b, scale = TRUE))", "expected two or more distinct columns"),
        ("(1 | exponential(mm(a, b)))", "expected distinct columns, then options"),
        ("(1 | mm(a, b)/c)", "grouping factor"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(term, message):
    with pytest.raises(InputError, match=message) as error:
        parse_formula(f"y ~ x + {term}")
    assert "\n" not in str(error.value)


def test_a_formula_is_written_as_it_is_read():
    for term in TERMS:
        (part,) = parse_formula(f"y ~ {term}").random
        (again,) = parse_formula(f"y ~ {part}").random
        assert again == part


def test_rows_of_two_levels_are_not_for_chunks(tmp_path):
    path = tmp_path / "calves.csv"
    CALVES.to_csv(path, index=False)
    with pytest.raises(InputError, match=r"mm\(sire, dam\)\) is not for chunks"):
        lmm("y ~ x + (1 | mm(sire, dam))", path, chunk_rows=20)
