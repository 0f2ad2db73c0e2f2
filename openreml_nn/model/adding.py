"""Rows that are added to those that a model's BLUPs and coefficients are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import estimable
from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.model.batch import Batch, level_codes, part, row_values, rows_of, with_responses
from openreml_nn.model.posterior import Posterior
from openreml_nn.model.random_effect import on_their_own
from openreml_nn.model.residual import structure_of
from openreml_nn.model.responses import of_family, remember_modes
from openreml_nn.result.equations import Equations, FixedBasis
from openreml_nn.result.joint import JointErrors
from openreml_nn.result.prediction import lowered
from openreml_nn.result.solution import Solution, solution_of
from openreml_nn.support.checks import check_names, check_tensor
from openreml_nn.support.errors import InputError
from openreml_nn.terms.design import design_of

__all__ = ["added"]


@torch.no_grad()
def added(model: Posterior, batch: Batch, names: Mapping[str, Sequence[str]]) -> Solution:
    """Let a model take up new rows, see :meth:`MixedModel.add`.

    Raises:
        InputError: if rows or levels cannot be added.
    """
    if model.family is not None:
        return _added_to_family(model, batch, names)
    before = _before(model)
    model.check(batch)
    batch, _ = with_responses(batch, None, model.responses > 1)
    levels = _levels(model, batch, rows_of(batch), names)
    batch, output = with_responses(*model.single(batch, model(batch), is_data=True))
    old, new = before.statistics(), _statistics(model, batch, output, levels, before.fixed)
    assert old is not None
    known = [effect.levels for effect in model.effects().values()]
    equations = _equations(_sum(old, new, known, levels), before.fixed)
    joint = _joint(model, equations)
    found = solution_of(joint, equations)
    for (name, effect), q in zip(model.effects().items(), levels, strict=True):
        if q > effect.levels:
            effect.grow(q, names.get(name, ()))
    for effect, values, variances in zip(
        model.effects().values(), found.values, found.variances, strict=True
    ):
        effect.blup.copy_(values[: effect.levels])
        effect.variance.copy_(variances[: effect.levels])
    if model.head == "gls":
        model.beta = found.coefficients.to(model.beta)
        model.beta_covariance = found.covariance.to(model.beta)
    model.joint = joint
    model.evidence.update(lambda: equations)
    return found


def _added_to_family(
    model: Posterior, batch: Batch, names: Mapping[str, Sequence[str]]
) -> Solution:
    """Modes and coefficients of the rows before and the new ones, found anew."""
    family, before = model.family, model.seen
    assert family is not None
    if before is None:
        raise InputError(
            "the model has no rows to which others could be added: call update() with the rows of the "
            "fit first; a checkpoint does not hold those of a family"
        )
    model.check(batch)
    batch, _ = with_responses(batch)
    levels = _levels(model, batch, rows_of(batch), names)
    data = of_family(family, model(batch), batch, model.head)
    family.check(data[0])
    if data[2] is not None:
        _refuse_undetermined(model, data[2])
    coded = {
        name: effect.coded(name, batch, len(data[0]), q)
        for (name, effect), q in zip(model.effects().items(), levels, strict=True)
    }
    seen = before.joined(data, coded)
    found, tree = seen.evaluate(family, model.effects(), levels)
    for (name, effect), q in zip(model.effects().items(), levels, strict=True):
        if q > effect.levels:
            effect.grow(q, names.get(name, ()))
    remember_modes(model, found, tree, seen, model.aliases)
    effects = [effect.known() for effect in model.effects().values()]
    value = float(found.log_likelihood)
    return Solution(
        [values for values, _ in effects],
        [variances for _, variances in effects],
        model.beta,
        model.beta_covariance,
        {seen.options[0]: value},
    )


def _before(model: Posterior) -> Equations:
    """What the rows before have said.

    Raises:
        InputError: if it is not there, or other rows cannot be added to it.
    """
    if structure_of(model.residual).of_fitted:
        raise InputError(
            "`residual` has variances by the fitted values, which new rows move: fit all rows"
        )
    if model.responses == 1 and not structure_of(model.residual).is_independent:
        raise InputError(
            "`residual` is correlated between rows, so that new rows depend on those before: fit "
            "all rows, or hand them to MixedModel.update()"
        )
    found = model.evidence.equations()
    if found is None or not found.has_response or found.statistics() is None:
        raise InputError(
            "the model has no rows to which others could be added: call update() with the rows of "
            "the fit first"
        )
    return found


def _levels(
    model: Posterior, batch: Batch, n: int, names: Mapping[str, Sequence[str]]
) -> list[int]:
    """How many levels each random effect has with the new rows.

    Raises:
        InputError: if new ones leave a gap, have no names where levels have, or are correlated.
    """
    if unknown := [name for name in names if name not in model.effects()]:
        raise InputError(f"`levels` has {unknown[0]!r}: expected names of {list(model.effects())}")
    found = []
    for name, effect in model.effects().items():
        codes, q = level_codes(batch, name, 2**62, n), effect.levels
        fresh = codes[codes >= q].unique()
        follow = q + torch.arange(len(fresh)).to(fresh)
        if not torch.equal(fresh, follow):
            odd = int(fresh[fresh != follow][0])
            raise InputError(
                f"group {name!r} has the code {odd}: expected known levels, 0 to {q - 1}, -1, or "
                f"new ones that follow without a gap, from {q}"
            )
        own = check_names(f"levels[{name!r}]", names.get(name, []))
        wanted = 0 if effect.names is None else len(fresh)
        if len(own) != wanted:
            raise InputError(
                f"`levels` has {len(own)} names for {name!r}: expected {wanted}, of its new levels"
                + ("" if wanted else ", as its levels have no names")
            )
        if set(own) & set(effect.names or ()):
            known = next(x for x in own if x in (effect.names or ()))
            raise InputError(f"`levels` has {known!r} for {name!r}, which is known: use its code")
        if (len(fresh) or bool((codes < 0).any())) and effect.g_of(q + 1) is None:
            raise InputError(
                f"group {name!r} has new levels, but its levels are correlated: expected known ones"
            )
        found.append(q + len(fresh))
    return found


def _statistics(
    model: Posterior, batch: Batch, output: Tensor, levels: Sequence[int], fixed: FixedBasis
) -> Statistics:
    """Cross-products of the new rows; a row of no known level has one of its own at the end."""
    n, like, y = len(output), fixed.offset, part(batch, "y")
    check_tensor("batch['y']", y, (n,), "floating")
    check_tensor("mean(x)", output, None, "floating")
    e = y.to(like)
    offset = row_values(batch, "offset", n)
    if offset is not None:
        e = e - offset.to(like)
    if model.head == "gls":
        X = output.to(like)
        _refuse_undetermined(model, X)
        f = torch.cat([X @ fixed.basis, (e - X @ fixed.offset)[:, None]], 1)
    else:
        f = (e - output.to(like))[:, None]
    designs = []
    for (name, effect), q in zip(model.effects().items(), levels, strict=True):
        codes, values = effect.coded(name, batch, n, q)
        codes, size = on_their_own(codes, q)
        z = None if values is None else values.to(like)
        designs.append(design_of(codes, z, size, absent=False))
    residual = structure_of(model.residual)
    if residual.is_independent:
        return Statistics.of(designs, f, 1 / residual.variances(batch, n).to(like))
    matrices = residual.operands(batch, n).values()
    terms = [term for matrix in matrices for term in matrix.terms(None, like.dtype)]
    equations = Equations.of(designs, terms, f, fixed)
    found = None if equations is None else equations.statistics()
    assert found is not None  # rows whose residuals are correlated are of the same levels
    return found


def _refuse_undetermined(model: Posterior, X: Tensor) -> None:
    odd = ~estimable(X.to(model.aliases), model.aliases)
    if bool(odd.any()):
        raise InputError(
            f"row {int(odd.nonzero()[0])} has a combination of features that the earlier rows do not "
            "determine: fit all rows, or hand them to MixedModel.update()"
        )


def _sum(
    old: Statistics, new: Statistics, before: Sequence[int], levels: Sequence[int]
) -> Statistics:
    """Cross-products of the rows of both, whose levels are the known ones, the new ones, and at the
    end those of rows of no known level, which are different in the two."""
    sizes, places = [], []
    for (a, _), (b, _), q, m in zip(old.sizes, new.sizes, before, levels, strict=True):
        sizes.append(m + (a - q) + (b - m))
        places.append(
            (
                torch.cat([torch.arange(q), m + torch.arange(a - q)]),
                torch.cat([torch.arange(m), m + (a - q) + torch.arange(b - m)]),
            )
        )
    device = old.products.ff.device
    one, two = ([place[i].to(device) for place in places] for i in range(2))
    return old.relabelled(one, sizes) + new.relabelled(two, sizes)


def _equations(statistics: Statistics, fixed: FixedBasis) -> Equations:
    return Equations.of_statistics(statistics, fixed.offset.new_ones(()), fixed)


def _joint(model: Posterior, equations: Equations) -> JointErrors:
    """The joint covariance of coefficients and BLUPs from all rows.

    Raises:
        InputError: if there are too many of them.
    """
    covariances = []
    for effect, (size, _) in zip(model.effects().values(), equations.sizes, strict=True):
        g = effect.g_of(size)
        assert g is not None
        covariances.append(lowered(g, equations.products.ff.dtype).map(Tensor.detach))
    fixed = equations.fixed
    own = model.joint
    joint = JointErrors(own.most_columns, own.most_numbers, own.most_entries)
    joint.to(fixed.offset.device)
    joint.update(covariances, equations.sizes, fixed.basis.shape[1], lambda: equations)
    if not joint.has_variances():
        raise InputError(
            f"beside the widest factor there are more than {joint.most_columns} effects and "
            f"coefficients, whose factor has more than {joint.most_entries} entries, so that rows "
            "cannot be added: fit all rows, or hand them to MixedModel.update()"
        )
    return joint
