"""The generator: the contract that every generator keeps, and its own equation."""

import math

import pytest
import torch
from scl_defense_example.hybrid_pattern import HybridPattern

from scl_defense import ThreatModel
from scl_defense.testing import assert_contract
from scl_defense.types import Context, GeneratorBatch


@pytest.mark.parametrize("pattern", ["circle", "square", "rhombus"])
def test_contract(pattern):
    assert_contract(HybridPattern(pattern=pattern, tile=5, sigma=0.8), "generator", "hybrid-pattern")


def made(generator, images, threat):
    batch = GeneratorBatch(images[None], images, torch.arange(len(images)))
    context = Context(threat=threat, rng=torch.Generator(), calibration=images)
    return generator(batch, context)[0]


def slow_hybrid(generator, image):
    """The equation with plain loops over pixels, for one channel."""
    height, width = image.shape
    reach = max(1, math.ceil(2 * generator.sigma))
    weights = {
        (dy, dx): math.exp(-(dy * dy + dx * dx) / (2 * generator.sigma**2))
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
    }
    total, middle = sum(weights.values()), (generator.tile - 1) / 2

    def ring(y, x):
        y, x = abs(y % generator.tile - middle), abs(x % generator.tile - middle)
        distance = {"circle": math.sqrt(x * x + y * y), "square": max(x, y), "rhombus": x + y}[generator.pattern]
        return 1.0 if int(distance // generator.ring) % 2 == 0 else 0.0

    def blurred(value, y, x):
        inside = [
            (min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1), w) for (dy, dx), w in weights.items()
        ]
        return sum(w * value(a, b) for a, b, w in inside) / total

    return torch.tensor(
        [
            [
                blurred(lambda a, b: float(image[a, b]), y, x) + generator.weight * (ring(y, x) - blurred(ring, y, x))
                for x in range(width)
            ]
            for y in range(height)
        ]
    )


@pytest.mark.parametrize("pattern", ["circle", "square", "rhombus"])
def test_the_equation(pattern):
    """With eps = 1 the ball is the whole box: what is left of the projection is the clamp to [0, 1]."""
    generator = HybridPattern(pattern=pattern, tile=6, ring=1.3, sigma=0.9, weight=0.7)
    images = torch.rand((2, 3, 9, 7), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([slow_hybrid(generator, channel) for channel in image]) for image in images])
    torch.testing.assert_close(
        made(generator, images, ThreatModel("linf", "1")), expected.clamp(0, 1), atol=1e-5, rtol=0
    )


def test_rings_by_hand():
    square = HybridPattern(pattern="square", tile=5).rings(5, 5)
    assert square.tolist() == [
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 1],
        [1, 0, 1, 0, 1],
        [1, 0, 0, 0, 1],
        [1, 1, 1, 1, 1],
    ]
    rhombus = HybridPattern(pattern="rhombus", tile=3).rings(3, 6)
    assert rhombus.tolist() == [[1, 0, 1] * 2, [0, 1, 0] * 2, [1, 0, 1] * 2]


def test_it_uses_the_ball_to_the_full():
    """On mid-grey, where the box is far, most pixels end at +-eps, in the direction of the pattern."""
    images = torch.full((1, 1, 16, 16), 0.5)
    moved = made(HybridPattern(), images, ThreatModel("linf", "8/255")) - images
    assert (moved.abs() > 0.99 * 8 / 255).float().mean() > 0.9
    assert ((moved > 0) == (HybridPattern().rings(16, 16) > 0.5)).float().mean() > 0.95
