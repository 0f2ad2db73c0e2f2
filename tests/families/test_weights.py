"""Prior weights of responses of a family: factors of log-densities, or trials of proportions."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Trainer
from torch import nn

from openreml_nn import InputError, MixedModel, RandomEffect, glmm
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.families import (
    Beta,
    Binomial,
    Gamma,
    Gaussian,
    NegativeBinomial,
    Ordinal,
    Poisson,
    ZeroInflated,
)
from openreml_nn.inference import (
    anova,
    dispersion,
    likelihood_ratio_test,
    simulate,
    zero_count,
)
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from openreml_nn.likelihood import LaplaceLoss

REFERENCE = Path(__file__).parents[1] / "reference" / "glmm"
rng = np.random.default_rng(5)
N, LEVELS = 60, 8
CODES, OTHER = torch.arange(N) % LEVELS, torch.arange(N) % 5
ETA = torch.from_numpy(rng.normal(size=N)) / 2
X = torch.stack([torch.ones(N).double(), torch.from_numpy(rng.normal(size=N))], 1)
WEIGHTS = torch.from_numpy(rng.integers(1, 4, N)).double()
COUNTS = torch.from_numpy(rng.poisson(np.exp(0.4 + ETA.numpy()))).double()
BINARY = (COUNTS > 1).double()
SOME = torch.from_numpy(rng.gamma(2.0, 1.0, N))
TRIALS = COUNTS + 2
RESPONSES = {
    "binomial": (Binomial, BINARY),
    "cloglog": (lambda: Binomial("cloglog"), BINARY),
    "trials": (Binomial, torch.stack([COUNTS, TRIALS - COUNTS], 1)),
    "poisson": (Poisson, COUNTS),
    "negative_binomial": (NegativeBinomial, COUNTS),
    "gamma": (Gamma, SOME),
    "gaussian": (Gaussian, SOME),
    "beta": (Beta, torch.sigmoid(SOME - 2)),
    "ordinal": (lambda: Ordinal(3), COUNTS.clamp(max=2)),
    "zero inflated": (
        lambda: ZeroInflated(Poisson(), nn.Linear(1, 1).double()),
        torch.stack([COUNTS, X[:, 1]], 1),
    ),
}


def covariance(rows, crossed):
    def part(codes, q):
        z = DummyMatrix.from_codes(codes[rows], q)
        return CovariancePropagation(z=z, g=ScalarMatrix(q))

    parts = {"g": part(CODES, LEVELS)}
    if crossed:
        parts["h"] = part(OTHER, 5)
    return Sum(**parts).double()


def likelihood(name, rows, weights, method="ml", quadrature=1, solver="auto"):
    """Value, gradients by parameters and X, and coefficients with their covariance."""
    torch.manual_seed(0)
    make, y = RESPONSES[name]
    crossed = quadrature == 1
    loss = LaplaceLoss(covariance(rows, crossed), make().double(), method, quadrature, solver)
    own = X[rows]
    eta = ETA[rows].clone().requires_grad_()
    value = loss(y[rows], eta, own, weights=weights)
    value.backward()
    found = loss.evaluate(y[rows], eta.detach(), own, weights=weights)
    by_row = torch.zeros(N).double().index_add(0, rows, eta.grad)
    slopes = [p.grad for p in loss.parameters()]
    return [value, by_row, *slopes, found.coefficients, found.coefficient_covariance]


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "blocked"},
        {"solver": "dense"},
        {"solver": "sparse"},
        {"method": "reml"},
        {"quadrature": 5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_whole_weights_are_rows_that_stand_so_often(name, options):
    every = torch.arange(N)
    repeated = every.repeat_interleave(WEIGHTS.long())
    found = likelihood(name, every, WEIGHTS, **options)
    for one, other in zip(found, likelihood(name, repeated, None, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("quadrature", [1, 3])
def test_gradients_with_weights_are_differences(quadrature):
    loss = LaplaceLoss(covariance(torch.arange(N), False), Gamma().double(), "ml", quadrature)
    weights = WEIGHTS * 0.7
    y = SOME.clone().requires_grad_()
    inputs = [y, *loss.parameters()]
    slopes = torch.autograd.grad(loss(y, ETA, None, weights=weights), inputs)
    for x, slope in zip(inputs, slopes, strict=True):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                x[0] += step
                ends.append(float(loss(y, ETA, None, weights=weights)))
                x[0] -= step
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope[0]), rel=1e-6, abs=1e-7)


def table():
    return pd.DataFrame(
        {
            "g": CODES, "x": X[:, 1], "w": WEIGHTS, "count": COUNTS, "binary": BINARY,
            "trials": TRIALS, "share": COUNTS / TRIALS, "one": 1.0,
        }
    )  # fmt: skip


def test_a_weighted_fit_is_that_of_repeated_rows():
    own = table()
    repeated = own.loc[own.index.repeat(own.w.astype(int))].reset_index(drop=True)
    one = glmm("count ~ x + share + (1 | g)", own, "poisson", weights="w")
    other = glmm("count ~ x + share + (1 | g)", repeated, "poisson")
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-10)
    # Steps end a part of a standard error from the maximum; the likelihoods are the same to rounding.
    away = (one.fixed.estimate - other.fixed.estimate) / other.fixed.std_error
    assert float(away.abs().max()) < 1e-4
    torch.testing.assert_close(one.fixed.std_error, other.fixed.std_error, rtol=1e-4, atol=0)
    for of in (dispersion, zero_count):
        assert of(one) == pytest.approx(of(other), rel=1e-4)
    found = anova(one, type=1)["statistic"]
    assert list(found) == pytest.approx(list(anova(other, type=1)["statistic"]), rel=1e-4)


def test_weights_of_one_are_none():
    one = glmm("count ~ x + (1 | g)", table(), "poisson", weights="one")
    other = glmm("count ~ x + (1 | g)", table(), "poisson")
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-12)
    assert torch.equal(one.fixed.estimate, other.fixed.estimate)
    assert likelihood_ratio_test(glmm("count ~ 1 + (1 | g)", table(), "poisson"), one).df == 1


def test_proportions_with_trials_are_successes_and_failures():
    own = table()
    one = glmm("share ~ x + (1 | g)", own, weights="trials")
    other = glmm("cbind(count, trials - count) ~ x + (1 | g)", own)
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-12)
    torch.testing.assert_close(one.fixed.estimate, other.fixed.estimate, rtol=1e-10, atol=1e-12)
    assert simulate(one, 1).shape == simulate(other, 1).shape
    pd.testing.assert_frame_equal(one.predict(own), other.predict(own))
    pd.testing.assert_frame_equal(one.predict(own.drop(columns="trials")), one.predict(own))


def test_weights_are_those_of_lme4():
    wanted = json.loads((REFERENCE / "weights.json").read_text())
    cbpp = pd.read_csv(REFERENCE / "cbpp.csv").assign(share=lambda t: t["incidence"] / t["size"])
    epil = pd.read_csv(REFERENCE / "epil.csv").assign(w=lambda t: 1.0 + t.index % 3)
    fits = {
        "proportions": glmm("share ~ C(period) + (1 | herd)", cbpp, weights="size"),
        "counts": glmm("y ~ lage + (1 | subject)", epil, "poisson", weights="w"),
    }
    for name, result in fits.items():
        known = wanted[name]
        assert result.log_likelihood == pytest.approx(known["log_likelihood"], rel=1e-7)
        errors = torch.tensor(known["std_error"]).double()
        away = result.fixed.estimate - torch.tensor(known["fixed"]).double()
        assert float((away / errors).abs().max()) < 0.005
        torch.testing.assert_close(result.fixed.std_error, errors, rtol=0.01, atol=0)
        assert result.components[0].covariance.item() == pytest.approx(known["variance"], rel=0.005)


def batch(weights=None, y=COUNTS):
    found = {"x": X, "y": y, "groups": {"g": CODES}}
    return found if weights is None else {**found, "weights": weights}


def model(family):
    torch.manual_seed(1)
    mean = nn.Linear(2, 1, bias=False).double()
    return MixedModel(mean, {"g": RandomEffect(LEVELS).double()}, family=family.double())


def test_batches_take_weights():
    own, rows = model(Poisson()), torch.arange(N).repeat_interleave(WEIGHTS.long())
    repeated = {"x": X[rows], "y": COUNTS[rows], "groups": {"g": CODES[rows]}}
    one, other = own.loss(batch(WEIGHTS)) * N, own.loss(repeated) * len(rows)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
    own.update(batch(WEIGHTS))
    first = [own.random["g"].blup.clone(), *own.predict(batch(WEIGHTS)), *own.predict(batch())]
    own.update(repeated)
    second = [own.random["g"].blup.clone(), *own.predict(batch()), *own.predict(batch())]
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_batches_of_proportions_are_those_of_counts():
    own = model(Binomial())
    shares = batch(TRIALS, COUNTS / TRIALS)
    counts = batch(None, torch.stack([COUNTS, TRIALS - COUNTS], 1))
    torch.testing.assert_close(own.loss(shares), own.loss(counts), rtol=1e-12, atol=0)
    own.update(shares)
    torch.testing.assert_close(own.log_density(shares), own.log_density(counts))


def test_rows_that_are_left_out_take_their_weights_with_them():
    keep, offset = torch.arange(N)[::2], torch.zeros(N).double()
    loss = LaplaceLoss(covariance(torch.arange(N), False), Poisson())
    part = MarginalFit(loss, COUNTS, X, offset, ["a", "b"], WEIGHTS).part(keep, 1e-3)
    x = torch.tensor([0.3, 0.1, 0.5]).double()
    assert part.count == float(WEIGHTS[keep].sum())
    with torch.no_grad(), loss.covariance.given(part.at.natural(0, x[2:])):
        wanted = loss(COUNTS[keep], part.Q @ x[:2], None, keep, WEIGHTS[keep])
    assert part.evaluate(x)[0] == pytest.approx(float(wanted), rel=1e-12)


def test_a_module_of_a_formula_takes_weights():
    own = table()
    for formula, family, weights in (
        ("count ~ x + (1 | g)", "poisson", "w"),
        ("share ~ x + (1 | g)", "binomial", "trials"),
    ):
        data = MixedModelDataModule(own, formula, weights=weights, family=family)
        module = MixedModule(formula, weights=weights, family=family)
        trainer = Trainer(
            max_epochs=100, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)
        wanted = glmm(formula, own, family, weights=weights)
        assert module.result.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-9)


@pytest.mark.parametrize(
    ("formula", "weights", "said"),
    [
        ("share ~ x + (1 | g)", None, "expected 0 or 1; of proportions the trials are `weights`"),
        ("share ~ x + (1 | g)", "w", r"'share' times 'w' is .* in row \d+: expected whole succ"),
        ("share ~ x + (1 | g)", "half", "'half' is 1.5 in row .*: expected whole numbers, trials"),
        ("share ~ x + (1 | g)", "none", "the weight 'none' is 0 in row .*: expected a positive"),
        ("share ~ x + (1 | g)", 3, "`weights` is 3"),
    ],
)
def test_weights_that_do_not_fit_are_refused(formula, weights, said):
    own = table().assign(half=WEIGHTS + 0.5, none=0.0)
    own["half"] = 1.5
    with pytest.raises((InputError, TypeError), match=said):
        glmm(formula, own, weights=weights)


def test_what_weights_make_no_sense_of_is_refused():
    result = glmm("count ~ x + (1 | g)", table(), "poisson", weights="w")
    with pytest.raises(InputError, match="`result` has prior weights, and a power of a density"):
        simulate(result, 1)
    other = glmm("count ~ 1 + (1 | g)", table(), "poisson")
    with pytest.raises(InputError, match="have other weights, 1 and"):
        likelihood_ratio_test(other, result)
    loss = LaplaceLoss(covariance(torch.arange(N), False), Poisson())
    with pytest.raises(InputError, match="`weights` is 0 in row 3: expected a positive number"):
        loss(COUNTS, ETA, weights=torch.where(torch.arange(N) == 3, 0.0, WEIGHTS))


def test_weights_and_proportions_have_no_gradient():
    V = CovariancePropagation(DummyMatrix.from_codes(CODES, LEVELS), ScalarMatrix(LEVELS)).double()
    loss, share = LaplaceLoss(V, Binomial()), COUNTS / TRIALS
    loss(share, ETA, weights=TRIALS)  # the same numbers, which are then known as checked
    with pytest.raises(InputError, match="`y` requires a gradient"):
        loss(share.clone().requires_grad_(), ETA, weights=TRIALS)
    with pytest.raises(InputError, match="`weights` requires a gradient"):
        loss(BINARY, ETA, weights=WEIGHTS.clone().requires_grad_())


@pytest.mark.parametrize("sure_first", [False, True])
def test_rows_of_which_all_trials_agree_are_added_to_proportions(sure_first):
    torch.manual_seed(0)
    sure = torch.arange(N) < 6
    share = torch.where(sure, (CODES % 2).double(), (COUNTS / TRIALS).clamp(max=0.9))
    trials = torch.where(sure, TRIALS, 10.0)
    batch = {
        "x": X[:, 1:],
        "y": torch.where(sure, share, (share * 10).round() / 10),
        "weights": trials,
        "groups": {"g": CODES},
    }
    model = MixedModel(nn.Linear(1, 1).double(), {"g": RandomEffect(LEVELS)}, family=Binomial())
    model.double().update(batch)
    wanted = model.random["g"].known()

    def part(rows):
        own = {key: value[rows] for key, value in batch.items() if key != "groups"}
        return own | {"groups": {"g": CODES[rows]}}

    first, rest = (sure, ~sure) if sure_first else (~sure, sure)
    model.update(part(first))
    model.add(part(rest))
    for found, expected in zip(model.random["g"].known(), wanted):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
