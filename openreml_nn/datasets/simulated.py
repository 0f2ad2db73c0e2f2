"""Simulated data whose truth is known, for networks with random effects."""

from __future__ import annotations

import numpy as np
import pandas as pd

from openreml_nn.support.checks import check_count

__all__ = ["field", "growth", "purchases", "ratings", "visits"]


def ratings(rows: int = 20_000, users: int = 1000, items: int = 200, seed: int = 1) -> pd.DataFrame:
    r"""Ratings of items by users: crossed random intercepts.

    :math:`y = 3 + \sin(2 x_1) + x_2 x_3 + b_{user} + b_{item} + e` with features uniform on
    (−1, 1), a fourth one without effect, and variances 0.5, 0.25 and 1.

    Args:
        rows, users, items: how many there are.
        seed: of the random numbers.

    Raises:
        TypeError, InputError: if an argument is no whole number, or too small.

    >>> list(ratings(4, 2, 2).columns)
    ['rating', 'x1', 'x2', 'x3', 'x4', 'user', 'item']
    """
    rng = _generator(seed, rows=rows, users=users, items=items)
    x = rng.uniform(-1, 1, (rows, 4))
    user, item = rng.integers(0, users, rows), rng.integers(0, items, rows)
    b = 0.5**0.5 * rng.standard_normal(users)[user] + 0.5 * rng.standard_normal(items)[item]
    y = 3 + np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + b + rng.standard_normal(rows)
    table = {f"x{j + 1}": x[:, j] for j in range(4)}
    return pd.DataFrame({"rating": y, **table, "user": user, "item": item})


def growth(children: int = 400, visits: int = 8, seed: int = 1) -> pd.DataFrame:
    r"""Heights (cm) of children at ages from 2 to 12: correlated random intercepts and slopes.

    .. math:: y = 80 + 45(1 - e^{-age/6}) + 2\,dose\cos(age/2) + b_0 + b_1 (age - 7) + e

    The standard deviations of :math:`b_0`, :math:`b_1` and e are 4, 0.5 and 1, and the correlation of
    the first two is 0.3; ``years`` is age − 7.

    Args:
        children, visits: how many children there are, and visits of each.
        seed: of the random numbers.

    Raises:
        TypeError, InputError: if an argument is no whole number, or too small.

    >>> list(growth(2, 2).columns)
    ['height', 'age', 'years', 'dose', 'child']
    """
    rng = _generator(seed, children=children, visits=visits)
    child = np.arange(children).repeat(visits)
    age = rng.uniform(2, 12, len(child))
    dose = rng.uniform(0, 1, children)[child]
    covariance = [[16, 0.6], [0.6, 0.25]]
    b = rng.multivariate_normal([0, 0], covariance, children)[child]
    mean = 80 + 45 * (1 - np.exp(-age / 6)) + 2 * dose * np.cos(age / 2)
    y = mean + b[:, 0] + b[:, 1] * (age - 7) + rng.standard_normal(len(child))
    columns = {"height": y, "age": age, "years": age - 7, "dose": dose, "child": child}
    return pd.DataFrame(columns)


def field(plots: int = 300, samples: int = 4, seed: int = 1) -> pd.DataFrame:
    r"""Yields of plots at random places of a field: a random effect with a spatial kernel.

    .. math:: y = 5 + \tanh(2\,rain) + rain \cdot nitrogen + b(east, north) + e

    b has a Matérn 3/2 covariance of variance 1 and length 0.2, and the residual variance is 0.25.

    Args:
        plots, samples: how many plots there are, and samples of each.
        seed: of the random numbers.

    Raises:
        TypeError, InputError: if an argument is no whole number, or too small.

    >>> list(field(2, 2).columns)
    ['yield', 'rain', 'nitrogen', 'plot', 'east', 'north']
    """
    rng = _generator(seed, plots=plots, samples=samples)
    place = rng.uniform(0, 1, (plots, 2))
    r = 3**0.5 * np.linalg.norm(place[:, None] - place, axis=2) / 0.2
    b = np.linalg.cholesky((1 + r) * np.exp(-r)) @ rng.standard_normal(plots)
    plot = np.arange(plots).repeat(samples)
    rain, nitrogen = rng.uniform(-1, 1, (2, len(plot)))
    mean = 5 + np.tanh(2 * rain) + rain * nitrogen
    y = mean + b[plot] + 0.5 * rng.standard_normal(len(plot))
    east, north = place[plot].T
    columns = {"yield": y, "rain": rain, "nitrogen": nitrogen, "plot": plot}
    return pd.DataFrame({**columns, "east": east, "north": north})


def purchases(rows: int = 20_000, users: int = 1000, seed: int = 1) -> pd.DataFrame:
    r"""Whether users bought what they were shown: a binary response, random intercepts.

    :math:`\mathrm{logit}\,p = \sin(2 x_1) + 2 x_2 x_3 - 0.5 + b_{user}` with features uniform on
    (−1, 1), a fourth one without effect, and variance 0.8.

    Args:
        rows, users: how many there are.
        seed: of the random numbers.

    Raises:
        TypeError, InputError: if an argument is no whole number, or too small.

    >>> list(purchases(4, 2).columns)
    ['bought', 'x1', 'x2', 'x3', 'x4', 'user']
    """
    rng = _generator(seed, rows=rows, users=users)
    x = rng.uniform(-1, 1, (rows, 4))
    user = rng.integers(0, users, rows)
    b = 0.8**0.5 * rng.standard_normal(users)
    eta = np.sin(2 * x[:, 0]) + 2 * x[:, 1] * x[:, 2] - 0.5 + b[user]
    y = (rng.random(rows) < 1 / (1 + np.exp(-eta))).astype(int)
    table = {f"x{j + 1}": x[:, j] for j in range(4)}
    return pd.DataFrame({"bought": y, **table, "user": user})


def visits(rows: int = 20_000, doctors: int = 1000, seed: int = 1) -> pd.DataFrame:
    r"""Numbers of visits of patients to their doctors: a count, random intercepts.

    .. math:: \log\mu = 0.5 + 0.6\sin(2\,age) + severity \cdot distance + b_{doctor}

    The features are uniform on (−1, 1), and the variance of b is 0.3.

    Args:
        rows, doctors: how many there are.
        seed: of the random numbers.

    Raises:
        TypeError, InputError: if an argument is no whole number, or too small.

    >>> list(visits(4, 2).columns)
    ['visits', 'age', 'severity', 'distance', 'doctor']
    """
    rng = _generator(seed, rows=rows, doctors=doctors)
    age, severity, distance = rng.uniform(-1, 1, (3, rows))
    doctor = rng.integers(0, doctors, rows)
    b = 0.3**0.5 * rng.standard_normal(doctors)
    mean = np.exp(0.5 + 0.6 * np.sin(2 * age) + severity * distance + b[doctor])
    columns = {"visits": rng.poisson(mean), "age": age, "severity": severity}
    return pd.DataFrame({**columns, "distance": distance, "doctor": doctor})


def _generator(seed: int, **sizes: int) -> np.random.Generator:
    """Random numbers of a seed, after the sizes of the table have been checked."""
    for name, value in sizes.items():
        check_count(name, value, 1)
    return np.random.default_rng(check_count("seed", seed))
