"""A network on the columns of a table, with random effects of users and items, in Lightning."""

from lightning import Trainer, seed_everything
from torch import nn

from openreml_nn.datasets import ratings
from openreml_nn.lightning import MixedModelDataModule, MixedModule

seed_everything(1, verbose=False)
formula = "rating ~ x1 + x2 + x3 + x4 + (1 | user) + (1 | item)"
table = ratings(rows=10_000, users=500, items=100)
data = MixedModelDataModule(table, validation=0.2, split="unseen", split_by="user")
network = nn.Sequential(nn.LazyLinear(32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
adam = {"_target_": "torch.optim.Adam", "lr": 0.01}
module = MixedModule(formula, network=network, optimizer=adam, rows=512)
trainer = Trainer(
    max_epochs=15,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, data)

print(module.result.summary(formula))
print({name: round(float(v), 3) for name, v in trainer.callback_metrics.items() if "val" in name})
print(module.predict(table.head(3)))  # mean, variance, population_mean, low, high
print(module.model.blups().nlargest(3, "blup"))
