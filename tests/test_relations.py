"""Random walks, series, graphs and pedigrees by formula, and what is wrong with them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, REMLLoss, glmm, lmm
from openreml_nn.covariance import (
    AR1Matrix,
    CARMatrix,
    CovariancePropagation,
    DummyMatrix,
    ICARMatrix,
    Matrix,
    Pedigree,
    RandomWalkMatrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.model.relations import read_pedigree
from tests.forked import program

AREAS = [f"a{i}" for i in range(7)]
EDGES = pd.DataFrame({"from": AREAS, "to": AREAS[1:] + AREAS[:1]})


def matrix() -> pd.DataFrame:
    W = pd.DataFrame(0.0, AREAS, AREAS)
    for a, b in EDGES.to_numpy():
        W.loc[a, b] = W.loc[b, a] = 1.0
    return W


def table(seed: int = 0) -> pd.DataFrame:
    """Weeks 2 to 14 without 7, in areas."""
    rng = np.random.default_rng(seed)
    week = rng.permutation(np.repeat([w for w in range(2, 15) if w != 7], 6))
    walk, area = np.cumsum(rng.standard_normal(15)), rng.choice(AREAS, len(week))
    y = walk[week] + 0.5 * rng.standard_normal(len(week))
    y = y + pd.Series(area).map(dict(zip(AREAS, rng.standard_normal(7), strict=True))).to_numpy()
    return pd.DataFrame({"week": week, "area": area, "y": y})


def tree(data: pd.DataFrame, kind: str, g: Matrix) -> Matrix:
    column = "week" if kind in ("rw1", "rw2", "ar1") else "area"
    codes = data[column] - 2 if column == "week" else data[column].map(AREAS.index)
    z = DummyMatrix.from_codes(torch.tensor(codes.to_numpy()), g.shape[0])
    return Sum(g=CovariancePropagation(z, g), residual=ScalarMatrix(len(data))).double()


RING = torch.tensor([(i, (i + 1) % 7) for i in range(7)])


@pytest.mark.parametrize(
    ("kind", "group", "covariance"),
    [
        ("rw1", "rw1(week)", lambda: RandomWalkMatrix(13)),
        ("rw2", "rw2(week)", lambda: RandomWalkMatrix(13, 2)),
        ("ar1", "ar1(week)", lambda: AR1Matrix(13)),
        ("car", "car(area, W)", lambda: CARMatrix(RING)),
        ("icar", "icar(area, W)", lambda: ICARMatrix(RING)),
    ],
)
def test_a_relation_by_formula_equals_its_tree_by_every_solver(kind, group, covariance):
    data = table()
    kernels = {"W": EDGES} if "W" in group else None
    found = lmm(f"y ~ week + (1 | {group})", data, kernels=kernels)
    assert found.converged
    V = tree(data, kind, covariance())
    for name, value in zip(V.param_names, [p.value for p in found.parameters], strict=True):
        V.set_value(name, value, natural=True)
    y, X = torch.tensor(data["y"]), torch.tensor([[1.0, w] for w in data["week"]]).double()
    for solver in ("dense", "sparse", "blocked"):
        other = REMLLoss(V, solver=solver).evaluate(y, X)
        assert float(other.log_likelihood) == pytest.approx(found.log_likelihood, abs=1e-8)
    assert found.components[0].group == group
    if kind.startswith("rw"):
        # Week 7, which has no row, has the effect that the walk goes through.
        (effects,) = [x.values[:, 0] for x in found.random]
        assert float(effects.sum()) == pytest.approx(0, abs=1e-9)
        if kind == "rw1":
            assert float(effects[5]) == pytest.approx(float(effects[4] + effects[6]) / 2, abs=1e-9)


def test_a_graph_is_the_same_as_matrix_edges_and_file_in_any_order(tmp_path):
    data, mixed = table(), AREAS[3:] + AREAS[:3]
    path = tmp_path / "edges.csv"
    pd.concat([EDGES, EDGES.rename(columns={"from": "to", "to": "from"})]).to_csv(path, index=False)
    turned = EDGES.sample(frac=1, random_state=0).assign(weight=1.0)
    fits = [
        lmm("y ~ week + (1 | icar(area, W))", data, kernels={"W": W})
        for W in (EDGES, turned, matrix(), matrix().loc[mixed, mixed], path)
    ]
    for other in fits[1:]:
        assert other.log_likelihood == pytest.approx(fits[0].log_likelihood, abs=1e-9)
    by_weight = lmm("y ~ week + (1 | icar(area, W))", data, kernels={"W": 4 * matrix()})
    assert by_weight.log_likelihood == pytest.approx(fits[0].log_likelihood, abs=1e-9)
    at, four = (x.parameters[0].value for x in (fits[0], by_weight))
    assert four == pytest.approx(4 * at, rel=1e-6)


def test_a_walk_may_go_in_larger_steps_and_backwards():
    data = table()
    one = lmm("y ~ 1 + (1 | rw1(week))", data)
    days = lmm("y ~ 1 + (1 | rw1(week))", data.assign(week=1000 - 7 * data["week"]))
    assert days.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-9)
    with pytest.warns(RuntimeWarning, match="did not see"):
        new = one.predict(data.assign(week=99))
    assert new["mean"].to_numpy() == pytest.approx(new["population_mean"].to_numpy())


def test_relations_of_counts():
    data = table().assign(n=np.random.default_rng(0).poisson(3, 72))
    found = glmm("n ~ 1 + (1 | rw1(week)) + (1 | icar(area, W))", data, family="poisson",
                 kernels={"W": EDGES})  # fmt: skip
    assert found.converged
    assert [c.group for c in found.components] == ["rw1(week)", "icar(area, W)"]


def test_a_program_takes_a_graph_and_a_pedigree_with_groups(tmp_path):
    data = table()
    data.to_csv(tmp_path / "d.csv", index=False)
    EDGES.to_csv(tmp_path / "W.csv", index=False)
    done = program(
        "data.path=d.csv", "model.formula=y ~ week + (1 | car(area, W))", "model.kernels.W=W.csv",
        "logger=none", "plots=false", "trainer.enable_progress_bar=false", "hydra.run.dir=r", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    expected = lmm("y ~ week + (1 | car(area, W))", data, kernels={"W": EDGES})
    assert record["fit"]["log_likelihood"] == pytest.approx(expected.log_likelihood, abs=1e-6)


#: b is a sire and a dam; G and H are no animals.
FAMILY = {
    "animal": list("abcdef"), "sire": ["G", "G", "a", "b", "b", "c"],
    "dam": ["H", "G", "b", "c", "a", "b"],
}  # fmt: skip


def test_a_program_takes_groups_of_unknown_parents_and_plants(tmp_path):
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"plant": list("abcdef") * 5, "y": rng.standard_normal(30)})
    data.to_csv(tmp_path / "d.csv", index=False)
    pd.DataFrame(FAMILY).to_csv(tmp_path / "p.csv", index=False)
    run = [
        "data.path=d.csv", "model.formula=y ~ 1 + (1 | ped(plant))", "model.pedigree=p.csv",
        "logger=none", "plots=false", "trainer.enable_progress_bar=false", "hydra.run.dir=r",
    ]  # fmt: skip
    refused = program(
        *run, "model.pedigree_groups=[G,H]", "model.hermaphrodite=false", cwd=tmp_path
    )
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "'b' is a `sire` in row 4 and a `dam` in row 3" in line
    plants = [*run, "model.hermaphrodite=true"]
    done = program(*plants, "model.pedigree_groups=[G,H]", "model.group_variance=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    relation = Pedigree.of(**FAMILY, groups=["G", "H"], hermaphrodite=True).grouped(2.0)
    expected = lmm("y ~ 1 + (1 | ped(plant))", data, pedigree=relation)
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    assert record["fit"]["log_likelihood"] == pytest.approx(expected.log_likelihood, abs=1e-6)
    alone = program(*plants, "model.group_variance=2", cwd=tmp_path)
    assert alone.returncode == 2
    assert "model.group_variance" in alone.stderr


def test_two_sexes_are_an_error_where_that_is_said_and_a_warning_where_nothing_is():
    parts = FAMILY["animal"], FAMILY["sire"], FAMILY["dam"]
    with pytest.raises(InputError, match=r"'b' is a `sire` in row 4 and a `dam` in row 3"):
        Pedigree.of(*parts, groups=["G", "H"], hermaphrodite=False)
    with pytest.warns(UserWarning, match="hermaphrodite=True"):
        Pedigree.of(*parts, groups=["G", "H"])
    plants = read_pedigree(pd.DataFrame(FAMILY), ["G", "H"], hermaphrodite=True)
    assert plants.names[-2:] == ("G", "H")


def wrong(W: pd.DataFrame, a: str, b: str, value: float) -> pd.DataFrame:
    found = W.copy()
    found.loc[a, b] = value
    return found


@pytest.mark.parametrize(
    ("formula", "kernels", "message"),
    [
        ("(1 | car(area))", None, r"expected car\(area, W\), W a name in `kernels`"),
        ("(1 | rw1(week, area))", None, r"expected rw1\(time\)"),
        ("(1 | rw1(week, 3))", None, "expected distinct columns"),
        ("(1 | icar(area, W))", None, "needs a matrix 'W' in `kernels`"),
        ("(1 | rw2(two))", None, "has 2 times at equal steps: expected 3 or more"),
        ("(1 | rw1(one))", None, "has 1 time at equal steps: expected 2 or more"),
        ("(1 | rw1(half))", None, "in row 1: expected whole numbers"),
        ("(1 | rw1(area))", None, "area"),
        ("(1 | car(area, W))", {"W": wrong(matrix(), "a1", "a2", 2.0)}, "not symmetric.*'a1'"),
        ("(1 | car(area, W))", {"W": wrong(matrix(), "a1", "a1", 2.0)}, "weight 2 between 'a1'"),
        ("(1 | car(area, W))", {"W": -matrix()}, "weight -1 between 'a0' and 'a1'"),
        ("(1 | icar(area, W))", {"W": 0 * matrix()}, "has no neighbour of 'a0'"),
        ("(1 | icar(area, W))", {"W": wrong(matrix(), "a1", "a2", np.nan)}, "nan between 'a1'"),
        ("(1 | icar(area, W))", {"W": EDGES[2:5]}, "has the level .* which kernel 'W' has not"),
        ("(1 | icar(area, W))", {"W": pd.concat([EDGES, EDGES])}, "'a0' and 'a1' twice in row 8"),
        ("(1 | icar(area, W))", {"W": EDGES.assign(to="a0")}, "as a pair in row 1"),
        ("(1 | icar(area, W))", {"W": EDGES.assign(weight="x")}, "holds what is no number"),
        ("(1 | icar(area, W))", {"W": EDGES.assign(to=None)}, "has no value in row 1"),
        ("(1 | vm(area, W))", {"W": matrix()}, "not positive semi-definite"),
        ("(1 | vm(area, W))", {"W": EDGES}, "is sparse, as a graph or an inverse is"),
        ("(1 | vm(area, W))", {"W": matrix().iloc[:, :5]}, "has 7 rows and 5 columns"),
        ("(1 | vm(area, W))", {"W": matrix().rename(columns={"a1": "z"})}, "'z' stands in one only"),
        ("(1 | vm(area, W))", {"W": matrix().rename({"a1": "a2"}, axis=0).rename({"a1": "a2"}, axis=1)},
         "has the level 'a2' twice"),
        ("(1 | vm(area, W))", {"W": matrix().astype(object).replace(1.0, "x")}, "is no number"),
        ("(1 | vm(area, W))", {"W": torch.zeros(3, 2)}, r"has shape \(3, 2\): expected \(q, q\)"),
        ("(1 | icar(area, W))", {"W": EDGES[:0]}, "has no row: expected pairs of neighbours"),
        ("(1 | icar(area, W))", {"W": EDGES.assign(weight=np.inf)}, "a weight that is not finite"),
        ("(1 | vm(area, ped))", {"ped": matrix()}, "the name of the pedigree's matrix"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(formula, kernels, message):
    data = table().assign(one=3, half=lambda d: d["week"] / 2 + 0.5, two=lambda d: d["week"] % 2)
    with pytest.raises(InputError, match=message) as error:
        lmm(f"y ~ 1 + {formula}", data, kernels=kernels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [([[1, 2]], "kernel 'W' is a list"), (1j * torch.eye(7), "kernel 'W' is torch.complex")],
)
def test_what_is_no_kernel_is_said_by_its_kind(given, message):
    with pytest.raises(TypeError, match=message):
        lmm("y ~ 1 + (1 | vm(area, W))", table(), kernels={"W": given})


def test_a_kernel_may_name_its_columns_alone_and_in_any_order():
    K = (matrix() + 3 * np.eye(7)) / 3
    expected = lmm("y ~ 1 + (1 | vm(area, K))", table(), kernels={"K": K})
    for same in (K[AREAS[::-1]], K.reset_index(drop=True)):
        found = lmm("y ~ 1 + (1 | vm(area, K))", table(), kernels={"K": same})
        assert found.log_likelihood == expected.log_likelihood


PLACES = [
    "(1 | exponential(east, north))",
    "(1 | matern(east, north, neighbours=5))",
    "(1 | spline(east, north))",
]


def field(north: float, like: int | None = None) -> pd.DataFrame:
    """Thirty places, of which the fifth has another coordinate, or those of another one."""
    rng = np.random.default_rng(2)
    places = pd.DataFrame(rng.uniform(0, 9, (30, 3)), columns=["y", "east", "north"])
    if like is not None:
        places.loc[4, ["east", "north"]] = places.loc[like, ["east", "north"]]
    else:
        places.loc[4, "north"] = north
    return places


@pytest.mark.parametrize("term", PLACES)
@pytest.mark.parametrize("north", [np.inf, -np.inf])
def test_an_infinite_coordinate_is_named_with_its_row(term, north):
    with pytest.raises(InputError, match=f"coordinate 'north' is {north:g} in row 5"):
        lmm(f"y ~ 1 + {term}", field(north))


def test_residuals_at_an_infinite_place_are_named_with_the_row():
    with pytest.raises(InputError, match="column 'north' is inf in row 5"):
        lmm("y ~ 1", field(np.inf).assign(g=1), residual="exponential(east, north | g)")


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.filterwarnings("ignore:the fit did not converge")
@pytest.mark.parametrize("term", PLACES[:1])
def test_a_missing_coordinate_is_named_with_its_row_and_left_out(term):
    with pytest.warns(RuntimeWarning, match=r"1 of 30 rows left out.*'north' in row 5"):
        found = lmm(f"y ~ 1 + {term}", field(np.nan))
    assert found.rows == 29


def test_residuals_at_one_place_are_named_with_the_row():
    twice = field(0.0, like=7).assign(g=1)
    with pytest.raises(
        InputError, match=r"row 8 has the position .* of 'east:north', which its group"
    ):
        lmm("y ~ 1", twice, residual="exponential(east, north | g)")


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.filterwarnings("ignore:the fit did not converge")
@pytest.mark.parametrize("term", PLACES[:2])
def test_two_rows_at_one_place_share_its_effect(term):
    found = lmm(f"y ~ 1 + {term}", field(0.0, like=7))
    assert len(found.random[0].values) == 29
