"""What a fit of a response that is not Gaussian knows of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openreml_nn.lightning.rows import concatenated
from openreml_nn.lightning.sharing import all_batches, are_same
from openreml_nn.lightning.table import TableModel
from openreml_nn.model import MixedModel
from openreml_nn.model.generalised import fit_family
from openreml_nn.model.means import evaluating
from openreml_nn.result import Record, Result
from openreml_nn.support.errors import InputError

__all__ = ["Marginal"]


class Marginal:
    """The rows of an epoch of a model with a family: what its likelihood takes of each batch, and
    what the network has yielded for it.

    Args:
        model: the model.
        all_rows: whether a batch holds all rows, the same on all processes; None where it does if
            all processes have the same single one.
        whole_groups: whether no batch may cut a group.
    """

    def __init__(
        self, model: MixedModel, all_rows: bool | None = False, whole_groups: bool = False
    ) -> None:
        self.model, self._all_rows, self._whole_groups = model, all_rows, whole_groups
        self._parts: list[dict[str, Any]] = []
        self.fitted: Result | None = None

    def add(self, batch: Mapping[str, Any], output: Tensor) -> None:
        """Take a batch.

        Raises:
            InputError: if the way takes all rows in one batch and there was one before.
        """
        if self._parts and self._all_rows:
            raise InputError(
                "the loader yields several batches: this way of training takes all rows in one, "
                "as of DataLoader([batch], batch_size=None); mini-batches are for "
                "training='groups' or 'composite', and head 'ml'"
            )
        # Learned features of random effects are of the parameters at the end, and need x.
        is_read = any(effect.features is not None for effect in self.model.effects().values())
        unread = set() if is_read else {"x"}
        kept = {k: part for k, part in batch.items() if k not in unread and part is not None}
        self._parts.append({**kept, "output": output.detach().double()})

    def gathered(self) -> Marginal:
        """The rows of all processes, of which there must be some.

        Raises:
            InputError: if there are none.
        """
        if not self._parts:
            raise InputError("the training loader yielded no rows: expected some")
        if self._whole_groups:
            for i, part in enumerate(self._parts):
                part["batch"] = torch.full_like(part["output"], i, dtype=torch.long)
        own, is_whole = concatenated(self._parts), self._all_rows
        if is_whole is None:
            is_whole = are_same(own if len(self._parts) == 1 else None)
        if not is_whole:
            own = concatenated(all_batches(own, own["output"].device))
        if self._whole_groups:
            _refuse_cut(own["groups"], own.pop("batch"))
        found = Marginal(self.model, self._all_rows)
        found._parts = [own]
        return found

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self._rows[1])

    @property
    def _rows(self) -> tuple[Mapping[str, Any], Tensor]:
        (own,) = self._parts
        return {key: part for key, part in own.items() if key != "output"}, own["output"]

    def record(self) -> Record:
        """The likelihood at the present parameters."""
        batch, output = self._rows
        off = torch.autocast(output.device.type, enabled=False)
        with torch.no_grad(), off, evaluating(self.model):
            loss, y, eta, X, weights = self.model.marginal(output, batch)
            found = Record.of(loss.covariance, -float(loss(y, eta, X, weights=weights)))
            own = {k: float(v) for k, v in loss.family.quantities(output).items()}
        return replace(found, parameters={**found.parameters, **own})

    def fit(self, table: TableModel | None, max_iterations: int) -> Result:
        """Bring all but the network to its optimum; the model takes it up."""
        batch, output = self._rows
        names = [] if output.dim() == 1 else [f"X{j}" for j in range(output.shape[1])]
        labels = {}
        if table is not None:
            labels, names = table.labels, table.names(len(names)) if names else names
        off = torch.autocast(output.device.type, enabled=False)
        with torch.inference_mode(False), off, evaluating(self.model):
            self.fitted = fit_family(
                self.model,
                batch,
                output,
                names=names,
                labels=labels,
                max_iterations=max_iterations,
                begin=None if table is None else lambda: table.begin(self.model, batch),
            )
            assert self.fitted.model is not None
            self.model.load_state_dict(self.fitted.model.state_dict())
            self.model.seen = self.fitted.model.seen
        return self.fitted

    def update(self) -> None:
        """Store coefficients, modes and what their variances need in the model."""
        if self.fitted is None:
            batch, output = self._rows
            with torch.autocast(output.device.type, enabled=False):
                self.model.update(batch, output)

    def result(self, history: Sequence[Record], table: TableModel | None) -> Result:
        """The result at the optimum, where the fit ended."""
        assert self.fitted is not None
        return replace(self.fitted, history=tuple(history))


def _refuse_cut(groups: Mapping[str, Tensor], batch: Tensor) -> None:
    """Refuse batches that cut a group, of which the processes have one at the same time."""
    for name, codes in groups.items():
        codes = codes.long()
        pairs = torch.stack([codes, batch])[:, codes >= 0].unique(dim=1)
        levels, count = pairs[0].unique(return_counts=True)
        if bool((count > 1).any()):
            raise InputError(
                f"level {int(levels[count > 1][0])} of {name!r} is in more than one "
                "mini-batch: training='groups' takes batches that cut no group, as of "
                "DataLoader(data, batch_sampler=WholeGroups(groups, rows))"
            )
