r"""Ways of training the network of a :class:`MixedModel`.

A way says what a step of the network's optimizer goes down, :meth:`Way.loss`, and what is kept of
an epoch's batches, from which the covariance and the BLUPs follow at its end, :meth:`Way.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openreml_nn.lightning.batches import connected_rows, in_order, whole
from openreml_nn.lightning.conditional import deviance, is_uneven
from openreml_nn.lightning.held import Held, HeldOrSummed
from openreml_nn.lightning.marginal import Marginal
from openreml_nn.lightning.reading import Store
from openreml_nn.lightning.rows import check_response, concatenated
from openreml_nn.lightning.sharing import all_batches, gather, gather_parts, processes, share, total
from openreml_nn.lightning.sums import LevelSums
from openreml_nn.model import MixedModel, take
from openreml_nn.model.batch import Batch, split
from openreml_nn.support.checks import check_choice
from openreml_nn.support.errors import InputError

__all__ = [
    "WAYS",
    "Alternating",
    "Composite",
    "Full",
    "Groups",
    "Linear",
    "Parts",
    "Way",
    "way_of",
]

Coded = Mapping[str, tuple[Tensor, Tensor | None]]


class Way:
    """A way of training; a subclass supplies :meth:`loss`.

    Attributes:
        heads: heads of the models that it trains.
        needs_blups: whether the loss of an epoch takes the BLUPs of the one before.
        needs_all_rows: whether a batch must hold all rows, the same on all processes.
        cuts_tables: whether a table becomes mini-batches, see :meth:`division`.
        takes_families: whether it trains models of responses that are not Gaussian, by the marginal
            likelihood of a batch.

    Args:
        rows: rows that the network sees at a time, where that is the way's to choose.
    """

    heads: tuple[str, ...] = ("ml",)
    needs_blups = False
    needs_all_rows = False
    cuts_tables = True
    takes_families = True

    def __init__(self, rows: int = 1024) -> None:
        self.row_count = rows

    def begin_epoch(self, model: MixedModel) -> None:
        """See where the model stands before the first step of an epoch."""

    def memory(self) -> dict[str, Tensor]:
        """What the way keeps from one epoch to the next, for a run that is resumed."""
        return {}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Take up a memory."""

    def loss(self, model: MixedModel, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """The loss of a batch, divided by its rows, and what the network has yielded.

        The loss is None where nothing is trained by its gradient.
        Under a distributed strategy its gradients, averaged over the processes, are those of the
        rows of all.
        """
        raise NotImplementedError

    def output(self, model: MixedModel, batch: Batch) -> Tensor:
        """What the network yields for the batch."""
        return model(batch)

    def rows(self, model: MixedModel) -> Store:
        """An empty store for what is kept of an epoch's batches."""
        return LevelSums(model) if model.family is None else Marginal(model)

    def division(self, batch: Batch) -> Callable[[torch.Generator], list[Tensor]]:
        """How epochs divide a table into mini-batches: a function that draws their rows."""
        n = len(batch["y"])
        return lambda generator: in_order(n, self.row_count, generator, batch["y"].device)

    def check(self, model: MixedModel) -> None:
        """Refuse a model that the way does not train.

        Raises:
            InputError: if it is of another head, or has a family that the way does not train, or its levels are correlated where
                they must not be.
        """
        if model.family is not None and not self.takes_families:
            raise InputError(
                f"`model` has the family {type(model.family).__name__}, which "
                f"{type(self).__name__.lower()} training does not train: expected training='full', "
                "'parts', 'groups' or 'composite'"
            )
        if model.head not in self.heads:
            name = type(self).__name__.lower()
            raise InputError(
                f"{name} training is for head {self.heads[0]!r}: head {model.head!r} takes its "
                "coefficients from all rows, by training='full' or 'parts'"
            )


# ---------------------------------------------------------------------- batches of any rows


class Alternating(Way):
    r"""Mini-batches of least squares on what the BLUPs leave, then the BLUPs.

    Henderson's equations: the likelihood's maximum over the mean is that of

    .. math:: -\tfrac12\Bigl[\lVert y - f(x) - Zb \rVert^2_{R^{-1}} + b^\top G^{-1} b\Bigr]

    over the mean and b together, and the step of the network is one on its first part with b at
    the BLUPs. Where a network yields R or the values of Z, :math:`\mathrm{tr}\,R^{-1} Z P Z^\top`
    and :math:`\log|R|` belong to it, with P the BLUPs' prediction-error covariance: then its
    gradient is the likelihood's (Fisher's identity; the step is one of an EM algorithm).

    With head ``"gls"`` the coefficients of the features are found with the BLUPs, from all rows of
    an epoch (before the first, in a pass of its own), and P is the joint covariance of both: then
    the gradient is the restricted likelihood's.

    At the optimum the BLUPs have no mean over the levels, where the network can yield what that
    would explain. Taking turns, network and BLUPs would hand it over slowly, by the part that the
    BLUPs are shrunken. So the network is given all of the mean; and less of it, half as much each
    epoch, where after an epoch the BLUPs still have it: the network cannot yield it then.

    Reference:
        Henderson, Biometrics 31 (1975) 423, eq. 2; Dempster, Laird and Rubin, JRSS B 39 (1977) 1.
    """

    heads = ("ml", "gls")
    needs_blups = True
    takes_families = False

    def __init__(self, rows: int = 1024) -> None:
        super().__init__(rows)
        # Of each random effect the mean over its levels (k,), and the part that is given over.
        self._means: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}

    def begin_epoch(self, model: MixedModel) -> None:
        for name, effect in model.effects().items():
            if not effect.is_per_level:
                continue
            mean = effect.blup.mean(0)
            before = self._means.get(name, torch.zeros_like(mean)).to(mean)
            part = self._parts.get(name, torch.ones_like(mean)).to(mean)
            # A constant is what most networks can yield, be it slowly.
            still = 0.999 if effect.effect_names == ("(Intercept)",) else 0.95
            kept = mean * before > still * before**2
            part = torch.where(kept & (before != 0), part / 2, (2 * part).clamp(max=1))
            self._means[name], self._parts[name] = mean, part

    def memory(self) -> dict[str, Tensor]:
        kept = (("means", self._means), ("parts", self._parts))
        return {f"{what}/{name}": value for what, by in kept for name, value in by.items()}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        for key, value in memory.items():
            what, _, name = key.partition("/")
            {"means": self._means, "parts": self._parts}[what][name] = value

    def loss(self, model: MixedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self.output(model, batch)
        _check_response(model, batch["y"], output)
        handed = {name: self._parts[name].to(mean) * mean for name, mean in self._means.items()}
        with torch.autocast(output.device.type, enabled=False):
            found, count = deviance(model, batch, output, handed)
            return found * (processes() / (2 * total(count, output.device))), output

    def check(self, model: MixedModel) -> None:
        super().check(model)
        LevelSums(model)
        if model.responses > 1 and (model.head == "gls" or is_uneven(model)):
            raise InputError(
                f"{model.responses} responses of a row with head 'gls', learned features of random "
                "effects or a network for variances need all rows at once: use training='full' or "
                "'parts'"
            )
        if model.head == "gls" and model.method == "ml" and is_uneven(model):
            raise InputError(
                "`method` is 'ml' with head 'gls' beside learned features of random effects, or a "
                "network for variances: use 'reml', or training='full' or 'parts'"
            )


class Composite(Way):
    """Mini-batches of any rows, each with its own likelihood: a composite likelihood, which cuts
    groups.

    Reference:
        Varin, Reid and Firth, Statistica Sinica 21 (2011) 5.
    """

    def loss(self, model: MixedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self.output(model, batch)
        _check_response(model, batch["y"], output)
        rows = concatenated(all_batches(batch, output.device))
        for name, codes in rows["groups"].items():
            alone = codes.dim() == 1 and len(codes) > 1
            if alone and int(codes[0]) >= 0 and bool((codes == codes[0]).all()):
                raise InputError(
                    f"it has one level of {name!r} in {len(codes)} rows, whose variance cannot "
                    "be told from the mean: take larger batches"
                )
        with torch.autocast(output.device.type, enabled=False):
            return model.loss_of(gather_parts(output), rows), output


class Groups(Composite):
    """Mini-batches that cut no group: their likelihoods add up to that of all rows.

    A loader whose batches cut a group is refused at the end of its epoch;
    :class:`~openreml_nn.lightning.WholeGroups` is a batch sampler that cuts none.
    """

    def rows(self, model: MixedModel) -> Store:
        if model.family is not None:
            return Marginal(model, whole_groups=True)
        return LevelSums(model, whole_groups=True)

    def division(self, batch: Batch) -> Callable[[torch.Generator], list[Tensor]]:
        sets = connected_rows(batch["groups"])
        if int(sets.max()) == 0:
            raise InputError(
                "all rows hang together through their groups, which training='groups' cannot "
                "divide: use 'parts', 'alternating' or 'composite'"
            )
        return lambda generator: whole(sets, self.row_count, generator)

    def check(self, model: MixedModel) -> None:
        super().check(model)
        effects = model.effects().items()
        if correlated := [name for name, effect in effects if not effect.is_per_level]:
            raise InputError(
                f"the levels of {correlated[0]!r} are correlated, so that no mini-batch is "
                "independent of the others: use training='parts', 'alternating' or 'composite'"
            )


def _check_response(model: MixedModel, y: Any, output: Tensor) -> None:
    """Refuse a response that cannot train; with a family, its likelihood does."""
    if model.family is None:
        check_response(y, output, model.responses)


# ---------------------------------------------------------------------- all rows at once


class Full(Way):
    """One step on the likelihood of all rows, which one batch holds.

    Under a distributed strategy all processes hold them, and each runs the network on its share.
    """

    heads = ("ml", "gls")
    needs_all_rows = True
    cuts_tables = False

    def loss(self, model: MixedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self.output(model, batch)
        _check_response(model, batch["y"], output)
        with torch.autocast(output.device.type, enabled=False):
            return model.loss_of(output, batch), output

    def output(self, model: MixedModel, batch: Batch) -> Tensor:
        return gather(self._run(model, take(batch["x"], share())), len(batch["y"]))

    def _run(self, model: MixedModel, x: Any) -> Tensor:
        return model({"x": x})

    def rows(self, model: MixedModel) -> Store:
        return Held(model) if model.family is None else Marginal(model, all_rows=True)


class Parts(Full):
    """A step on the likelihood of all rows in the memory of a few: the network runs on some rows at
    a time, and again when their gradient comes back."""

    def _run(self, model: MixedModel, x: Any) -> Tensor:
        parts = split(x, self.row_count)
        return torch.cat([checkpoint(model, {"x": part}, use_reentrant=False) for part in parts])


class Linear(Way):
    """A linear mean, of which all follows from the rows of an epoch, in one batch or in several."""

    heads = ("gls",)
    cuts_tables = False

    def loss(self, model: MixedModel, batch: Batch) -> tuple[Tensor | None, Tensor]:
        output = self.output(model, batch)
        _check_response(model, batch["y"], output)
        return None, output

    def rows(self, model: MixedModel) -> Store:
        return HeldOrSummed(model) if model.family is None else Marginal(model, all_rows=None)


WAYS: dict[str, type[Way]] = {
    "alternating": Alternating,
    "full": Full,
    "parts": Parts,
    "groups": Groups,
    "composite": Composite,
}


def way_of(training: str | Way | None, head: str, rows: int, has_family: bool = False) -> Way:
    """A way by its name; None is ``"full"`` for head ``"gls"`` and for families, else
    ``"alternating"``.

    Raises:
        InputError: if there is none of this name.
    """
    if isinstance(training, Way):
        return training
    if training is None:
        training = "full" if head == "gls" or has_family else "alternating"
    check_choice("training", training, tuple(WAYS))
    return WAYS[training](rows)
