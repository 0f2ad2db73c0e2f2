"""Careless calls of all that is public: each wrong argument ends in an error that names it.

A short run, the same each time, is part of the tests. The long one tries every wrong value and
prints the worst offenders, of one package or of all:

    python -m tests.fuzz.test_public_interface [covariance]
"""

import contextlib
import copy
import importlib
import inspect
import io
import os
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import openreml_nn.covariance as cov
import openreml_nn.covariance.transform as trans
import openreml_nn.estimation as estimation
import openreml_nn.inference as inference
import openreml_nn.lightning as lightning
import openreml_nn.likelihood as likelihood
import openreml_nn.metrics as metrics
import openreml_nn.report as report
from openreml_nn import (
    AIREML,
    LaplaceLoss,
    MixedModel,
    RandomEffect,
    REMLLoss,
    datasets,
    families,
    fit_reml,
    fit_stream,
    glmm,
    lmm,
    restricted_log_likelihood,
)
from openreml_nn.estimation import moment_start

pytestmark = pytest.mark.fuzz

PACKAGES = [
    "",
    "covariance",
    "covariance.transform",
    "likelihood",
    "estimation",
    "inference",
    "metrics",
    "lightning",
    "report",
    "datasets",
    "families",
]
#: Share of the careless calls that must end in an error that names the argument.
GOAL = {"": 0.95, "covariance": 0.95, "covariance.transform": 0.95, "likelihood": 0.95, "estimation": 0.95,
        "inference": 0.95, "metrics": 0.95, "lightning": 0.95, "report": 0.95, "datasets": 0.95,
        "families": 0.95}  # fmt: skip

# ---------------------------------------------------------------------- wrong values


@dataclass(frozen=True)
class Kind:
    """What an argument takes: ``fits`` tells a value that is right, or may be."""

    fits: Callable[[Any], bool]
    more: tuple[Any, ...] = ()

    def pool(self) -> list[Any]:
        return [value for value in (*ANYTHING, *self.more) if not self.fits(value)]


def double(*shape, value=0.5):
    return torch.full(shape, value, dtype=torch.float64)


ANYTHING = (
    None,
    "nonsense",
    "",
    3,
    -1,
    0,
    2.5,
    float("nan"),
    float("inf"),
    True,
    1j,
    b"bytes",
    [1.0, 2.0],
    ["a", "b"],
    [],
    (),
    {},
    {"a": 1},
    np.zeros(3),
    np.zeros((2, 2)),
    pd.DataFrame({"a": [1.0]}),
    double(3),
    double(0),
    double(2, 2),
    double(3, value=float("nan")),
    torch.arange(3),
    torch.zeros(3, device="meta"),
    torch.zeros(3, dtype=torch.complex64),
    object(),
    int,
    nn.Linear(1, 1),
    cov.ScalarMatrix(7),
    nn.Parameter(double(1)),
)


def optional(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.fits(value), kind.more)


def count(least=0) -> Kind:
    def fits(value):
        return isinstance(value, Integral) and not isinstance(value, bool) and value >= least

    return Kind(fits, (least - 1, -100, 3.5))


def number(least=-np.inf, most=np.inf) -> Kind:
    def fits(value):
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        return is_number and bool(np.isfinite(value)) and least < value < most

    return Kind(fits, (-2.0, 1.5))


def tensor(*shape, whole=True, floating=True, finite=True) -> Kind:
    """A tensor of a shape, None for any size; ``whole`` and ``floating`` are the dtypes taken."""

    def fits(value):
        if not isinstance(value, torch.Tensor) or value.is_meta or value.is_complex():
            return False
        if value.dtype == torch.bool or not (floating if value.is_floating_point() else whole):
            return False
        sizes = zip(value.shape, shape, strict=False)
        if value.dim() != len(shape) or any(b is not None and a != b for a, b in sizes):
            return False
        return (bool(torch.isfinite(value).all()) and bool(value.numel())) or not finite

    own = [4 if size is None else size for size in shape]
    return Kind(
        fits,
        (
            double(*own, value=float("nan")),
            double(*own, value=float("inf")),
            double(*own, 1),
            double(*(size + 1 for size in own)),
            double(*own).tolist(),
            double(*own).numpy(),
            torch.zeros(own, dtype=torch.complex128),
            torch.zeros(own, dtype=torch.bool),
            torch.zeros(own, device="meta"),
        ),
    )


def of(*classes) -> Kind:
    return Kind(lambda value: isinstance(value, classes))


never = Kind(lambda value: False)
flag = of(bool)
path = of(str)
text = of(str)
choice = Kind(lambda value: False, ("ML", "Reml", "auto ", ["reml"]))
names = Kind(
    lambda value: (
        isinstance(value, list | tuple | pd.Index) and all(isinstance(item, str) for item in value)
    )
)
mapping = Kind(lambda value: isinstance(value, dict) and not value, ({1: 2}, {"g": None}))
module = of(nn.Module)
#: A formula, a table, a result, a run: no value of the pool is one.
formula = table = result_kind = never

# ---------------------------------------------------------------------- calls


@dataclass
class Call:
    """A call that works, and what each of its arguments takes."""

    package: str
    name: str
    function: Callable[..., Any]
    good: dict[str, Any]
    kinds: dict[str, Kind]
    #: What a message may call an argument besides its name.
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)


FORMULA = "Reaction ~ Days + (1 | Subject)"


@cache
def result():
    return lmm(FORMULA, datasets.sleepstudy())


@cache
def large():
    return lmm("Reaction ~ Days + (Days || Subject)", datasets.sleepstudy())


def batch():
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(12, 2)
    return {"x": x, "y": x[:, 0] * 2 + 0.1, "groups": {"g": torch.arange(12) % 4}}


def network_model(head="ml"):
    return MixedModel(nn.Linear(2, 1).double(), {"g": RandomEffect(4)}, head=head)


def _batch_pool():
    """Batches with a part that is missing or wrong."""
    found = [{}, {"x": batch()["x"]}, [batch()], (batch()["x"], batch()["y"])]
    for key in ("x", "y", "groups"):
        found.append({k: v for k, v in batch().items() if k != key})
        for value in (None, "text", [1.0], np.zeros(12), double(3), torch.zeros(12, device="meta")):
            found.append({**batch(), key: value})
    x, y, g = batch()["x"], batch()["y"], batch()["groups"]["g"]
    for groups in (g, {"h": g}, {"g": g.tolist()}, {"g": g.double()}, {"g": g[:5]}, {"g": g + 9}):
        found.append({**batch(), "groups": groups})
    nan = torch.full_like(y, float("nan"))
    found += [{**batch(), "y": wrong} for wrong in (nan, y[:, None], y.long(), y.numpy(), y + 1j)]
    found += [{**batch(), "x": wrong} for wrong in (x.float(), x.numpy(), x * float("nan"))]
    found += [{**batch(), "values": wrong} for wrong in (3, [1.0], {"g": double(5, 1)}, {"g": 1})]
    return tuple(found)


BATCH = Kind(lambda value: False, _batch_pool())


def reads(*keys) -> Kind:
    """A batch of which only some parts are read: it is right if these are."""
    good = batch()

    def fits(value):
        if not isinstance(value, dict) or "values" in value:
            return False
        parts = [(value.get(key), good[key]) for key in keys]
        return all(torch.equal(a, b) if torch.is_tensor(b) and torch.is_tensor(a) and not a.is_meta
                   else str(a) == str(b) for a, b in parts)  # fmt: skip

    return Kind(fits, BATCH.more)


