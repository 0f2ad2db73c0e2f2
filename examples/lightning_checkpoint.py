"""Train in Lightning, save a checkpoint, load it and predict for known and new levels."""

import tempfile
from pathlib import Path

import pandas as pd
from lightning import Trainer

from openreml_nn.datasets import sleepstudy
from openreml_nn.lightning import MixedModelDataModule, MixedModule, StopWhenConverged

FORMULA = "Reaction ~ Days + (Days | Subject)"


def main() -> None:
    data = MixedModelDataModule(sleepstudy())
    model = MixedModule(FORMULA, optimizer={"_target_": "torch.optim.Adam", "lr": 0.1})
    trainer = Trainer(
        max_epochs=1000,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[StopWhenConverged()],
    )
    trainer.fit(model, data)
    assert model.result is not None
    print(model.result.summary(FORMULA))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        trainer.save_checkpoint(path)
        loaded = MixedModule.load_from_checkpoint(path, weights_only=True)
    new = pd.DataFrame({"Days": [10, 10], "Subject": ["308", "a new one"]})
    print(loaded.predict(new))


if __name__ == "__main__":
    main()
