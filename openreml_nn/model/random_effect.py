"""The random effects of one grouping factor, as a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    MembershipMatrix,
    ScalarMatrix,
    UnstructuredMatrix,
)
from openreml_nn.covariance.kernel import DistanceMatrix
from openreml_nn.covariance.params import module_name, operand_name, user_name
from openreml_nn.covariance.propagation import propagated
from openreml_nn.covariance.sum import summands
from openreml_nn.covariance.vecchia import VecchiaMatrix
from openreml_nn.model.batch import (
    Batch,
    check_values,
    level_codes,
    level_values,
    part,
)
from openreml_nn.result.prediction import lowered, prior_of
from openreml_nn.support.checks import (
    check_count,
    check_instance,
    check_labels,
    check_tensor,
    found,
)
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import RepeatedCovariance
from openreml_nn.terms.design import design_of
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.term import Term

__all__ = [
    "Coded",
    "Effects",
    "RandomEffect",
    "coded_effects",
    "independent_levels",
    "kernel_of",
    "on_their_own",
]

#: Level codes (n,) of the rows and values (n, k) of the effects, by the names of random effects; of rows
#: of m levels each (n, m) and (n, m, k).
Coded = Mapping[str, tuple[Tensor, Tensor | None]]


def independent_levels(levels: int, effects: int) -> Matrix:
    r"""The covariance of the effects of independent levels where nothing else is said.

    One effect has :math:`\sigma^2 I` and several have :math:`I \otimes \Sigma`, Σ any covariance.
    """
    if effects == 1:
        return ScalarMatrix(levels)
    return KroneckerProduct(levels=IdentityMatrix(levels), effects=UnstructuredMatrix(effects))


def kernel_of(g: Matrix) -> DistanceMatrix | VecchiaMatrix | None:
    """The kernel among the levels of a covariance of all levels; None if there is none."""
    if isinstance(g, KroneckerProduct) and list(g.operands) == ["levels", "effects"]:
        one = g.operands["levels"]
        return one if isinstance(one, DistanceMatrix | VecchiaMatrix) else None
    return g if isinstance(g, DistanceMatrix | VecchiaMatrix) else None


def _labels(name: str, given: int | Sequence[str]) -> tuple[str, ...]:
    """The names that were given, or numbers."""
    if isinstance(given, Integral):
        return tuple(map(str, range(check_count(name, given, 1))))
    return check_labels(name, given)


def _effect_names(
    effects: int | Sequence[str], responses: int | Sequence[str]
) -> tuple[tuple[str, ...], int]:
    """Names of the effects of a level, for each response in turn, and how many responses there are."""
    own, several = _labels("effects", effects), _labels("responses", responses)
    if isinstance(effects, Integral) and len(own) == 1:
        own = ("(Intercept)",)
    if len(several) == 1:
        return own, 1
    if len(own) == 1:
        return several, len(several)
    return tuple(f"{response}:{effect}" for response in several for effect in own), len(several)


def _of_all_levels(covariance: Matrix | None, q: int, k: int) -> Matrix:
    """G of q levels, from what was given."""
    if covariance is None:
        return independent_levels(q, k).double()
    if covariance.shape == (q * k, q * k):
        return covariance
    if covariance.shape == (k, k):
        return KroneckerProduct(levels=IdentityMatrix(q), effects=covariance)
    raise InputError(
        f"`covariance` is {covariance.shape}: expected {(k, k)} for the "
        f"effects of a level, or {(q * k, q * k)} for all levels"
    )


class RandomEffect(nn.Module):
    r"""The random effects of one grouping factor, :math:`b \sim N(0, G)`.

    Args:
        levels: how many levels there are, or their names.
        covariance: of the effects of a level, (k, k), independent between
            levels; or of all levels, (levels · k, levels · k), such as a kernel. By
            default one variance, or an unstructured matrix for several effects.
        effects: k, how many effects each level has, or their names.
        features: a module that yields the effects' values (n, k) from ``x``: random
            slopes in learned features.
        basis: B (k, k), for effects that are better conditioned as those of :math:`z^\top B` than as
            those of the values z; then ``g``, ``blup`` and ``variance`` are of these.
        responses: t, or their names, where a row has several and each has effects of its own: then
            there are t times ``effects``, those of the first response first.
        places: (levels, d) coordinates of the levels of a kernel of their distances: then a row
            of no known level, with its own in ``batch["places"]``, is predicted by kriging.

    Attributes:
        g: the covariance G of all levels.
        blup: (levels, k) BLUPs, after :meth:`MixedModel.update`.
        variance: (levels, k, k) their prediction-error variances.
        basis: B, the identity by default.

    Raises:
        TypeError: if an argument is of another kind.
        InputError: if the covariance has another shape, or a name stands twice.

    >>> RandomEffect(10, effects=2).g.shape
    (20, 20)
    """

    blup: Tensor
    variance: Tensor
    basis: Tensor
    places: Tensor | None

    def __init__(
        self,
        levels: int | Sequence[str],
        covariance: Matrix | None = None,
        effects: int | Sequence[str] = 1,
        features: nn.Module | None = None,
        basis: Tensor | None = None,
        places: Tensor | None = None,
        responses: int | Sequence[str] = 1,
    ) -> None:
        super().__init__()
        self.effect_names, self.responses = _effect_names(effects, responses)
        k = len(self.effect_names)
        if self.responses > 1 and features is not None:
            raise InputError(
                f"`features` is {found(features)} with {self.responses} responses: expected None, "
                "and values in the batch"
            )
        if isinstance(levels, Integral):
            self.names, q = None, check_count("levels", levels, 1)
        else:
            self.names = check_labels("levels", levels)
            q = len(self.names)
        check_instance("covariance", covariance, (Matrix, NoneType), "a Matrix, or None")
        check_instance("features", features, (nn.Module, NoneType), "a module, or None")
        if basis is not None:
            check_tensor("basis", basis, (k, k), "floating")
        self.levels, self.effects = q, k
        self.features = features
        self.g = _of_all_levels(covariance, q, k)
        like = next(self.g.parameters(), torch.zeros(1, dtype=torch.float64))
        self.register_buffer("blup", like.new_zeros(q, k))
        self.register_buffer("variance", like.new_zeros(q, k, k))
        self.register_buffer("basis", torch.eye(k).to(like) if basis is None else basis)
        kernel = kernel_of(self.g)
        if isinstance(kernel, VecchiaMatrix):
            places = kernel.places if places is None else places
        if places is not None:
            check_tensor("places", places, (q, "d"), "floating")
            if kernel is None:
                raise InputError(
                    f"`places` has coordinates but `covariance` is {type(self.g).__name__}: expected a "
                    "kernel of distances, such as MaternMatrix, or its product with a covariance"
                )
        self.register_buffer("places", places)

    @property
    def is_per_level(self) -> bool:
        """Whether levels are independent and have one covariance."""
        return isinstance(lowered(self.g), RepeatedCovariance)

    def prior(self) -> Tensor:
        """Covariance (k, k) of the effects of a level that was not seen: the mean where levels differ."""
        basis = self.basis.to(prior := self.prior_in_basis())
        return basis @ prior @ basis.mT

    def prior_in_basis(self, dtype: torch.dtype | None = None) -> Tensor:
        """Covariance (k, k) of the effects of a level that was not seen, in their basis; see :meth:`prior`.
        ``dtype`` is that of the computation, by default of the parameters."""
        g = lowered(self.g, dtype)
        if isinstance(kernel_of(self.g), VecchiaMatrix) and isinstance(g, PrecisionCovariance):
            return g.shown()  # the variance of any place
        return prior_of(g, self.levels, self.effects)

    def known(self) -> tuple[Tensor, Tensor]:
        """BLUPs (levels, k) of the effects of z, and their prediction-error variances."""
        basis = self.basis.to(self.blup)
        return self.blup @ basis.mT, basis @ self.variance @ basis.mT

    def coded(
        self, name: str, batch: Batch, n: int, levels: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The codes of the levels (n,) of the rows of a batch, and the values of the effects (n, k),
        None for ones; where a row has m levels (n, m) and (n, m, k). A code is below ``levels``,
        the effect's own number by default.

        Raises:
            TypeError, InputError: if codes or values have another kind, shape or range.
        """
        codes = level_codes(batch, name, self.levels if levels is None else levels, n)
        if self.features is not None:
            values = self.features(part(batch, "x"))
            check_tensor(f"features of {name!r}", values, (n, self.effects), "floating", False)
            return codes, values
        values = level_values(batch, name, self.effects, codes.shape)
        if values is None or self.effects == 1:
            return codes, values
        return codes, values @ self.basis.to(values)

    def covariance(
        self, name: str, codes: Tensor, values: Tensor | None, levels: int | None = None
    ) -> CovariancePropagation:
        r""":math:`Z G Z^\top` of rows, of its own levels or so many; one of no known level has its own,
        refused where levels are correlated."""
        codes, g, levels = self._of_rows(name, codes, levels)
        if codes.dim() == 2:
            return CovariancePropagation(z=MembershipMatrix(codes, levels, values), g=g)
        return CovariancePropagation(z=DummyMatrix.from_codes(codes, levels, values), g=g)

    def terms(
        self, name: str, codes: Tensor, values: Tensor | None, dtype: torch.dtype
    ) -> list[Term]:
        """The terms of :meth:`covariance`, without the tree, computed in a precision."""
        codes, g, levels = self._of_rows(name, codes)
        design = design_of(codes.long(), values, levels, absent=False)
        return summands(operand_name(name, {"residual"}), g, propagated(design, g, dtype))

    def _of_rows(
        self, name: str, codes: Tensor, levels: int | None = None
    ) -> tuple[Tensor, Matrix, int]:
        """Codes of rows, those of no known level on their own, with G of so many levels."""
        levels = self.levels if levels is None else levels
        if len(codes) and int(codes.min()) < 0:
            codes, levels = on_their_own(codes, levels)
        grown = self.g_of(levels)
        if grown is None:
            raise InputError(
                f"group {name!r} has the code -1, a level that is not known, in rows of the "
                "likelihood: expected known levels, because its levels are correlated"
            )
        return codes, grown, levels

    def g_of(self, levels: int) -> Matrix | None:
        """G for another number of levels, with the same parameters; None for correlated ones."""
        return self.g if levels == self.levels else _of_other_levels(self.g, levels * self.effects)

    def grow(self, levels: int, names: Sequence[str] = ()) -> None:
        """Take in new levels, which follow the known ones; the parameters stay.

        Args:
            levels: how many there are then.
            names: of the new ones, where levels have names.

        Raises:
            InputError: if levels are correlated, there are fewer than before, or names are missing or
                known.
        """
        more, g = levels - self.levels, self.g_of(levels)
        if more < 0 or g is None:
            why = " or more" if more < 0 else ", because levels are correlated"
            raise InputError(f"`levels` is {levels}: expected {self.levels}{why}")
        expected = 0 if self.names is None else more
        if len(names) != expected:
            raise InputError(f"`names` has {len(names)} names: expected {expected}, of new levels")
        if self.names is not None:
            self.names = check_labels("names", [*self.names, *names])
        self.g, self.levels = g, levels
        self.blup = torch.cat([self.blup, self.blup.new_zeros(more, self.effects)])
        shape = more, self.effects, self.effects
        self.variance = torch.cat([self.variance, self.variance.new_zeros(shape)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Rows may have brought new levels since; names are not in a checkpoint.
        kept = state_dict.get(prefix + "blup")
        if kept is not None and kept.dtype != self.blup.dtype:  # that of the data they are from
            self.blup, self.variance = self.blup.to(kept.dtype), self.variance.to(kept.dtype)
        levels = 0 if kept is None or self.names is not None else len(kept)
        if levels > self.levels and self.g_of(levels) is not None:
            self.grow(levels)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, effects={self.effects}"


def _of_other_levels(g: Matrix, columns: int) -> Matrix | None:
    """The covariance of independent levels for another number of them, with the same parameters; None
    where levels are correlated."""
    if type(g) is ScalarMatrix:
        return g.of_size(columns)
    if isinstance(g, KroneckerProduct) and list(g.operands) == ["levels", "effects"]:
        one, own = g.operands.values()
        if isinstance(one, IdentityMatrix) and isinstance(own, Matrix):
            levels = IdentityMatrix(columns // own.shape[0]).to(own.no_params())
            return KroneckerProduct(levels=levels, effects=own)
    return None


def on_their_own(codes: Tensor, levels: int) -> tuple[Tensor, int]:
    """Codes of rows where each that is not known is a level of its own, after so many; and how many
    levels there are then."""
    flat = codes.flatten()
    at = (flat < 0).nonzero()[:, 0]
    own = torch.arange(levels, levels + len(at), device=codes.device, dtype=codes.dtype)
    return flat.index_copy(0, at, own).reshape(codes.shape), levels + len(at)


class Effects(nn.ModuleDict):
    """Random effects by the names of their factors, whatever these are.

    :class:`torch.nn.ModuleDict` refuses names with dots and those of its own methods;
    such a name is percent-encoded in ``state_dict()`` and nowhere else.
    """

    def __getitem__(self, key: str) -> RandomEffect:
        return cast(RandomEffect, super().__getitem__(self._kept(key)))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(self._kept(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(self._kept(key))

    def __contains__(self, key: str) -> bool:
        return super().__contains__(self._kept(key))

    def __iter__(self) -> Iterator[str]:
        return map(user_name, super().__iter__())

    def keys(self) -> Any:
        return dict.fromkeys(self).keys()

    def items(self) -> Any:
        return dict(zip(self, self.values(), strict=True)).items()

    def _kept(self, key: str) -> str:
        return module_name(key, self)


def coded_effects(effects: Mapping[str, RandomEffect], batch: Batch, n: int) -> Coded:
    """Codes and values of each random effect in a batch of n rows.

    Raises:
        TypeError, InputError: as :meth:`RandomEffect.coded`; for values of another name, or a wrong ``g``.
    """
    check_values(batch, effects)
    for name, effect in effects.items():
        if effect.g.shape[0] != (size := effect.levels * effect.effects):
            raise InputError(f"`g` of {name!r} is {effect.g.shape}: expected {(size, size)}")
    return {name: effect.coded(name, batch, n) for name, effect in effects.items()}
