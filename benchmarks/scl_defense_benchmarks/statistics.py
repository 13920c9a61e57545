"""Intervals for shares of images."""

from typing import NamedTuple


class Interval(NamedTuple):
    """A 95 % confidence interval of a share, both ends in [0, 1]."""

    low: float
    high: float


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95 % score interval (Wilson 1927) of ``successes`` out of ``n`` >= 1."""
    from scipy.stats import binomtest  # a second of import, only where a number is made

    found = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(float(found.low), float(found.high))
