"""Means that random effects have taken up in the place of a network."""

from __future__ import annotations

from collections.abc import Mapping

from openreml_nn.model.random_effect import RandomEffect
from openreml_nn.support.warning import warn

__all__ = ["warn_of_level_means"]

#: With fewer levels their mean is too uncertain to say anything.
_LEVELS = 10
#: A mean of the levels is one where it is so many standard errors from zero,
_ERRORS = 5.0
#: and this share at least of the levels' variance about it: a smaller one hardly moves the estimates.
_SHARE = 0.1


def warn_of_level_means(effects: Mapping[str, RandomEffect], head: str) -> None:
    r"""Warn of random effects whose levels have a mean, which the model says is zero.

    Until a network yields the mean of the response the random effects take it up, and their variance
    is that about zero: :math:`\sigma^2 = m^2 + s^2` in the place of

    .. math:: s^2 = \frac1q \sum_j \left[(\hat b_j - m)^2 + \mathrm{var}(b_j - \hat b_j)\right],
        \qquad m = \frac1q \sum_j \hat b_j

    The standard error of m is taken as :math:`s / \sqrt q`, because with :math:`\sigma` in the place of
    s no mean of q levels is more than :math:`\sqrt q` of it. Levels that are correlated, whose mean is
    uncertain, and effects of learned features, whose sign is any, are not looked at.

    Args:
        effects: by name, with their BLUPs.
        head: of the model.
    """
    for name, effect in effects.items():
        q = effect.levels
        if q < _LEVELS or effect.features is not None or not effect.is_per_level:
            continue
        blup, error = effect.known()
        mean = blup.mean(0)
        spread = ((blup - mean) ** 2 + error.diagonal(dim1=1, dim2=2)).mean(0)
        is_one = (mean**2 > _ERRORS**2 * spread / q) & (mean**2 > _SHARE * spread)
        for k in is_one.nonzero()[:, 0].tolist():
            m, errors = float(mean[k]), float(mean[k].abs() / (spread[k] / q).sqrt())
            which = effect.effect_names[k]
            if which != "(Intercept)":
                cure = "give the network the values of this effect"
            elif head == "gls":
                cure = "yield a constant among the features"
            else:
                cure = "centre the response, start the network's last bias at its mean, take head 'gls'"
            warn(
                f"random effect {name!r}, {which!r}: the BLUPs of the {q} levels have the mean {m:.4g}, "
                f"{errors:.3g} standard errors from 0, which the network has not learned, so that their "
                f"variance is too large: {cure}, or train longer"
            )
