"""--batch-size auto: a number from what is free, in the result, and in no verdict."""

import pytest
from planted_attacks import run
from scl_defense_benchmarks import evaluate as module
from scl_defense_benchmarks.attempt import CHUNK
from scl_defense_benchmarks.native import PGD
from scl_defense_benchmarks.results import without_times

from scl_defense.errors import UserError


@pytest.fixture
def few(digits):
    return digits[0][1400:1440], digits[1][1400:1440]


def test_little_memory_means_fewer_images_and_the_same_verdicts(network, few, monkeypatch):
    plain = run(*few, PGD(steps=2), network=network, batch_size=CHUNK)
    assert plain.memory is None
    results = {}
    for free in (1 << 20, 1 << 40, None):
        monkeypatch.setattr(module, "free_bytes", lambda device, free=free: free)
        results[free] = run(*few, PGD(steps=2), network=network, batch_size="auto", workers=2)
    small, large, unknown = results.values()
    assert 1 < small.batch_size < 32 and large.batch_size == unknown.batch_size == CHUNK
    assert small.memory["predicted"] <= small.memory["share"] * (1 << 20) < large.memory["predicted"]
    assert small.memory["per_image"] == large.memory["per_image"] > 32 * 64 * 4
    assert "memory" in small.to_json() and "memory" not in without_times(small.to_json())
    for one in results.values():
        assert one.attacks[0].outcomes == plain.attacks[0].outcomes
        assert one.attacks[0].distances == plain.attacks[0].distances


def test_more_workers_share_what_is_free(network, few, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: 1 << 20)
    one, four = (run(*few, PGD(steps=1), network=network, batch_size="auto", workers=count) for count in (1, 4))
    assert four.batch_size <= one.batch_size / 3


@pytest.mark.parametrize("size", [0, "all", 1.5])
def test_a_batch_size_that_cannot_be(network, few, size):
    with pytest.raises(UserError, match="must be at least 1, or auto"):
        run(*few, PGD(steps=1), network=network, batch_size=size)
