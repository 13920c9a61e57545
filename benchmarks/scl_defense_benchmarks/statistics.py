"""Intervals for shares of images, and paired comparisons of methods."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")


class Interval(NamedTuple):
    """A 95 % confidence interval of a share, both ends in [0, 1]."""

    low: float
    high: float


class Paired(NamedTuple):
    """Mean of paired differences with its 95 % interval; ``p`` is two-sided, n the number of pairs."""

    difference: float
    low: float
    high: float
    p: float
    n: int

    @property
    def positive(self) -> bool:
        """The whole interval lies above 0."""
        return self.low > 0


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95 % score interval (Wilson 1927) of ``successes`` out of ``n`` >= 1."""
    from scipy.stats import binomtest  # a second of import, only where a number is made

    found = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(float(found.low), float(found.high))


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); ``None`` for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def paired_by_seed(better: Sequence[float], than: Sequence[float]) -> Paired | None:
    """Student's paired t over seeds: both lists hold one number a seed, in the same order of seeds.

    ``None`` for fewer than two pairs: one seed has no spread. Equal differences in every seed (spread 0) give an
    interval of width 0 and p 1 (no difference) or 0: with few seeds and few images that happens by rounding, which is
    why a claim also needs :func:`paired_by_image`. Differences below 1e-12 count as none.
    """
    from scipy.stats import t

    if len(better) != len(than):
        raise ValueError(f"pairs need as many numbers on both sides, not {len(better)} and {len(than)}")
    differences = [a - b for a, b in zip(better, than, strict=True)]
    if len(differences) < 2:
        return None
    mean, sd = mean_sd(differences)
    n = len(differences)
    error = (sd or 0.0) / math.sqrt(n)
    if error < 1e-12:
        return Paired(mean, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0, n)
    half = float(t.ppf(0.975, n - 1)) * error
    return Paired(mean, mean - half, mean + half, 2 * float(t.sf(abs(mean) / error, n - 1)), n)


def paired_by_image(better: Sequence[str], than: Sequence[str]) -> Paired | None:
    """A normal interval over test images: how far would the difference move with other images of this kind?

    Each text holds one seed's outcomes, a character an image, ``1`` for robust; both lists in the same order of seeds.
    The difference of an image is averaged over seeds; the interval is mean +- 1.96 sd / sqrt(images). ``None`` when
    nothing can be paired: no seed, or not the same images.
    """
    from scipy.stats import norm

    lengths = {len(text) for text in (*better, *than)}
    if not better or len(better) != len(than) or len(lengths) != 1 or lengths == {0}:
        return None
    per_image = [
        math.fsum((a[j] == "1") - (b[j] == "1") for a, b in zip(better, than, strict=True)) / len(better)
        for j in range(lengths.pop())
    ]
    mean, sd = mean_sd(per_image)
    error = (sd or 0.0) / math.sqrt(len(per_image))
    if error < 1e-12:
        return Paired(mean, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0, len(per_image))
    half = float(norm.ppf(0.975)) * error
    return Paired(mean, mean - half, mean + half, 2 * float(norm.sf(abs(mean) / error)), len(per_image))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's step-down adjusted p-values (Holm 1979): the chance of one false claim in the family is kept at the level.

    With p_(1) <= ... <= p_(m): adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    """
    adjusted, largest = {}, 0.0
    for place, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}
