"""What a bootstrap says of its samples."""

import numpy as np
import pandas as pd

from openreml_nn.inference.bootstrap import Bootstrap


def test_intervals_bias_and_standard_errors_are_those_of_the_samples():
    samples = pd.DataFrame({"a": np.arange(101.0), "b": np.arange(101.0) ** 2})
    found = Bootstrap(samples, pd.Series({"a": 40.0, "b": 0.0})).intervals(0.9).set_index("name")
    assert found["estimate"].tolist() == [40.0, 0.0]
    np.testing.assert_allclose(found["bias"], [10.0, np.mean(np.arange(101.0) ** 2)])
    np.testing.assert_allclose(found["std_error"], samples.std())
    np.testing.assert_allclose(found["low"], [5.0, 25.0])
    np.testing.assert_allclose(found["high"], [95.0, 95.0**2])
