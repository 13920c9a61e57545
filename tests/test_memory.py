"""Predicted peak memory: against what is known by counting, and how many images it allows."""

import pytest
import torch
from torch import nn

from scl_defense import memory
from scl_defense.memory import choose, free_bytes, peak_bytes

MIB = 1 << 20


def test_the_peak_is_what_was_held_together():
    kept = []

    def call():
        first = torch.zeros(MIB)  # 4 MiB
        second = first + 1  # 8
        del first
        third = second * 2  # 8 again
        third.add_(1)
        kept.append(third.view(-1)[: MIB // 2])  # a view holds its whole storage
        del second, third
        torch.ones(MIB // 4)

    assert peak_bytes(call, "cpu") == 8 * MIB
    assert peak_bytes(lambda: kept[0].mul_(2), "cpu") == 0, "what was there before is not counted"


def test_the_backward_pass_is_counted():
    """Of x -> exp -> exp: two outputs are kept, and a gradient of their size comes to them; never four at a time."""
    given = torch.zeros(MIB, requires_grad=True)

    def call():
        torch.autograd.grad(given.exp().exp().sum(), given)

    assert peak_bytes(call, "cpu") == pytest.approx(12 * MIB, abs=64)
    with torch.no_grad():
        assert peak_bytes(lambda: given.exp().exp(), "cpu") == 8 * MIB


def test_the_peak_of_a_network_is_a_straight_line_and_predicts_a_larger_batch():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4)
    )
    network(torch.zeros(1, 3, 16, 16))

    def measure(count):
        def call():
            points = torch.zeros(count, 3, 16, 16, requires_grad=True)
            torch.autograd.grad(network(points).sum(), points)

        return peak_bytes(call, "cpu")

    found = choose(measure, 100 * MIB, 64)
    assert found.images == 64 and found.probes[0][0] < found.probes[1][0] < 64
    assert found.predicted == pytest.approx(measure(64), rel=0.02)
    less = choose(measure, 2 * MIB, 64)
    assert 1 <= less.images < 64 and measure(less.images) <= memory.SHARE * 2 * MIB < measure(less.images + 1)


@pytest.mark.parametrize(
    ("free", "most", "side_by_side", "images"),
    [
        (2300, 128, 1, 10),
        (2599, 128, 2, 4),
        (10**9, 128, 1, 128),
        (50, 128, 1, 1),
        (None, 128, 4, 128),
        (2300, 1, 1, 1),
    ],
)
def test_the_largest_that_fits_is_chosen(free, most, side_by_side, images):
    """100 bytes an image and 150 of fixed cost, of which half of what is free may be used."""
    found = choose(lambda count: 150 + 100 * count, free, most, side_by_side=side_by_side)
    assert found.images == images
    if most > 1:
        assert (found.fixed, found.per_image) == (150, 100)
        assert found.predicted == side_by_side * (150 + 100 * images)


def test_the_least_of_machine_group_and_limit_is_free(monkeypatch):
    for name, value in (("_machine", 9), ("_group", 7), ("_limit", None)):
        monkeypatch.setattr(memory, name, lambda value=value: value)
    assert free_bytes("cpu") == 7
    monkeypatch.setattr(memory, "_group", lambda: None)
    monkeypatch.setattr(memory, "_machine", lambda: None)
    assert free_bytes("cpu") is None
    monkeypatch.setattr(memory, "_limit", lambda: -5)
    assert free_bytes("cpu") == 0


def test_this_machine_has_some():
    assert 0 < free_bytes("cpu") < 1 << 50
