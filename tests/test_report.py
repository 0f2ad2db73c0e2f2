"""Tables, plots and files of a result."""

import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console

import openreml_nn
from openreml_nn import InputError, datasets, fit_reml, glmm, lmm
from openreml_nn.covariance import (
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialMatrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.datasets import visits
from openreml_nn.inference import diagnose, profile, quantile_residuals, variance_shares
from openreml_nn.inference.refit import tracked
from openreml_nn.program.outputs import write_plots, write_record, write_tables
from openreml_nn.program.sweep import SweepTable
from openreml_nn.report import (
    blup_table,
    calibration,
    caterpillar,
    convergence,
    covariance_map,
    fixed_table,
    residuals,
    semivariogram,
    shares,
    variance_table,
    write_report,
    zeta,
)
from openreml_nn.report.contents import RunContents
from openreml_nn.report.runs import FAILED, best, collect, compared
from openreml_nn.support.names import shortened

FORMULA = "Reaction ~ Days + (Days | Subject)"


def write_run(result, directory, validation=None, is_drawn=True):
    write_tables(result, directory)
    if is_drawn:
        write_plots(result, directory)
    write_record(result, directory, validation or {})


@pytest.fixture(scope="module")
def result():
    return lmm(FORMULA, datasets.sleepstudy())


def test_tables(result):
    fixed = fixed_table(result).set_index("name")
    assert fixed.loc["Days", "estimate"] == pytest.approx(10.467286, rel=1e-7)
    variance = variance_table(result).fillna({"effect2": ""})
    named = variance.set_index(["group", "effect1", "effect2"])
    assert named.loc[("Subject", "(Intercept)", ""), "std_dev"] == pytest.approx(24.7406, rel=1e-3)
    assert named.loc[("Subject", "(Intercept)", "Days"), "correlation"] == pytest.approx(
        0.06555, rel=1e-2
    )
    assert named.loc[("Residual", "", ""), "covariance"] == pytest.approx(654.94, rel=1e-4)
    blups = blup_table(result)
    assert len(blups) == 36
    first = blups[(blups["level"] == "308") & (blups["effect"] == "Days")].iloc[0]
    assert first["blup"] == pytest.approx(9.199, rel=1e-3)
    variances = result.random[0].variances.diagonal(dim1=1, dim2=2)
    np.testing.assert_allclose(blups["std_error"], variances.sqrt().reshape(-1).numpy())


def test_plots_draw_what_they_claim(result):
    figure = caterpillar(result, "Subject")
    assert isinstance(figure, Figure)
    assert [axis.get_title() for axis in figure.axes] == ["(Intercept)", "Days"]
    drawn = figure.axes[0].lines[0].get_xdata()
    blups = blup_table(result)
    expected = blups[blups["effect"] == "(Intercept)"]["blup"]
    np.testing.assert_allclose(np.sort(drawn), np.sort(expected))
    # Intervals of 95%, in the order of the BLUPs.
    (lines,) = figure.axes[0].collections
    first = blups[blups["effect"] == "(Intercept)"].sort_values("blup")
    ends = np.array([line[:, 0] for line in lines.get_segments()])
    np.testing.assert_allclose(ends.mean(1), first["blup"])
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * 1.96 * first["std_error"])
    path = convergence(result).axes[0].lines[0].get_ydata()
    assert path[-1] == result.log_likelihood
    points = residuals(result).axes[0].lines[0]
    np.testing.assert_allclose(points.get_ydata(), result.residuals.numpy())
    with pytest.raises(ValueError, match="expected one of"):
        caterpillar(result, "Nobody")


