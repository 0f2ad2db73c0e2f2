"""Networks with random effects beside embeddings and boosted trees:
``python -m tests.benchmarks.neural [study ...] --seeds 3``.

Each fit runs in a process of its own on one core. A study is simulated once for each seed, and each method
predicts the same rows held out; the table has means over the seeds, with the standard deviation between
them. ``seconds`` are of the processor. ``floor`` is the error of the predictor that knows the mean function and the covariances.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import queue
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pandas as pd
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from openreml_nn import MixedModel, fit_reml
from openreml_nn.lightning import MixedModule
from tests.benchmarks.studies import STUDIES, Data, network

BATCH = 512
RATE = 0.006
DECAY = 0.1
#: A fit that takes longer is given up.
MOST_SECONDS = 3600


class _Rows(Dataset[dict[str, object]]):
    """Rows for training, many at once."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.train)

    def __getitem__(self, at: list[int]) -> dict[str, object]:
        return self.data.batch(self.data.train[at])


def random_effects(data: Data) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Predictions, variances and components of the network with random effects."""
    model = MixedModel(network(data.x.shape[1]), data.random())
    rate = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": RATE}
    module = MixedModule(
        model,
        {"_target_": "torch.optim.AdamW", "lr": RATE, "weight_decay": DECAY},
        scheduler={**rate, "total_steps": data.epochs + 1},
    )
    rows = _Rows(data)
    order = BatchSampler(RandomSampler(rows), BATCH, drop_last=False)
    trainer = Trainer(
        max_epochs=data.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, sampler=order, batch_size=None))
    found = model.predict(data.batch(data.test))
    components = {p.name: p.value for p in module.result.parameters if "/effects/" not in p.name}
    for name, effect in model.random.items():
        if effect.effects > 1:
            prior = effect.prior()
            components |= {f"{name}[{i},{i}]": float(v) for i, v in enumerate(prior.diagonal())}
            components[f"{name}[1,0]"] = float(prior[1, 0])
    return found.mean, found.variance, components


def linear(data: Data) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Predictions of the linear mixed model, by REML."""

    def rows(at: Tensor) -> dict[str, object]:
        x, y = data.x[at].double(), data.y[at].double()
        values = {name: value[at].double() for name, value in data.values.items()}
        x = torch.cat([torch.ones(len(x), 1), x], 1)
        return data.batch(at) | {"x": x, "y": y, "values": values}

    model = MixedModel(nn.Identity(), data.random(), head="gls")
    train = rows(data.train)
    result = fit_reml(model.covariance(train), train["y"], train["x"])
    model.update(train)
    found = model.predict(rows(data.test))
    return found.mean, found.variance, {p.name: p.value for p in result.parameters}


class _Embedded(nn.Module):
    """The network on x and ten learned numbers of each level."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.encodings = nn.ModuleList(nn.Embedding(q, 10) for q in data.levels.values())
        width = data.x.shape[1] + 10 * len(data.levels) + (0 if data.places is None else 2)
        self.network = network(width)

    def forward(self, data: Data, at: Tensor) -> Tensor:
        codes = [codes[at] for codes in data.groups.values()]
        parts = [data.x[at], *(e(c) for e, c in zip(self.encodings, codes, strict=True))]
        if data.places is not None:
            parts.append(data.places[codes[0]].float() / 10)
        return self.network(torch.cat(parts, 1))[:, 0]


def embedding(data: Data) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Predictions of a network with embeddings of the levels, by least squares."""
    module = _Embedded(data)
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=data.epochs)
    for _ in range(data.epochs):
        for at in data.train[torch.randperm(len(data.train))].split(BATCH):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(data, at), data.y[at]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return module(data, data.test), None, {}


