"""A network with random effects on two workers of Ray Train.

Each worker reads its share of the rows; what is learned is what one process with both shares would
learn. The checkpoint that Ray keeps predicts without the data.

    pip install "ray[train]"
    python examples/ray_train.py [epochs]
"""

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import ray
import ray.train.lightning
import torch
from lightning import Trainer
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.lightning import MixedModule

USERS = 50


def model() -> MixedModel:
    network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    return MixedModel(network, {"user": RandomEffect(USERS)})


def rows() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    x, user = torch.randn(2000, 3, generator=g), torch.randint(0, USERS, (2000,), generator=g)
    b = torch.randn(USERS, generator=g)
    y = x[:, 0].sin() + b[user] + 0.5 * torch.randn(2000, generator=g)
    return TensorDataset(x, y, user)


def train(config: dict[str, int]) -> None:
    """What each worker runs."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(1)
    module = MixedModule(model(), {"_target_": "torch.optim.Adam", "lr": 0.01})
    trainer = Trainer(
        max_epochs=config["epochs"],
        accelerator="cpu",
        devices="auto",
        strategy=ray.train.lightning.RayDDPStrategy(),
        plugins=[ray.train.lightning.RayLightningEnvironment()],
        callbacks=[ray.train.lightning.RayTrainReportCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = ray.train.lightning.prepare_trainer(trainer)
    # Lightning gives each worker a sampler of its share of the rows.
    trainer.fit(module, DataLoader(rows(), batch_size=100, shuffle=True))


if __name__ == "__main__":
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    # A busy machine takes longer to import torch than Ray waits for its workers by default.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as folder:
        found = TorchTrainer(
            train,
            train_loop_config={"epochs": epochs},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        with found.checkpoint.as_directory() as kept:
            path = Path(kept) / ray.train.lightning.RayTrainReportCallback.CHECKPOINT_NAME
            module = MixedModule.load_from_checkpoint(path, model=model(), weights_only=True)
    ray.shutdown()
    print({name: round(float(value), 4) for name, value in found.metrics.items()})
    new = {"x": torch.zeros(2, 3), "groups": {"user": torch.tensor([7, -1])}}
    print(module.model.predict(new))
    print(module.model.blups().nlargest(3, "blup"))
