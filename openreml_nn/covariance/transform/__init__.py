"""Transforms from the real line to the scale on which a parameter is named.

A parameter called ``sigma^2`` is stored as an unconstrained number ``x``; its
transform yields the variance. Every transform is an elementwise map with an
inverse and a derivative.
"""

from openreml_nn.covariance.transform.base import Transform
from openreml_nn.covariance.transform.chain import TransformChain
from openreml_nn.covariance.transform.elementary import (
    TransformExp,
    TransformExp2,
    TransformExp10,
    TransformExpPow2,
    TransformIdentity,
    TransformPow,
    TransformScaleShift,
    TransformSigmoid,
)

__all__ = [
    "Transform",
    "TransformChain",
    "TransformExp",
    "TransformExp2",
    "TransformExp10",
    "TransformExpPow2",
    "TransformIdentity",
    "TransformPow",
    "TransformScaleShift",
    "TransformSigmoid",
]
