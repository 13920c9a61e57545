"""Convolutions as one call: the numbers of the same steps one by one, and of the network, compiled or not."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from scl_defense_benchmarks import chain as chain_module
from scl_defense_benchmarks import convolutions, kernels
from scl_defense_benchmarks.program import Program, Step, Stretch
from scl_defense_benchmarks.twin import Twin, again, twin_of
from torch import Tensor, nn

from scl_defense.models import Network
from scl_defense.plugins import default_host

CASES = {"small-cnn": (1, 28), "resnet18": (3, 32)}


def _network(name: str) -> Network:
    torch.manual_seed(0)
    channels, side = CASES[name]
    encoder = default_host()["model"].get(name)(width=8)((channels, side, side))
    network = Network(encoder, 10, (0.4,) * channels, (0.3,) * channels)
    for norm in (part for part in network.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.3, 0.3)
    return network.eval().requires_grad_(False)


def _images(name: str, count: int) -> Tensor:
    channels, side = CASES[name]
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(count))


def _step_by_step(twin: Twin) -> Twin:
    """The same program without a chain."""
    copied = again(twin, twin.precision)
    assert copied.program is not None
    copied.program.parts = list[Step | Stretch](copied.program.steps)
    return copied


def _passed(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits without a gradient, logits with one, and the gradient."""
    points = images.clone().requires_grad_()
    with torch.no_grad():
        alone = network(images)
    logits = network(points)
    weights = torch.linspace(1, 2, logits.numel()).view_as(logits)
    return alone, logits.detach(), torch.autograd.grad(logits, points, weights)[0]


def _chains(program: Program | None) -> list[int]:
    assert program is not None
    return [len(part.steps) for part in program.parts if isinstance(part, Stretch)]


@pytest.fixture
def taken(monkeypatch):
    """How often a chain was computed in one call."""
    calls, called = [], kernels.called
    monkeypatch.setattr(
        chain_module, "called", lambda function, *given: calls.append(function) or called(function, *given)
    )
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scripted", [True, False])
def test_in_one_call_it_is_the_same_to_the_last_bit(name, precision, scripted, taken, monkeypatch):
    if not scripted:
        monkeypatch.setattr(kernels, "_COMPILED", {one: one for one in (kernels.chain, kernels.chain_back)})
    twin = twin_of(_network(name), _images(name, 4), precision)
    assert _chains(twin.program) == [{"small-cnn": 4, "resnet18": 20}[name]]
    for count in (1, 5, 33):
        taken.clear()
        images = _images(name, count)
        for found, expected in zip(_passed(twin, images), _passed(_step_by_step(twin), images), strict=True):
            assert torch.equal(found, expected)
        assert taken == [kernels.chain, kernels.chain, kernels.chain_back]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_networks(name, taken):
    network, images = _network(name), _images(name, 9)
    twin = twin_of(network, images[:4])
    for found, expected in zip(_passed(twin, images), _passed(network, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert taken


def test_its_gradient_has_a_gradient_itself(taken):
    network, images = _network("resnet18"), _images("resnet18", 3)
    found = []
    for one in (twin_of(network, images), network):
        points = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(one(points).square().sum(), points, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), points)[0])
    assert kernels.chain_back in taken
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))


