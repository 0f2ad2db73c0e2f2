"""Real data against lme4's fits."""

import json
from pathlib import Path

import pytest

from openreml_nn import datasets, lmm
from openreml_nn.table import read_table
from tests.benchmarks.cases import CASES
from tests.benchmarks.measure import measure

FOLDER = Path(__file__).parents[1] / "reference"
ROWS = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))["lmer"]
REFINED = json.loads((FOLDER / "refined.json").read_text(encoding="utf-8"))
#: Columns of numbers, not used as a group, that R's factor() was applied to.
CATEGORICAL = {"insteval": ["service"]}


def table_of(name):
    bundled = getattr(datasets, name, None)
    if bundled is not None:
        return bundled()
    file = next(FOLDER.glob(f"{name}.csv*"))
    return read_table(file)


NLME = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))["nlme"]
#: How each model of nlme is written here.
STRUCTURES = {
    "random 1|Subject, residual variance by Sex": ("+ (1 | Subject)", "diag(Sex)"),
    "residual compound symmetry within Subject": ("", "cs(Subject)"),
    "residual AR1 within Subject": ("", "ar1(age | Subject)"),
}


@pytest.mark.parametrize("solver", ["auto", "dense"])
@pytest.mark.parametrize("row", NLME, ids=lambda row: row["model"])
def test_structured_residuals_equal_nlme(row, solver):
    random, residual = STRUCTURES[row["model"]]
    table = table_of(row["dataset"])
    formula = f"distance ~ age * Sex {random}"
    result = lmm(formula, table, residual=residual, method=row["method"], solver=solver)
    assert result.converged
    assert result.log_likelihood == pytest.approx(row["log_likelihood"], rel=1e-9)
    for name, estimate in row["fixed"].items():
        found = float(result.fixed.estimate[result.fixed.names.index(name)])
        assert found == pytest.approx(estimate, rel=1e-5)
    components = {c.group: c.covariance for c in result.components}
    for group, (variance,) in row["random"].items():
        assert components[group].item() == pytest.approx(variance[0], rel=1e-4)
    R = components["Residual"]
    assert float(R[-1, -1]) == pytest.approx(row["sigma2"], rel=1e-4)
    for correlation in row["cor"].values():
        assert float(R[0, 1] / R[0, 0]) == pytest.approx(correlation, rel=1e-4)
    for ratio in row["var"].values():
        assert float((R[0, 0] / R[1, 1]).sqrt()) == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r['dataset']}-{r['formula'].split('~')[1]}-{r['method']}"
)
def test_fit_equals_lme4(row):
    name = row["dataset"]
    result = lmm(
        row["formula"],
        table_of(name),
        categorical=CATEGORICAL.get(name, []),
        method=row["method"],
    )
    assert result.converged
    # Where the row stopped short of the optimum, lme4's own refined fit counts.
    refined = REFINED.get(name) if row["method"] == "reml" else None
    expected = (refined or row)["log_likelihood"]
    # lme4's optimizer leaves at most 3e-11, relative, of the likelihood of these rows.
    assert result.log_likelihood == pytest.approx(expected, rel=1e-10)
    assert bool(result.singular) == row.get("singular", False)
    assert result.rows == row.get("n", result.rows)

    sigma2 = row["sigma2"]
    assert result.residual_variance == pytest.approx(sigma2, rel=1e-3)
    components = [c for c in result.components if c.group != "Residual"]
    for group, effect1, effect2, vcov in _variances(refined or row):
        matching = [c for c in components if _same(c.group, group) and effect1 in c.effects]
        assert len(matching) == 1
        c = matching[0]
        i = c.effects.index(effect1)
        j = i if effect2 is None else c.effects.index(effect2)
        found = float(c.covariance[i, j])
        if vcov == 0:
            assert abs(found) < 1e-5 * sigma2
        else:
            assert found == pytest.approx(vcov, rel=1e-3)

    for effect in row["fixed"]:
        at = result.fixed.names.index(effect["name"])
        assert float(result.fixed.estimate[at]) == pytest.approx(
            effect["estimate"], rel=1e-4, abs=1e-8
        )
        if "std_error" in effect:
            error = refined["std_error"][effect["name"]] if refined else effect["std_error"]
            assert float(result.fixed.std_error[at]) == pytest.approx(error, rel=1e-4)

    named = {c.name: c for c in components}
    for group, head in ((refined or row).get("blup_head") or {}).items():
        for effects in result.random:
            c = named[effects.name]
            if _same(c.group, group) and len(c.effects) == len(head["values"][0]):
                # Levels are written a:b here and b:a in lme4.
                spelled = {_key(level): i for i, level in enumerate(c.levels)}
                for level, values in zip(head["levels"], head["values"], strict=True):
                    blup = effects.values[spelled[_key(level)]].tolist()
                    scale = max(map(abs, values))
                    assert blup == pytest.approx(values, rel=1e-3, abs=1e-3 * scale + 1e-6)


def _variances(row):
    for v in row["variance"]:
        if v["group"] != "Residual":
            yield v["group"], v.get("effect1", "(Intercept)"), v.get("effect2"), v["vcov"]


def _key(label):
    return tuple(sorted(label.split(":")))


def _same(ours, theirs):
    # lme4 numbers uncorrelated terms of one factor: Subject, Subject.1.
    return _key(ours) == _key(theirs.split(".")[0])


def test_insteval_needs_less_than_a_gigabyte():
    # A peak that the fit's process had from this one would be told as the fit's.
    held = bytearray(1_200_000_000)
    held[::4096] = b"1" * len(held[::4096])
    # V would take 43 GB.
    found = measure(CASES["insteval"], "ours")
    assert 100 < found.peak_mb < 1000
    assert 0 < found.grown_mb < 500
