"""The projection onto ball and box: the nearest point, to rounding, in every corner case."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from scl_defense.threat import NORMS, ThreatModel, parse_eps

SHAPES = [(1, 1, 8, 8), (3, 3, 5, 7), (2, 4, 6, 3), (0, 3, 4, 4)]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=rng(seed), dtype=dtype)


def rows(*values):
    """Images (N, 1, 1, D) in float64 from arrays (D,)."""
    return torch.from_numpy(np.stack(values).astype(np.float64)).reshape(len(values), 1, 1, -1)


RADII = ("0", "1e-9", "1/1000", "8/255", "0.3", "0.5", "1")
# Round numbers make ties, and sums that miss a radius by one rounding error.
PIXELS = st.one_of(st.integers(0, 10).map(lambda n: n / 10), st.floats(0, 1))
TARGETS = st.one_of(st.integers(-20, 30).map(lambda n: n / 10), st.floats(-3, 4))


@st.composite
def problems(draw):
    """(norm, eps, image, target): ties, saturated pixels, and radii that just fail to hold the clipped target."""
    norm = draw(st.sampled_from(NORMS))
    pairs = draw(st.lists(st.tuples(PIXELS, TARGETS), min_size=1, max_size=16))
    image, target = (np.array(side) for side in zip(*pairs, strict=True))
    if draw(st.booleans()):  # one value everywhere: every breakpoint coincides
        image, target = np.full_like(image, image[0]), np.full_like(target, target[0])
    eps = draw(st.sampled_from(RADII))
    if norm != "linf" and draw(st.booleans()):
        reach = np.linalg.norm(np.clip(target, 0, 1) - image, ord=ORDER[norm])
        eps = repr(float(max(reach * draw(st.sampled_from([0.25, 0.999999, 1 - 2**-52, 1.0, 1.5])), 0.0)))
    return norm, eps, image, target


# Rounding decides whether these lie outside, so no breakpoint of the dual function seems to reach the radius.
ROUNDING = [
    ("l1", "0", np.array([0.9, 0.1]), np.array([1.5, 2.6])),
    ("l1", "0", np.array([0.4, 0.3, 0.9, 0.2]), np.array([-0.9, 1.6, 1.1, -1.8])),
    ("l2", "3.9599999999999995", np.full(16, 0.01), np.linspace(3, 9, 16)),
    ("l2", "0.282842712474619", np.array([0.2, 0.3]), np.array([-0.6, 0.5])),
    ("l2", "0.8602325267042626", np.array([0.2, 0.4, 0.6]), np.array([2.0, 0.5, 0.3])),
]


def assert_is_the_reference(norm, eps, image, target):
    projected = ThreatModel(norm, eps).project(rows(image), rows(target)).flatten().numpy()
    expected = reference.project(norm, image.tolist(), target.tolist(), float(parse_eps(eps)))
    np.testing.assert_allclose(projected, expected, rtol=0, atol=2e-8)


@pytest.mark.parametrize("problem", ROUNDING, ids=lambda problem: f"{problem[0]}-{problem[1]}")
def test_rounding_does_not_lose_the_projection(problem):
    assert_is_the_reference(*problem)


@given(problems())
def test_projection_is_the_reference(problem):
    assert_is_the_reference(*problem)


@given(problems())
def test_projection_is_in_ball_and_box_and_stays(problem):
    norm, eps, image, target = problem
    threat, images = ThreatModel(norm, eps), rows(image)
    projected = threat.project(images, rows(target))
    assert threat.contains(images, projected).all()
    torch.testing.assert_close(threat.project(images, projected), projected, rtol=0, atol=1e-9)


@given(problems(), st.integers(0, 2**32 - 1))
def test_no_feasible_point_is_nearer(problem, seed):
    """<target - p, z - p> <= 0 for every feasible z holds at the nearest point p and nowhere else."""
    norm, eps, image, target = problem
    radius, generator = float(parse_eps(eps)), np.random.default_rng(seed)
    threat, images = ThreatModel(norm, eps), rows(image)
    projected = threat.project(images, rows(target)).flatten().numpy()
    moves = np.clip(generator.uniform(-1, 2, (200, len(image))), 0, 1) - image
    moves[::2] *= generator.random((100, len(image))) < 0.3  # sparse ones: the vertices of the L1 ball
    length = np.linalg.norm(moves, ord=ORDER[norm], axis=1, keepdims=True)
    feasible = image + moves * np.minimum(1, radius / np.maximum(length, 1e-12))
    assert threat.contains(rows(image), rows(*feasible)).all()
    assert ((feasible - projected) @ (target - projected) <= 1e-7).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_itself_agrees_with_alternating_projections(norm, seed):
    generator = np.random.default_rng(seed)
    image, target = generator.choice([0, 0.2, 0.9, 1], 6), generator.uniform(-2, 3, 6)
    expected = reference.dykstra(norm, image, target, 0.7)
    np.testing.assert_allclose(reference.project(norm, image.tolist(), target.tolist(), 0.7), expected, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_interior_points_do_not_move(norm, shape):
    images = 0.2 + 0.6 * rand(*shape)
    size = math.prod(shape[1:])
    inside = images + (rand(*shape, seed=1) - 0.5) * (0.1 / {"linf": 1, "l2": size**0.5, "l1": size}[norm])
    torch.testing.assert_close(ThreatModel(norm, "0.1").project(images, inside), inside, rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eps_zero_is_the_identity(norm, shape, dtype):
    images, far = rand(*shape, dtype=dtype).round(decimals=1), 4 * rand(*shape, seed=1, dtype=dtype) - 2
    threat, rounding = ThreatModel(norm, "0"), 0 if dtype == torch.float32 else 1e-12
    for made in (threat.project(images, far), threat.random_start(images, rng()), threat.random_corner(images, rng())):
        torch.testing.assert_close(made, images, rtol=0, atol=rounding)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_keeps_shape_and_dtype_and_touches_nothing(norm, shape, dtype):
    images, far = rand(*shape, dtype=dtype), 4 * rand(*shape, seed=1, dtype=dtype) - 2
    kept = images.clone(), far.clone()
    projected = ThreatModel(norm, "0.3").project(images, far)
    assert projected.shape == images.shape and projected.dtype == dtype
    assert torch.equal(images, kept[0]) and torch.equal(far, kept[1])


@pytest.mark.parametrize("norm", NORMS)
def test_images_of_a_batch_do_not_interact(norm):
    images, far = rand(5, 3, 4, 4, dtype=torch.float64), 3 * rand(5, 3, 4, 4, seed=1, dtype=torch.float64) - 1
    far[2] = images[2]  # one needs no projection
    threat = ThreatModel(norm, "0.4")
    together = threat.project(images, far)
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], threat.project(images[i : i + 1], far[i : i + 1]))


@pytest.mark.parametrize(("norm", "eps"), [("linf", "8/255"), ("l2", "0.5"), ("l1", "0.5"), ("l1", "12")])
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.55, 0.7, 0.9, 0.97])
def test_rounding_of_flat_images_stays_inside(norm, eps, size, value):
    """On a flat image every pixel rounds the same way, so float32 errors add up instead of cancelling."""
    images = torch.full((1, 3, size, size), value)
    far = images + (0.3 if value < 0.5 else -0.3)
    threat = ThreatModel(norm, eps)
    projected = threat.project(images, far)
    assert threat.contains(images, projected).all()
    assert threat.distance(images, projected).item() > 0.97 * threat.radius


# -- L0: a number of pixels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_l0_keeps_the_pixels_that_bring_most_nearer(seed, count):
    """Against all subsets of a small image: no other choice of pixels ends nearer to the target."""
    from itertools import combinations

    images, far = rand(1, 2, 2, 3, seed=seed), 3 * rand(1, 2, 2, 3, seed=seed + 50) - 1
    threat = ThreatModel("l0", str(count))
    made = threat.project(images, far)
    assert threat.contains(images, made).all()

    def error(point):
        return float((point - far).square().sum())

    errors = []
    for chosen in combinations(range(6), min(count, 6)):
        point = images.clone().flatten(2)
        point[:, :, list(chosen)] = far.clamp(0, 1).flatten(2)[:, :, list(chosen)]
        errors.append(error(point.view_as(images)))
    assert error(made) == pytest.approx(min(errors), abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_l0_points_inside_stay_and_random_ones_use_the_whole_budget(shape):
    images, threat = rand(*shape), ThreatModel("l0", "4")
    for made in (threat.random_start(images, rng(9)), threat.random_corner(images, rng(9))):
        assert (threat.distance(images, made) == 4).all()
        assert torch.equal(threat.project(images, made), made)
    assert torch.equal(ThreatModel("l0", "0").random_start(images, rng()), images)