def test_run_directory(result, tmp_path):
    write_run(result, tmp_path / "run")
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.*")}
    assert files == {
        "result.json",
        "summary.txt",
        "fixed.csv",
        "variance.csv",
        "blup.csv",
        "residuals.csv",
        "plots/blup_Subject.png",
        "plots/convergence.png",
        "plots/covariance.png",
        "plots/residuals.png",
        "plots/shares.png",
    }
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["schema"] == 1
    assert record["model"] == {"formula": FORMULA, "method": "reml"}
    assert record["data"] == {
        "rows": 180,
        "dropped_rows": 0,
        "fixed_effects": 2,
        "groups": {"Subject": 18},
    }
    assert record["fit"]["log_likelihood"] == result.log_likelihood
    assert record["fit"]["converged"] is True
    assert record["fit"]["singular"] is False
    assert [f["name"] for f in record["fixed"]] == ["(Intercept)", "Days"]
    (random,) = record["random"]
    assert random["group"] == "Subject"
    assert random["effects"] == ["(Intercept)", "Days"]
    assert random["levels"] == 18
    np.testing.assert_allclose(random["covariance"], result.components[0].covariance.numpy())
    assert record["residual"]["variance"] == result.residual_variance
    assert record["residual"]["parameters"] == {"sigma^2": result.residual_variance}
    assert (tmp_path / "run" / "summary.txt").read_text() == result.summary(FORMULA)
    assert len(pd.read_csv(tmp_path / "run" / "blup.csv")) == 36


def test_a_run_whose_tables_cannot_be_written_has_no_result(result, tmp_path, monkeypatch):
    """``result.json`` stands for all tables, and so comes after them."""

    def full(table, path):
        assert not (tmp_path / "result.json").exists()
        if path.name == "blup.csv":
            raise OSError("no space left")

    monkeypatch.setattr("openreml_nn.program.outputs.write_table", full)
    with pytest.raises(OSError, match="no space left"):
        write_run(result, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_independent_effects_of_one_factor_are_entries_of_their_own(tmp_path):
    result = lmm("Reaction ~ Days + (Days || Subject)", datasets.sleepstudy())
    record = result.to_dict()
    assert [(r["group"], r["effects"]) for r in record["random"]] == [
        ("Subject", ["(Intercept)"]),
        ("Subject", ["Days"]),
    ]
    assert record["data"]["groups"] == {"Subject": 18}
    assert len(caterpillar(result, "Subject").axes) == 2


def test_the_summary_is_laid_out_like_lme4s(result):
    text = result.summary(FORMULA)
    parts = ["REML criterion 1743.6283", "Random effects", "Residual", "Fixed effects", "t value"]
    at = [text.index(part) for part in parts]
    assert at == sorted(at)


class ZMQInteractiveShell:
    """What IPython calls the shell of a Jupyter kernel."""


def test_a_notebook_has_the_summary_and_the_bar_of_a_terminal(result, monkeypatch, capsys):
    elsewhere = result.summary()
    monkeypatch.setattr("rich.console.get_ipython", ZMQInteractiveShell, raising=False)
    assert Console().is_jupyter
    assert result.summary() == elsewhere
    assert list(tracked([1, 2], "fits", progress=True)) == [1, 2]
    assert capsys.readouterr().out == ""


def test_plots_show_what_they_say(result):
    assert len(residuals(result).axes) == 2
    bars = shares(result).axes[0].patches
    table = variance_shares(result)
    assert [bar.get_width() for bar in bars] == pytest.approx(table["share"][::-1].tolist())
    image = covariance_map(result, 20).axes[0].images[0].get_array()
    V = result.source.covariance().detach().numpy()[:20, :20]
    np.testing.assert_allclose(image, V, rtol=1e-10)
    figure = zeta(profile(result, ["sigma", "Days"]))
    assert [axis.get_title() for axis in figure.axes[:2]] == ["sigma", "Days"]


def test_a_calibration_plot_shows_shares_against_predictions():
    mean = torch.tensor([0.15] * 100 + [0.75] * 40)
    target = torch.zeros(140)
    target[:20], target[100:130] = 1, 1
    axis = calibration(mean, target, 10).axes[0]
    line = axis.lines[-1]
    np.testing.assert_allclose(line.get_xdata(), [0.15, 0.75], rtol=1e-6)
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.75], rtol=1e-6)
    # Wilson's interval of 20 of 100, as R's prop.test has it without a correction.
    low, high = axis.collections[0].get_segments()[0][:, 1]
    np.testing.assert_allclose([low, high], [0.1334, 0.2888], atol=1e-4)


