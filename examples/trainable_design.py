"""A random effect along a curve whose rate is estimated with the variances."""

import torch
from torch import nn

from openreml_nn import fit_reml
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum


class Growth(nn.Module):
    """The share of its final height that a plant has at each time."""

    def __init__(self, time: torch.Tensor) -> None:
        super().__init__()
        self.time = time
        self.rate = nn.Parameter(torch.tensor([0.3], dtype=time.dtype))

    def forward(self) -> torch.Tensor:
        return 1 - torch.exp(-self.rate * self.time)


torch.manual_seed(1)
plants = 10
time = torch.linspace(0.1, 5, 8).double().repeat(plants)
plant = torch.arange(plants).repeat_interleave(8)
height = 3 * torch.randn(plants).double()
y = height[plant] * (1 - torch.exp(-1.2 * time)) + 0.3 * torch.randn(80).double()

z = DummyMatrix.from_codes(plant, plants, values=Growth(time))
V = Sum(
    height=CovariancePropagation(z=z, g=ScalarMatrix(plants)),
    residual=ScalarMatrix(80),
).double()
result = fit_reml(V, y, torch.ones(80, 1).double())
print(result.summary())
for p in result.parameters:
    print(f"{p.name}: {p.value:.4f}, standard error {p.std_error:.4f}")