BATCH_WORDS = ("batch", "x", "y", "groups", "group", "values", "'g'")
OPTIONS = {"method": choice, "solver": choice}


SLOW = "slow ~ Days + (1 | Subject)"


def slow():
    """Reactions that are slow or not."""
    return datasets.sleepstudy().assign(slow=lambda t: t.Reaction > 300)


def _top() -> list[Call]:
    one = cov.ScalarMatrix(6).double()
    data = {"y": double(6), "X": torch.eye(6, 2, dtype=torch.float64)}
    y_X = {"y": tensor(6, whole=False), "X": tensor(6, None, whole=False)}
    made = [
        Call("", "MixedModel", MixedModel, {"mean": nn.Linear(2, 1), "random": {"g": RandomEffect(4)}},
             {"mean": module, "random": Kind(lambda v: False, ({"g": 4}, [RandomEffect(2)])),
              "residual": optional(module), "head": choice, "method": optional(choice), "solver": choice,
              "responses": optional(count(1))}),
        Call("", "RandomEffect", RandomEffect, {"levels": 4},
             {"levels": Kind(lambda v: count(1).fits(v) or (names.fits(v) and len(v) > 0)),
              "covariance": Kind(lambda v: v is None), "features": optional(module),
              "effects": Kind(lambda v: count(1).fits(v) or (names.fits(v) and len(v) > 0)),
              "responses": Kind(lambda v: count(1).fits(v) or (names.fits(v) and len(v) > 0)),
              "places": Kind(lambda v: v is None)}),
        Call("", "REMLLoss", REMLLoss, {"covariance": one},
             {"covariance": of(cov.Matrix), "reduction": choice, **OPTIONS}),
        Call("", "REMLLoss.forward", REMLLoss(one), data,
             {**y_X, "rows": optional(tensor(6, floating=False))}),
        Call("", "REMLLoss.objective", REMLLoss(one).objective, data,
             {**y_X, "rows": optional(tensor(6, floating=False))}),
        Call("", "fit_reml", fit_reml, {"covariance": one, **data},
             {"covariance": never, **y_X, **OPTIONS, "rows": optional(tensor(6, floating=False)),
              "start": choice, "max_iterations": count(1),
              "names": Kind(lambda v: v is None or (names.fits(v) and len(v) == 2)),
              "labels": optional(mapping)}),
        Call("", "AIREML", AIREML, {"params": list(one.parameters())},
             {"params": of(nn.Module, nn.Parameter), "tolerance": number(0)}),
        Call("", "AIREML.step", AIREML(one.parameters()).step, {"closure": lambda: 0.0},
             {"closure": Kind(callable)}),
        Call("", "lmm", lmm, {"formula": FORMULA, "table": datasets.sleepstudy()},
             {"formula": formula, "table": table, "categorical": names, "residual": optional(never),
              "weights": optional(never), "residual_variance": optional(number(1e-9)), **OPTIONS,
              "max_iterations": count(1)}),
        Call("", "glmm", glmm, {"formula": SLOW, "table": slow(), "family": "binomial"},
             {"formula": formula, "table": table, "categorical": names, "family": choice,
              "link": optional(choice), "quadrature": count(1), **OPTIONS, "max_iterations": count(1)}),
        Call("", "LaplaceLoss", LaplaceLoss, {"covariance": one, "family": families.Poisson()},
             {"covariance": of(cov.Matrix), "family": of(families.Family), "quadrature": count(1),
              **OPTIONS}),
        Call("", "LaplaceLoss.forward", LaplaceLoss(one, families.Gaussian()),
             {"y": double(6), "eta": double(6)},
             {"y": tensor(6), "eta": tensor(6, whole=False),
              "X": optional(tensor(6, None, whole=False)), "rows": optional(tensor(6, floating=False))},
             {"y": ("response", "`y`")}),
        Call("", "fit_stream", fit_stream,
             {"formula": FORMULA, "path": str(datasets.table_path("sleepstudy")), "progress": False},
             {"formula": formula, "path": never, "chunk_rows": count(1), "categorical": names,
              "weights": optional(never), "residual": optional(never), "residual_variance": optional(number(1e-9)),
              "method": choice, "solver": choice, "max_iterations": count(1), "progress": flag}),
        Call("", "restricted_log_likelihood", restricted_log_likelihood,
             {**data, "V": torch.eye(6, dtype=torch.float64)},
             {**y_X, "V": tensor(6, 6, whole=False), "method": choice}),
        Call("", "Result.predict", result().predict, {"table": datasets.sleepstudy()},
             {"table": of(pd.DataFrame), "level": number(1e-9, 1 - 1e-9)}),
        Call("", "Result.update", result().update, {"table": datasets.sleepstudy()},
             {"table": of(pd.DataFrame)}),
        Call("", "Result.summary", result().summary, {}, {"title": optional(text)}),
        Call("", "Result.to_json", result().to_json, {"path": "r.json"}, {"path": path}),
    ]  # fmt: skip
    x = batch()["x"]
    for head in ("ml", "gls"):
        model = network_model(head)
        model.update(batch())
        output = model(batch())
        made += [
            Call("", f"MixedModel.{name} ({head})", getattr(model, name), {"batch": batch()},
                 {"batch": reads(*keys)}, {"batch": BATCH_WORDS})
            for name, keys in (("loss", ("x", "y", "groups")), ("predict", ("x", "groups")),
                               ("update", ("x", "y", "groups")), ("add", ("x", "y", "groups")),
                               ("objective", ("x", "y", "groups")))
        ]  # fmt: skip
        made.append(
            Call("", f"MixedModel.loss_of ({head})", model.loss_of,
                 {"output": output, "batch": batch()},
                 {"output": tensor(*output.shape, whole=False), "batch": reads("y", "groups")},
                 {"output": ("mean", "network", "batch"), "batch": BATCH_WORDS})
        )  # fmt: skip
    model = network_model()
    made += [
        Call("", "MixedModel.forward", model, {"batch": {"x": x}},
             {"batch": Kind(lambda v: False, ({"y": x}, {"x": x.numpy()}, {"x": [1]}, {"x": double(3, 7)}))},
             {"batch": ("x",)}),
        Call("", "MixedModel.backward_in_parts", model.backward_in_parts, {"batch": batch(), "rows": 4},
             {"batch": BATCH, "rows": count(1)}, {"batch": BATCH_WORDS}),
    ]  # fmt: skip
    return made


