"""Levels belong to the fit: the same ids are the same levels whatever their dtype or spelling."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Trainer

from openreml_nn import InputError, lmm
from openreml_nn.inference import emmeans
from openreml_nn.lightning import MixedModelDataModule, MixedModule, StopWhenConverged
from openreml_nn.table import Encoder, Learned, read_table

N = 120
RNG = np.random.default_rng(1)
G = np.arange(N) % 12
TABLE = pd.DataFrame({"g": G, "s": RNG.integers(1, 4, N), "x": RNG.normal(size=N)})
TABLE["y"] = (
    np.array([0, 0, 10, 20])[TABLE["s"]] + RNG.normal(size=12)[G] + 0.3 * RNG.normal(size=N)
)
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def served(formula, table, **options):
    module = MixedModule(formula, **options)
    trainer = Trainer(max_epochs=100, callbacks=[StopWhenConverged()], **QUIET)
    trainer.fit(module, MixedModelDataModule(table, formula, **options))
    return module


@pytest.mark.parametrize("variable", ["C(s)", "factor(s)", "s", "cut(s, c(0, 1, 2, 3))"])
@pytest.mark.parametrize("part", ["{} + (1 | g)", "x + ({} | g)", "x * {} + (1 | g)"])
def test_a_subset_is_encoded_with_the_levels_of_the_fit(variable, part):
    categorical = ["s"] if variable == "s" else []
    encoder = Encoder("y ~ " + part.format(variable), categorical)
    whole = encoder.fit(TABLE)
    state = Learned.from_dict(encoder.learned.to_dict())
    again = Encoder("y ~ " + part.format(variable), categorical)
    again.learned = state
    for rows in (TABLE["s"] > 1, TABLE["s"] == 3, TABLE.index == 7):
        kept = np.flatnonzero(rows)
        found = again.transform(TABLE[rows])
        torch.testing.assert_close(found.X, whole.X[kept])
        torch.testing.assert_close(found.random[0].values, whole.random[0].values[kept])
        torch.testing.assert_close(found.random[0].codes, whole.random[0].codes[kept])
    with pytest.raises(InputError, match="has the level '4' in row"):
        again.transform(TABLE.assign(s=TABLE["s"] + 1))


def test_predictions_of_a_factor_made_in_the_formula():
    module = served("y ~ C(s) + (1 | g)", TABLE)
    for rows in (TABLE["s"] > 1, TABLE["s"] == 3):
        own = module.predict(TABLE[rows])["mean"]
        torch.testing.assert_close(
            torch.tensor(own.to_numpy()),
            torch.tensor(module.predict(TABLE)["mean"][rows].to_numpy()),
        )


def test_marginal_means_know_a_factor_made_in_the_formula():
    named = emmeans(lmm("y ~ s + (1 | g)", TABLE, categorical=["s"]), "s").table
    for variable in ("C(s)", "factor(s)", "C(s, contr.sum)"):
        made = emmeans(lmm(f"y ~ {variable} + (1 | g)", TABLE), "s").table
        assert made["name"].tolist() == ["1", "2", "3"]
        np.testing.assert_allclose(made["estimate"], named["estimate"], rtol=1e-6)


DAYS = pd.Series(pd.Timestamp("2024-01-01") + pd.to_timedelta(G, unit="D"))
SPELLED = {
    "int as text": (TABLE["g"], TABLE["g"].astype(str)),
    "text as int": (TABLE["g"].astype(str), TABLE["g"]),
    "int as float": (TABLE["g"], TABLE["g"].astype(float)),
    "int as Int64": (TABLE["g"], TABLE["g"].astype("Int64")),
    "int as category": (TABLE["g"], TABLE["g"].astype("category")),
    "int as object": (TABLE["g"], TABLE["g"].astype(object)),
    "float64 as float32": (TABLE["g"] * 0.1, (TABLE["g"] * 0.1).astype("float32")),
    "float32 as float64": ((TABLE["g"] * 0.1).astype("float32"), TABLE["g"] * 0.1),
    "bool as 0 and 1": (TABLE["g"] > 5, (TABLE["g"] > 5).astype(int)),
    "0 and 1 as bool": ((TABLE["g"] > 5).astype(int), TABLE["g"] > 5),
    "TRUE as true": ((TABLE["g"] > 5).map({True: "TRUE", False: "FALSE"}), TABLE["g"] > 5),
    "dates as text": (DAYS, DAYS.dt.strftime("%Y-%m-%d")),
    "text as dates": (DAYS.dt.strftime("%Y-%m-%d"), DAYS),
    "dates as datetime text": (DAYS, DAYS.dt.strftime("%Y-%m-%d %H:%M:%S")),
    "date objects": (DAYS, DAYS.dt.date),
    "padded": ("L" + TABLE["g"].astype(str), "L" + TABLE["g"].astype(str) + " "),
    "64 bits": (TABLE["g"] + 2**62, (TABLE["g"] + 2**62).astype(str)),
    "unsigned": (TABLE["g"].astype("uint64") + 2**63, (TABLE["g"].astype("uint64") + 2**63).astype(str)),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLED)
def test_the_same_ids_are_the_same_levels(case):
    first, other = SPELLED[case]
    encoder = Encoder("y ~ 1 + (1 | k)")
    (own,) = encoder.fit(TABLE.assign(k=first)).random
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (again,) = encoder.transform(TABLE.assign(k=other)).random
    assert again.codes.tolist() == own.codes.tolist()
    assert len(set(own.codes.tolist())) == first.nunique()


def test_ids_that_differ_as_written_are_different_levels():
    encoder = Encoder("y ~ 1 + (1 | k)")
    encoder.fit(TABLE.assign(k=[f"{i:03d}" for i in G]))
    with pytest.warns(RuntimeWarning, match="of k in 120 of 120 rows"):
        found = encoder.transform(TABLE.assign(k=G))
    assert found.unseen == {"k": 120}


def test_a_spelling_of_two_levels_is_none_of_them():
    encoder = Encoder("y ~ 1 + (1 | k)")
    encoder.fit(TABLE.assign(k=np.where(G % 2, "a", "a ")))
    with pytest.warns(RuntimeWarning, match="of k in 120 of 120 rows"):
        encoder.transform(TABLE.assign(k=" a"))


def test_64_bit_ids_are_exact_beside_a_missing_value(tmp_path):
    ids = [2**53 + i for i in G]
    table = TABLE.assign(k=pd.array([None, *ids[1:]], dtype="Int64"))
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    with pytest.warns(RuntimeWarning, match="1 of 120 rows"):
        expected = lmm("y ~ 1 + (1 | k)", table)
    assert expected.components[0].levels == tuple(str(2**53 + i) for i in range(12))
    for name in ("t.csv", "t.parquet"):
        with pytest.warns(RuntimeWarning, match="1 of 120 rows"):
            found = lmm("y ~ 1 + (1 | k)", read_table(tmp_path / name))
        assert found.components[0].levels == expected.components[0].levels
        assert found.log_likelihood == expected.log_likelihood
    with pytest.warns(RuntimeWarning, match="cannot tell whole numbers beyond 2"):
        Encoder("y ~ 1 + (1 | k)").fit(TABLE.assign(k=np.array(ids, dtype=float)))


def test_a_table_to_predict_needs_no_response():
    encoder = Encoder("log(y + 9) ~ x + (1 | g)")
    expected = encoder.fit(TABLE).X
    for y in (np.nan, None, "?", "later"):
        found = encoder.transform(TABLE.assign(y=y))
        assert found.y is None
        torch.testing.assert_close(found.X, expected)
    assert encoder.transform(TABLE.drop(columns="y")).y is None
    assert encoder.transform(TABLE).y is not None
    assert encoder.transform(TABLE.head(0)).X.shape == (0, 2)


def test_rows_held_out_are_those_with_a_response():
    hole = TABLE.assign(y=TABLE["y"].where(TABLE.index % 9 > 0))
    encoder = Encoder("y ~ x + (1 | g)")
    encoder.fit(TABLE)
    with pytest.warns(RuntimeWarning, match="14 of 120 rows left out"):
        found = encoder.transform(hole, held_out=True)
    assert len(found.y) == 106
    assert found.dropped_rows == 14


@pytest.mark.parametrize("variable", ["f", "C(f)"])
def test_a_rare_level_that_is_held_out_stops_nothing(variable):
    table = TABLE.assign(f=np.array(list("abc"))[np.arange(N) % 3])
    table.loc[5, "f"] = "rare"
    out = table.index % 10 == 5
    encoder = Encoder(f"y ~ x + {variable} + (1 | g)")
    encoder.fit(table[~out])
    with pytest.warns(RuntimeWarning, match="1 held-out rows of unknown levels"):
        found = encoder.transform(table[out], held_out=True)
    assert found.rows.tolist() == list(range(1, 12))
    with pytest.raises(InputError, match="has the level 'rare' in row 6"):
        encoder.transform(table[out])


def test_a_level_that_was_not_seen_is_counted_in_one_warning():
    encoder = Encoder("y ~ 1 + (1 | g) + (1 | s) + (1 | g:s)")
    encoder.fit(TABLE)
    new = TABLE.assign(g=TABLE["g"].where(TABLE.index > 2, 99))
    with pytest.warns(RuntimeWarning) as caught:
        encoder.transform(new)
    assert len(caught) == 1
    assert "of g in 3, g:s in 3 of 120 rows" in str(caught[0].message)


@pytest.mark.parametrize("name", ["plot.id", "a/b", "π", "x y", "a:b", "1st", "residual", "TRUE"])
def test_names_in_backticks_work_everywhere(name):
    table = TABLE.rename(columns={"g": name})
    found = lmm(f"y ~ x + (1 | `{name}`)", table)
    assert found.components[0].group == name
    assert found.log_likelihood == lmm("y ~ x + (1 | g)", TABLE).log_likelihood
    Encoder(f"`{name}` ~ x", residual=f"cs(`{name}`)").fit(table)
    assert Encoder(f"y ~ 0 + `{name}`").fit(table).names == (name,)
    if name not in ("a/b", "x y", "a:b", "1st", "TRUE"):
        assert Encoder(f"y ~ 0 + {name}").fit(table).names == (name,)
