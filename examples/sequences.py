"""A recurrent network on sequences, with random slopes of patients in a feature of their own."""

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.lightning import MixedModule

torch.manual_seed(1)
patients, visits, length = 100, 12, 20
patient = torch.arange(patients).repeat_interleave(visits)
n = len(patient)
signal = torch.randn(n, length, 2).cumsum(1) / 4
dose = torch.rand(n)
effects = torch.randn(patients, 2) * torch.tensor([1.0, 0.6])  # intercept and slope by dose
y = signal[:, -5:, 0].mean(1).tanh() + signal[:, :, 1].std(1)
y = y + effects[patient, 0] + dose * effects[patient, 1] + 0.3 * torch.randn(n)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 16, batch_first=True)
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0][:, -1])


model = MixedModel(Recurrent(), {"patient": RandomEffect(patients, effects=2)})
slopes = torch.stack([torch.ones(n), dose], 1)
rows = [
    {"x": signal[i], "y": y[i], "groups": {"patient": patient[i]}, "values": {"patient": slopes[i]}}
    for i in range(n)
]
module = MixedModule(model, {"_target_": "torch.optim.Adam", "lr": 0.01})
trainer = Trainer(
    max_epochs=20,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, DataLoader(rows, batch_size=100, shuffle=True))

print("covariance of the patients' intercepts and slopes (0.36 the slopes' variance, 1 the other)")
print(model.random["patient"].prior().detach())
print(f"variance of the residual {model.residual().item():.3f} (0.09)")
new = {"x": signal[:2], "groups": {"patient": torch.tensor([0, -1])}}
new["values"] = {"patient": torch.tensor([[1.0, 0.5], [1.0, 0.5]])}
print("variance of a prediction, patient known and not known:", model.predict(new).variance)
