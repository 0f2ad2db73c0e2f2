"""Deletion of rows and groups against fits without them, dense algebra and lme4."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openreml_nn import InputError, fit_reml, fit_stream, lmm
from openreml_nn.covariance import ScalarMatrix
from openreml_nn.datasets import oats, penicillin, sleepstudy, table_path
from openreml_nn.inference import influence
from tests.inference.dense import covariance, generalised, projection

FILE = Path(__file__).parents[1] / "reference" / "types.json"
REFERENCE = json.loads(FILE.read_text(encoding="utf-8"))
LOST = [*range(1, 9), *range(15, 20), 33, 47, *range(101, 105)]
SOME = sleepstudy().drop(index=[i - 1 for i in LOST])
SOME["w"] = np.linspace(1, 3, len(SOME))
MODELS = {
    "slopes": {},
    "weights": {"weights": "w"},
    "ar1": {"residual": "ar1(Days | Subject)"},
}


@pytest.fixture(scope="module", params=MODELS)
def result(request):
    options = MODELS[request.param]
    random = "(1 | Subject)" if "residual" in options else "(Days | Subject)"
    return lmm(f"Reaction ~ Days + {random}", SOME, **options)


@pytest.mark.parametrize("by", [None, "Subject", "labels"])
def test_deletion_is_estimation_from_the_other_rows(result, by):
    subjects = SOME["Subject"].astype(int).to_numpy()
    labels = {None: np.arange(len(SOME)), "Subject": subjects, "labels": subjects % 3}[by]
    found = influence(result, labels.tolist() if by == "labels" else by)
    assert found["rows"].sum() == len(SOME)
    cases = found.index if by is not None else found.index[::20]
    for i in cases:
        keep = torch.tensor(labels.astype(str) != str(found["case"][i]))
        X, y = result.source.X[keep], result.source.y[keep]
        beta, phi = generalised(y, X, covariance(result)[keep][:, keep])
        change = result.fixed.estimate - beta
        own = result.fixed.covariance
        np.testing.assert_allclose(
            found.loc[i, [f"dfbeta_{n}" for n in result.fixed.names]].astype(float),
            change, rtol=1e-6, atol=1e-9,
        )  # fmt: skip
        ratio = torch.linalg.solve(own, phi)
        expected = {
            "cook": change @ torch.linalg.solve(own, change) / 2,
            "mdffits": change @ torch.linalg.solve(phi, change) / 2,
            "covtrace": (ratio.diagonal().sum() - 2).abs(),
            "covratio": torch.linalg.det(ratio),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(float(value), rel=1e-6), name


def test_leverage_is_the_slope_of_fitted_values(result):
    """At the same V the fitted values are linear in y: row by row of their matrix."""
    R = result.source.covariance.terms(None)[-1].detach().dense()
    hat = torch.eye(len(R)).double() - R @ projection(result)
    np.testing.assert_allclose(hat @ result.source.y, result.fitted, rtol=1e-8)
    found = influence(result)["leverage"]
    np.testing.assert_allclose(found, hat.diagonal(), rtol=1e-7)
    by_subject = influence(result, "Subject")["leverage"]
    assert by_subject.sum() == pytest.approx(found.sum())


def test_leverage_and_fits_again_equal_lme4():
    plain = lmm("Reaction ~ Days + (Days | Subject)", SOME)
    np.testing.assert_allclose(influence(plain)["leverage"], REFERENCE["leverage"], rtol=1e-4)
    found = influence(plain, "Subject", refit=True, progress=False)
    deleted = REFERENCE["deleted"]
    assert found["case"].tolist() == deleted["case"]
    for j, name in enumerate(("intercept", "days")):
        beta = float(plain.fixed.estimate[j]) - found.iloc[:, -2 + j]
        np.testing.assert_allclose(beta, deleted[name], rtol=1e-5)


def test_fits_again_are_fits_of_the_other_rows():
    table = penicillin()
    result = lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", table)
    found = influence(result, "sample", refit=True, progress=False)
    fit = lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", table[table["sample"] != "C"])
    change = float(result.fixed.estimate[0] - fit.fixed.estimate[0])
    row = found.set_index("case").loc["C"]
    assert row["dfbeta_(Intercept)"] == pytest.approx(change, abs=1e-5)
    ratio = float(fit.fixed.covariance[0, 0] / result.fixed.covariance[0, 0])
    assert row["covratio"] == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("refit", [False, True])
def test_a_case_that_alone_tells_a_coefficient_has_no_numbers(refit):
    result = lmm("yield ~ Variety + (1 | Block)", oats())
    found = influence(result, oats()["Variety"].tolist(), refit, progress=False)
    assert found["case"].tolist() == ["Victory", "Golden Rain", "Marvellous"]
    assert found["cook"].isna().all()
    assert found.filter(like="dfbeta").isna().all(axis=None)
    assert found["leverage"].notna().all()
    if not refit:
        assert influence(result, "Block")["cook"].notna().all()


@pytest.mark.parametrize("refit", [False, True])
def test_deletion_beside_weights_and_strata_is_a_fit_of_the_other_rows(refit):
    table = SOME.assign(late=np.where(SOME["Days"] > 4, "yes", "no"))
    options = {"weights": "w", "residual": "diag(late)"}
    formula = "Reaction ~ Days + (1 | Subject)"
    result = lmm(formula, table, **options)
    found = influence(result, "Subject", refit=refit, progress=False).iloc[3]
    if not refit:
        options["constraints"] = {p.name: p.value for p in result.parameters}
    others = lmm(formula, table[table["Subject"].astype(str) != str(found["case"])], **options)
    change = result.fixed.estimate - others.fixed.estimate
    cook = change @ torch.linalg.solve(result.fixed.covariance, change) / 2
    assert found["cook"] == pytest.approx(float(cook), rel=1e-4 if refit else 1e-9)


def test_what_is_no_case_is_refused():
    result = lmm("yield ~ Variety + (1 | Block)", oats())
    streamed = fit_stream("yield ~ 1 + (1 | Block)", table_path("oats"), progress=False)
    y = torch.linspace(0, 1, 20).double()
    plain = fit_reml(ScalarMatrix(20).double(), y, torch.ones(20, 0).double())
    for call, message in (
        (lambda: influence(result, "Variety"), r"`by` is 'Variety': expected one of \['Block'\]"),
        (
            lambda: influence(result, ["a", "b"]),
            "`by` has 2 labels: expected one for each of the 72",
        ),
        (lambda: influence(result, [None, *"ab" * 35, "a"]), "`by` has no label in row 1"),
        (lambda: influence(streamed), "read in chunks"),
        (lambda: influence(plain), "`result` has no fixed effects"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(TypeError, match="`by` is 3"):
        influence(result, 3)
