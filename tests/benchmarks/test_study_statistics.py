"""Paired comparisons against scipy, hand computation, and Holm's own worked numbers."""

import math
import random

import pytest
from scipy import stats
from scl_defense_benchmarks.statistics import holm, mean_sd, paired_by_image, paired_by_seed


def test_paired_by_seed_is_scipys_paired_t():
    rng = random.Random(0)
    for n in (2, 3, 5, 12):
        a, b = [rng.random() for _ in range(n)], [rng.random() for _ in range(n)]
        ours, theirs = paired_by_seed(a, b), stats.ttest_rel(a, b)
        low, high = theirs.confidence_interval(0.95)
        assert ours == pytest.approx((sum(a) / n - sum(b) / n, low, high, theirs.pvalue, n), abs=1e-12)


def test_paired_by_seed_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, error 1/sqrt(3), t(0.975, 2) = 4.302653 (any printed table)."""
    found = paired_by_seed([0.02, 0.04, 0.06], [0.01, 0.02, 0.03])
    half = 0.01 * 4.302653 / math.sqrt(3)
    assert (found.difference, found.low, found.high) == pytest.approx((0.02, 0.02 - half, 0.02 + half), abs=1e-8)
    assert not found.positive  # three seeds of 1, 2 and 3 points show nothing


def test_one_seed_has_no_interval_and_equal_differences_have_one_of_no_width():
    assert paired_by_seed([0.5], [0.4]) is None
    assert paired_by_seed([0.5, 0.5], [0.5, 0.5]) == (0, 0, 0, 1.0, 2)
    same = paired_by_seed([0.5, 0.7], [0.4, 0.6])
    assert same.low == same.high == pytest.approx(0.1) and same.p == 0.0
    with pytest.raises(ValueError, match="as many numbers"):
        paired_by_seed([0.5, 0.5], [0.5])


def test_the_order_of_the_pair_decides_the_sign_alone():
    a, b = [0.3, 0.5, 0.6], [0.2, 0.5, 0.4]
    one, other = paired_by_seed(a, b), paired_by_seed(b, a)
    assert (one.difference, one.low, one.high, one.p) == pytest.approx(
        (-other.difference, -other.high, -other.low, other.p)
    )


def test_paired_by_image_averages_over_seeds_first():
    """Images differ by (1, 1, 0, 0) and (1, 0, 0, -1) in two seeds: averages 1, .5, 0, -.5; mean .25."""
    found = paired_by_image(["1110", "1100"], ["0010", "0101"])
    values = [1.0, 0.5, 0.0, -0.5]
    error = stats.sem(values)
    assert found.difference == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx((0.25 - 1.959964 * error, 0.25 + 1.959964 * error), abs=1e-6)
    assert found.n == 4


def test_paired_by_image_agrees_with_a_bootstrap():
    rng = random.Random(1)
    a = "".join(rng.choice("1110") for _ in range(400))
    b = "".join(rng.choice("110") for _ in range(400))
    found = paired_by_image([a], [b])
    differences = [(x == "1") - (y == "1") for x, y in zip(a, b, strict=True)]
    means = sorted(sum(rng.choices(differences, k=400)) / 400 for _ in range(2000))
    assert (found.low, found.high) == pytest.approx((means[50], means[1949]), abs=0.01)


def test_images_that_are_not_the_same_are_not_paired():
    assert paired_by_image(["101"], ["10"]) is None
    assert paired_by_image([], []) is None
    assert paired_by_image(["101", "101"], ["101"]) is None


def test_holm_on_a_worked_example():
    """p .01 .04 .03 .005 (Wikipedia, Holm-Bonferroni): only .01 and .005 are rejected at .05."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert {name for name, p in found.items() if p < 0.05} == {"a", "d"}
    assert list(found) == ["a", "b", "c", "d"]


def test_holm_against_the_definition():
    """Slowly: p_(i) is rejected at level x when p_(j) <= x / (m - j + 1) for all j <= i; adjusted = smallest such x."""
    rng = random.Random(2)
    for _ in range(50):
        p_values = {place: rng.random() ** 3 for place in range(rng.randint(1, 6))}
        ordered = sorted(p_values, key=p_values.get)
        for key, adjusted in holm(p_values).items():
            until = ordered[: ordered.index(key) + 1]
            needed = max((len(ordered) - place) * p_values[other] for place, other in enumerate(until))
            assert adjusted == pytest.approx(min(1.0, needed))
    assert holm({}) == {}


def test_mean_sd():
    assert mean_sd([0.2, 0.4]) == pytest.approx((0.3, math.sqrt(0.02)))
    assert mean_sd([0.2]) == (0.2, None)
