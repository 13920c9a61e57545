"""The inner maximisation: closed-form optima, what counts as a step, and what it must leave alone."""

import random

import numpy as np
import pytest
import reference
import torch
from scipy.optimize import linprog
from torch import nn

from scl_defense.ascent import ascend, default_rel_step
from scl_defense.draws import Several
from scl_defense.errors import ComponentError
from scl_defense.threat import NORMS, ThreatModel

EPS = {"linf": "8/255", "l2": "0.25", "l1": "0.4"}
THREATS = [ThreatModel(norm, EPS[norm]) for norm in NORMS]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=rng(seed))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def interior(*shape, seed=0):
    return 0.45 + 0.1 * rand(*shape, seed=seed)


def linear(weights):
    return lambda images: (images * weights).flatten(1).sum(1)


# -- how far it gets


@pytest.mark.parametrize("start", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_linear_objective_reaches_its_optimum_in_ten_steps(threat, start):
    """max <w, delta> over the ball is eps times the dual norm of w. Interior images, 75 pixels: one L1 pixel a step."""
    images, weights = interior(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
    objective = linear(weights)
    found = ascend(objective, images, threat, steps=10, start=start, rng=rng())
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[threat.norm]
    optimum = threat.radius * weights.flatten(1).norm(p=dual, dim=1)
    share = (objective(found) - objective(images)) / optimum
    # An L2 or L1 walk from a random point turns towards the optimum; from the image it goes straight there.
    least = 1 - 1e-5 if threat.norm == "linf" or start == "zero" else 0.95
    assert (share <= 1 + 1e-4).all()
    assert (share >= least).all()


@pytest.mark.parametrize("images_at", ["interior", "corners", "mixed"])
@pytest.mark.parametrize(("shape", "eps"), [((3, 1, 8, 8), "2"), ((2, 3, 16, 16), "12")])
def test_l1_near_the_corners_of_the_box(images_at, shape, eps):
    """Boxed L1 is a fractional knapsack: saturated pixels must not hold up the ascent (Croce & Hein 2021)."""
    pixels = {
        "interior": interior(*shape),
        "corners": rand(*shape).round(),
        "mixed": torch.where(rand(*shape, seed=2) < 0.5, rand(*shape).round(), rand(*shape)),
    }
    images, weights, threat = pixels[images_at], randn(*shape, seed=1), ThreatModel("l1", eps)
    objective = linear(weights)
    found = ascend(objective, images, threat, steps=200, rel_step=0.1, start="zero", rng=rng())
    assert threat.contains(images, found).all()
    for image, weight, gain in zip(images, weights, objective(found) - objective(images), strict=True):
        optimum = reference.linear_optimum("l1", weight.flatten().numpy(), image.flatten().numpy(), threat.radius)
        assert 0.9 * optimum <= gain <= optimum * (1 + 1e-4)


def test_linf_in_the_box_is_exact():
    images, weights, threat = rand(4, 3, 6, 6).round(decimals=1), randn(4, 3, 6, 6, seed=1), ThreatModel("linf", "0.25")
    objective = linear(weights)
    gain = objective(ascend(objective, images, threat, steps=10, rng=rng())) - objective(images)
    expected = [
        reference.linear_optimum("linf", w.flatten().numpy(), x.flatten().numpy(), 0.25)
        for x, w in zip(images, weights, strict=True)
    ]
    np.testing.assert_allclose(gain, expected, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_reference_agrees_with_linear_programming(seed):
    generator = np.random.default_rng(seed)
    image, weights = generator.choice([0, 0.3, 1], 12), generator.normal(size=12)
    solved = linprog(  # delta = up - down
        np.concatenate([-weights, weights]),
        A_ub=np.ones((1, 24)),
        b_ub=[1.7],
        bounds=[*((0, 1 - x) for x in image), *((0, x) for x in image)],
    )
    assert reference.linear_optimum("l1", weights, image, 1.7) == pytest.approx(-solved.fun, abs=1e-9)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_concave_objective_finds_an_interior_maximum(threat):
    """-||z - c||^2 with c inside the ball: the maximum is c, and small steps come near it."""
    images = interior(3, 1, 4, 4)
    inside = randn(3, 1, 4, 4, seed=1)
    length = inside.flatten(1).norm(p={"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm], dim=1).view(-1, 1, 1, 1)
    centre = images + 0.5 * threat.radius * inside / length
    found = ascend(
        lambda z: -(z - centre).square().flatten(1).sum(1), images, threat, steps=300, rel_step=0.01, rng=rng()
    )
    assert (threat.distance(centre, found) <= 0.1 * threat.radius).all()


@pytest.mark.parametrize("start", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_loss_of_a_network_rises(threat, start):
    torch_rng = rng(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_rng) * 0.5)
    images, labels = rand(8, 3, 4, 4), torch.arange(8) % 5

    def objective(z):
        return nn.functional.cross_entropy(network(z), labels, reduction="none")

    losses = [objective(ascend(objective, images, threat, steps=n, start=start, rng=rng())).mean() for n in (0, 1, 20)]
    assert losses[0] < losses[1] < losses[2]


# -- what a step is


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_exactly_as_many_objective_calls_as_steps(threat, steps):
    seen = []

    def objective(z):
        seen.append(z.detach().clone())
        return z.flatten(1).sum(1)

    images = interior(2, 1, 4, 4)
    found = ascend(objective, images, threat, steps=steps, rel_step=0.1, start="zero", rng=rng())
    assert len(seen) == steps
    if steps:
        assert torch.equal(seen[0], images)
        assert not torch.equal(seen[-1], found)  # the last step is taken and kept


def test_one_step_from_zero_is_the_image_plus_one_step():
    images, weights = interior(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    length = weights.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for rel_step in (0.5, 1.0):
        one = {"steps": 1, "start": "zero", "rel_step": rel_step, "rng": rng()}
        found = ascend(linear(weights), images, ThreatModel("linf", "0.1"), **one)
        torch.testing.assert_close(found, images + 0.1 * rel_step * weights.sign())
        found = ascend(linear(weights), images, ThreatModel("l2", "0.1"), **one)
        torch.testing.assert_close(found, images + 0.1 * rel_step * weights / length)
        found = ascend(linear(weights), images, ThreatModel("l1", "0.1"), **one)
        top = weights.flatten(1).abs().argmax(1)
        expected = torch.zeros(3, 32)
        expected[range(3), top] = 0.1 * rel_step * weights.flatten(1)[range(3), top].sign()
        torch.testing.assert_close(found, images + expected.view_as(images))


def test_one_default_step_is_projected_back():
    """2.5 eps ends on the sphere: fast gradient sign."""
    images, weights = interior(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1)
    found = ascend(linear(weights), images, ThreatModel("linf", "0.1"), steps=1, start="zero", rng=rng())
    torch.testing.assert_close(found, images + 0.1 * weights.sign())


def test_default_step_crosses_the_ball():
    assert [default_rel_step(steps) for steps in (1, 10, 25)] == [2.5, 0.25, 0.1]


def test_rel_step_is_in_units_of_eps():
    images, path = interior(1, 1, 3, 3), []

    def objective(z):
        path.append(z.detach().clone())
        return z.flatten(1).sum(1)

    ascend(objective, images, ThreatModel("linf", "0.1"), steps=5, rel_step=0.1, start="zero", rng=rng())
    torch.testing.assert_close(torch.stack(path).amax((1, 2, 3, 4)) - images.max(), 0.01 * torch.arange(5.0))


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_no_steps_is_the_start(threat):
    images, unused = interior(3, 2, 4, 4), linear(torch.zeros(2, 4, 4))
    assert torch.equal(ascend(unused, images, threat, steps=0, start="zero", rng=rng()), images)
    uniform = ascend(unused, images, threat, steps=0, start="uniform", rng=rng())
    assert torch.equal(uniform, threat.random_start(images, rng()))
    assert not torch.equal(uniform, images)
    corner = threat.random_corner(images, rng(4))
    found = ascend(unused, images, threat, steps=0, start=corner, rng=rng())
    torch.testing.assert_close(found, corner, rtol=0, atol=1e-6)
    small = ascend(unused, images, ThreatModel("linf", "0.1"), steps=0, start="gaussian", rng=rng()) - images
    assert small.std().item() == pytest.approx(0.001, rel=0.3)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_start_outside_the_ball_is_projected(threat):
    images = interior(3, 2, 4, 4)
    far = torch.full_like(images, 3.0)
    found = ascend(linear(far), images, threat, steps=0, start=far, rng=rng())
    assert threat.contains(images, found).all()
    torch.testing.assert_close(found, threat.project(images, far))


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("start", ["zero", "uniform", "gaussian"])
def test_every_point_asked_about_is_in_the_ball(threat, start):
    images = rand(4, 3, 5, 5).round(decimals=1)

    def objective(z):
        assert threat.contains(images, z.detach()).all()
        return linear(randn(4, 3, 5, 5, seed=1))(z)

    found = ascend(objective, images, threat, steps=6, rel_step=0.7, start=start, rng=rng())
    assert threat.contains(images, found).all()


# -- gradients that are of no use


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_samples_with_zero_gradient_move_randomly_and_the_others_do_not(threat):
    images = interior(4, 1, 4, 4)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    weights = randn(4, 1, 4, 4, seed=1)

    def objective(z):
        return linear(weights)(z) * mask

    runs = [ascend(objective, images, threat, steps=1, start="zero", rng=rng(seed)) for seed in (0, 1)]
    moved = [threat.distance(images, run) > 0.5 * threat.radius for run in runs]
    assert moved[0].all() and moved[1].all()
    assert torch.equal(runs[0][[0, 2]], runs[1][[0, 2]])
    assert not torch.equal(runs[0][1], runs[1][1]) and not torch.equal(runs[0][3], runs[1][3])
    assert not torch.equal(runs[0][1], runs[0][3])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_an_infinite_slope_is_the_steepest(threat, sign):
    images, weights = interior(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    weights[0, 0, 0, 0] = sign * torch.inf
    found = ascend(linear(weights), images, threat, steps=3, start="zero", rng=rng())
    assert threat.contains(images, found).all()
    moved = (found - images)[0, 0]
    assert moved[0, 0] * sign > 0.9 * threat.radius
    if threat.norm != "linf":  # the finite slopes are nothing beside it
        assert moved[1:].abs().max() < 1e-3 * threat.radius


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_gradients_that_are_no_number_survive(threat):
    """A wholly broken sample moves randomly; in a partly broken one the sound pixels still count."""
    images, weights = interior(3, 1, 4, 4), torch.ones(3, 1, 4, 4)
    weights[0] = torch.nan
    weights[1, :, :2] = torch.nan
    found = ascend(linear(weights), images, threat, steps=3, start="zero", rng=rng())
    assert threat.contains(images, found).all()
    assert (threat.distance(images, found) > 0.3 * threat.radius).all()
    assert torch.equal(found[1, :, :2], images[1, :, :2])
    assert (found[1, :, 2:] > images[1, :, 2:]).any()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_vanishing_gradients_still_climb(threat):
    """Saturated networks give gradients of 1e-30 whose squares are zero in float32."""
    images, weights = interior(4, 3, 4, 4), randn(4, 3, 4, 4, seed=1)
    strong = ascend(linear(weights), images, threat, steps=3, start="zero", rng=rng())
    weak = ascend(linear(weights * 1e-30), images, threat, steps=3, start="zero", rng=rng())
    torch.testing.assert_close(weak, strong, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 1, 5, 7)])
def test_small_batches(threat, shape):
    found = ascend(linear(torch.ones(shape[1:])), interior(*shape), threat, steps=3, rng=rng())
    assert found.shape == shape


# -- what it leaves alone


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
def test_only_its_own_generator_is_drawn_from(threat, start):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    images = interior(3, 1, 4, 4)
    first, again, other = (
        ascend(lambda z: 0 * z.flatten(1).sum(1), images, threat, steps=4, start=start, rng=rng(seed))
        for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("grad", ["none", "kept"])
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_parameters_gradients_and_inputs_are_untouched(grad, outer):
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    kept = {"none": None, "kept": torch.full((1, 16), 3.0)}[grad]
    network[1].weight.grad = kept
    images = interior(3, 1, 4, 4).requires_grad_()
    start = torch.zeros(3, 1, 4, 4).requires_grad_()
    before = images.detach().clone()
    with outer():
        found = ascend(lambda z: network(z).squeeze(1), images, THREATS[0], steps=3, start=start, rng=rng())
    assert network[1].weight.grad is kept and network[1].bias.grad is None
    assert kept is None or torch.equal(kept, torch.full((1, 16), 3.0))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(images, before) and images.grad is None and images.requires_grad
    assert torch.equal(start, torch.zeros(3, 1, 4, 4)) and start.grad is None
    assert not found.requires_grad and found.grad_fn is None and found.data_ptr() != images.data_ptr()


def test_images_do_not_share_memory_with_the_answer():
    for steps, count in ((0, 2), (0, 0)):
        images = interior(count, 1, 2, 2)
        found = ascend(linear(torch.ones(1, 2, 2)), images, THREATS[0], steps=steps, start="zero", rng=rng())
        found.fill_(9)
        assert (images < 1).all()


def test_every_step_asks_about_a_fresh_leaf():
    """No graph and no gradient is carried from one step into the next."""
    leaves = []

    def objective(z):
        leaves.append((z.is_leaf, z.requires_grad, z.grad))
        return z.flatten(1).sum(1)

    ascend(objective, interior(2, 1, 3, 3), THREATS[0], steps=3, rng=rng())
    assert leaves == [(True, True, None)] * 3


# -- objectives that cannot be climbed


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (lambda z: z.sum(), "one value an image"),
        (lambda z: z.flatten(1), "one value an image"),
        (lambda z: z.flatten(1).sum(1, keepdim=True), "one value an image"),
        (lambda z: z.flatten(1).sum(1)[:-1], "one value an image"),
        (lambda z: None, "NoneType"),
        (lambda z: 3.0, "float"),
        (lambda z: z.detach().flatten(1).sum(1), "cut"),
        (lambda z: torch.ones(3), "cut"),
        (lambda z: torch.ones(3, requires_grad=True) * 2, "does not depend"),
    ],
)
def test_an_objective_that_cannot_be_climbed_is_named(objective, says):
    with pytest.raises(ComponentError, match=says) as caught:
        ascend(objective, interior(3, 1, 4, 4), THREATS[0], steps=1, rng=rng())
    assert "\n" not in str(caught.value)


def test_an_objective_under_no_grad_is_named():
    @torch.no_grad()
    def objective(z):
        return z.flatten(1).sum(1)

    with pytest.raises(ComponentError, match="cut"):
        ascend(objective, interior(3, 1, 4, 4), THREATS[0], steps=1, rng=rng())


@pytest.mark.parametrize("start", ["Uniform", "", None, 3])
def test_an_unknown_start_is_an_error(start):
    with pytest.raises(ComponentError, match="uniform, gaussian, zero"):
        ascend(linear(torch.ones(1, 2, 2)), interior(3, 1, 2, 2), THREATS[0], steps=1, start=start, rng=rng())


@pytest.mark.parametrize("shape", [(2, 3, 1, 4, 4), (3, 2, 4, 4), (2, 1, 4, 4), (4, 4)])
def test_a_start_of_another_shape_is_an_error(shape):
    with pytest.raises(ComponentError):
        ascend(linear(torch.ones(1, 4, 4)), interior(3, 1, 4, 4), THREATS[0], steps=1, start=rand(*shape), rng=rng())


def test_a_batch_that_shrinks_has_few_sizes_and_every_image_ends_where_it_ends_alone():
    """Image k is done in step k: 100 sizes, of which eight an octave are passed."""
    images, threat, steps = rand(100, 1, 3, 3), THREATS[0], 100
    slopes, sizes = randn(100, 1, 3, 3, seed=1), []

    def climbing(steps_of):
        count = torch.zeros(len(images), dtype=torch.long)

        def objective(points, places):
            sizes.append(len(places))
            count[places] += 1  # a place that is there twice counts once
            return (points * slopes[places]).flatten(1).sum(1), count[places] > steps_of[places]

        return objective

    how = {"steps": steps, "rel_step": 0.05, "start": "zero"}
    together = ascend(climbing(torch.arange(100)), images, threat, **how, stopping=True, rng=rng())
    allowed = {2**octave * k // 8 for octave in range(7) for k in range(8, 16)}
    assert len(sizes) == steps and set(sizes) <= allowed and len(set(sizes)) <= 16 + 8 * 3
    assert max(sizes) == 104 and sum(sizes) < 1.06 * sum(range(1, 101))
    for k in (0, 1, 3, 50, 99):
        alone = ascend(
            lambda points, k=k: (points * slopes[k]).flatten(1).sum(1), images[k : k + 1], threat,
            steps=k, rel_step=0.05, start="zero", rng=rng(),
        )  # fmt: skip
        assert torch.equal(together[k : k + 1], alone)


# -- parts of a batch with draws of their own


def stopping_objective(images, limits):
    """Linear, without a slope for every fifth image until it is moved, done above a limit of each image's own."""
    weights = randn(*images.shape, seed=5)

    def objective(points, rows):
        values = ((points - images[rows]) * weights[rows]).flatten(1).sum(1)
        stuck = (rows % 5 == 0) & (values.abs() < 0.3 * limits[rows])
        return torch.where(stuck, 0 * values, values), values.detach() > limits[rows]

    return objective


@pytest.mark.parametrize("start", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_parts_that_climb_together_climb_as_alone(threat, start):
    """Each with its own draws, also for what is stuck in some of them alone, and with any number of points at once."""
    sizes, images = [9, 0, 1, 23], interior(33, 1, 6, 6)
    limits = 0.3 * threat.radius + threat.radius * rand(33, seed=2)
    how = {"steps": 8, "rel_step": 0.2, "start": start, "stopping": True}
    alone, done, first = [], [], 0
    for number, size in enumerate(sizes):
        part = images[first : first + size]
        whole = stopping_objective(images, limits)

        def objective(points, rows, first=first, whole=whole):
            values, over = whole(points, rows + first)
            done.append(over)
            return values, over

        alone.append(ascend(objective, part, threat, rng=rng(number), **how) if size else part)
        first += size
    assert any(one.any() for one in done) and not all(one.all() for one in done)
    for at_once in (None, 1, 7, 16, 100):
        draws = Several([(rng(number), size) for number, size in enumerate(sizes)])
        passed = []
        whole = stopping_objective(images, limits)

        def counted(points, rows, whole=whole, passed=passed):
            passed.append(len(set(rows.tolist())))
            return whole(points, rows)

        together = ascend(counted, images, threat, rng=draws, at_once=at_once, **how)
        assert torch.equal(together, torch.cat(alone))
        assert max(passed) <= (at_once or 33)


@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_what_is_stuck_goes_on_from_where_it_is(threat, stopping):
    images, draws = interior(5, 1, 4, 4), rng(3)
    at = threat.random_start(images, draws)
    wanted = threat.project(images, at + 0.4 * threat.radius * threat.random_direction(images, draws))

    def flat(points, *rows):
        values = 0 * points.flatten(1).sum(1)
        return (values, torch.zeros(len(points), dtype=torch.bool)) if stopping else values

    found = ascend(flat, images, threat, steps=1, rel_step=0.4, stopping=stopping, rng=rng(3))
    assert torch.equal(found, wanted) and not torch.equal(found, at)


def test_who_is_stuck_makes_nobody_else_draw():
    """The second part's draws begin where they would without the first one, whose images have no slope."""
    images, threat = interior(6, 1, 4, 4), ThreatModel("linf", "0.1")

    def objective(points, rows):
        values = ((points - images[rows]) * randn(6, 1, 4, 4)[rows]).flatten(1).sum(1)
        return torch.where(rows < 3, 0 * values, values), torch.zeros(len(rows), dtype=torch.bool)

    one, other = rng(1), rng(2)
    ascend(objective, images, threat, steps=3, start="zero", stopping=True, rng=Several([(one, 3), (other, 3)]))
    assert torch.equal(other.get_state(), rng(2).get_state()) and not torch.equal(one.get_state(), rng(1).get_state())
