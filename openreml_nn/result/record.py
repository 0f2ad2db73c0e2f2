"""A result as what JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openreml_nn.result.parts import Component
from openreml_nn.result.values import FitValues
from openreml_nn.support.names import shortened

__all__ = ["to_record"]


def to_record(result: FitValues, validation: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What ``result.json`` holds (schema 1). Numbers that do not exist are None.

    Beside the keys of the schema, ``details`` has what else is known of the fit: parameters with
    standard errors, how the optimizer came there and from where else it started.

    Args:
        result: the fit.
        validation: metrics of rows that were held out, by name.
    """
    random = [c for c in result.components if not c.is_residual]
    return _finite(
        {
            "schema": 1,
            "model": {
                "formula": result.formula,
                "method": result.method,
                **_family(result),
                **({"constraints": dict(result.constraints)} if result.constraints else {}),
            },
            "data": {
                "rows": result.rows,
                "dropped_rows": result.dropped_rows,
                "fixed_effects": len(result.fixed.names),
                "groups": result.groups,
            },
            "fit": {
                "converged": result.converged,
                "singular": bool(result.singular),
                "iterations": result.iterations,
                "optimizer": result.optimizer,
                "solver": result.plan.solver,
                "seconds": result.seconds,
                "log_likelihood": result.log_likelihood,
                "deviance": result.deviance,
                "aic": result.aic,
                "bic": result.bic,
                "score_norm": result.score_norm,
            },
            "fixed": _fixed(result),
            "random": [_random(c) for c in random],
            **(
                {"family_parameters": {e.name: e.value for e in result.family_parameters}}
                if result.family is not None
                else {}
            ),
            "residual": {
                "variance": result.residual_variance,
                "parameters": _residual(result),
            },
            "details": {
                "exact": result.plan.exact,
                "log_likelihood_error": result.log_likelihood_error,
                "condition": result.condition,
                "singular": list(result.singular),
                "boundary": list(result.boundary),
                "kinks": list(result.kinks),
                "indistinct": list(result.indistinct),
                "parameters": [vars(estimate) for estimate in result.parameters],
                "std_errors": {c.name: c.std_error.tolist() for c in result.components},
                "history": [vars(step) for step in result.history],
                "starts": [vars(start) for start in result.starts],
            },
            **({"validation": dict(validation)} if validation else {}),
        }
    )


def _family(result: FitValues) -> dict[str, Any]:
    """What a response that is not Gaussian adds to the model."""
    if result.family is None:
        return {}
    found = {"family": result.family, "link": result.link, "quadrature": result.quadrature}
    return found if result.zi is None else {**found, "zi": result.zi}


def _residual(result: FitValues) -> dict[str, float]:
    """The residual's parameters by the last parts of their names, with what tells them apart before.

    Scales that the model itself holds at one, as of a side of a product, are left out.
    """
    known = {"residual/sigma^2", *result.constraints}
    own = [
        p
        for p in result.parameters
        if p.name.startswith("residual/") and (not p.fixed or p.name in known)
    ]
    names = shortened(p.name for p in own)
    return {names[p.name].removeprefix("residual/"): p.value for p in own}


def _fixed(result: FitValues) -> list[dict[str, Any]]:
    fixed = result.fixed
    columns = (x.tolist() for x in (fixed.estimate, fixed.std_error, fixed.statistic))
    keys = ("name", "estimate", "std_error", "statistic")
    return [dict(zip(keys, row, strict=True)) for row in zip(fixed.names, *columns, strict=True)]


def _random(c: Component) -> dict[str, Any]:
    return {
        "group": c.group,
        "effects": list(c.effects),
        "levels": len(c.levels),
        "covariance": c.covariance.tolist(),
        "std_dev": c.std_dev.tolist(),
        "correlation": c.correlation.tolist(),
    }


def _finite(value: Any) -> Any:
    """A value with None in place of each number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