class Shapes(nn.Module):
    """Sums and readers in places where a residual network has none."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.whole = nn.Conv2d(6, 6, 8)
        self.third, self.fourth = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 5, stride=2, padding=2)

    def forward(self, images):
        double = images.repeat(1, 2, 1, 1)
        one = F.relu(self.first(images))
        if self.how == "twice":  # what is read is what is added, and without a ReLU
            return self.fourth(F.relu(self.third(self.second(one) + one) + one)).flatten(1)
        if self.how == "shared":  # the gradient that comes is another's too, whose turn is later
            return self.fourth(self.second(one) + one + double).flatten(1)
        if self.how == "written over":
            return self.fourth(F.relu(self.second(one) + one)).mul_(2).relu_().flatten(1)
        if self.how == "read outside":  # the third's output is nobody else's, the second's is
            two = F.relu(self.second(one))
            return self.fourth(self.third(two)).flatten(1) + two.mean((2, 3))[:, :1]
        if self.how == "another size":  # what is added has to be repeated
            return self.fourth(F.relu(self.second(one) + self.whole(one))).flatten(1)
        two = F.relu(self.second(one) + one)  # one value three times
        return self.fourth(F.relu(F.relu(self.third(two) + one) + one)).flatten(1)


@pytest.mark.parametrize("how", ["twice", "shared", "written over", "read outside", "another size", "three times"])
@pytest.mark.parametrize("busy", [0, 1 << 30])
def test_sums_and_readers_in_any_place(how, busy, monkeypatch, taken):
    """busy: all of it by torch's one go, or all of it by plain convolutions."""
    monkeypatch.setattr(convolutions, "BUSY", busy)
    torch.manual_seed(0)
    network, images = Shapes(how).eval().requires_grad_(False), torch.rand(5, 3, 8, 8)
    twin = twin_of(network, images[:2])
    assert _chains(twin.program)
    for found, expected in zip(_passed(twin, images), _passed(network, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool(taken) is (how != "another size")


def test_a_sum_with_float32_stays_float32(taken):
    """Under autocast the images of a chain come in float32, and so does what they are added to."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)

        def forward(self, images):
            return (self.second(F.relu(self.first(images))) + images).flatten(1)

    torch.manual_seed(0)
    twin, images = twin_of(Whole().eval(), torch.rand(2, 3, 32, 32), "bf16"), torch.rand(40, 3, 32, 32)
    assert _chains(twin.program) == [2]
    taken.clear()
    for found, expected in zip(_passed(twin, images), _passed(_step_by_step(twin), images), strict=True):
        assert torch.equal(found, expected)
    assert not taken


def test_the_weights_are_those_of_the_moment_and_trained_ones_are_trained(taken):
    images = _images("small-cnn", 5)
    twin = twin_of(_network("small-cnn"), images)
    before = _passed(twin, images)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.3)
    changed = _passed(twin, images)
    assert not torch.allclose(before[0], changed[0])
    for found, expected in zip(changed, _passed(twin.network, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    taken.clear()
    twin.requires_grad_(True)
    twin(images).sum().backward()
    assert not taken and all(parameter.grad is not None for parameter in twin.parameters())


def test_images_of_several_sizes_have_each_their_own_plan():
    twin = twin_of(_network("resnet18"), _images("resnet18", 2))
    for side in (32, 16, 32, 24):
        images = torch.rand(3, 3, side, side)
        for found, expected in zip(_passed(twin, images), _passed(twin.network, images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert twin(torch.rand(0, 3, 32, 32)).shape == (0, 10)


class Box:
    """What a saved tensor is put into: it can be watched."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def test_the_way_back_lets_go_of_what_was_made():
    twin, images = twin_of(_network("resnet18"), _images("resnet18", 2)), _images("resnet18", 2).requires_grad_()
    boxes = []

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor)
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        logits = twin(images)
    assert len(boxes) > 30 and all(box() is not None for box in boxes)
    torch.autograd.grad(logits.sum(), images)
    assert all(box() is None for box in boxes)  # the logits are still there


def test_logits_that_are_forgotten_let_go_of_their_graph():
    twin, images = twin_of(_network("resnet18"), _images("resnet18", 2)), _images("resnet18", 2).requires_grad_()
    gc.disable()
    try:
        logits = twin(images)
        seen = [logits.grad_fn]
        while type(seen[-1]).__name__ != "_ChainedBackward":
            seen += [node for node, _ in seen.pop().next_functions if node is not None]
        given = weakref.ref(seen.pop().given)
        seen.clear()
        assert given() is not None
        del logits
        assert given() is None
    finally:
        gc.enable()


def test_a_second_way_back_is_the_first_ones():
    twin, images = twin_of(_network("resnet18"), _images("resnet18", 2)), _images("resnet18", 3).requires_grad_()
    logits = twin(images)
    first = torch.autograd.grad(logits.sum(), images, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(logits.sum(), images)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logits.sum(), images)


def test_weights_written_over_before_the_way_back_are_noticed():
    twin, images = twin_of(_network("small-cnn"), _images("small-cnn", 3)), _images("small-cnn", 3).requires_grad_()
    logits = twin(images)
    convolution = next(part for part in twin.modules() if isinstance(part, nn.Conv2d))
    with torch.no_grad():
        convolution.weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logits.sum(), images)


def test_a_weight_put_in_place_of_a_rounded_one_is_used():
    images = _images("small-cnn", 40)
    twin = twin_of(_network("small-cnn"), images[:4], "bf16")
    before = _passed(twin, images)
    third = [part for part in twin.modules() if isinstance(part, nn.Conv2d)][2]
    third.weight = nn.Parameter(third.weight.detach() * 1.5, requires_grad=False)
    changed = _passed(twin, images)
    for found, expected in zip(changed, _passed(_step_by_step(twin), images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert not torch.allclose(before[0], changed[0], rtol=0.02, atol=0.02)
    weights = {name: value.detach().clone() for name, value in twin.named_parameters()}
    with torch.no_grad():
        found, expected = (torch.func.functional_call(one, weights, (images,)) for one in (twin, _step_by_step(twin)))
    assert torch.equal(found, expected)


def test_plans_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(chain_module, "KINDS", 3)
    twin = twin_of(_network("resnet18"), _images("resnet18", 2))
    for side in range(16, 26):
        twin(torch.rand(2, 3, side, side))
    assert twin.program is not None
    stretch = next(part for part in twin.program.parts if isinstance(part, Stretch))
    assert 0 < len(stretch.chain._plans) <= 3


def test_a_fault_says_what_happened_and_not_where():
    maps, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    sizes = ([1, 1], [1, 1], [1, 1], 1)
    with pytest.raises(RuntimeError) as caught:
        kernels.called(kernels.slope, 1, torch.rand(2, 5, 8, 8), maps, weight, weight, sizes)
    assert "TorchScript" not in str(caught.value) and len(str(caught.value)) > 10
    assert caught.value.__context__ is None  # it would hold what did not fit into memory


def test_workers_begin_at_once(monkeypatch):
    """Both come to functions that are not compiled yet."""
    monkeypatch.setattr(kernels, "_COMPILED", {})
    images = _images("small-cnn", 8)
    twin = twin_of(_network("small-cnn"), images)
    expected, found, start = _passed(_step_by_step(twin), images), {}, threading.Barrier(2)

    def work(number: int) -> None:
        own = again(twin, "fp32")
        start.wait()
        found[number] = _passed(own, images)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for made in found.values() for a, b in zip(made, expected, strict=True))
    assert len(found) == 2


def test_what_cannot_be_compiled_is_called_as_it_is(monkeypatch):
    monkeypatch.setattr(kernels, "_COMPILED", {})
    assert kernels.called(lambda *given: sum(given), 1, 2) == 3
