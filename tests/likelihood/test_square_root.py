"""The likelihood by square roots against the dense one, where both keep their digits."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openreml_nn import REMLLoss
from openreml_nn.likelihood.system.square_root import SquareRootEvaluation
from tests.likelihood.models import models


@pytest.mark.parametrize("structured", [False, True])
@given(st.data(), st.sampled_from(["reml", "ml"]))
@settings(max_examples=settings.default.max_examples // 2)
def test_it_equals_dense_in_all_that_it_says(structured, data, method):
    m = data.draw(models(structured))
    objective = REMLLoss(m.covariance, method, "dense").objective(m.y, m.X)
    terms, dense = [t.detach() for t in objective.terms()], objective.evaluate()
    found = SquareRootEvaluation.of(objective.problem, terms)
    assume(found is not None)
    directions = [
        torch.randn(2, *matrix.shape) for matrix in objective.problem.matrices(objective.terms())
    ]
    directions = [d + d.mT if d.dim() == 3 and d.shape[1] == d.shape[2] else d for d in directions]

    def all_of(evaluation):
        return {
            "value": evaluation.log_likelihood,
            "y' P y": evaluation.y_p_y,
            "coefficients": evaluation.gamma,
            "factor": evaluation.gamma_factor,
            "V^-1 [X y]": evaluation.inverse_times_data(),
            "scores": evaluation.scores(),
            "information": evaluation.information(directions),
            "blups": [e.values for e in evaluation.random_effects()],
            "variances": [e.variances for e in evaluation.random_effects()],
        }

    expected = all_of(dense)
    for key, value in all_of(found).items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-8, atol=1e-8, msg=lambda s, k=key: f"{k}: {s}"
        )
