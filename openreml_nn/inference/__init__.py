"""Inference from a fit: tests, intervals, the bootstrap, marginal means and shares of variance."""

from openreml_nn.inference.agreement import refits
from openreml_nn.inference.checking import (
    Dispersion,
    ZeroCount,
    dispersion,
    quantile_residuals,
    zero_count,
)
from openreml_nn.inference.conditional import ConditionalAIC, conditional_aic
from openreml_nn.inference.degrees import FTest, coefficients, wald_test
from openreml_nn.inference.deletion import influence
from openreml_nn.inference.diagnosis import diagnose
from openreml_nn.inference.genetic import Heritability, heritability, reliability
from openreml_nn.inference.likelihood_ratio import LikelihoodRatio, likelihood_ratio_test
from openreml_nn.inference.means import MarginalMeans, emmeans
from openreml_nn.inference.profiling import Curve, Profile, profile
from openreml_nn.inference.resampling import Bootstrap, bootstrap, bootstrap_test, simulate
from openreml_nn.inference.scanning import scan
from openreml_nn.inference.several_effects import (
    blup_differences,
    effect_correlations,
    factor_loadings,
    selection_index,
)
from openreml_nn.inference.shares import R2, r2, variance_shares
from openreml_nn.inference.tables import anova

__all__ = [
    "R2",
    "Bootstrap",
    "ConditionalAIC",
    "Curve",
    "Dispersion",
    "FTest",
    "Heritability",
    "LikelihoodRatio",
    "MarginalMeans",
    "Profile",
    "ZeroCount",
    "anova",
    "blup_differences",
    "bootstrap",
    "bootstrap_test",
    "coefficients",
    "conditional_aic",
    "diagnose",
    "dispersion",
    "effect_correlations",
    "emmeans",
    "factor_loadings",
    "heritability",
    "influence",
    "likelihood_ratio_test",
    "profile",
    "quantile_residuals",
    "r2",
    "refits",
    "reliability",
    "scan",
    "selection_index",
    "simulate",
    "variance_shares",
    "wald_test",
    "zero_count",
]
