"""Mixed models as scikit-learn's estimators. They need scikit-learn: ``pip install
openreml_nn[sklearn]``."""

from openreml_nn.estimators.classifier import MixedClassifier
from openreml_nn.estimators.regressor import MixedRegressor

__all__ = ["MixedClassifier", "MixedRegressor"]
