"""Intervals: bootstrap by cluster, because completions of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def to_json(self) -> dict[str, float]:
        return self._asdict()


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """sum(numerators) / sum(denominators) with a percentile interval, resampling whole clusters (prompts).

    With denominators of 1 this is the mean. A resample whose denominator is 0 is left out.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    top = np.bincount(index, weights=np.asarray(numerators, dtype=float))
    bottom = np.bincount(index, weights=np.asarray(denominators, dtype=float))
    rng = np.random.default_rng(seed)
    # How often each cluster is drawn; the sums of a resample are then matrix products.
    times = rng.multinomial(len(top), np.full(len(top), 1 / len(top)), size=draws)
    tops, bottoms = times @ top, times @ bottom
    ratios = tops[bottoms != 0] / bottoms[bottoms != 0]
    if not len(ratios):
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high))


def bootstrap_mean(values: Sequence[float], clusters: Sequence[str], draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean over all values with a 95% interval clustered by prompt."""
    return bootstrap_ratio(values, np.ones(len(values)).tolist(), clusters, draws, seed)