def _covariance() -> list[Call]:
    specs = {"param_specs": optional(mapping)}
    sized = {
        cov.AR1Matrix: {"n": 3}, cov.AntedependenceMatrix: {"n": 3}, cov.DiagonalMatrix: {"n": 3},
        cov.CompoundSymmetricMatrix: {"n": 3}, cov.EqualEntryMatrix: {"n": 3},
        cov.EquicorrelationMatrix: {"n": 3}, cov.ScalarMatrix: {"n": 3}, cov.ToeplitzMatrix: {"n": 3},
        cov.StationaryMatrix: {"n": 3},
        cov.UnconstrainedMatrix: {"n": 3}, cov.UnstructuredMatrix: {"n": 3},
        cov.LowerTriangularMatrix: {"n": 3, "m": 2}, cov.ARMAMatrix: {"n": 3},
    }  # fmt: skip
    least = {cov.EquicorrelationMatrix: 2}
    found = []
    for made, good in sized.items():
        kinds = {"n": count(least.get(made, 1)), **specs}
        if made in (cov.EqualEntryMatrix, cov.ToeplitzMatrix):
            kinds["m" if made is cov.EqualEntryMatrix else "bands"] = optional(count(0))
        if made is cov.LowerTriangularMatrix:
            kinds["m"] = count(1)
        found.append(Call("covariance", made.__name__, made, good, kinds))
        found += _of_parameters(made(**good))
    size = double(3, 3)
    square = torch.eye(3, dtype=torch.float64)
    distance = (torch.arange(3.0)[:, None] - torch.arange(3.0)).abs()
    word = {"distance": ("distances",)}
    for made in (cov.ExponentialMatrix, cov.GaussianMatrix, cov.MaternMatrix, cov.SphericalMatrix,
                 cov.LinearMatrix, cov.RationalQuadraticMatrix,
                 cov.ContinuousAR1Matrix):  # fmt: skip
        kinds = {"distance": tensor(None, None, whole=False), **specs}
        if made is cov.MaternMatrix:
            kinds["nu"] = Kind(lambda v: v in (0.5, 1.5, 2.5) if isinstance(v, float) else False)
        found.append(Call("covariance", made.__name__, made, {"distance": distance}, kinds, word))
    found += _of_parameters(cov.ExponentialMatrix(distance))
    for made in (cov.Correlation, cov.ExponentialCorrelation, cov.GaussianCorrelation,
                 cov.SphericalCorrelation, cov.LinearCorrelation,
                 cov.RationalQuadraticCorrelation):  # fmt: skip
        found.append(Call("covariance", made.__name__, made, {}, {}))
    nu = Kind(lambda v: v in (0.5, 1.5, 2.5) if isinstance(v, float) else False)
    found.append(
        Call("covariance", "MaternCorrelation", cov.MaternCorrelation, {"nu": 1.5}, {"nu": nu})
    )
    places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    found.append(
        Call("covariance", "VecchiaMatrix", cov.VecchiaMatrix,
             {"places": places, "correlation": cov.MaternCorrelation(1.5), "neighbours": 2},
             {"places": tensor(None, None, whole=False), "correlation": of(cov.Correlation),
              "neighbours": count(1), **specs})
    )  # fmt: skip
    pairs = {"adjacency": torch.tensor([[0, 1], [1, 2]])}
    for made in (cov.CARMatrix, cov.ICARMatrix):
        found.append(
            Call(
                "covariance", made.__name__, made, pairs, {"adjacency": tensor(None, None), **specs}
            )
        )
    found.append(
        Call("covariance", "RandomWalkMatrix", cov.RandomWalkMatrix, {"n": 5, "order": 2},
             {"n": count(1), "order": Kind(lambda v: type(v) is int and v in (1, 2)), **specs})
    )  # fmt: skip
    found.append(
        Call("covariance", "VarianceFunction", cov.VarianceFunction,
             {"covariate": torch.tensor([1.0, 2.0])},
             {"covariate": tensor(None, whole=False), "kind": choice, **specs})
    )  # fmt: skip
    operand = Kind(lambda v: isinstance(v, cov.Matrix) and v.shape == (3, 3), (size[:, :2], "g"))
    words = {"operands": ("operand", "op_0", "op_1", "op_2", "positional")}
    for made in (cov.Sum, cov.BlockDiagonal, cov.KroneckerProduct, cov.HadamardProduct, cov.Product,
                 cov.Transpose, cov.Inverse, cov.Gram, cov.Augment, cov.Stack,
                 cov.CovariancePropagation, cov.Heteroscedastic, cov.kron):  # fmt: skip
        single = made in (cov.Transpose, cov.Inverse, cov.Gram)
        count_of = 1 if single else 2

        def call(operand, made=made, more=count_of - 1):
            return made(*[cov.ScalarMatrix(3) for _ in range(more)], operand)

        takes = operand
        if made in (cov.BlockDiagonal, cov.KroneckerProduct, cov.kron, cov.Augment, cov.Stack):
            takes = of(cov.Matrix)
        if single:
            takes = of(cov.Matrix)
        # A finite real matrix is an operand too, where its shape fits.
        fits = _or_matrix(takes, made)
        found.append(
            Call("covariance", made.__name__, call, {"operand": cov.ScalarMatrix(3)},
                 {"operand": fits}, {"operand": (*words["operands"], "`z`", "`g`", "`variance`", made.__name__)})
        )  # fmt: skip
    found.append(
        Call("covariance", "Gram", lambda gram_type: cov.Gram(cov.ScalarMatrix(3), gram_type=gram_type),
             {"gram_type": "xxt"}, {"gram_type": choice})
    )  # fmt: skip
    tree = cov.Sum(cov.AR1Matrix(3), cov.ScalarMatrix(3))
    found += _of_parameters(tree)
    found += [
        Call("covariance", f"Operator.{name}", getattr(tree, name), {"free_params": None},
             {"free_params": _free_params(tree)}, FREE_WORDS)
        for name in ("build_operands", "operands_grad")
    ]  # fmt: skip
    labels = Kind(lambda v: isinstance(v, list | tuple | np.ndarray | pd.Index) and len(v) > 0)
    codes = {"codes": torch.tensor([0, 1, 1]), "levels": 2}
    pedigree = cov.Pedigree.of(["a", "b", "c"], [None, None, "a"], [None, None, "G"], ["G"])
    calls = pd.DataFrame({"m": [0, 1, 2], "n": [2, 0, 1]}, ["a", "b", "c"])
    K = pd.DataFrame(np.eye(3) + 0.1, list("abc"), list("abc"))
    of_pedigree = Kind(lambda v: v in (["a", "b"], None) if not hasattr(v, "shape") else False)
    frequencies = optional(Kind(lambda v: False, ({"m": 2.0, "n": 0.5}, {"m": 0.5})))
    markers = {"markers": never, "method": choice, "frequencies": frequencies}
    weight = Kind(lambda v: isinstance(v, Real) and not isinstance(v, bool) and 0 <= v < np.inf)
    found += [
        Call("covariance", made.__name__, made,
             {"markers": calls, "method": "vanraden1", "frequencies": None}, markers)
        for made in (cov.genomic_relationship, cov.marker_codes)
    ]  # fmt: skip
    found += [
        Call("covariance", "marker_effects", cov.marker_effects,
             {"codes": cov.marker_codes(calls), "values": pd.Series([1.0, 2.0, 3.0], list("abc"))},
             {"codes": never, "values": never}),
        Call("covariance", "epistatic_relationship", cov.epistatic_relationship,
             {"one": K, "other": K, "scaled": True}, {"one": never, "other": never, "scaled": flag}),
        Call("covariance", "single_step_relationship", cov.single_step_relationship,
             {"pedigree": pedigree, "genomic": K, "tau": 1.0},
             {"pedigree": never, "genomic": never, "alpha": never, "beta": weight, "tau": weight,
              "omega": weight, "tuned": flag},
             {"alpha": ("genomic",), "tau": ("genomic",)}),
        Call("covariance", "Pedigree.grouped", pedigree.grouped, {"variance": 1.0},
             {"variance": number(0)}),
        Call("covariance", "Pedigree.relationship", pedigree.relationship, {"animals": ["a", "b"]},
             {"animals": of_pedigree}),
        Call("covariance", "Pedigree.positions", pedigree.positions, {"animals": ["a", "b"]},
             {"animals": Kind(lambda v: isinstance(v, list) and v == ["a", "b"])}),
        Call("covariance", "Relationship.design", pedigree.grouped(1.0).design, {"animal": ["a", "G"]},
             {"animal": Kind(lambda v: isinstance(v, list) and v == ["a", "b"])}),
    ]  # fmt: skip
    found += [
        Call("covariance", "IdentityMatrix", cov.IdentityMatrix, {"n": 3}, {"n": count(1)}),
        Call("covariance", "simple_param_specs", cov.simple_param_specs, {"n": 3},
             {"n": count(1), "default": optional(tensor(3)), "trans": optional(of(trans.Transform))}),
        Call("covariance", "KnownMatrix", cov.KnownMatrix, {"matrix": square},
             {"matrix": tensor(None, None, whole=False), **specs}),
        Call("covariance", "KnownInverseMatrix", cov.KnownInverseMatrix, {"inverse": square},
             {"inverse": tensor(None, None, whole=False), **specs}),
        Call("covariance", "Matrix", cov.Matrix, {"shape": (3, 3), "param_specs": {}},
             {"shape": Kind(lambda v: v == (3, 3) if isinstance(v, tuple) else False, ((1,), (3, "a"), (-1, 2))),
              "param_specs": mapping}),
        Call("covariance", "SimpleMatrix", cov.SimpleMatrix,
             {"num_free_params": 2, "call": torch.diag},
             {"num_free_params": count(1), "call": Kind(callable), "manual_grad": optional(Kind(callable)),
              "default": optional(tensor(2))}),
        Call("covariance", "Adapter", cov.Adapter,
             {"adaptee": cov.AR1Matrix(3), "param_specs": {"a": spec()},
              "param_map": lambda theta: theta.repeat(2)},
             {"adaptee": of(cov.Matrix), "param_specs": mapping, "param_map": Kind(callable)}),
        Call("covariance", "DummyMatrix", lambda labels, **more: cov.DummyMatrix(labels, **more),
             {"labels": ["a", "b", "a"]},
             {"labels": labels, "levels": optional(Kind(lambda v: isinstance(v, list | tuple))),
              "lex_order": flag, "drop_first": flag, "drop_empty_cols": flag,
              "covariates": optional(tensor(3, None))}),
        Call("covariance", "DummyMatrix.from_codes", cov.DummyMatrix.from_codes, codes,
             {"codes": tensor(3, floating=False), "levels": Kind(lambda v: count(2).fits(v)),
              "values": optional(tensor(3, None))}),
        Call("covariance", "MembershipMatrix", cov.MembershipMatrix, codes | {"codes": torch.tensor([[0, 1], [1, 1]])},
             {"codes": tensor(2, 2, floating=False), "levels": Kind(lambda v: count(2).fits(v)),
              "values": optional(tensor(2, 2)), "separate": flag}),
        Call("covariance", "Pedigree.of", cov.Pedigree.of,
             {"animal": ["a", "b", "c"], "sire": [None, None, "a"], "dam": [None, None, "b"]},
             {"animal": names, "sire": labels, "dam": labels, "groups": Kind(lambda v: isinstance(v, list | tuple) and not v),
              "hermaphrodite": flag}),
        Call("covariance", "Pedigree.design",
             cov.Pedigree.of(["a", "b"], [None, None], [None, None]).design, {"animal": ["a", "b"]},
             {"animal": Kind(lambda v: isinstance(v, list) and v == ["a", "b"])}),
        Call("covariance", "ar1_field", cov.ar1_field, {"rows": 3, "columns": 2},
             {"rows": count(1), "columns": count(1)}),
        Call("covariance", "factor_analytic", cov.factor_analytic, {"n": 4, "k": 1},
             {"n": count(2), "k": Kind(lambda v: count(1).fits(v) and v <= 4)}),
        Call("covariance", "heterogeneous", cov.heterogeneous, {"correlation": cov.EquicorrelationMatrix(3)},
             {"correlation": of(cov.Matrix)}),
        Call("covariance", "heterogeneous_ar1", cov.heterogeneous_ar1, {"n": 3}, {"n": count(1)}),
        Call("covariance", "heterogeneous_compound_symmetry", cov.heterogeneous_compound_symmetry,
             {"n": 3}, {"n": count(2)}),
        Call("covariance", "stratified", cov.stratified, {"strata": ["a", "b", "a"]}, {"strata": labels}),
        Call("covariance", "weighted", cov.weighted, {"weights": double(3)},
             {"weights": Kind(lambda v: tensor(None).fits(v) and bool((v > 0).all()))}),
        Call("covariance", "within", cov.within, {"groups": ["a", "a", "b"], "matrix": cov.AR1Matrix(2)},
             {"groups": labels, "matrix": of(cov.Matrix),
              "positions": optional(Kind(lambda v: isinstance(v, list | tuple | np.ndarray)))}),
    ]  # fmt: skip
    return found


