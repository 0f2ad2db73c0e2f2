"""The parts of a mixed model, and what rows have said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance import DummyMatrix, Matrix, MembershipMatrix, Operator, Sum
from openreml_nn.covariance.params import operand_name
from openreml_nn.families import Family
from openreml_nn.likelihood.effects import Coefficients, RandomEffects
from openreml_nn.model.batch import Batch, responding
from openreml_nn.model.random_effect import Effects, RandomEffect
from openreml_nn.model.residual import ResidualStructure, structure_of
from openreml_nn.model.seen import SeenRows
from openreml_nn.model.several import stacked, stacked_output
from openreml_nn.model.unread import refuse_elsewhere, refuse_unread
from openreml_nn.result.equations import Equations, FixedBasis
from openreml_nn.result.evidence import Evidence
from openreml_nn.result.joint import JointErrors
from openreml_nn.result.prediction import lowered
from openreml_nn.result.result import FixedEffects
from openreml_nn.support.modes import outside_inference
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.term import Term

__all__ = ["Posterior"]


class Posterior(nn.Module):
    """The parts of a mixed model, with the coefficients and BLUPs that were found from data.

    A subclass yields the mean, or the features, of a batch, in its ``forward``.

    Args:
        mean: the network of the mean, or of the features.
        random: random effects by name.
        residual: of a row, as :func:`structure_of` takes it, or a family.
        head: ``"ml"`` or ``"gls"``, whether the network yields the mean or features.
        responses: how many a row has.

    Attributes:
        beta: (p,) coefficients of the features, with head ``"gls"``; 0 for those that were dropped.
        beta_covariance: (p, p) their covariance.
        aliases: (p, d) null space of the features.
        joint: the joint covariance of coefficients and BLUPs.
        evidence: what the rows have said, to which others can be added.
        seen: with a family, the rows of the last update, in no checkpoint.
    """

    beta: Tensor
    beta_covariance: Tensor
    aliases: Tensor

    def __init__(
        self,
        mean: nn.Module,
        random: Mapping[str, RandomEffect],
        residual: nn.Module,
        head: str,
        responses: int = 1,
    ) -> None:
        super().__init__()
        self.mean = mean
        self.random = Effects(random)
        self.residual = residual
        self.head = head
        self.responses = responses
        none = torch.zeros(0, 0, dtype=torch.float64)
        self.register_buffer("beta", none.reshape(0))
        self.register_buffer("beta_covariance", none)
        self.register_buffer("aliases", none)
        self.joint = JointErrors()
        self.evidence = Evidence()
        self.seen: SeenRows | None = None
        self.register_load_state_dict_post_hook(_settle_again)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would keep the module under this name, beside the family that the likelihood is of.
        if name == "family":
            raise AttributeError(
                "`family` has the residual's place: assign `model.residual`, or make another model"
            )
        super().__setattr__(name, value)

    def check(self, batch: Batch) -> None:
        """Refuse what has no effect in this model, or is on another device.

        Raises:
            TypeError, InputError: if the batch has such a part, naming it.
        """
        refuse_unread(batch, self.effects, self.residual, self.responses, len(self.random))
        refuse_elsewhere(batch, self.beta.device)

    def single(self, batch: Batch, output: Tensor, is_data: bool) -> tuple[Batch, Tensor]:
        """A batch with what the network has yielded for it, with a row for each response; in the
        likelihood, for each that is not missing.

        Args:
            batch, output: as they are.
            is_data: whether the rows are of the likelihood.
        """
        if self.responses == 1:
            return batch, output
        found = self.stacked(batch, is_data)
        output = stacked_output(output, batch, self.responses, self.head)
        if not is_data:
            return found, output
        there, rows = responding(found)
        return there, output if rows is None else output[rows]

    def stacked(self, batch: Batch, is_data: bool) -> Batch:
        """A batch with a row for each response; ``is_data`` as in :meth:`single`."""
        features = (effect.features is not None for effect in self.effects().values())
        with_x = any(features) or not isinstance(self.residual, Matrix)
        found = stacked(batch, self.responses, self.effects(), is_data, with_x)
        if "residual" not in structure_of(self.residual).takes:
            del found["residual"]
        return found

    @property
    def family(self) -> Family | None:
        """The family of the response, which has the residual's place; None for a Gaussian one."""
        return self.residual if isinstance(self.residual, Family) else None

    def covariance_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the covariance: what :class:`AIREML` is for."""
        for effect in self.effects().values():
            yield from effect.g.parameters()
        if isinstance(self.residual, Matrix | ResidualStructure):
            yield from self.residual.parameters()

    def network_parameters(self) -> Iterator[nn.Parameter]:
        """All other parameters."""
        own = {id(p) for p in self.covariance_parameters()}
        return (p for p in self.parameters() if id(p) not in own)

    def effects(self) -> dict[str, RandomEffect]:
        """The random effects by name."""
        return dict(self.random.items())

    @torch.no_grad()
    def remember(
        self, random: Sequence[RandomEffects], fixed: Coefficients | FixedEffects, aliases: Tensor
    ) -> None:
        """Take up BLUPs and coefficients.

        Args:
            random: BLUPs of each random effect.
            fixed: coefficients of the kept columns of X, with their covariance.
            aliases: (p, d) the null space of X with all its columns.
        """
        effects = {operand_name(name, {"residual"}): e for name, e in self.effects().items()}
        for found in random:
            if found.name not in effects:
                continue  # of the rows' own errors
            _hold(effects[found.name], found)
        at, p = torch.tensor(fixed.columns, dtype=torch.long, device=aliases.device), len(aliases)
        self.beta = aliases.new_zeros(p).index_copy(0, at, fixed.estimate.to(aliases))
        self.beta_covariance = aliases.new_zeros(p, p)
        self.beta_covariance[at[:, None], at] = fixed.covariance.to(aliases)
        self.aliases = aliases.clone()

    @torch.no_grad()
    def remember_errors(
        self,
        covariance: Matrix,
        fixed: Callable[[], tuple[Tensor, FixedBasis]],
        r: int,
        dtype: torch.dtype,
        residual: Term | None = None,
    ) -> None:
        """Take up what the variances of predictions, and other rows, need: it is computed when it is
        asked for.

        Args:
            covariance: of the rows, as :meth:`covariance` makes it.
            fixed: yields the columns of the fixed part (n, r), and what they are, see
                :class:`Equations`.
            r: number of coefficients.
            dtype: that of the data and their likelihood.
            residual: what stands for the residual where a family has its place.
        """
        assert isinstance(covariance, Sum)
        parts = list(covariance.operands.values())
        own = [part for part in parts[len(self.random) :] if isinstance(part, Matrix)]
        terms = [term.detach() for part in own for term in part.terms(None, dtype)]
        if residual is not None:
            terms = [residual]
        random = [part for part in parts[: len(self.random)] if isinstance(part, Operator)]
        pairs = [part.operands.values() for part in random]
        designs = [z.design for z, _ in pairs if isinstance(z, DummyMatrix | MembershipMatrix)]
        self.remember_equations(
            [lowered(g, dtype).map(Tensor.detach) for _, g in pairs if isinstance(g, Matrix)],
            [(design.levels, design.shape[1] // design.levels) for design in designs],
            r,
            lambda: Equations.of(designs, terms, *fixed()),
        )

    def remember_equations(
        self,
        covariances: Sequence[Covariance],
        sizes: Sequence[tuple[int, int]],
        r: int,
        equations: Callable[[], Equations | None],
    ) -> None:
        """Take up the equations of rows, see :meth:`JointErrors.update` for the arguments."""
        self.evidence.update(equations)
        self.joint.update(covariances, sizes, r, self.evidence.equations)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The number of coefficients is known only once there are features.
        for name in ("beta", "beta_covariance", "aliases"):
            if prefix + name in state_dict:
                own = getattr(self, name)
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _settle_again(model: Posterior, _: object) -> None:
    """Let the joint covariance of a checkpoint that is too large to be in it come from the equations
    there, at the checkpoint's parameters; rows that were seen are others'."""
    model.seen = None
    evidence, joint = model.evidence, model.joint
    if not bool(joint.is_known) or bool(joint.is_exact) or not float(evidence.total[0]):
        return
    sizes = [(int(q), int(k)) for q, k in evidence.sizes.tolist()]
    own = [e.g_of(q) for e, (q, _) in zip(model.effects().values(), sizes, strict=True)]
    dtype = evidence.squares.dtype
    covariances = [lowered(g, dtype).map(Tensor.detach) for g in own if g is not None]
    if len(covariances) == len(sizes):
        joint.update(covariances, sizes, evidence.basis.shape[1], evidence.equations)


def _hold(effect: RandomEffect, found: RandomEffects) -> None:
    """Take up BLUPs and their variances, in the precision that they were computed in: what is
    kriged of rounded ones is far off where levels are at near places."""
    q, k, dtype = effect.levels, effect.effects, found.values.dtype
    if effect.blup.dtype != dtype:
        with outside_inference(False):
            effect.blup, effect.variance = effect.blup.to(dtype), effect.variance.to(dtype)
    # Rows of no known level had levels of their own, which come after the others.
    effect.blup.copy_(found.values.reshape(-1, k)[:q])
    effect.variance.copy_(found.variances.reshape(-1, k, k)[:q])
