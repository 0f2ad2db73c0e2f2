"""Linear mixed models as PyTorch modules."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from openreml_nn.version import __version__ as __version__

if TYPE_CHECKING:
    from openreml_nn import covariance, datasets, families
    from openreml_nn.estimation import (
        AIREML,
        Result,
        blue,
        blup,
        fit_reml,
        loglik,
        marginal_predict,
        marginal_residual,
        predict,
        residual,
    )
    from openreml_nn.likelihood import LaplaceLoss, REMLLoss, restricted_log_likelihood
    from openreml_nn.model import MixedModel, RandomEffect
    from openreml_nn.model.generalised import glmm
    from openreml_nn.model.linear import lmm
    from openreml_nn.model.stream import fit_stream
    from openreml_nn.support.errors import InputError, NumericalError

__all__ = [
    "AIREML",
    "InputError",
    "LaplaceLoss",
    "MixedModel",
    "NumericalError",
    "REMLLoss",
    "RandomEffect",
    "Result",
    "blue",
    "blup",
    "covariance",
    "datasets",
    "families",
    "fit_reml",
    "fit_stream",
    "glmm",
    "lmm",
    "loglik",
    "marginal_predict",
    "marginal_residual",
    "predict",
    "residual",
    "restricted_log_likelihood",
]

#: Where the names are that are imported when they are first asked for: what is not used costs nothing.
_HOMES = {
    "AIREML": "estimation",
    "InputError": "support.errors",
    "LaplaceLoss": "likelihood",
    "MixedModel": "model",
    "NumericalError": "support.errors",
    "REMLLoss": "likelihood",
    "RandomEffect": "model",
    "Result": "estimation",
    "blue": "estimation",
    "blup": "estimation",
    "fit_reml": "estimation",
    "fit_stream": "model.stream",
    "glmm": "model.generalised",
    "lmm": "model.linear",
    "loglik": "estimation",
    "marginal_predict": "estimation",
    "marginal_residual": "estimation",
    "predict": "estimation",
    "residual": "estimation",
    "restricted_log_likelihood": "likelihood",
}

if not TYPE_CHECKING:  # to a type checker a name that is not there stays a mistake

    def __getattr__(name):
        home = _HOMES.get(name)
        if home is not None:
            found = getattr(import_module(f"{__name__}.{home}"), name)
        elif name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        else:
            found = import_module(f"{__name__}.{name}")
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *__all__})