def spec():
    return {"fixed": False, "default": torch.zeros(1), "trans": trans.TransformIdentity()}


def _or_matrix(kind: Kind, made) -> Kind:
    def fits(value):
        if isinstance(value, cov.Matrix) and made is cov.CovariancePropagation:
            return value.shape == (3, 3)
        if isinstance(value, np.ndarray):
            return True  # may be taken as a tensor
        is_matrix = isinstance(value, torch.Tensor) and value.dim() == 2 and value.numel()
        return kind.fits(value) or bool(is_matrix)

    return Kind(fits, kind.more)


def _free_params(matrix) -> Kind:
    k = matrix.num_free_params

    def fits(value):
        return value is None or tensor(k, whole=False, finite=False).fits(value)

    own = [double(k + 1), double(k, 1), torch.zeros(k, device="meta"), torch.arange(k), [0.0] * k]
    own += [{"nobody": double(1)}, dict.fromkeys(matrix.free_param_names, 1.0)]
    return Kind(fits, (*own, dict.fromkeys(matrix.free_param_names, double(3))))


FREE_WORDS = dict.fromkeys(("free_params", "theta"), ("free_params", "parameter", "theta"))


def _of_parameters(matrix) -> list[Call]:
    """Methods of a Matrix that take parameters; each call is of its own copy."""
    kind, n = _free_params(matrix), matrix.shape
    own = type(matrix).__name__
    takes = {
        "forward": {"free_params": kind},
        "build_params": {"free_params": kind, "include_fixed": flag, "trans": flag, "out_format": choice},
        "grad": {"free_params": kind},
        "manual_grad": {"free_params": kind},
        "auto_grad": {"free_params": kind},
        "trans_grad": {"free_params": kind},
        "manual_vjp": {"cotangent": tensor(*n, whole=False, finite=False), "free_params": kind},
        "map_theta_to_v": {"theta": kind},
        "map_theta_to_dv": {"theta": kind},
        "terms": {"rows": optional(Kind(lambda v: isinstance(v, torch.Tensor) and v.dtype == torch.long
                                        and not v.is_meta and bool((v < n[0]).all())))},
        "fix": {"name": Kind(lambda v: v in matrix.param_names if isinstance(v, str) else False),
                "value": optional(number())},
        "free": {"name": Kind(lambda v: v in matrix.param_names if isinstance(v, str) else False)},
    }  # fmt: skip
    if n[0] != n[1]:
        del takes["terms"]
    first = matrix.param_names[0]
    good = {
        "manual_vjp": {"cotangent": double(*n)},
        "fix": {"name": first},
        "free": {"name": first},
    }
    good["map_theta_to_v"] = good["map_theta_to_dv"] = {"theta": double(matrix.num_free_params)}
    words = {**FREE_WORDS, "name": ("parameter",), "value": ("value", first)}

    def method(name):
        def call(**given):
            return getattr(copy.deepcopy(matrix), name)(**given)

        return call

    return [
        Call("covariance", f"{own}.{name}", method(name), good.get(name, {}), kinds, words)
        for name, kinds in takes.items()
    ]


