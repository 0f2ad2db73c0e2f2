"""A GPyTorch kernel as the covariance G of a random effect, in a plain PyTorch loop."""

import gpytorch
import torch

from openreml_nn import REMLLoss
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum

torch.manual_seed(1)
torch.set_default_dtype(torch.float64)
sites, n = 60, 400
place = torch.rand(sites, 2)
site = torch.cat([torch.arange(sites), torch.randint(0, sites, (n - sites,))])
truth = torch.exp(-(torch.cdist(place, place) ** 2) / (2 * 0.3**2)) + 1e-6 * torch.eye(sites)
x = torch.randn(n)
y = 1 + 2 * x + (torch.linalg.cholesky(truth) @ torch.randn(sites))[site] + 0.5 * torch.randn(n)
X = torch.stack([torch.ones(n), x], 1)

kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
Z, residual = DummyMatrix(site), ScalarMatrix(n)
optimizer = torch.optim.Adam([*kernel.parameters(), *residual.parameters()], lr=0.1)
for step in range(150):
    # G is a tensor with a graph: the loss takes its gradient back to the kernel.
    G = kernel(place).to_dense()
    loss = REMLLoss(Sum(site=CovariancePropagation(z=Z, g=G), residual=residual))(y, X)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}  loss {loss.item():.4f}")

print(f"loss {loss.item():.4f}")
print(f"length {kernel.base_kernel.lengthscale.item():.3f} (0.3)")
print(f"variance {kernel.outputscale.item():.3f} (1)")
print(f"residual variance {residual.build_params().item():.3f} (0.25)")
