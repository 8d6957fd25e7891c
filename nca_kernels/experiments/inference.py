"""Confidence intervals and answers as docs/protocol.md defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

# The 0.975 quantile of Student's t, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% confidence interval; a single value has no interval."""

    mean: float
    half: float | None

    @property
    def low(self) -> float:
        return -np.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        return np.inf if self.half is None else self.mean + self.half

    def text(self, digits: int = 4) -> str:
        spread = "" if self.half is None else f" [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        return f"{self.mean:+.{digits}f}{spread}"


def interval(values: list[float]) -> Interval:
    """Student's t interval of the mean; ``values`` has one value per seed."""
    n = len(values)
    return Interval(mean(values), _T[n - 2] * stdev(values) / n**0.5 if n > 1 else None)


def paired(values: list[float], others: list[float]) -> Interval:
    """The interval of the mean of the differences, each between two values of the same seed."""
    return interval([value - other for value, other in zip(values, others, strict=True)])


def answer(difference: Interval, delta: float) -> str:
    """Yes if the interval is above 0; no if it excludes an effect of ``delta``."""
    if difference.low > 0:
        return "yes"
    return "no" if difference.high < max(delta, 0.0) else "cannot tell"


def p_value(values: list[float], others: list[float]) -> float:
    """The two-sided p-value of the paired t-test; ``values`` and ``others`` have one value per seed. 1 for a single seed."""
    difference = np.subtract(values, others)
    n = len(difference)
    spread = difference.std(ddof=1) / n**0.5 if n > 1 else np.inf
    if not spread:
        return float(not difference.any())

    def area(start: float) -> float:
        # With t = sqrt(n - 1) tan(angle), Student's density is proportional to cos(angle) ** (n - 2).
        angles = start + (np.pi / 2 - start) * (np.arange(10_000) + 0.5) / 10_000
        return float((np.cos(angles) ** (n - 2)).sum() * (np.pi / 2 - start))

    return area(float(np.arctan(abs(difference.mean()) / spread / max(n - 1, 1) ** 0.5))) / area(0.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values with Holm's correction for their number, in the given order."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values)):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = least
    return adjusted


def share_above(groups: list[list[bool]], draws: int = 10_000) -> tuple[float, float, float]:
    """A share and its 95% bootstrap interval. Whole groups are resampled, because the runs of one setting are not independent."""
    counts = np.array([[sum(group), len(group)] for group in groups])
    picked = np.random.default_rng(0).integers(len(counts), size=(draws, len(counts)))
    sums = counts[picked].sum(1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(counts[:, 0].sum() / counts[:, 1].sum()), float(low), float(high)