def _transform() -> list[Call]:
    value = Kind(
        lambda v: isinstance(v, torch.Tensor) and not v.is_complex() and v.dtype != torch.bool
    )
    made = [trans.TransformIdentity(), trans.TransformExp(), trans.TransformExpPow2(),
            trans.TransformSigmoid(), trans.TransformPow(2.0), trans.TransformScaleShift(2.0, 1.0),
            trans.TransformChain([trans.TransformExp()])]  # fmt: skip
    found = [
        Call("covariance.transform", "TransformPow", trans.TransformPow, {"factor": 2.0},
             {"factor": Kind(lambda v: number().fits(v) and v != 0)}),
        *(
            Call("covariance.transform", made.__name__, made, {}, {"degree": count(1)})
            for made in (trans.TransformExp2, trans.TransformExp10)
        ),
        Call("covariance.transform", "TransformScaleShift", trans.TransformScaleShift, {"a": 2.0},
             {"a": Kind(lambda v: number().fits(v) and v != 0), "b": number()}),
        Call("covariance.transform", "TransformChain", trans.TransformChain,
             {"chain": [trans.TransformExp()]}, {"chain": Kind(lambda v: False, ([int], [trans.TransformExp]))}),
    ]  # fmt: skip
    for t in made:
        own = type(t).__name__
        found += [
            Call("covariance.transform", f"{own}.__call__", t.__call__, {"x": double(2)}, {"x": value}),
            Call("covariance.transform", f"{own}.inverse", t.inverse, {"value": double(2)},
                 {"value": value}),
            Call("covariance.transform", f"{own}.grad", t.grad, {"x": double(2)}, {"x": value}),
        ]  # fmt: skip
    return found


def _likelihood() -> list[Call]:
    share = number(0, 1)
    return [
        Call("likelihood", "Auto", likelihood.Auto, {"memory": 1e9}, {"memory": number(0)}),
        Call("likelihood", "Blocked", likelihood.Blocked, {"pair_cost": 10.0},
             {"pair_cost": Kind(lambda v: number(-1).fits(v) and v >= 0)}),
        Call("likelihood", "Krylov", likelihood.Krylov,
             {"probes": 5, "tolerance": 1e-8, "probe_tolerance": 1e-4, "seed": 3},
             {"probes": optional(count(1)), "tolerance": share, "probe_tolerance": share,
              "seed": count()}),
        Call("likelihood", "Sparse", likelihood.Sparse, {"memory": 1e9}, {"memory": number(0)}),
    ]  # fmt: skip


def _estimation() -> list[Call]:
    one = REMLLoss(cov.ScalarMatrix(6).double())
    good = {"loss": one, "y": double(6), "X": torch.eye(6, 2, dtype=torch.float64)}
    kinds = {"loss": never, "y": tensor(6, whole=False), "X": tensor(6, None, whole=False)}
    kinds["rows"] = optional(tensor(6, floating=False))
    data = {"y": double(6), "X": torch.eye(6, 2, dtype=torch.float64)}
    data["V"] = torch.eye(6, dtype=torch.float64)
    takes = {"y": tensor(6, whole=False), "X": tensor(6, None, whole=False)}
    takes |= {"V": tensor(6, 6, whole=False), "theta": Kind(lambda v: v is None)}
    effects = {"Z": torch.eye(6, 3, dtype=torch.float64), "G": torch.eye(3, dtype=torch.float64)}
    takes_effects = {"Z": tensor(6, 3, whole=False), "G": tensor(3, 3, whole=False)}
    found = [Call("estimation", "moment_start", moment_start, good, kinds)]
    for name in ("blue", "loglik", "marginal_predict", "marginal_residual"):
        more = {"method": choice} if name == "loglik" else {}
        function = getattr(estimation, name)
        found.append(Call("estimation", name, function, data, {**takes, **more}))
    for name in ("blup", "predict", "residual"):
        function = getattr(estimation, name)
        found.append(
            Call("estimation", name, function, {**data, **effects}, {**takes, **takes_effects})
        )
    return found


