"""Radii, norms, random starts and steepest directions against geometry that is known by other means."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scl_defense.errors import UserError
from scl_defense.threat import ALL_NORMS, NORMS, ThreatModel, parse_eps

SHAPES = [(1, 1, 8, 8), (3, 3, 5, 7), (2, 4, 6, 3), (0, 3, 4, 4)]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=rng(seed), dtype=dtype)


# -- reading a radius


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("8/255", Fraction(8, 255)),
        ("0.1", Fraction(1, 10)),
        (" 8/255\n", Fraction(8, 255)),
        ("1e-3", Fraction(1, 1000)),
        ("0.5/255", Fraction(1, 510)),
        ("0", Fraction(0)),
        (0.25, Fraction(1, 4)),
        (1e-05, Fraction(1, 100_000)),
        (2, Fraction(2)),
        (np.float32(0.5), Fraction(1, 2)),
    ],
)
def test_eps_is_exact(written, value):
    assert parse_eps(written) == value


BAD_EPS = [
    "", "-1", "-0.1", "nan", "inf", "-inf", "1e999", "8/0", "8/0.0", "0/0", "/255", "8/", "8//255", "8/-255",
    "8 / 255", "1_0", "+1", ".5", "5.", "0x10", "8,5", "eight", "٨/٢٥٥", "８/255", "²", "1e1000000000", "True",
    "9" * 30, "1" * 5000, "1/" + "3" * 5000, "8/255; 1", "8/255/2", "\x00",
]  # fmt: skip


@pytest.mark.parametrize("written", BAD_EPS, ids=lambda text: repr(text[:12]))
@pytest.mark.parametrize("read", [parse_eps, lambda text: ThreatModel("l2", text)], ids=["parse_eps", "ThreatModel"])
def test_bad_eps_is_one_line(read, written):
    with pytest.raises(UserError) as caught:
        read(written)
    assert "eps" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, -0.5, float("nan"), float("inf"), None, True, [8]])
def test_bad_eps_that_is_no_text(value):
    with pytest.raises(UserError):
        parse_eps(value)


@given(top=st.integers(0, 1000), bottom=st.integers(1, 1000))
def test_a_written_fraction_is_that_fraction(top, bottom):
    assert parse_eps(f"{top}/{bottom}") == Fraction(top, bottom)


@given(st.floats(0, 1e8))
def test_a_float_is_read_as_printed(value):
    assert float(parse_eps(value)) == value


# -- making a threat model


def test_as_written_and_back():
    threat = ThreatModel.parse("linf:8/255")
    assert (threat.norm, threat.eps, str(threat)) == ("linf", "8/255", "linf:8/255")
    assert threat.radius == 8 / 255
    assert ThreatModel.parse("L2:0.5") == ThreatModel("l2", "0.5")
    assert ThreatModel("l1", 12).eps == "12"


def test_radii_are_compared_as_numbers():
    assert ThreatModel("l2", "0.5") == ThreatModel("l2", "1/2")
    assert hash(ThreatModel("l2", "0.5")) == hash(ThreatModel("l2", "1/2"))
    assert ThreatModel("l2", "0.5") != ThreatModel("l2", "0.51")
    assert ThreatModel("l2", "0.5") != ThreatModel("l1", "0.5")


@pytest.mark.parametrize("text", ["linf", "", "l3:1", "8/255:linf", "linf:", ":8/255", "linf:1:2", "linf=0.1"])
def test_bad_threat_text(text):
    with pytest.raises(UserError) as caught:
        ThreatModel.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eps", ["8", "1.0001", "256/255", 2])
def test_linf_beyond_the_whole_range_says_what_was_meant(eps):
    with pytest.raises(UserError, match="8/255 instead of 8"):
        ThreatModel("linf", eps)


def test_whole_range_and_large_l1_are_allowed():
    assert ThreatModel("linf", "1").radius == 1
    assert ThreatModel("l1", "12").radius == 12


# -- measuring


@pytest.mark.parametrize("norm", NORMS)
def test_distance_is_the_norm(norm):
    images, moved = rand(5, 3, 4, 6), rand(5, 3, 4, 6, seed=1)
    expected = np.linalg.norm((moved.double() - images.double()).numpy().reshape(5, -1), ord=ORDER[norm], axis=1)
    np.testing.assert_allclose(ThreatModel(norm, "0.1").distance(images, moved), expected, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_contains_is_decided_image_by_image(norm):
    images = torch.full((6, 1, 2, 2), 0.5)
    candidates = images.clone()
    candidates[0, 0, 0, 0] += 0.0999  # inside
    candidates[1, 0, 0, 0] += 0.1001  # outside the ball
    candidates[2, 0, 0, 0] = math.nan
    candidates[3, 0, 0, 0] = math.inf
    assert ThreatModel(norm, "0.1").contains(images, candidates).tolist() == [True, False, False, False, True, True]
    candidates = images.clone()
    candidates[0, 0, 0, 0], candidates[1, 0, 0, 0] = 1.001, -0.001  # in the ball, outside the box
    assert ThreatModel(norm, "1").contains(images, candidates).tolist() == [False, False, True, True, True, True]


# -- random starts and corners


def starts(norm, count=6000, eps="0.4", seed=3):
    """Perturbations (count, 3) in units of eps around the middle of the box, where the box is not met."""
    images = torch.full((count, 1, 1, 3), 0.5, dtype=torch.float64)
    return (ThreatModel(norm, eps).random_start(images, rng(seed)) - images).flatten(1).numpy() / float(eps)


def assert_distributed(sample, distribution):
    assert stats.kstest(sample, distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_is_uniform_in_the_ball(norm):
    delta = starts(norm)
    # The share of volume within a part r of the radius is r^3, whatever the norm.
    assert_distributed(np.linalg.norm(delta, ord=ORDER[norm], axis=1) ** 3, stats.uniform())
    # One coordinate t: the slices of cube, ball and octahedron have areas in proportion to 1, 1 - t^2, (1 - |t|)^2.
    share_below = {
        "linf": lambda t: (1 + t) / 2,
        "l2": lambda t: (2 + 3 * t - t**3) / 4,
        "l1": lambda t: (1 + np.sign(t) * (1 - (1 - np.abs(t)) ** 3)) / 2,
    }[norm]
    for coordinate in delta.T:
        assert_distributed(share_below(coordinate), stats.uniform())
    assert np.abs(np.corrcoef(delta.T) - np.eye(3)).max() < 0.05


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_is_not_only_the_surface(norm):
    length = np.linalg.norm(starts(norm), ord=ORDER[norm], axis=1)
    assert length.mean() == pytest.approx(3 / 4, abs=0.01)
    assert (length < 0.5).mean() == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", ["random_start", "random_corner"])
def test_random_points_are_inside_and_repeatable(norm, shape, draw):
    images, threat = rand(*shape).round(decimals=1), ThreatModel(norm, "0.8")
    kept = images.clone()
    first, again, other = (getattr(threat, draw)(images, rng(seed)) for seed in (0, 0, 1))
    assert first.shape == shape and first.dtype == images.dtype
    assert threat.contains(images, first).all()
    assert torch.equal(first, again) and torch.equal(images, kept)
    assert len(images) == 0 or not torch.equal(first, other)


@pytest.mark.parametrize("norm", NORMS)
def test_corners_lie_at_the_full_radius(norm):
    images, threat = torch.full((50, 3, 4, 5), 0.5), ThreatModel(norm, "0.3")
    corners = threat.random_corner(images, rng())
    torch.testing.assert_close(
        threat.distance(images, corners), torch.full((50,), 0.3, dtype=torch.float64), rtol=1e-5, atol=0
    )
    if norm == "linf":
        torch.testing.assert_close((corners - images).abs(), torch.full_like(images, 0.3))
    moved = (corners - images).abs() > 1e-6
    assert (corners > images)[moved].float().mean().item() == pytest.approx(0.5, abs=0.2 if norm == "l1" else 0.05)
    if norm == "l1":  # an extreme point of the ball: one coordinate holds it all
        assert (moved.flatten(1).sum(1) == 1).all()


def test_an_l1_corner_fills_coordinates_up_to_the_box():
    torch.manual_seed(0)
    images = torch.rand(40, 1, 5, 6).round(decimals=1)
    threat = ThreatModel("l1", "3")
    corners = threat.random_corner(images, rng())
    delta = (corners - images).flatten(1)
    assert threat.contains(images, corners).all()
    torch.testing.assert_close(delta.abs().sum(1), torch.full((40,), 3.0), rtol=0, atol=1e-5)
    at_wall = (corners.flatten(1) < 1e-5) | (corners.flatten(1) > 1 - 1e-5)
    assert (((delta.abs() > 1e-6) & ~at_wall).sum(1) <= 1).all()  # at most the last one stops inside


def test_corners_are_cut_by_the_box_alone():
    images = torch.tensor([0.0, 0.1, 0.95, 1.0]).view(1, 1, 2, 2).repeat(64, 1, 1, 1)
    corners = ThreatModel("linf", "0.2").random_corner(images, rng())
    for sign in (1, -1):
        hit = ((images + sign * 0.2).clamp(0, 1) - corners).abs() < 1e-6
        assert hit.any(0).all()
    assert (torch.minimum(*[((images + s * 0.2).clamp(0, 1) - corners).abs() for s in (1, -1)]) < 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_directions_have_norm_one(norm, shape):
    direction = ThreatModel(norm, "0.1").random_direction(torch.zeros(shape), rng())
    length = direction.flatten(1).norm(p=ORDER[norm], dim=1)
    torch.testing.assert_close(length, torch.ones(shape[0]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("draw", ["random_start", "random_corner", "random_direction"])
def test_only_the_given_generator_is_drawn_from(norm, draw):
    before = torch.get_rng_state()
    getattr(ThreatModel(norm, "0.1"), draw)(torch.full((2, 1, 3, 3), 0.5), rng())
    assert torch.equal(torch.get_rng_state(), before)


# -- the steepest direction


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0]])
@pytest.mark.parametrize("norm", NORMS)
def test_steepest_maximises_a_linear_function_over_the_unit_ball(norm, shape):
    """The maximum of <g, v> over ||v|| <= 1 is the dual norm of g (L1: one coordinate in a hundred moves)."""
    shape = (shape[0], 1, 5, 5) if norm == "l1" else shape
    gradient, middle = torch.randn(shape, generator=rng(1)), torch.full(shape, 0.5)
    direction = ThreatModel(norm, "0.1").steepest(gradient, middle)
    flat, moved = gradient.flatten(1), direction.flatten(1)
    dual = {"linf": 1, "l2": 2, "l1": math.inf}[norm]
    torch.testing.assert_close((flat * moved).sum(1), flat.norm(p=dual, dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(moved.norm(p=ORDER[norm], dim=1), torch.ones(shape[0]))


def test_steepest_l1_moves_the_largest_coordinates_equally():
    gradient = torch.randn((4, 3, 32, 32), generator=rng(1))
    direction = ThreatModel("l1", "12").steepest(gradient, torch.full_like(gradient, 0.5)).flatten(1)
    for row, slope in zip(direction, gradient.flatten(1), strict=True):
        moved = row.nonzero().flatten()
        assert len(moved) == math.ceil(0.01 * 3 * 32 * 32)
        assert set(moved.tolist()) == set(slope.abs().argsort(descending=True)[: len(moved)].tolist())
        torch.testing.assert_close(row[moved], slope[moved].sign() / len(moved))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 5, 150, 700]))
def test_steepest_l1_never_pushes_a_saturated_coordinate(seed, size):
    generator = np.random.default_rng(seed)
    gradient = torch.from_numpy(generator.normal(size=(3, 1, 1, size)))
    at = torch.from_numpy(generator.choice([0.0, 0.5, 1.0], (3, 1, 1, size)))
    direction = ThreatModel("l1", "1").steepest(gradient, at)
    assert not (((direction > 0) & (at >= 1)) | ((direction < 0) & (at <= 0))).any()
    movable = torch.where(gradient > 0, at < 1, at > 0).flatten(1)
    torch.testing.assert_close(direction.flatten(1).abs().sum(1), movable.any(1).double())
    best = (gradient.abs().flatten(1) * movable).argmax(1)
    chosen = direction.flatten(1)[range(3), best] != 0
    assert torch.equal(chosen, movable.any(1))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("norm", NORMS)
def test_steepest_does_not_depend_on_the_size_of_the_gradient(norm, scale):
    pattern = torch.tensor([3.0, -4.0, 0.0, 1.0]).view(1, 1, 2, 2)
    threat, middle = ThreatModel(norm, "0.1"), torch.full((1, 1, 2, 2), 0.5)
    expected = threat.steepest(pattern, middle)
    gradient = pattern * scale if scale < 1e38 else pattern / 4 * scale
    coarse = 2e-3 if scale < 1e-38 else 1e-5  # 1e-42 is a float32 of only ten bits
    torch.testing.assert_close(threat.steepest(gradient, middle), expected, rtol=coarse, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_gives_the_zero_direction(norm):
    gradient = torch.zeros(3, 1, 4, 4)
    gradient[1] = 1.0
    direction = ThreatModel(norm, "0.1").steepest(gradient, torch.full((3, 1, 4, 4), 0.5))
    assert (direction[0] == 0).all() and (direction[2] == 0).all() and (direction[1] != 0).any()


@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_batch_passes_through_everything(norm):
    nothing, threat = torch.zeros(0, 3, 4, 4), ThreatModel(norm, "0.1")
    for made in (
        threat.project(nothing, nothing),
        threat.random_direction(nothing, rng()),
        threat.steepest(nothing, nothing),
    ):
        assert made.shape == nothing.shape
    assert threat.distance(nothing, nothing).shape == threat.contains(nothing, nothing).shape == (0,)


# -- L0: a number of pixels


def test_l0_counts_pixels_and_not_channels():
    images = torch.full((3, 3, 2, 2), 0.5)
    moved = images.clone()
    moved[1, :, 0, 0] = 1.0  # all channels of one pixel
    moved[2, 0, 0, 0], moved[2, 1, 1, 1] = 0.6, 0.5 + 1e-6  # one channel each of two
    threat = ThreatModel("l0", "1")
    assert threat.distance(images, moved).tolist() == [0, 1, 2]
    assert threat.contains(images, moved).tolist() == [True, True, False]
    assert threat.tolerance() == 1


@pytest.mark.parametrize("eps", ["8/255", "0.5", "1.5"])
def test_l0_needs_a_whole_number(eps):
    with pytest.raises(UserError, match="no number of pixels, which l0 counts; write a whole number"):
        ThreatModel("l0", eps)
    assert ThreatModel("l0", "10") == ThreatModel("l0", "20/2")


def test_l0_is_judged_and_attacked_in_but_has_no_ascent():
    assert set(ALL_NORMS) == {*NORMS, "l0"}
    with pytest.raises(UserError, match="l0 has no direction of steepest ascent"):
        ThreatModel("l0", "1").steepest(rand(1, 1, 2, 2), rand(1, 1, 2, 2))
