"""A twin's convolutions against torch's own."""

import copy

import pytest
import torch
from scl_defense_benchmarks import convolutions, twin
from scl_defense_benchmarks.battery import plan_attacks
from scl_defense_benchmarks.convolutions import FrozenConv2d, convolved, freeze_convolutions
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.kernels import PRODUCT
from scl_defense_benchmarks.layouts import widened
from scl_defense_benchmarks.twin import twin_of
from torch import nn

from scl_defense.models import Network
from scl_defense.plugins import default_host
from scl_defense.threat import ThreatModel


def pair(convolution):
    """The convolution, frozen, and the same as a :class:`FrozenConv2d`."""
    convolution = convolution.eval().requires_grad_(False)
    frozen = nn.Sequential(copy.deepcopy(convolution))
    freeze_convolutions(frozen)
    assert type(frozen[0]) is FrozenConv2d
    return convolution, frozen[0]


def gradient(convolution, maps, weight):
    points = maps.clone().requires_grad_()
    made = convolution(points)
    return made.detach(), torch.autograd.grad((made * weight).sum(), points)[0]


@pytest.fixture
def light(monkeypatch):
    """Weights count as heavy from one number on: the same path as for millions."""
    monkeypatch.setattr(convolutions, "HEAVY", 1)


SMALL_MAPS = [(3, 4, 4), (3, 2, 3), (5, 4, 4), ((3, 1), 3, 5), ((1, 5), 4, 4)]


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(("kernel", "height", "width"), SMALL_MAPS)
@pytest.mark.parametrize("bias", [True, False])
def test_small_maps_side_by_side_are_the_same_sums(monkeypatch, kernel, height, width, bias):
    torch.manual_seed(0)
    around = tuple(side // 2 for side in (kernel if isinstance(kernel, tuple) else (kernel, kernel)))
    own, frozen = pair(nn.Conv2d(6, 10, kernel, padding=around, bias=bias).double())
    laid, side_by_side = [], FrozenConv2d._side_by_side
    monkeypatch.setattr(FrozenConv2d, "_side_by_side", lambda *given: laid.append(1) or side_by_side(*given))
    maps, weight = torch.randn(7, 6, height, width).double(), torch.randn(7, 10, height, width).double()
    for found, expected in zip(gradient(frozen, maps, weight), gradient(own, maps, weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert laid


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("kernel", [3, 5])
def test_an_image_does_not_reach_its_neighbours(kernel):
    own, frozen = pair(nn.Conv2d(3, 4, kernel, padding=kernel // 2))
    maps = torch.randn(3, 3, 4, 4)
    maps[1] = torch.nan
    made = frozen(maps)
    torch.testing.assert_close(made[[0, 2]], own(maps[[0, 2]]))
    assert made[1].isnan().all()


OTHERS = [{"stride": 2, "padding": 0}, {"padding": 0}, {"dilation": 2, "padding": 2}, {"groups": 2, "padding": 1},
          {"padding": 1, "padding_mode": "circular"}, {"padding": "same"}, {"padding": 2}]  # fmt: skip


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_every_other_convolution_is_left_to_torch(options):
    own, frozen = pair(nn.Conv2d(2, 32, 3, **options))
    maps = torch.randn(3, 2, 4, 4)
    weight = torch.randn(own(maps).shape)
    for found, expected in zip(gradient(frozen, maps, weight), gradient(own, maps, weight), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(frozen(maps[0]), own(maps[0]))  # without a batch


@pytest.mark.parametrize(("inputs", "kernel", "side"), [(1, 3, 28), (3, 3, 9), (2, 5, 6), (1, (1, 3), 4), (1, 1, 5)])
def test_the_gradient_to_few_inputs_is_autograds(inputs, kernel, side):
    torch.manual_seed(0)
    around = tuple(side // 2 for side in (kernel if isinstance(kernel, tuple) else (kernel, kernel)))
    own, frozen = pair(nn.Conv2d(inputs, 16 * inputs, kernel, padding=around))
    maps, weight = torch.randn(5, inputs, side, side + 1), torch.randn(5, 16 * inputs, side, side + 1)
    assert frozen.plan(maps, frozen.weight).back == -1
    found, slope = gradient(frozen, maps, weight)
    expected, exact = gradient(own.double(), maps.double(), weight.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_gradient_to_few_inputs_has_a_gradient_itself():
    own, frozen = pair(nn.Conv2d(1, 16, 3, padding=1))
    found = []
    for one in (own, frozen):
        points = torch.linspace(-1, 1, 25).view(1, 1, 5, 5).requires_grad_()
        (slope,) = torch.autograd.grad(one(points).pow(3).sum(), points, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), points)[0])
    torch.testing.assert_close(found[1], found[0])


#: (inputs, outputs, kernel, stride, padding, rows, columns), and what the plan is forward and back.
KINDS = {
    "8 to 8": ((8, 8, 3, 1, 1, 6, 8), 2, 2),
    "3 to 4": ((3, 4, 3, 1, 1, 5, 8), 4, 4),
    "16 to 2, tall": ((16, 2, (5, 3), 1, (2, 1), 6, 4), 2, 1),
    "odd width": ((4, 4, 3, 1, 1, 6, 7), 1, 1),
    "halved": ((8, 16, 3, 2, 1, 8, 6), 1, 0),
    "halved, odd": ((5, 9, 3, 2, 1, 7, 9), 1, 0),
    "halved, many": ((40, 8, 3, 2, 1, 8, 8), 1, 1),
    "every second pixel": ((6, 12, 1, 2, 0, 8, 7), 1, -2),
    "one to many": ((1, 16, 3, 1, 1, 6, 6), 1, -1),
    "unpadded": ((6, 6, 3, 1, 0, 6, 6), 1, 1),
}


@pytest.fixture
def busy(monkeypatch):
    """Every convolution is large enough to be taken in one go."""
    monkeypatch.setattr(convolutions, "BUSY", 0)


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("added", "rectified"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_sum_and_a_relu_in_one_go_are_torchs_own(kind, bias, added, rectified):
    torch.manual_seed(0)
    (inputs, outputs, kernel, stride, padding, rows, columns), forward, back = KINDS[kind]
    own, frozen = pair(nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias))
    maps = torch.randn(5, inputs, rows, columns).contiguous(memory_format=torch.channels_last)
    other, weight = torch.randn(2, *own(maps).shape)
    plan = frozen.plan(maps, frozen.weight)
    assert plan.served and (plan.forward, plan.back) == (forward, back)

    def of(compute, dtype):
        points = [value.to(dtype).requires_grad_() for value in (maps, other)]
        made = compute(*points)
        slopes = torch.autograd.grad((made * weight.to(dtype)).sum(), points, allow_unused=not added)
        return [made.detach(), *slopes]

    def plain(maps, other):
        made = own.double()(maps) + (other if added else 0)
        return made.relu() if rectified else made

    found = of(
        lambda maps, other: convolved(frozen, maps, other if added else None, rectified=rectified), torch.float32
    )
    for mine, exact in zip(found, of(plain, torch.float64), strict=True):
        assert (mine is None) is (exact is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        beside = other.clone() if added else None
        made = convolved(frozen, maps, beside, rectified=rectified)
        assert torch.equal(made, found[0]) and (beside is None or torch.equal(beside, other))


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rectified", [False, True])
def test_in_bfloat16_it_is_what_autocast_gives(kind, rectified):
    torch.manual_seed(0)
    (inputs, outputs, kernel, stride, padding, rows, columns), *_ = KINDS[kind]
    own, frozen = pair(nn.Conv2d(inputs, outputs, kernel, stride, padding))
    frozen.round_once()
    maps = torch.randn(5, inputs, rows, columns)
    other = torch.randn_like(own(maps)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found, slope = gradient(lambda points: convolved(frozen, points, other, rectified=rectified), maps, 1.0)
        expected, exact = gradient(lambda points: finished(own(points) + other, rectified), maps, 1.0)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    torch.testing.assert_close(slope, exact, rtol=0.02, atol=0.02)


def finished(made, rectified):
    return made.relu() if rectified else made


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_has_a_gradient_itself(kind):
    torch.manual_seed(0)
    (inputs, outputs, kernel, stride, padding, rows, columns), *_ = KINDS[kind]
    own, frozen = pair(nn.Conv2d(inputs, outputs, kernel, stride, padding))
    maps, found = torch.randn(2, inputs, rows, columns), []
    for one in (lambda points: own(points).relu(), lambda points: convolved(frozen, points, rectified=True)):
        points = maps.clone().requires_grad_()
        (slope,) = torch.autograd.grad(one(points).pow(3).sum(), points, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), points)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_written_to_are_laid_out_anew(kind):
    (inputs, outputs, kernel, stride, padding, rows, columns), *_ = KINDS[kind]
    own, frozen = pair(nn.Conv2d(inputs, outputs, kernel, stride, padding))
    maps = torch.randn(2, inputs, rows, columns)
    gradient(frozen, maps, 1.0)
    for layer in (own, frozen):
        layer.weight.mul_(-2), layer.bias.add_(3)
    for found, expected in zip(gradient(frozen, maps, 1.0), gradient(own, maps, 1.0), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_made_may_be_written_over(kind):
    """As by a ReLU in place behind it, or a sum."""
    (inputs, outputs, kernel, stride, padding, rows, columns), *_ = KINDS[kind]
    own, frozen = pair(nn.Conv2d(inputs, outputs, kernel, stride, padding))
    maps = torch.randn(2, inputs, rows, columns)
    slopes = [gradient(lambda points, one=one: one(points).mul_(2).relu_(), maps, 1.0)[1] for one in (own, frozen)]
    torch.testing.assert_close(slopes[1], slopes[0])


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("lowered", [False, True])
def test_a_form_that_computes_something_else_is_not_taken(monkeypatch, lowered):
    """Some builds of oneDNN do, in bfloat16 with a stride along the row."""
    torch.manual_seed(0)
    monkeypatch.setattr(convolutions, "widened", lambda weight, count: widened(weight, count).flip(3))
    own, frozen = pair(nn.Conv2d(8, 8, 3, padding=1))
    frozen.round_once()
    maps = torch.randn(3, 8, 6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        found, expected = gradient(frozen, maps, 1.0), gradient(own, maps, 1.0)
    assert {(plan.forward, plan.back) for plan in frozen._scl_plans.values()} == {(1, 1)}
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [
    (16, 4, 1), (8, 3, 5), (8, 8, 7), (64, 3, 3), (8, 1, 5), (1, 8, 5), (3, 8, 5), (2, 16, 1), (4, 16, 1),
])  # fmt: skip
def test_no_bfloat16_convolution_is_wrong(inputs, outputs, kernel):
    """Shapes that one build of oneDNN gets wrong as neighbours at once."""
    torch.manual_seed(0)
    own, frozen = pair(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
    frozen.round_once()
    for count, side in ((64, 4), (5, 8), (7, 28)):
        maps = torch.randn(count, inputs, side, side)
        points = maps.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = frozen(points)
        (slope,) = torch.autograd.grad(found.sum(), points)  # outside, as attacks do
        exact, whole = gradient(own, maps, 1.0)
        torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
        torch.testing.assert_close(slope, whole, rtol=0.05, atol=0.05)


def test_a_build_without_the_one_go_does_without(monkeypatch, busy):
    own, frozen = pair(nn.Conv2d(4, 4, 3, padding=1))
    maps = torch.randn(3, 4, 8, 8)
    monkeypatch.setattr(convolutions, "_one_go_works", lambda: False)
    for found, expected in zip(gradient(frozen, maps, 1.0), gradient(own, maps, 1.0), strict=True):
        assert torch.equal(found, expected)
    monkeypatch.undo()
    monkeypatch.setattr(convolutions, "in_one_go", lambda *given: maps)
    assert not convolutions._one_go_works.__wrapped__()


def test_asking_whether_it_works_draws_from_nobody_and_asks_once(monkeypatch):
    state, asked, once = torch.get_rng_state(), [], convolutions.in_one_go
    monkeypatch.setattr(convolutions, "in_one_go", lambda *given: asked.append(1) or once(*given))
    with torch.autocast("cpu", torch.bfloat16):
        assert convolutions._one_go_works.__wrapped__()
    assert len(asked) == 2 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("busy")
def test_no_image_at_all_is_passed_too():
    own, frozen = pair(nn.Conv2d(8, 8, 3, padding=1))
    assert frozen(torch.rand(0, 8, 8, 8)).shape == own(torch.rand(0, 8, 8, 8)).shape
    assert not frozen._scl_plans


@pytest.mark.usefixtures("busy")
def test_transforms_of_functions_go_through():
    own, frozen = pair(nn.Conv2d(4, 4, 3, padding=1))
    maps = torch.randn(3, 4, 8, 8)
    slopes = [torch.func.grad(lambda maps, one=one: convolve_relu(one, maps).sum())(maps) for one in (own, frozen)]
    torch.testing.assert_close(slopes[1], slopes[0])


def convolve_relu(layer, maps):
    return convolved(layer, maps, rectified=True) if isinstance(layer, FrozenConv2d) else layer(maps).relu()


def test_weights_rounded_once_are_what_autocast_rounds_them_to():
    own, frozen = pair(nn.Conv2d(4, 8, 3, padding=1))
    maps = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = own(maps)
        frozen.round_once()
        frozen.weight.data += 1  # it is the copy that is used
        assert torch.equal(frozen(input=maps), expected)
        assert torch.equal(copy.deepcopy(frozen)(maps), expected)
    frozen.weight.data = own.weight.data.clone()
    assert torch.equal(frozen(maps), own(maps))  # outside autocast the weights themselves


@pytest.mark.usefixtures("light")
def test_side_by_side_in_bfloat16_is_what_autocast_gives():
    own, frozen = pair(nn.Conv2d(8, 16, 3, padding=1))
    frozen.round_once()
    maps = torch.randn(5, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, slope = gradient(frozen, maps, 1.0)
        expected, exact = gradient(own, maps, 1.0)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(slope, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_numbers_that_autocast_leaves_alone_are_left_alone(dtype):
    own, frozen = pair(nn.Conv2d(2, 32, 3, padding=1).to(dtype))
    frozen.round_once()
    late = pair(nn.Conv2d(2, 32, 3, padding=1))[1]
    late.round_once()
    late.to(dtype)  # rounded before its weights were of that type
    late.weight.data, late.bias.data = own.weight.data, own.bias.data
    maps = torch.randn(3, 2, 5, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(maps), own(maps)) and torch.equal(late(maps), own(maps))


def test_other_weights_in_their_place_are_used():
    """A member of an ensemble that shares the layers, or a weight that is made of the image."""
    own, frozen = pair(nn.Conv2d(1, 16, 3, padding=1))
    frozen.round_once()
    other = {"weight": torch.randn(16, 1, 3, 3), "bias": torch.randn(16)}
    maps = torch.randn(4, 1, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.functional_call(frozen, other, (maps,))
        assert torch.equal(found, torch.func.functional_call(own, other, (maps,)))

    def made_of_it(convolution, points):
        weight = convolution.weight * points.square().sum()
        return torch.func.functional_call(convolution, {"weight": weight}, (points,)).square().sum()

    points = maps.requires_grad_()
    slopes = [torch.autograd.grad(made_of_it(one, points), points)[0] for one in (own, frozen)]
    torch.testing.assert_close(slopes[1], slopes[0])


def test_a_network_that_cannot_have_them_is_folded_all_the_same(monkeypatch):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    monkeypatch.setattr(FrozenConv2d, "forward", lambda self, input: self.missing)
    made = twin_of(network, torch.rand(4, 1, 8, 8))
    assert [type(part) for part in made.modules()][2:4] == [nn.Conv2d, nn.Identity]


def test_what_a_hook_prepares_and_subclasses_stay_as_they_are():
    class Mine(nn.Conv2d):
        pass

    normed = nn.utils.spectral_norm(nn.Conv2d(2, 2, 3))
    network = nn.Sequential(Mine(2, 2, 3), normed, nn.Conv2d(2, 2, 3))
    freeze_convolutions(network)
    assert [type(part) for part in network] == [Mine, nn.Conv2d, FrozenConv2d]


ATTACKS = ["pgd:steps=5", "native:pgd:steps=5:loss=margin", "apgd-ce:steps=10", "fgsm", "pgd-min:steps=5"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_verdict_changes_image_by_image(monkeypatch, precision):
    """A network with heavy weights on small maps, and a first layer from one input to many."""
    monkeypatch.setattr(convolutions, "HEAVY", 9000)
    torch.manual_seed(0)
    encoder = default_host()["model"].get("small-cnn")(width=16)((1, 28, 28))
    network = Network(encoder, 10, (0.5,), (0.5,))
    stages = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    stages[-1].stride = (1, 1)  # 7 x 7 maps; counted as small
    monkeypatch.setattr(convolutions, "SMALL", 49)
    images = torch.rand(48, 1, 28, 28)
    with torch.no_grad():
        for _ in range(20):  # batch norm sees them
            network(images)
        labels = network.eval()(images).argmax(1)
    used = []
    side_by_side, form = FrozenConv2d._side_by_side, FrozenConv2d.back_form
    monkeypatch.setattr(FrozenConv2d, "_side_by_side", lambda *given: used.append("wide") or side_by_side(*given))
    roads = {PRODUCT: "few"}
    monkeypatch.setattr(
        FrozenConv2d,
        "back_form",
        lambda layer, weight, plan: used.append(roads.get(plan.back)) or form(layer, weight, plan),
    )
    plan = plan_attacks(",".join(ATTACKS), host=default_host(), threat=ThreatModel("linf", "2/255"))
    found = []
    for frozen in (freeze_convolutions, lambda network: None):
        monkeypatch.setattr(twin, "freeze_convolutions", frozen)
        found.append(evaluate(network, images, labels, plan, seed=0, precision=precision, workers=1))
        assert bool(used) is (frozen is freeze_convolutions)
        assert not used or {"wide", "few"} <= set(used)
        used.clear()
    first, second = found
    assert [row.label for row in first.attacks] and 0 < first.attacks[0].robust_accuracy < 1
    assert first.worst_cases == second.worst_cases
    for new, old in zip(first.attacks, second.attacks, strict=True):
        assert new.robust_accuracy == old.robust_accuracy and new.queries == old.queries


def test_a_twin_has_them_and_the_network_does_not():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    made = twin_of(network.eval(), torch.rand(4, 1, 8, 8))
    assert [type(part) for part in made.modules() if isinstance(part, nn.Conv2d)] == [FrozenConv2d]
    assert type(network[0]) is nn.Conv2d