def _inference() -> list[Call]:
    own = {"result": result()}
    takes = {"result": result_kind}
    level = number(0, 1)
    contrast = Kind(lambda v: isinstance(v, torch.Tensor) and v.shape[-1:] == (2,) and v.dim() == 2)
    at = optional(mapping)
    adjust = Kind(lambda v: False, ("bonferoni",))
    samples = {"samples": count(2), "seed": count(0)}
    ddf = {"ddf": choice}
    profiled = inference.profile(result(), ["sigma"])
    drawn = inference.bootstrap(result(), 2, progress=False)
    oats = lmm("yield ~ Variety + (1 | Block)", datasets.oats())
    means = inference.emmeans(oats, "Variety")
    counted = glmm("visits ~ 1 + (1 | doctor)", datasets.visits(60, 5), family="poisson")
    pairs = {"small": result(), "large": large()}
    small_large = {"small": result_kind, "large": result_kind}
    words = {"factors": ("factor",), "results": ("result", "small", "large")}
    return [
        Call("inference", "anova", lambda results, **more: inference.anova(results, large(), **more),
             {"results": result()}, {"results": result_kind, "refit": optional(flag)}, words),
        Call("inference", "anova of one", lambda results, **more: inference.anova(results, **more),
             {"results": oats}, {"results": result_kind, "type": optional(Kind(lambda v: v in (1, 2, 3) if type(v) is int else False)), **ddf}, words),
        Call("inference", "bootstrap", inference.bootstrap, {**own, "samples": 2, "progress": False},
             {**takes, **samples, "statistic": optional(Kind(callable)), "progress": flag}),
        Call("inference", "bootstrap_test", inference.bootstrap_test,
             {**pairs, "samples": 2, "progress": False}, {**small_large, **samples, "progress": flag}),
        Call("inference", "coefficients", inference.coefficients, own, {**takes, **ddf, "level": level}),
        Call("inference", "diagnose", inference.diagnose, own, takes),
        Call("inference", "emmeans", inference.emmeans, {"result": oats, "factors": "Variety"},
             {**takes, "factors": never, "at": at, **ddf, "level": level}, words),
        Call("inference", "MarginalMeans.pairs", means.pairs, {}, {"adjust": adjust}),
        Call("inference", "heritability", inference.heritability, {**own, "group": "Subject"},
             {**takes, "group": never, "method": choice}),
        Call("inference", "effect_correlations", inference.effect_correlations,
             {"result": factors(), "group": "Subject"}, {**takes, "group": never}),
        Call("inference", "blup_differences", inference.blup_differences, {**own, "group": "Subject"},
             {**takes, "group": never, "weights": optional(mapping)}),
        Call("inference", "factor_loadings", inference.factor_loadings,
             {"result": factors(), "group": "Subject"}, {**takes, "group": never}),
        Call("inference", "selection_index", inference.selection_index,
             {"result": factors(), "group": "Subject", "weights": {"parta": 1.0}},
             {**takes, "group": never, "weights": mapping}),
        Call("inference", "reliability", inference.reliability, own, {**takes, "group": optional(never)}),
        Call("inference", "conditional_aic", inference.conditional_aic, own,
             {**takes, "correction": optional(choice), "progress": flag}),
        Call("inference", "refits", inference.refits, {**own, "starts": 0, "progress": False},
             {**takes, "starts": count(0), "seed": count(0), "progress": flag}),
        Call("inference", "influence", inference.influence, {**own, "by": "Subject", "progress": False},
             {**takes, "by": Kind(lambda v: v is None or (not isinstance(v, str) and hasattr(v, "__len__") and len(v) == 180)),
              "refit": flag, "progress": flag}),
        Call("inference", "scan", inference.scan, {**own, "markers": np.eye(180)[:, :2]},
             {**takes, "markers": Kind(lambda v: isinstance(v, torch.Tensor | np.ndarray) and v.shape[:1] == (180,) and v.ndim == 2)}),
        Call("inference", "likelihood_ratio_test", inference.likelihood_ratio_test, pairs, small_large),
        Call("inference", "profile", inference.profile, {**own, "names": ["sigma"], "progress": False},
             {**takes, "max_iterations": count(1), "progress": flag, "names": Kind(lambda v: v is None or v in ([], ()) if not isinstance(v, torch.Tensor | np.ndarray | pd.DataFrame) else False)}),
        Call("inference", "Profile.intervals", profiled.intervals, {}, {"level": level}),
        Call("inference", "Curve.interval", profiled.curves["sigma"].interval, {"level": 0.9},
             {"level": level}),
        Call("inference", "Bootstrap.intervals", drawn.intervals, {}, {"level": level}),
        Call("inference", "r2", inference.r2, own, {**takes, "observation": optional(never)}),
        *(
            Call("inference", name, getattr(inference, name), {"result": counted}, {"result": never})
            for name in ("dispersion", "zero_count")
        ),
        Call("inference", "quantile_residuals", inference.quantile_residuals, {"result": counted},
             {"result": never, "seed": count(0)}),
        Call("inference", "simulate", inference.simulate, own, {**takes, "n": count(1), "seed": count(0)}),
        Call("inference", "variance_shares", inference.variance_shares, own,
             {**takes, "observation": optional(never)}),
        Call("inference", "wald_test", inference.wald_test, {**own, "contrasts": torch.eye(2, dtype=torch.float64)},
             {**takes, "contrasts": contrast, **ddf}),
    ]  # fmt: skip


def _metrics() -> list[Call]:
    n = 4
    row = tensor(n)
    above = Kind(lambda v: row.fits(v) and bool((v > 0).all()), (-double(n), double(n, value=0.0)))
    part = Kind(
        lambda v: (tensor().fits(v) or row.fits(v)) and bool((v >= 0).all()),
        (-double(n), -double()),
    )
    prior = Kind(lambda v: number(0).fits(v) or (tensor().fits(v) and bool(v > 0)))
    components = Kind(lambda v: tensor(2).fits(v) and bool((v >= 0).all()) and bool(v.sum() > 0),
                      (-double(2), double(2, value=0.0)))  # fmt: skip
    level = number(0, 1)
    three = {"mean": double(n), "variance": double(n), "target": double(n)}
    takes_three = {"mean": row, "variance": above, "target": row}
    chance = Kind(
        lambda v: row.fits(v) and bool(((v >= 0) & (v <= 1)).all()), (2 * double(n), -double(n))
    )
    success = Kind(
        lambda v: row.fits(v) and bool(((v == 0) | (v == 1)).all()),
        (-double(n), double(n, value=0.5)),
    )
    two = {"mean": double(n, value=0.5), "target": torch.arange(n) % 2}
    takes_two = {"mean": chance, "target": success}
    bins = {"bins": count(1)}
    poisson = {"family": families.Poisson()}
    counts = {"mean": double(n), "target": torch.arange(float(n))}
    whole = Kind(
        lambda v: row.fits(v) and bool((v >= 0).all()) and bool((v == v.round()).all()),
        (-double(n), double(n, value=0.5)),
    )
    takes_counts = {"mean": above, "target": whole}
    of_family = {"family": of(families.Family)}
    r2 = {"population_mean": torch.arange(4.0), "random": double(n), "residual": double(n)}
    takes_r2 = {"population_mean": row, "random": part, "residual": part}
    h2 = {"components": double(2), "covariance": torch.eye(2, dtype=torch.float64)}
    symmetric = Kind(lambda v: tensor(2, 2).fits(v) and torch.equal(v, v.mT))
    takes_h2 = {"components": components, "covariance": symmetric}
    additive = Kind(lambda v: count(0).fits(v) and v < 2)
    some = Kind(lambda v: isinstance(v, torch.Tensor) and v.dim() == 1 and above.fits(v[:n]) and len(v) > 0
                if isinstance(v, torch.Tensor) and not v.is_meta else False)  # fmt: skip
    pev = Kind(
        lambda v: tensor(None).fits(v) and bool((v >= 0).all()) and bool((v <= 0.7).all()),
        (-double(3), double(3, value=7.0)),
    )
    data = {"y": double(6), "X": torch.eye(6, 2, dtype=torch.float64), "V": torch.eye(6).double()}
    takes_data = {"y": tensor(6), "X": tensor(6, 2), "V": tensor(6, 6)}
    anything = Kind(lambda v: tensor(None).fits(v) and bool((v > 0).all()), (-double(n),))
    del some

    def call(name, good, kinds):
        return Call("metrics", name, getattr(metrics, name), good, kinds)

    def update(made, good, kinds, name="update"):
        def run(**given):
            return getattr(made(), name)(**given)

        return Call("metrics", f"{type(made()).__name__}.{name}", run, good, kinds)

    return [
        call("gaussian_negative_log_density", three, takes_three),
        call("interval_coverage", three, {**takes_three, "level": level}),
        call("interval_width", {"variance": double(n)}, {"variance": anything, "level": level}),
        call("blup_reliability", {"variance": double(3), "prior": 0.7}, {"variance": pev, "prior": prior}),
        call("intraclass_correlation", {"components": double(2)},
             {"components": Kind(lambda v: tensor(None).fits(v) and bool((v >= 0).all()), (-double(2),))}),
        call("narrow_sense_heritability", h2, {**takes_h2, "additive": additive}),
        call("marginal_r2", r2, takes_r2),
        call("conditional_r2", r2, takes_r2),
        *(call(name, two, takes_two) for name in ("log_loss", "brier_score", "auc")),
        call("calibration_error", two, {**takes_two, **bins}),
        call("calibration_curve", two, {**takes_two, **bins}),
        call("mean_deviance", {**counts, **poisson}, {**takes_counts, **of_family}),
        call("CalibrationError", {}, bins),
        call("CalibrationCurve", {}, bins),
        call("MeanDeviance", poisson, of_family),
        *(update(made, two, takes_two) for made in (metrics.LogLoss, metrics.BrierScore, metrics.AUC, metrics.CalibrationError, metrics.CalibrationCurve)),
        update(lambda: metrics.MeanDeviance(families.Poisson()), counts, takes_counts),
        call("IntervalCoverage", {}, {"level": level}),
        call("IntervalWidth", {}, {"level": level}),
        call("IntraclassCorrelation", {"components": 2}, {"components": count(1)}),
        call("NarrowSenseHeritability", {"components": 2}, {"components": count(1), "additive": additive}),
        call("RestrictedLogLikelihood", {"fixed_effects": 2}, {"fixed_effects": count(0), "method": choice}),
        update(metrics.GaussianNegativeLogDensity, three, takes_three),
        update(metrics.IntervalCoverage, three, takes_three),
        update(metrics.IntervalWidth, three, {"variance": above}),
        update(metrics.BLUPReliability, {"error_variance": double(3), "prior": 0.7},
               {"error_variance": pev, "prior": prior}),
        update(lambda: metrics.IntraclassCorrelation(2), {"components": double(2)}, {"components": components}),
        update(lambda: metrics.NarrowSenseHeritability(2), h2, takes_h2),
        update(metrics.MarginalR2, r2, takes_r2),
        update(metrics.ConditionalR2, r2, takes_r2),
        update(lambda: metrics.RestrictedLogLikelihood(2), data, takes_data),
    ]  # fmt: skip


