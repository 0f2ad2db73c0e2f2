"""A formula and a table: the model of lme4's first vignette."""

from openreml_nn import lmm
from openreml_nn.datasets import sleepstudy

FORMULA = "Reaction ~ Days + (Days | Subject)"

if __name__ == "__main__":
    result = lmm(FORMULA, sleepstudy())
    print(result.summary(FORMULA))
    print(result.plan)