def gpboost(data: Data) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Boosted trees with random effects of the same form, 200 trees."""
    import gpboost as gpb

    def grouping(at: Tensor) -> dict[str, object]:
        if data.places is not None:
            return {"gp_coords": data.places[data.groups["place"][at]].numpy()}
        found = {"group_data": torch.stack([c[at] for c in data.groups.values()], 1).numpy()}
        if data.values:
            (values,) = data.values.values()
            found["group_rand_coef_data"] = values[at][:, 1:].double().numpy()
        return found

    options: dict[str, object] = {"likelihood": "gaussian", **grouping(data.train)}
    if data.values:
        ((name, values),) = data.values.items()
        factor = 1 + list(data.groups).index(name)
        options["ind_effect_group_rand_coef"] = [factor] * (values.shape[1] - 1)
    if data.places is not None:
        options |= {"cov_function": "gaussian", "gp_approx": "vecchia_latent"}
    model = gpb.GPModel(**options)
    x, y = (v.double().numpy() for v in (data.x, data.y))
    train, test = data.train.numpy(), data.test.numpy()
    settings = {"learning_rate": 0.1, "max_depth": 6, "verbose": -1, "num_threads": 1}
    trees = gpb.train(settings, gpb.Dataset(x[train], y[train]), 200, gp_model=model)
    new = {f"{key}_pred": value for key, value in grouping(data.test).items()}
    found = trees.predict(data=x[test], predict_var=True, pred_latent=False, **new)
    table = model.get_cov_pars(format_pandas=True)
    components = {str(name): float(table[name].iloc[0]) for name in table.columns}
    mean, variance = (torch.as_tensor(found[k]) for k in ("response_mean", "response_var"))
    return mean, variance, components


METHODS: dict[str, Callable[[Data], tuple[Tensor, Tensor | None, dict[str, float]]]] = {
    "random effects": random_effects,
    "linear": linear,
    "embedding": embedding,
    "gpboost": gpboost,
}


def _run(study: str, seed: int, method: str, rows: int, answer: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = STUDIES[study](seed, **({"n": rows} if rows else {}))
    if method == "floor":
        answer.put({"mse": data.oracle()})
        return
    torch.manual_seed(seed)
    start = time.process_time()
    mean, variance, components = METHODS[method](data)
    found = {"seconds": time.process_time() - start}
    error = mean.double() - data.y[data.test]
    found["mse"] = float((error**2).mean())
    if variance is not None:
        found["coverage"] = float((error.abs() < 1.96 * variance.sqrt()).double().mean())
    answer.put({**found, **components})


def _found(study: str, seed: int, method: str, rows: int) -> dict[str, float]:
    """What a process of its own finds; nothing if it fails or takes too long."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_run, args=(study, seed, method, rows, answer))
    process.start()
    deadline = time.monotonic() + MOST_SECONDS
    while time.monotonic() < deadline:
        try:
            found = answer.get(timeout=1)
        except queue.Empty:
            if process.is_alive():
                continue
            break
        process.join()
        return found
    process.kill()
    process.join()
    return {}


def _lines(study: str, seeds: int, methods: list[str], rows: int) -> Iterator[str]:
    """The table of a study, and the components."""
    table = []
    wanted = methods if study.startswith("insteval") else ["floor", *methods]
    for seed in range(1, seeds + 1):
        floor = float("nan")
        for method in wanted:
            if method == "gpboost" and find_spec("gpboost") is None:
                continue
            found = _found(study, seed, method, rows)
            floor = found.get("mse", floor) if method == "floor" else floor
            print(f"# {study} seed {seed} {method}: {found or 'failed'}", flush=True)
            table.append(
                {
                    "method": method,
                    "seed": seed,
                    **found,
                    "of floor": found.get("mse", float("nan")) / floor,
                }
            )
    frame = pd.DataFrame(table).drop(columns="seed")
    means, spread = (frame.groupby("method", sort=False).agg(kind) for kind in ("mean", "std"))
    columns = [c for c in ("mse", "of floor", "coverage", "seconds") if c in frame]
    yield f"{study}, {seeds} seeds: {_said(study)}"
    yield f"{'':16}" + "".join(f"{column:>22}" for column in columns)
    for method in means.index:
        cells = [_cell(means.loc[method, c], spread.loc[method, c]) for c in columns]
        yield f"{method:16}" + "".join(f"{cell:>22}" for cell in cells)
    for method in means.index:
        parts = means.loc[method].drop(columns).dropna()
        texts = (f"{name} {_cell(parts[name], spread.loc[method, name])}" for name in parts.index)
        if len(parts):
            yield f"{method}: " + ", ".join(texts)


def _cell(mean: float, spread: float) -> str:
    if math.isnan(mean):
        return ""
    digits = 1 if mean > 10 else 4
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" +- {spread:.{digits}f}")


def _said(study: str) -> str:
    """The first sentence of what the study's function says."""
    made = STUDIES[study]
    return " ".join((getattr(made, "func", made).__doc__ or "").split()).partition(".")[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.neural", description=__doc__)
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], help="all by default")
    parser.add_argument("--seeds", type=int, default=3, help="simulations, or folds, of each")
    parser.add_argument("--methods", nargs="*", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--rows", type=int, default=0, help="of the data, to try the command out")
    options = parser.parse_args()
    for study in options.studies or STUDIES:
        for line in _lines(study, options.seeds, options.methods, options.rows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
