"""Counts with more zeros than their distribution has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openreml_nn.families.binomial import Binomial
from openreml_nn.families.counts import NegativeBinomial, NegativeBinomial1, Poisson
from openreml_nn.families.drawing import drawn
from openreml_nn.families.family import Family, refuse_rows
from openreml_nn.support.checks import check_instance
from openreml_nn.support.errors import InputError

__all__ = ["ZeroInflated", "check_inflatable"]

Derivatives = tuple[Tensor, Tensor, Tensor]


class ZeroInflated(Family):
    r"""A response that is 0 with probability :math:`\pi_i`, and else of another family.

    .. math::
        p(y \mid \eta) = \pi\,1\{y = 0\} + (1 - \pi)\,p_0(y \mid \eta),\qquad
        \mathrm{logit}\,\pi_i = h(z_i)

    The response is (n, 1 + k): y, and the k inputs :math:`z_i` of the zero part.

    Args:
        family: of the other responses: a Poisson or a negative binomial one, or a binomial one of 0
            and 1 with the logit link.
        logits: h, a module from (n, k) to (n,) or (n, 1); its parameters are the family's.
        names: of the inputs, where h is linear in them and tables are to show its coefficients.

    Raises:
        TypeError: if the family or the module is of another kind.
        InputError: if the family has no zeros to inflate.

    Reference:
        Lambert, Technometrics 34 (1992) 1.

    >>> family = ZeroInflated(Poisson(), nn.Linear(1, 1, bias=False))
    >>> nn.init.zeros_(family.logits.weight).shape
    torch.Size([1, 1])
    >>> family.log_density(torch.tensor([[0.0, 1.0]]), torch.zeros(1)).exp()
    tensor([0.6839], grad_fn=<ExpBackward0>)
    """

    def __init__(self, family: Family, logits: nn.Module, names: Sequence[str] = ()) -> None:
        super().__init__()
        check_instance("family", family, Family)
        check_instance("logits", logits, nn.Module)
        check_inflatable(family)
        self.family, self.logits, self.names = family, logits, tuple(names)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"zero-inflated {self.family.name}"

    @property
    def link(self) -> str:  # type: ignore[override]
        return self.family.link

    @property
    def base(self) -> Family:
        return self.family

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        y, zeta = self._parts(y, eta)
        return _log_density(self.family, y, zeta, eta)

    def derivatives(self, y: Tensor, eta: Tensor) -> Derivatives:
        # Of a zero, with r the probability that it is of the other family, f' = r l', r' = r (1 - r) l'.
        y, zeta = self._parts(y, eta)
        first, second, third = self.family.derivatives(y, eta)
        at_zero = self.family.log_density(torch.zeros_like(y), eta)
        r, rest = torch.sigmoid(at_zero - zeta), torch.sigmoid(zeta - at_zero)
        square = first * first
        bend = second + rest * square
        twist = third + 2 * rest * first * second - r * rest * first * square
        zero = y == 0
        return (
            torch.where(zero, r * first, first),
            torch.where(zero, r * bend, second),
            torch.where(zero, r * (rest * first * bend + twist), third),
        )

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        """Refused: the variance is no function of the mean, so that there is no unit deviance.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"the {self.name} family has no unit deviance: judge rows by the negative log density, and "
            "fits by Result.deviance, which is -2 times the log-likelihood"
        )

    @property
    def has_deviance(self) -> bool:
        return False

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        """Responses with the inputs that the rows have."""
        own, zeta = self._parts(y, eta)
        found = self.family.draw(own, eta, rng)
        extra = drawn(rng.random, eta, len(eta)) < torch.sigmoid(zeta)
        found = torch.where(extra, torch.zeros_like(found), found)
        return torch.cat([found[:, None], y[:, 1:].to(found)], 1)

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        y, zeta = self._parts(y, eta)
        share = torch.sigmoid(zeta)
        below, at = ((1 - share) * part for part in self.family.cumulative(y, eta))
        return below + share * (y > 0), at + share * (y >= 0)

    def of_rows(self, inputs: Tensor | None) -> Family:
        if inputs is None:
            raise InputError("there are no inputs of the zero part: expected `batch['zi']`, (n, k)")
        zeta = self.logits(inputs.to(next(self.logits.parameters(), inputs)))
        return _Known(self.family, zeta.reshape(len(inputs)))

    def with_inputs(self, y: Tensor, inputs: Tensor | None) -> Tensor:
        if inputs is None:
            raise InputError("there are no inputs of the zero part: expected `batch['zi']`, (n, k)")
        if y.dim() != 1 or inputs.dim() != 2 or len(y) != len(inputs):
            raise InputError(
                f"`batch['zi']` has shape {tuple(inputs.shape)} beside responses of shape "
                f"{tuple(y.shape)}: expected (n, k) and (n,)"
            )
        return torch.cat([y[:, None].to(inputs), inputs], 1)

    def observed(self, y: Tensor) -> Tensor:
        return y[:, 0]

    def inputs_of(self, y: Tensor) -> Tensor:
        return y[:, 1:]

    def check(self, y: Tensor, what: str = "`y`") -> None:
        if y.dim() != 2:
            raise InputError(
                f"{what} has shape {tuple(y.shape)}: expected (n, 1 + k), the response and the inputs "
                "of the zero part"
            )
        refuse_rows(y, ~torch.isfinite(y), what, "finite numbers")
        self.family.check(y[:, 0], what)

    def start(self, y: Tensor) -> Tensor:
        """Half of the zeros are taken to be of the zero part, where that is linear."""
        if isinstance(self.logits, nn.Linear):
            share = ((y[:, 0] == 0).to(y).mean() / 2).clamp(0.02, 0.8)
            with torch.no_grad():
                Z = y[:, 1:]
                found = torch.linalg.lstsq(Z, torch.logit(share).expand(len(y), 1)).solution
                self.logits.weight.copy_(found.mT)
        return self.family.start(y[:, 0])

    def quantities(self, like: Tensor) -> dict[str, Tensor]:
        found = self.family.quantities(like)
        if self.names and isinstance(self.logits, nn.Linear):
            weights = self.logits.weight.reshape(-1).to(like).split(1)
            found |= {f"zi {name}": w for name, w in zip(self.names, weights, strict=True)}
        return found

    def by_parameters(self, given: Mapping[str, Any], option: str) -> dict[str, Any]:
        known = [name for name in given if name.startswith("zi ")]
        if known:
            raise InputError(
                f"`{option}` names {known[0]!r}, a coefficient: expected covariance parameters, or "
                "those of the family"
            )
        return self.family.by_parameters(given, option)

    def extra_repr(self) -> str:
        return ""

    def _parts(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        """The response, and the logit of the probability of a zero beside the family's."""
        zeta = self.logits(y[:, 1:].to(next(self.logits.parameters(), eta)))
        return y[:, 0].to(eta), zeta.reshape(len(y)).to(eta)


def check_inflatable(family: Family) -> None:
    """Refuse a family that has no zeros to inflate.

    Raises:
        InputError: naming it.
    """
    if not isinstance(family, Poisson | NegativeBinomial | NegativeBinomial1 | Binomial):
        raise InputError(
            f"`family` is {family.name or type(family).__name__!r}, without zeros to inflate: "
            "expected a poisson, negative_binomial, negative_binomial_1 or binomial one"
        )


def _log_density(family: Family, y: Tensor, zeta: Tensor, eta: Tensor) -> Tensor:
    some = nn.functional.logsigmoid(-zeta) + family.log_density(y, eta)
    return torch.where(y == 0, torch.logaddexp(nn.functional.logsigmoid(zeta), some), some)


class _Known(Family):
    """Zero inflation of rows whose logits are known: what predicts for them."""

    def __init__(self, family: Family, zeta: Tensor) -> None:
        super().__init__()
        self.family, self.zeta = family, zeta

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        return _log_density(self.family, y, self.zeta.to(eta), eta)

    def mean(self, eta: Tensor) -> Tensor:
        r""":math:`(1 - \pi)\mu`."""
        return torch.sigmoid(-self.zeta).to(eta) * self.family.mean(eta)

    def variance(self, eta: Tensor) -> Tensor:
        r""":math:`(1 - \pi)(V + \pi\mu^2)`."""
        some, mean = torch.sigmoid(-self.zeta).to(eta), self.family.mean(eta)
        return some * (self.family.variance(eta) + torch.sigmoid(self.zeta).to(eta) * mean * mean)