def test_residuals_of_a_family_are_quantile_residuals(tmp_path):
    result = glmm("visits ~ age + (1 | doctor)", visits(300, 10), family="poisson")
    axes = residuals(result).axes
    assert axes[0].get_ylabel() == "randomised quantile residual"
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), quantile_residuals(result))
    write_run(result, tmp_path, is_drawn=False)
    run = RunContents(tmp_path, "run", "run")
    run.context()
    drawn = [plot for plot in run.charts.plots.values() if "esiduals" in plot["title"]]
    assert [plot["ylabel"] for plot in drawn] == ["quantile residual"] * 2
    assert drawn[1]["diagonal"] == [0, 1]


def test_a_semivariogram_of_an_autoregressive_field_rises_to_its_sill():
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(400.0)[:, None]
    z = torch.zeros(400)
    for i in range(1, 400):
        z[i] = 0.9 * z[i - 1] + (1 - 0.81) ** 0.5 * torch.randn(1, generator=generator).item()
    table = pd.DataFrame({"y": z.numpy(), "g": np.arange(400) // 10})
    result = lmm("y ~ 1 + (1 | g)", table)
    axis = semivariogram(result, place, bins=40).axes[0]
    line = axis.lines[0].get_ydata()
    assert line[0] < 0.5 * line[5:].mean()
    assert line[5:].mean() == pytest.approx(float(z.var()), rel=0.2)
    with pytest.raises(
        ValueError, match=r"shape \(3, 1\): expected a real tensor of shape \(400, k\)"
    ):
        semivariogram(lmm("y ~ 1 + (1 | g)", table), torch.zeros(3, 1))


class Page(HTMLParser):
    """Tables of a page by caption, the data of its plots, and its tags."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.tags, self._row, self._text, self._plots = {}, [], None, None, ""
        self._in, self._table, self._differs = "", [], False
        self.feed(path.read_text(encoding="utf-8"))
        self.plots = json.loads(self._plots)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = "plots" if ("id", "plots") in attrs else tag
        if tag == "caption":
            self._text = ""
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th") and self._row is not None:
            self._text = ""
            self._differs = ("class", "differs") in attrs

    def handle_data(self, data):
        if self._in == "plots":
            self._plots += data
        elif self._text is not None:
            self._text += data

    def handle_endtag(self, tag):
        if tag == "caption":
            self._table = self.tables.setdefault(self._text, [])
        elif tag in ("td", "th"):
            self._row.append(("*" if self._differs else "") + self._text)
        elif tag == "tr":
            self._table.append(self._row)
        if tag in ("caption", "td", "th", "script"):
            self._text, self._in = None, ""


def cells(page, words):
    """The rows of the first table whose caption has some words, by the name of the row."""
    (table,) = [rows for caption, rows in page.tables.items() if words in caption][:1]
    return {row[0]: row[1:] for row in table}


def test_a_report_is_one_page_that_needs_no_other_file(result, tmp_path):
    for name in ("a", "b"):
        write_run(result, tmp_path / name, {"val_mse": 1.0})
    assert write_report(tmp_path, tmp_path / "report.html") == 2
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    # Only what the page does not draw itself is a picture.
    assert text.count("data:image/png;base64,") == 2 * len(["covariance", "shares"])
    assert text.count("<figcaption>Shares of the variance, with standard errors<") == 2
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "REML criterion 1743.6283" in text
    assert f"gathered by openreml_nn {openreml_nn.__version__} on" in text
    assert write_report(tmp_path / "a", tmp_path / "one.html") == 1
    with pytest.raises(InputError, match="has no run"):
        write_report(tmp_path / "none", tmp_path / "none.html")


def test_a_report_has_the_numbers_of_the_fit(result, tmp_path):
    write_run(result, tmp_path / "run", is_drawn=False)
    write_report(tmp_path / "run", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    fixed = cells(page, "estimate ± 1.96")["Days"]
    b, se = result.fixed.estimate[1].item(), result.fixed.std_error[1].item()
    expected = [b, se, b - 1.96 * se, b + 1.96 * se, b / se]
    np.testing.assert_allclose([float(x) for x in fixed], expected, rtol=1e-5)
    residual = cells(page, "Variances")["Residual"]
    v = result.residual_variance
    se = float(variance_table(result)["std_error"].iloc[-1])
    expected = [v, se, v * np.exp(-1.96 * se / v), v * np.exp(1.96 * se / v), v**0.5]
    np.testing.assert_allclose([float(x) for x in residual[1:6]], expected, rtol=1e-5)
    plots = {plot["title"]: plot for plot in page.plots.values()}
    (title,) = [t for t in plots if t.startswith("Subject: Days")]
    drawn, blups = plots[title], blup_table(result)
    days = blups[blups["effect"] == "Days"].sort_values("blup")
    assert drawn["rows"] == days["level"].tolist()
    np.testing.assert_allclose(drawn["x"], days["blup"], rtol=1e-6)
    np.testing.assert_allclose(drawn["low"], days["blup"] - 1.96 * days["std_error"], rtol=1e-6)
    assert drawn["rows"][-1] == "308"
    assert drawn["says"][-1].startswith("9.199 (")
    (title,) = [t for t in plots if t.startswith("Residuals")]
    np.testing.assert_allclose(plots[title]["y"], result.residuals, rtol=1e-6)
    (path,) = [p for t, p in plots.items() if t == "Convergence"]
    assert path["ylabel"] == "restricted log-likelihood"
    assert path["y"][-1] == result.log_likelihood
    # What the script draws into is there.
    places = {attributes.get("data-plot") for _, attributes in page.tags} - {None}
    assert places == set(page.plots)


def test_a_report_takes_runs_without_random_effects_or_fixed_ones(tmp_path):
    table = datasets.sleepstudy()
    residual = lmm("Reaction ~ Days", table, residual="ar1(Days | Subject)")
    write_run(residual, tmp_path / "residual", is_drawn=False)
    write_run(lmm("Reaction ~ 0 + (1 | Subject)", table), tmp_path / "random", is_drawn=False)
    assert len(pd.read_csv(tmp_path / "residual" / "blup.csv")) == 0
    assert write_report(tmp_path, tmp_path / "page.html") == 2
    titles = [plot["title"] for plot in Page(tmp_path / "page.html").plots.values()]
    assert sum("BLUPs" in title for title in titles) == 1
    assert sum(title.startswith("Fixed effects") for title in titles) == 1


def test_runs_stand_side_by_side(result, tmp_path):
    other = lmm("Reaction ~ Days + (1 | Subject)", datasets.sleepstudy())
    for name, each in {"slopes": result, "intercepts": other}.items():
        write_run(each, tmp_path / name, is_drawn=False)
    (tmp_path / "wrong").mkdir()
    failure = {"status": 2, "error": "no column <b>", "overrides": ['model.formula="y ~ b"']}
    (tmp_path / "wrong" / FAILED).write_text(json.dumps(failure))
    assert write_report(tmp_path, tmp_path / "page.html") == 2
    page = Page(tmp_path / "page.html")
    found = cells(page, "Options and results")
    assert found["run"][:3] == ["formula", "log-likelihood", "AIC"]
    # The run that failed is there, and none is best, as REML compares none of these.
    assert found["wrong"] == ["y ~ b", *[""] * (len(found["run"]) - 1)]
    assert "wrong: no column &lt;b&gt;" in (tmp_path / "page.html").read_text()
    found = cells(page, "Estimates of each run")
    assert list(found)[-3:] == ["log-likelihood", "AIC", "BIC"]
    assert found["Quantity"] == ["intercepts", "slopes"]
    # The estimate is the same in balanced data, its standard error is not.
    assert found["Days"] == ["10.4673 (0.804)", "*10.4673 (1.55)"]
    assert found["variance of Subject: Days"] == ["", "*35.0717"]


def test_the_model_is_said_in_words(result, tmp_path):
    write_run(result, tmp_path, is_drawn=False)
    slopes = RunContents(tmp_path, "run", "run0").words()
    assert (
        "with 2 fixed effects. The random part has random intercepts and random effects" in slopes
    )
    assert slopes.endswith(
        "of Days for 18 levels of Subject. It was fitted by restricted maximum "
        "likelihood (REML) to 180 rows."
    )
    (tmp_path / "config.yaml").write_text("model: {network: {_target_: torch.nn.LazyLinear}}")
    network = RunContents(tmp_path, "run", "run0").words()
    assert "with a network for its mean and 2 coefficients of its features. The" in network


def test_the_facts_of_a_fit_have_what_its_family_and_the_rows_held_out_say(result, tmp_path):
    write_record(result, tmp_path, {"val_mse": 2.5, "val_negative_log_density": 0.5})
    record = json.loads((tmp_path / "result.json").read_text())
    record["details"]["exact"] = False
    record["family_parameters"] = {"dispersion": 1.25}
    (tmp_path / "result.json").write_text(json.dumps(record))
    facts = dict(RunContents(tmp_path, "run", "run0").facts())
    assert facts["Likelihood"] == "estimated, not exact"
    assert float(facts["Parameter dispersion of the family"]) == 1.25
    assert float(facts["Held-out mean squared error"]) == 2.5
    assert float(facts["Held-out negative log density"]) == 0.5


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"method": ["reml", "ml"]}, None),
        ({"method": ["reml", "reml"], "formula": ["y ~ x", "y ~ 1"]}, None),
        ({"method": ["ml", "ml"], "formula": ["y ~ x", "y ~ 1"]}, ("b", "aic")),
        ({"rows": [10, 11]}, None),
        ({"aic": [np.nan, np.nan]}, None),
        ({"error": [None, "not found"]}, ("a", "aic")),
        ({"val_negative_log_density": [1.0, 2.0]}, ("a", "val_negative_log_density")),
    ],
)
def test_the_best_run_is_named_where_runs_compare(columns, found):
    same = {"run": ["a", "b"], "formula": "y ~ x", "rows": 10, "method": "reml", "aic": [3.0, 2.0]}
    assert best(pd.DataFrame({**same, **columns})) == found


def test_a_report_has_the_structure_of_the_errors_and_its_correlations(tmp_path):
    found = lmm(
        "Reaction ~ Days", datasets.sleepstudy().head(60), residual="ar1(Days | Subject) + units"
    )
    write_record(found, tmp_path, {})
    (tmp_path / "config.yaml").write_text("model: {residual: ar1(Days | Subject) + units}")
    run = RunContents(tmp_path, "run", "run0")
    assert run.formula() == ["Reaction ~ Days", "residual = ar1(Days | Subject) + units"]
    assert "The errors have the structure ar1(Days | Subject) + units." in run.words()
    assert "random intercepts" not in run.words()
    ((name, value, error),) = ([cell.text for cell in row.cells] for row in run.parameters().rows)
    (rho,) = [p for p in found.parameters if p.name.endswith("rho")]
    assert name == shortened(p.name for p in found.parameters)[rho.name] == "residual/rho"
    assert (float(value), float(error)) == pytest.approx((rho.value, rho.std_error), rel=1e-5)


def test_the_variance_of_a_slope_that_is_zero_is_said_of_the_slope():
    rng = np.random.default_rng(0)
    g, x = np.repeat(np.arange(12), 6), np.tile(np.arange(6.0), 12)
    y = rng.standard_normal(12)[g] + x + rng.standard_normal(72)
    y -= (x - 2.5) * np.repeat(np.polyfit(np.arange(6.0), y.reshape(12, 6).T, 1)[0], 6)
    found = diagnose(lmm("y ~ x + (x || g)", pd.DataFrame({"y": y, "x": x, "g": g})))
    assert any("levels of g do not differ in the effect of x. Leaving" in line for line in found)


def test_names_of_users_are_text_in_a_report(tmp_path):
    rng = np.random.default_rng(0)
    levels = np.array(["</script><b>", "=1+1", "'x", 'a"b', "<img src=x>", "NA"], dtype=object)
    g = np.repeat(np.arange(6), 5)
    table = pd.DataFrame({"g": levels[g], "a<b>": rng.standard_normal(30)})
    table["y"] = table["a<b>"] + rng.standard_normal(6)[g] + 0.1 * rng.standard_normal(30)
    write_run(lmm("y ~ `a<b>` + (1 | g)", table), tmp_path / "<i>run")
    write_report(tmp_path, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert {tag for tag, _ in page.tags} & {"b", "img", "i"} == {"img"}
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
    assert "a<b>" in cells(page, "estimate ± 1.96")
    (rows,) = [plot["rows"] for plot in page.plots.values() if "BLUPs" in plot["title"]]
    assert set(rows) == set(levels)


def test_of_many_levels_a_report_draws_some_and_says_so(tmp_path):
    g = np.arange(9000) % 3000
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"y": rng.standard_normal(3000)[g] + rng.standard_normal(9000), "g": g})
    found = lmm("y ~ 1 + (1 | g)", table)
    write_run(found, tmp_path, is_drawn=False)
    write_report(tmp_path, tmp_path / "page.html")
    plots = [
        plot for plot in Page(tmp_path / "page.html").plots.values() if "BLUPs" in plot["title"]
    ]
    assert "2,000 of 3,000 levels, evenly by rank" in plots[0]["title"]
    blup = found.random[0].values[:, 0]
    np.testing.assert_allclose(
        [plots[0]["x"][0], plots[0]["x"][-1]], [blup.min(), blup.max()], rtol=1e-6
    )
    residual = pd.read_csv(tmp_path / "residuals.csv")
    assert residual["row"].iloc[[0, -1]].tolist() == [1, 9000]
    np.testing.assert_allclose(residual["residual"], found.residuals[residual["row"] - 1])


def test_what_is_wrong_is_written_in_words(tmp_path):
    table = pd.DataFrame({"y": np.random.default_rng(0).standard_normal(60)})
    table["g"] = np.arange(60) // 20
    found = lmm("y ~ 1 + (1 | g)", table)
    write_run(found, tmp_path)
    said = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert "g has 3 levels" in said


def test_what_is_told_of_runs_is_where_they_differ():
    failed = pd.DataFrame(
        {"run": ["0", "1"], "model.formula": ['"y ~ a"', '"y ~ b"'], "seed": "1", "error": "no"}
    )
    assert compared(failed).to_dict("list") == {"run": ["0", "1"], "formula": ["y ~ a", "y ~ b"]}
    fitted = failed.assign(formula=["y ~ a", None], aic=[1.0, None], deviance=[3.0, 4.0])
    fitted["g (Intercept) variance"] = [1.0, 2.0]
    found = compared(fitted.assign(aic=[1.0, 2.0]))
    assert list(found) == ["run", "formula", "aic"]
    assert found["formula"].tolist() == ["y ~ a", "y ~ b"]
    assert list(compared(fitted.head(1))) == ["run", "seed", "formula", "aic"]
    # An option that one run has and the other has by default is a difference; a missing outcome is none.
    given = fitted.assign(**{"model.family": ["poisson", None], "val_mse": [1.0, None]})
    assert list(compared(given)) == ["run", "formula", "model.family"]


def test_options_are_alike_however_they_are_typed(result, tmp_path):
    for name, typed in {"one": "plots=false", "sweep": "plots=False"}.items():
        write_run(result, tmp_path / name, is_drawn=False)
        (tmp_path / name / ".hydra").mkdir()
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text(f"- {typed}\n- +seed={name}\n")
    found = collect(tmp_path)
    assert found["plots"].tolist() == ["false", "false"]
    assert list(compared(found)) == ["run", "seed"]


def test_a_report_takes_runs_of_earlier_versions(result, tmp_path):
    write_run(result, tmp_path, is_drawn=False)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["details"]["residuals"] == "residual"
    del record["details"]
    (tmp_path / "result.json").write_text(json.dumps(record))
    assert write_report(tmp_path, tmp_path / "page.html") == 1


def test_the_best_run_of_a_sweep():
    table = pd.DataFrame({"run": ["a", "b"], "method": ["ml", "ml"], "aic": [3.0, 2.0]})
    table["formula"] = ["y ~ 1", "y ~ x"]
    table["rows"] = 10
    assert best(table) == ("b", "aic")
    assert best(table.assign(method="reml")) is None  # of different fixed effects
    assert best(table.assign(rows=[10, 9])) is None
    assert best(table.assign(formula=["y ~ 1", "log(y) ~ 1"])) is None
    assert best(table.assign(method=["reml", "ml"])) is None
    held_out = table.assign(val_negative_log_density=[1.0, 2.0])
    assert best(held_out)[0] == "a"
    assert best(held_out.assign(rows=[10, 9])) is None  # of other data


def test_a_result_of_something_else_is_named(result, tmp_path):
    write_run(result, tmp_path / "a")
    for text in ("{", "[]", '{"model": {}}'):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(InputError, match=r"result.json' is not the result of a run"):
            write_report(tmp_path, tmp_path / "page.html")
    (tmp_path / "failed.json").write_text("{}")
    with pytest.raises(InputError, match=r"failed.json' is not the result of a run"):
        collect(tmp_path)


def test_a_new_sweep_forgets_failures_of_its_own_kind_alone(tmp_path):
    for name, text in (("run", '{"status": 2}'), ("other", '{"tests": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "failed.json").write_text(text)
    SweepTable().on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert [path.parent.name for path in tmp_path.rglob("failed.json")] == ["other"]


def test_a_plot_is_bounded_by_what_it_shows():
    rng = np.random.default_rng(0)
    g = rng.permutation(np.repeat(np.arange(30_000), 3))
    x = rng.standard_normal(len(g))
    b = rng.standard_normal((30_000, 2))
    table = pd.DataFrame({"y": b[g, 0] + b[g, 1] * x + rng.standard_normal(len(g)), "x": x, "g": g})
    found = lmm("y ~ x + (x | g)", table)
    figure = caterpillar(found, "g")
    blup = found.random[0].values[:, 0].numpy()
    drawn = figure.axes[0].lines[0].get_xdata()
    assert len(drawn) == 300
    assert (drawn[0], drawn[-1]) == (blup.min(), blup.max())
    np.testing.assert_array_equal(drawn, np.sort(drawn))
    assert figure.axes[0].get_ylabel() == "g (300 of 30000 levels, evenly by rank)"
    # The same levels in the other panel, in the same order.
    level = {value: i for i, value in enumerate(blup)}
    expected = found.random[0].values[[level[value] for value in drawn], 1]
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_xdata(), expected)
    # 30,000 x 30,000 numbers would be 7 GB; the rows have at most 60 levels.
    image = covariance_map(found).axes[0].images[0].get_array()
    G, s2 = found.components[0].covariance.numpy(), found.residual_variance
    z = np.stack([np.ones(60), x[:60]], 1)
    V = (z @ G @ z.T) * (g[:60, None] == g[:60]) + s2 * np.eye(60)
    np.testing.assert_allclose(image, V, rtol=1e-10)
    quantiles = residuals(found).axes[1].lines[0].get_ydata()
    assert len(quantiles) == 2_000


def test_the_rows_of_a_covariance_plot_may_have_correlated_levels(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    codes, strata = torch.arange(40) % 8, torch.arange(40) % 4
    place = torch.arange(8.0, dtype=torch.float64)
    kernel = ExponentialMatrix((place[:, None] - place).abs()).double()
    V = Sum(
        kernel=CovariancePropagation(z=DummyMatrix.from_codes(codes, 8), g=kernel),
        own=CovariancePropagation(
            z=DummyMatrix.from_codes(strata, 4), g=DiagonalMatrix(4).double()
        ),
        residual=ScalarMatrix(40).double(),
    )
    y = torch.randn(40, dtype=torch.float64, generator=generator)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        found = fit_reml(V, y, torch.ones(40, 1, dtype=torch.float64), max_iterations=3)
    expected = V().detach().numpy()
    image = covariance_map(found, 30).axes[0].images[0].get_array()
    np.testing.assert_allclose(image, expected[:30, :30], rtol=1e-10)
    monkeypatch.setattr("openreml_nn.report.plots._NUMBERS", 300)
    figure = covariance_map(found, 30)
    assert figure.axes[0].get_xlabel() == "row (the first 10 of 40)"
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), expected[:10, :10], rtol=1e-10)


def test_a_plot_that_fails_costs_a_line_and_not_the_result(result, tmp_path, monkeypatch):
    def broken(*_):
        raise MemoryError("cannot allocate\n80 GB")

    monkeypatch.setattr("openreml_nn.program.outputs.covariance_map", broken)
    said = "^plot covariance is left out: MemoryError: cannot allocate 80 GB$"
    with pytest.warns(RuntimeWarning, match=said):
        write_run(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["data"]["rows"] == 180
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {
        "blup_Subject", "convergence", "residuals", "shares"
    }  # fmt: skip


def test_results_are_written_before_anything_is_drawn(result, tmp_path):
    write_tables(result, tmp_path)
    names = {"summary.txt", "fixed.csv", "variance.csv", "blup.csv", "residuals.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names
    write_plots(result, tmp_path)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5
