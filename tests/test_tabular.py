"""Neural mixed models of tables, data modules that hold rows out, and the program."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from openreml_nn import InputError, datasets, lmm
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from openreml_nn.lightning.split import Split
from tests.test_neural import quiet

pytestmark = pytest.mark.filterwarnings("ignore:.*levels that the fit did not see")

LAYERS = [
    {"_target_": "torch.nn.LazyLinear", "out_features": 16},
    {"_target_": "torch.nn.Tanh"},
]
NETWORK = {"_target_": "torch.nn.Sequential", "_args_": LAYERS}
CROSSED = "rating ~ x1 + x2 + x3 + x4 + (1 | user) + (1 | item)"
FIELD = "yield ~ rain + nitrogen + (1 | matern(east, north))"


def fitted(formula, table, epochs=20, split="random", **options):
    data = MixedModelDataModule(table, formula, validation=0.2, split=split)
    adam = {"_target_": "torch.optim.Adam", "lr": 0.01}
    module = MixedModule(formula, network=NETWORK, optimizer=adam, rows=256, **options)
    trainer = quiet(epochs)
    trainer.fit(module, data)
    return module, trainer, data


CASES = {
    "crossed": (CROSSED, datasets.ratings(3000, 100, 30), {}),
    "gls": (CROSSED, datasets.ratings(3000, 100, 30), {"head": "gls", "training": "full"}),
    "slopes": ("height ~ age + dose + (years | child)", datasets.growth(100), {}),
    "uneven": ("height ~ age + dose + (1 | child)", datasets.growth(100), {"residual": NETWORK}),
    "field": (FIELD, datasets.field(60), {}),
}


@pytest.mark.filterwarnings("ignore:.*which the network has not learned")
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_needs_neither_table_nor_model(name, tmp_path):
    formula, table, options = CASES[name]
    module, trainer, _ = fitted(formula, table, 3, **options)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = MixedModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    new = table.iloc[:10].copy()
    if name == "field":
        new.loc[5:, "east"] += 0.5
    else:
        group = formula.split("| ")[1].split(")")[0]
        new[group] = new[group].astype(str)
        new.loc[5:, group] = "never seen"
    expected, found = module.predict(new), again.predict(new)
    pd.testing.assert_frame_equal(found, expected)
    assert list(found.columns) == ["mean", "variance", "population_mean", "low", "high"]
    assert float(found["variance"][5:].min()) > 0


def test_the_simulated_truth_comes_out():
    module, trainer, data = fitted(CROSSED, datasets.ratings(), 15)
    user, item, residual = (float(c.covariance[0, 0]) for c in module.result.components)
    for found, truth, error in zip(
        (user, item, residual), (0.5, 0.25, 1.0), (0.03, 0.03, 0.015), strict=True
    ):
        assert abs(found - truth) < 3 * error
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert 0.92 < metrics["val_coverage"] < 0.97
    assert metrics["val_mse"] < 1.2
    torch.testing.assert_close(
        module.result.fitted + module.result.residuals, data.encoded.y, rtol=1e-12, atol=1e-12
    )


def clusters(plots=25, samples=4):
    """Four fields of one by one, ten apart: of plots of a Matérn field of length 0.2."""
    rng = np.random.default_rng(1)
    corner = 10 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(plots, 0)
    place = corner + rng.uniform(0, 1, corner.shape)
    r = 3**0.5 * np.linalg.norm(place[:, None] - place, axis=2) / 0.2
    b = np.linalg.cholesky((1 + r) * np.exp(-r)) @ rng.standard_normal(len(place))
    plot = np.arange(len(place)).repeat(samples)
    table = pd.DataFrame({"rain": rng.uniform(-1, 1, len(plot)), "plot": plot})
    table["yield"] = np.tanh(2 * table["rain"]) + b[plot] + 0.5 * rng.standard_normal(len(plot))
    table["east"], table["north"] = place[plot].T
    return table.sample(frac=1, random_state=1)


def test_a_field_learns_its_length():
    formula = "yield ~ rain + (1 | matern(east, north))"
    module, _, data = fitted(formula, clusters(), 12, split="group")
    length = {p.name: p for p in module.result.parameters}["east_north/g/lengthscale"]
    assert abs(length.value - 0.2) < 3 * length.std_error < 0.2
    np.testing.assert_array_equal(module.places, data.table[["east", "north"]])
    # It started at a third of the typical distance, which is that of the fields.
    assert torch.pdist(module.places).median() / 3 > 10 * length.value


@pytest.mark.parametrize("head", ["ml", "gls"])
def test_units_do_not_matter(head):
    table = datasets.ratings(1500, 50, 20)
    other = table.assign(x1=1000 * table["x1"] + 7, rating=100 * table["rating"] - 3)
    training = "full" if head == "gls" else "alternating"
    found = []
    for one in (table, other):
        torch.manual_seed(1)
        found.append(fitted(CROSSED, one, 4, head=head, training=training)[0].predict(one))
    expected, same = found
    np.testing.assert_allclose(same["mean"], 100 * expected["mean"] - 3, rtol=1e-3)
    np.testing.assert_allclose(same["variance"], 100**2 * expected["variance"], rtol=1e-3)


def test_a_network_may_be_a_module(tmp_path):
    formula, table, _ = CASES["crossed"]
    data = MixedModelDataModule(table, formula)
    module = MixedModule(formula, network=nn.Sequential(nn.LazyLinear(8), nn.ReLU()))
    trainer = quiet(1)
    trainer.fit(module, data)
    assert "network" not in module.hparams
    assert len(module.predict(table)) == len(table)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    with pytest.raises(InputError, match=r"a network that was given as a module.*pass `network`"):
        MixedModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    layers = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    again = MixedModule.load_from_checkpoint(tmp_path / "m.ckpt", network=layers, weights_only=True)
    pd.testing.assert_frame_equal(again.predict(table), module.predict(table))


WRONG = r"'network' fails for 3 columns, \['\(Intercept\)', 'rain', 'nitrogen'\]: mat1 and mat2"


def test_errors_name_what_is_wrong():
    formula, table, _ = CASES["field"]
    with pytest.raises(TypeError, match="kernels"):  # known matrices are the data module's
        MixedModule(formula, network=NETWORK, kernels={"K": "kinship.csv"})
    with pytest.raises(InputError, match="has no random effect"):
        fitted("yield ~ rain", table, 1)
    for target, message in [("os.system", "not a class"), ("torch.Size", "not a class")]:
        with pytest.raises(InputError, match=message):
            quiet(1).fit(
                MixedModule(formula, network={"_target_": target}),
                MixedModelDataModule(table, formula),
            )
    wrong = {"_target_": "torch.nn.Linear", "in_features": 99, "out_features": 2}
    with pytest.raises(InputError, match=WRONG):
        quiet(1).fit(MixedModule(formula, network=wrong), MixedModelDataModule(table, formula))
    two = {**wrong, "in_features": 2}
    bare = "yield ~ 0 + rain + nitrogen + (1 | matern(east, north))"
    quiet(1).fit(MixedModule(bare, network=two), MixedModelDataModule(table, bare))
    with pytest.raises(ValueError, match="no estimates"):
        MixedModule(formula, network=NETWORK).predict(table)
    other = MixedModelDataModule(table, "yield ~ rain + (1 | plot)")
    with pytest.raises(ValueError, match="the data module's formula"):
        quiet(1).fit(MixedModule(formula, network=NETWORK), other)


# ---------------------------------------------------------------------- rows held out


def module_with(split, validation=0.25, **options):
    data = MixedModelDataModule(
        datasets.growth(40), "height ~ age + (1 | child)", validation=validation, split=split,
        **options,
    )  # fmt: skip
    data.setup()
    return data


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_module_of_a_formula_evaluates_after_its_fit_alone(stage):
    data = MixedModelDataModule(datasets.sleepstudy(), "Reaction ~ Days + (1 | Subject)")
    with pytest.raises(InputError, match="the module has no estimates: fit it or load"):
        getattr(quiet(1), stage)(MixedModule("Reaction ~ Days + (1 | Subject)"), data)


def test_random_rows_are_held_out():
    data = module_with("random")
    assert len(data.held_out.y) == 80
    assert len(data.encoded.y) == 240
    again = module_with("random")
    assert torch.equal(data.held_out.y, again.held_out.y)
    assert not torch.equal(data.held_out.y, module_with("random", seed=1).held_out.y)


def test_the_same_share_of_each_level_is_held_out():
    data = module_with("group")
    codes = data.held_out.random[0].codes
    assert torch.equal(codes.bincount(), torch.full((40,), 2))
    assert len(data.encoded.random[0].levels) == 40
    # However large the share, training keeps a row of each level.
    table = datasets.growth(40)
    out = Split(0.99, "group").held_out(table, ["child"], "the table")
    assert table.child[~out].value_counts().tolist() == [1] * 40


def test_whole_levels_are_held_out():
    data = module_with("unseen")
    assert set(data.held_out.random[0].codes.tolist()) == {-1}
    assert len(data.encoded.random[0].levels) == 30
    assert len(data.held_out.y) == 80


def test_a_split_by_another_column():
    data = module_with("unseen", split_by="dose")
    assert len(data.held_out.y) == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "stratified"}, "`split` is 'stratified'"),
        ({"split": "random", "validation": 1.0}, "`validation` is 1.0"),
        ({"split": "unseen", "split_by": "school"}, "no column 'school'"),
        ({"split": "group", "validation": 0.01}, "no row of 320 is held out"),
    ],
)
def test_splits_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        module_with(**options)


@pytest.mark.filterwarnings("ignore:.*which the network has not learned")
def test_every_epoch_has_an_order_of_its_own_and_every_seed():
    table, formula = datasets.growth(40), "height ~ age + (1 | child)"

    def seen(seed):
        data = MixedModelDataModule(table, formula)
        module = MixedModule(formula, network=NETWORK, rows=100, seed=seed)
        trainer = quiet(1)
        trainer.fit(module, data)
        loader, found = data.train_dataloader(), []
        for epoch in range(2):
            trainer.fit_loop.epoch_progress.current.processed = epoch
            trainer.fit_loop.epoch_progress.current.completed = epoch
            found.append(torch.cat([batch["y"] for batch in loader]))
        return found

    first, second = seen(0)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert torch.equal(first, seen(0)[0])
    assert not torch.equal(first, seen(1)[0])


@pytest.mark.parametrize("network", [None, NETWORK], ids=["linear", "network"])
@pytest.mark.parametrize(
    "options", [{"residual": "diag(dose)"}, {"weights": "w"}, {"residual": "ar1(visit | child)"}]
)
def test_residuals_and_weights_are_the_same_options_for_both(network, options):
    """A network trains on them, and a linear mean has lmm's likelihood and predictions."""
    table = datasets.growth(30)
    table["w"] = 1 + np.arange(len(table)) % 3
    table["visit"] = table.groupby("child").cumcount()
    formula = "height ~ age + (1 | child)"
    data = MixedModelDataModule(table, formula, **options)
    lbfgs = {"_target_": "torch.optim.LBFGS", "line_search_fn": "strong_wolfe"}
    module = MixedModule(formula, lbfgs if network else None, "full", network=network, **options)
    quiet(30 if network is None else 3).fit(module, data)
    expected = lmm(formula, table, **options)
    found = module.predict(table)
    assert (found["variance"] > 0).all()
    if network is None:
        assert module.result.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-9)
        np.testing.assert_allclose(found, expected.predict(table), rtol=1e-4)
        pd.testing.assert_frame_equal(module.result.predict(table), found)
    else:
        loss, y, X = module.model.data(module.model(data.encoded.batch()), data.encoded.batch())
        own = -float(loss(y, X)) * len(y)
        assert module.result.log_likelihood == pytest.approx(own, rel=1e-9)


def test_a_gaussian_family_by_name_is_the_linear_model():
    """REML by default and no approximation, as if no family had been named."""
    found = []
    for options in ({}, {"family": "gaussian"}, {"family": "gaussian", "link": "identity"}):
        module = MixedModule("Reaction ~ Days + (Days | Subject)", **options)
        data = MixedModelDataModule(datasets.sleepstudy(), family=options.get("family"))
        quiet(50).fit(module, datamodule=data)
        found.append(module.result)
    assert {r.method for r in found} == {"reml"}
    assert {r.log_likelihood for r in found} == {found[0].log_likelihood}
    assert all(r.family is None for r in found)
