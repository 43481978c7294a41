"""Means with intervals, and paired differences. Pure functions; the same seed gives the same interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

DRAWS = 2000


def interval(values: Sequence[float], *, share: float = 0.95, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, in their unit (Efron and Tibshirani 1993, chapter 13).

    One value is its own interval. Raises `ValueError` without values, and for values that are not finite.
    """
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
        raise ValueError(f"values of shape {sample.shape}; expected a list of one or more finite numbers")
    if len(sample) == 1:
        return float(sample[0]), float(sample[0])
    found = bootstrap(
        (sample,), np.mean, n_resamples=draws, confidence_level=share, method="percentile", random_state=seed
    ).confidence_interval
    # Means of equal values may be off by a rounding, and lie the wrong way round.
    low, high = sorted(np.clip((found.low, found.high), sample.min(), sample.max()))
    return float(low), float(high)


def share_interval(values: Sequence[float], *, share: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, from one 0 or 1 a case (Wilson 1927).

    Where all or none of the cases are 1, the bootstrap's has no width. Raises `ValueError` without values, and for others.
    """
    if not len(values) or not set(values) <= {0, 1}:
        raise ValueError("expected one or more values of 0 or 1")
    found = binomtest(int(sum(values)), len(values)).proportion_ci(share, method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Mean:
    """A mean over `count` of `total` cases, with its 95 % interval; the rest have no value."""

    value: float
    low: float
    high: float
    count: int
    total: int


def mean(values: Sequence[float | None], *, share: bool = False) -> Mean | None:
    """The mean of the values that there are, None without any; of a `share`, of values 0 and 1, with Wilson's interval."""
    found = [float(value) for value in values if value is not None]
    if not found:
        return None
    ends = share_interval(found) if share else interval(found)
    return Mean(float(np.mean(found)), *ends, len(found), len(values))


def paired(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> Mean | None:
    """The mean of `ours` less `theirs`, over the cases that have both, out of the cases of either; None without any.

    Both were measured on the same cases, so the interval is that of the differences, which is far narrower than those of the
    two means.
    """
    return mean(
        [
            None if ours.get(case) is None or theirs.get(case) is None else float(ours[case]) - float(theirs[case])
            for case in sorted(ours.keys() | theirs.keys())
        ]
    )
