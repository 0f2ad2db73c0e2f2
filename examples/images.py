"""A convolutional network on images from several cameras, with a random intercept of the camera."""

import torch
from torch import nn

from openreml_nn import AIREML, MixedModel, RandomEffect

torch.manual_seed(1)
cameras, n = 30, 1500
camera = torch.randint(0, cameras, (n,))
# A blob of some width at some place; the response is its width, as a camera sees it.
width = 1 + 2 * torch.rand(n)
place = 8 + 2 * torch.randn(n, 2)
grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"), -1)
distance = ((grid - place[:, None, None]) ** 2).sum(-1)
images = torch.exp(-distance / (2 * width[:, None, None] ** 2))[:, None]
images += 0.1 * torch.randn(n, 1, 16, 16)
y = width + 0.7 * torch.randn(cameras)[camera] + 0.2 * torch.randn(n)

network = nn.Sequential(
    nn.Conv2d(1, 8, 5, stride=2),
    nn.ReLU(),
    nn.Conv2d(8, 16, 3, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(64, 1),
)
model = MixedModel(network, {"camera": RandomEffect(cameras)})
batch = {"x": images, "y": y, "groups": {"camera": camera}}


def outputs():
    """What the network yields for all images, 256 at a time, without recording."""
    with torch.no_grad():
        return torch.cat([model({"x": some}) for some in images.split(256)])


# The exact gradient of all rows in the memory of 256 images.
adam = torch.optim.Adam(model.network_parameters(), lr=0.01)
reml = AIREML(list(model.covariance_parameters()))
for _ in range(60):
    adam.zero_grad()
    loss = model.backward_in_parts(batch, rows=256)
    adam.step()
    reml.step(lambda: model.loss_of(outputs(), batch))
model.update(batch)

variance, residual = model.random["camera"].prior().item(), model.residual().item()
print(f"loss {float(loss):.4f}")
print(f"variance of the cameras {variance:.3f} (0.49)")
print(f"variance of the residual {residual:.3f} (0.04)")