def _lightning() -> list[Call]:
    config = Kind(
        lambda v: v is None or callable(v), ({"_target_": "os.system"}, {"_target_": "torch.nope"})
    )
    network = Kind(lambda v: isinstance(v, nn.Module), ({"_target_": "os.system"}, {"_target_": 3}))
    column = optional(never)
    frame = {"table": datasets.sleepstudy(), "formula": FORMULA}
    way = Kind(lambda v: v is None or choice.fits(v), choice.more)
    trained = {
        "optimizer": config,
        "training": way,
        "rows": count(1),
        "scheduler": config,
        "seed": count(0),
    }
    model = network_model()

    def data(**given):
        made = lightning.MixedModelDataModule(**given)
        made.setup("fit")
        return made.predict_dataloader()

    def fitted():
        return _fitted()

    given = {"validation": 0.2, **frame}
    return [
        Call("lightning", "ExportBLUPs", lightning.ExportBLUPs, {"path": "a"}, {"path": path}),
        Call("lightning", "TraceVariances", lightning.TraceVariances, {"path": "a"}, {"path": path}),
        Call("lightning", "StopWhenConverged", lightning.StopWhenConverged, {},
             {"tolerance": optional(number(0)), "every_n_epochs": optional(count(1))}),
        Call("lightning", "MixedModelDataModule", data, given,
             {"table": table, "formula": formula, "categorical": Kind(lambda v: isinstance(v, tuple | list) and not len(v)),
              "predict_table": optional(never), "residual": column, "weights": column,
              "validation": Kind(lambda v: number(-1e-9, 1).fits(v)), "split": choice,
              "split_by": optional(never), "seed": count(0)}, {"split_by": ("split",)}),
        Call("lightning", "MixedModule", lightning.MixedModule, {"model": model},
             {"model": of(MixedModel), **trained}),
        Call("lightning", "MixedModule", lightning.MixedModule,
             {"model": FORMULA, "network": nn.LazyLinear(2)},
             {"model": formula, "network": optional(network), "head": Kind(lambda v: v is None or choice.fits(v), choice.more),
              "residual": column, "weights": optional(text), "method": optional(choice),
              "categorical": names, "solver": OPTIONS["solver"], **trained}),
        Call("lightning", "MixedModule.of", lightning.MixedModule.of, {"result": result()}, {"result": result_kind}),
        Call("lightning", "MixedModule.predict", fitted().predict, {"table": datasets.sleepstudy()},
             {"table": table}),
        Call("lightning", "MixedModule.predict_step",
             lambda batch: lightning.MixedModule(model).predict_step(batch, 0), {"batch": batch()},
             {"batch": reads("x", "groups")}, {"batch": BATCH_WORDS}),
        Call("lightning", "UpdateBLUPs", lightning.UpdateBLUPs, {}, {"model": optional(text)}),
        Call("lightning", "WholeCSVLogger", lightning.WholeCSVLogger, {"save_dir": "a"}, {}),
        Call("lightning", "WholeTensorBoardLogger", lightning.WholeTensorBoardLogger, {"save_dir": "a"}, {}),
        Call("lightning", "WholeGroups", lightning.WholeGroups, {"groups": {"g": torch.arange(6)}, "rows": 2},
             {"groups": Kind(lambda v: isinstance(v, dict) and all(isinstance(x, torch.Tensor) for x in v.values()), ({"g": [0, 1]},)),
              "rows": count(1), "seed": count(0)}),
    ]  # fmt: skip


@cache
def _fitted():
    from lightning import Trainer

    made = lightning.MixedModule(FORMULA)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **options)
    trainer.fit(made, lightning.MixedModelDataModule(datasets.sleepstudy(), FORMULA))
    return made


