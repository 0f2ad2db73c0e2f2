"""Trains a small model in some processes; the first one writes what came out."""

import torch
from lightning import Callback, Trainer
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.families import Binomial
from openreml_nn.lightning import MixedModule, WholeGroups
from openreml_nn.lightning.ways import Alternating
from openreml_nn.model import take


def train(processes, training, head, path, n=203):
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    q = 12
    x = torch.randn(n, 2, generator=generator)
    codes = torch.randint(0, q, (n,), generator=generator)
    b = torch.randn(q, generator=generator)[codes]
    y = x[:, 0].sin() + b + 0.5 * torch.randn(n, generator=generator)
    y[::17] = torch.nan  # rows without a response, not as many on each process
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1 if head == "ml" else 3))
    spread = nn.Linear(2, 1) if training in ("full", "alternating") and head == "ml" else None
    effect = RandomEffect(q)
    if training == "several":
        y = torch.stack([y, y.roll(3) + b], 1)
        network[-1], effect, training = nn.Linear(8, 2), RandomEffect(q, responses=2), "alternating"
    model = MixedModel(network, {"g": effect}, residual=spread, head=head)
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.05}
    if training == "family":
        model = MixedModel(nn.Identity(), {"g": effect}, head=head, family=Binomial())
        x, y = torch.cat([torch.ones(n, 1), x], 1), (y > 0).where(~y.isnan(), y)
        sgd = training = None
    if training == "linear":
        model = MixedModel(nn.Identity(), {"g": RandomEffect(q)}, head=head)
        x = 100 + torch.cat([torch.ones(n, 1), x], 1)
        sgd = training = None
    module = MixedModule(model, sgd, training, rows=64)
    batch = {"x": x, "y": y, "groups": {"g": codes}}
    rows = {
        None: lambda: DataLoader(TensorDataset(x, y, codes), batch_sampler=Every(n)),
        "alternating": lambda: DataLoader(TensorDataset(x, y, codes), batch_sampler=Every(n)),
        "groups": lambda: WholeGroupsOf(batch, processes),
    }.get(training, lambda: DataLoader([batch], batch_size=None))
    trainer = Trainer(
        max_epochs=3 if model.family is None else 30,
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=[Written(path, take(batch, slice(0, 5)))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, rows())


class Every:
    """Mini-batches of 64 rows, of which each process has its share, not always as many."""

    def __init__(self, n):
        self.rows = torch.arange(n).split(64)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        known = distributed.is_initialized()
        rank, size = (distributed.get_rank(), distributed.get_world_size()) if known else (0, 1)
        return iter([rows[rank::size].tolist() for rows in self.rows])


class WholeGroupsOf:
    """Mini-batches of whole groups, of which each of two processes has every other group."""

    def __init__(self, batch, processes):
        self.batch, self.processes = batch, processes
        self.sampler = WholeGroups(batch["groups"], 64)

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        self.sampler.set_epoch(0)
        for rows in self.sampler:
            part = take(self.batch, torch.tensor(rows))
            if self.processes > 1:
                own = part["groups"]["g"] % 2 == distributed.get_rank()
                part = take(part, own.nonzero()[:, 0])
            yield part


class Written(Callback):
    """Writes what came out where it is: gradients do not leave a process."""

    def __init__(self, path, some):
        self.path, self.some = path, some

    def on_fit_end(self, trainer, module):
        if trainer.is_global_zero:
            found = dict(module.model.state_dict())
            found["variance"] = module.model.predict(self.some).variance
            in_batches = isinstance(module.way, Alternating) and module.model.head == "gls"
            if in_batches or not list(module.model.mean.parameters()):
                # These are in a basis of the coefficients, which may have other signs.
                based = ("joint.", "evidence.")
                found = {key: x for key, x in found.items() if not key.startswith(based)}
            found["loss"] = trainer.callback_metrics["train_loss"]
            weights = list(module.model.mean.parameters())
            if weights:
                found["gradient"] = torch.cat([p.grad.flatten() for p in weights])
            torch.save(found, self.path)