@cache
def factors():
    """A fit with a factor-analytic term."""
    table = datasets.sleepstudy()
    rng = np.random.default_rng(0)
    table["part"] = np.array(["a", "b", "c"])[np.arange(180) % 3]
    table["y"] = rng.standard_normal(18)[np.arange(180) // 10] + rng.standard_normal(180)
    return lmm("y ~ 1 + fa(0 + part | Subject, 1)", table)


@cache
def _run() -> tempfile.TemporaryDirectory:
    """The folder of a run."""
    folder = tempfile.TemporaryDirectory()
    result().to_json(os.path.join(folder.name, "result.json"))
    return folder


def _report() -> list[Call]:
    own, takes = {"result": result()}, {"result": result_kind}
    places = {"places": torch.arange(180.0)[:, None]}
    return [
        *(
            Call("report", name, getattr(report, name), own, takes)
            for name in ("blup_table", "convergence", "fixed_table", "residuals", "shares", "variance_table")
        ),
        Call("report", "caterpillar", report.caterpillar, {**own, "group": "Subject"},
             {**takes, "group": never}),
        Call("report", "residual_table", report.residual_table, own, takes),
        Call("report", "covariance_map", report.covariance_map, own, {**takes, "rows": count(1)}),
        Call("report", "calibration", report.calibration,
             {"mean": torch.tensor([0.2, 0.7]), "target": torch.tensor([0.0, 1.0])},
             {"mean": never, "target": never, "bins": count(1)}),
        Call("report", "semivariogram", report.semivariogram, {**own, **places},
             {**takes, "places": tensor(180, None), "bins": count(1), "seed": count(0)}),
        Call("report", "zeta", report.zeta, {"profile": inference.profile(result(), ["sigma"])},
             {"profile": never}),
        Call("report", "write_report", report.write_report, {"folder": _run().name, "path": "p.html"},
             {"folder": never, "path": path}),
    ]  # fmt: skip


def _datasets() -> list[Call]:
    return [
        Call("datasets", "table_path", datasets.table_path, {"name": "oats"}, {"name": never}),
        Call("datasets", "ratings", datasets.ratings, {"rows": 5},
             {"rows": count(1), "users": count(1), "items": count(1), "seed": count(0)}),
        Call("datasets", "growth", datasets.growth, {"children": 3},
             {"children": count(1), "visits": count(1), "seed": count(0)}),
        Call("datasets", "field", datasets.field, {"plots": 3},
             {"plots": count(1), "samples": count(1), "seed": count(0)}),
        Call("datasets", "purchases", datasets.purchases, {"rows": 5},
             {"rows": count(1), "users": count(1), "seed": count(0)}),
        Call("datasets", "visits", datasets.visits, {"rows": 5},
             {"rows": count(1), "doctors": count(1), "seed": count(0)}),
    ]  # fmt: skip


def _families() -> list[Call]:
    plain = ("Poisson", "NegativeBinomial", "NegativeBinomial1", "Gaussian", "StudentT", "Tweedie")
    found = [Call("families", name, getattr(families, name), {}, {}) for name in plain]
    for name in ("Binomial", "Gamma", "Beta"):
        found.append(Call("families", name, getattr(families, name), {}, {"link": choice}))
    return [
        *found,
        Call("families", "Ordinal", families.Ordinal, {"levels": 3},
             {"levels": count(2), "link": choice}),
        Call("families", "named_family", families.named_family, {"family": "binomial"},
             {"family": choice, "link": optional(choice)}),
        Call("families", "ZeroInflated", families.ZeroInflated,
             {"family": families.Poisson(), "logits": nn.Linear(1, 1)},
             {"family": of(families.Family), "logits": of(nn.Module)}),
    ]  # fmt: skip


CALLS = {
    "": _top,
    "covariance": _covariance,
    "covariance.transform": _transform,
    "likelihood": _likelihood,
    "estimation": _estimation,
    "inference": _inference,
    "metrics": _metrics,
    "lightning": _lightning,
    "report": _report,
    "datasets": _datasets,
    "families": _families,
}

#: What is public and takes no arguments of a user's own: values that come out, errors, bases.
EXEMPT = {
    "Bootstrap", "Component", "Cost", "Curve", "Dense", "Dispersion", "Grid", "Solver", "Spectral", "Estimate", "Evaluation", "FTest", "Family", "LaplaceEvaluation", "InputError", "LikelihoodRatio",
    "MarginalMeans", "NotPositiveDefiniteError", "NumericalError", "Operator", "Pedigree", "Plan",
    "Profile", "ProgressBar", "R2", "Relationship", "Result", "Transform", "ConditionalAIC", "Heritability", "Way", "ZeroCount",
}  # fmt: skip

# ---------------------------------------------------------------------- outcomes

_EXPECTS = re.compile(
    r"expected|must|needs?\b|\buse\b|only|between|at least|\bis empty|\bis not\b|\bare not\b|"
    r"does not|has no|have no|cannot|unknown|more are needed|not positive|neither"
)


def outcome(call: Call, arguments: dict[str, Any], wrong: tuple[str, ...]) -> tuple[str, str]:
    """``accepted``, ``named`` or ``other``, and what was said."""
    streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    try:
        with streams[0], streams[1], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.function(**arguments)
    except (Exception, SystemExit) as error:
        text = str(error)
        said = f"{type(error).__name__}: {text[:110]!r}"
        frames = traceback.extract_tb(error.__traceback__)
        ours = "openreml_nn" in frames[-1].filename and "tests" not in frames[-1].filename
        right = isinstance(error, TypeError | ValueError) and not isinstance(error, UnicodeError)
        names = {word for name in wrong for word in (name, *call.words.get(name, ()))}
        values = {repr(arguments[name]) for name in wrong} | {
            str(arguments[name]) for name in wrong
        }
        is_named = any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in names)
        is_shown = any(value and value in text for value in values)
        if ours and right and (is_named or is_shown) and _EXPECTS.search(text):
            return "named", said
        return "other", f"{said} at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"
    return "accepted", "accepted"


def careless(call: Call, per: int | None, rng: random.Random):
    """Calls with one wrong argument, ``per`` for each of its arguments, and with two swapped."""
    for name, kind in call.kinds.items():
        pool = kind.pool()
        for value in pool if per is None else rng.sample(pool, min(per, len(pool))):
            yield {**call.good, name: value}, (name,)
    for a, b in combinations(call.good, 2):
        swapped = {**call.good, a: call.good[b], b: call.good[a]}
        wrong = [n for n in (a, b) if n in call.kinds and not call.kinds[n].fits(swapped[n])]
        # A value that is right for one argument is not in the pool of another of its kind.
        if len(wrong) == 2 and type(call.good[a]) is not type(call.good[b]):
            yield swapped, (a, b)


def survey(package: str, per: int | None = None, seed: int = 0):
    """Counts of the outcomes, and each call that was not refused by name."""
    counts: Counter[str] = Counter()
    offenders = []
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for call in CALLS[package]():
                rng = random.Random(f"{seed} {call.name}")
                for arguments, wrong in careless(call, per, rng):
                    kind, said = outcome(call, arguments, wrong)
                    counts[kind] += 1
                    if kind != "named":
                        values = ", ".join(repr(arguments[name]) for name in wrong)
                        given = " ".join(values.split())[:60]
                        offenders.append((call.name, ", ".join(wrong), given, said))
        finally:
            os.chdir(here)
    return counts, offenders


# ---------------------------------------------------------------------- tests


@pytest.mark.parametrize("package", CALLS)
def test_calls_that_are_right_are_taken(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in CALLS[package]():
        if not call.name.endswith("AIREML.step"):
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call.function(**call.good)


@pytest.mark.parametrize("package", CALLS)
def test_careless_calls_end_in_an_error_that_names_the_argument(package):
    counts, offenders = survey(package, per=3)
    total = sum(counts.values())
    worst = "\n".join("  ".join(offender) for offender in offenders[:20])
    assert counts["named"] >= GOAL[package] * total, f"{dict(counts)} of {total}\n{worst}"


def test_everything_public_is_called():
    called = {call.name.split(".")[0].split(" ")[0] for make in CALLS.values() for call in make()}
    missing = []
    for package in PACKAGES:
        module = importlib.import_module(f"openreml_nn.{package}".rstrip("."))
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            takes_some = inspect.isclass(value) or inspect.signature(value).parameters
            if name not in called | EXEMPT and takes_some:
                missing.append(f"{package}.{name}")
    assert not missing


def _main() -> None:
    for package in sys.argv[1:] or CALLS:
        counts, offenders = survey(package)
        total = sum(counts.values())
        by = Counter((name, argument) for name, argument, *_ in offenders)
        for (name, argument), _ in by.most_common():
            own = [o for o in offenders if o[:2] == (name, argument)]
            print(f"{len(own):4d}  {name} `{argument}`")
            for *_, given, said in own[:8]:
                print(f"          {given}  ->  {said}")
        share = counts["named"] / total
        print(
            f"{package or 'openreml_nn'}: {share:.1%} of {total} named, {dict(counts)}", flush=True
        )


if __name__ == "__main__":
    _main()
