"""A network written down as a program computes what its own forward pass does."""

import threading

import pytest
import torch
import torch.nn.functional as F
from scl_defense_benchmarks import convolutions
from scl_defense_benchmarks.convolutions import convolved, freeze_convolutions
from scl_defense_benchmarks.pooling import averaged, is_tiling
from scl_defense_benchmarks.program import program_of
from scl_defense_benchmarks.twin import again, twin_of
from torch import nn


class Block(nn.Module):
    """A residual block; ``kind`` is how its ReLU and its sum are written."""

    def __init__(self, kind, width=8):
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.relu, self.drop = nn.ReLU(inplace=kind == "in place"), nn.Dropout(0.5)

    def forward(self, maps):
        if self.kind == "functions":
            return F.relu(maps + self.second(torch.relu(self.first(maps))))
        if self.kind == "methods":
            return self.second(self.first(maps).relu()).add(maps).relu_()
        if self.kind == "in place":
            out = self.second(self.drop(self.relu(self.first(maps))))
            out += maps
            return self.relu(out)
        if self.kind == "read twice":
            out = self.first(maps)
            return F.relu(out) + self.second(out)
        if self.kind == "its own input":
            return F.relu(self.first(maps) + maps)
        if self.kind == "two convolutions":
            return F.relu(self.first(maps) + self.second(maps))
        if self.kind == "the same one twice":
            return F.relu(self.first(maps) + self.first(self.first(maps)))
        if self.kind == "written over between":
            copied = maps.clone()
            out = self.first(copied)
            copied.mul_(0.5)
            return F.relu(out) + copied
        if self.kind == "a number":
            return F.relu(self.first(maps) + 1)
        assert self.kind == "a vector"
        return F.relu(self.first(maps) + maps[:, :, :1, :1])


KINDS = {
    "functions": 2, "methods": 2, "in place": 2, "read twice": 1, "its own input": 1, "two convolutions": 1,
    "the same one twice": 1, "written over between": 0, "a number": 0, "a vector": 1,
}  # fmt: skip


class Whole(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)  # no buffer, as in many networks of strangers
        self.stem, self.norm, self.block = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), Block(kind)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(8 * 16, 5)

    def forward(self, images, features=False):
        maps = self.pool(self.block(F.relu(self.norm(self.stem(images - self.mean)))))
        flat = maps.flatten(1)
        return flat if features else self.head(flat)


def made(kind):
    torch.manual_seed(0)
    network = Whole(kind)
    network.norm.running_mean.uniform_(-0.5, 0.5)
    return network.eval().requires_grad_(False)


def logits_and_slope(network, images):
    points = images.clone().requires_grad_()
    logits = network(points)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), points)[0]


@pytest.fixture(autouse=True)
def _busy(monkeypatch):
    monkeypatch.setattr(convolutions, "BUSY", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_network_does(kind):
    network, images = made(kind), torch.rand(6, 3, 8, 8)
    twin = twin_of(network, images[:4])
    assert twin.program is not None
    together = [step.node.name for step in twin.program.steps if step.call is convolved and "other" in step.named]
    assert len(together) == 1 + KINDS[kind]  # with the first layer's
    if kind != "written over between":  # what autograd forbids
        for found, expected in zip(logits_and_slope(twin, images), logits_and_slope(network, images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    before = images.clone()
    with torch.no_grad():
        torch.testing.assert_close(twin(images), network(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again(twin, "fp32")(images), network(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(images, before)


def test_in_bfloat16_its_logits_are_the_networks():
    for kind in KINDS:
        images = torch.rand(6, 3, 8, 8)
        twin = twin_of(made(kind), images, "bf16")
        (logits, slope), twin.program = logits_and_slope(twin, images), None
        expected, exact = logits_and_slope(twin, images)
        assert torch.equal(logits, expected)
        torch.testing.assert_close(slope, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_whoever_hooks_a_layer_is_called(hook):
    images = torch.rand(4, 3, 8, 8)
    twin = twin_of(made("functions"), images)
    assert twin.program is not None
    calls = []
    handle = getattr(twin.network.block.first, hook)(lambda *given: calls.append(1) and None)
    logits_and_slope(twin, images)
    assert calls
    handle.remove()
    assert calls and logits_and_slope(twin, images) and len(calls) == 1


class Rounded(torch.autograd.Function):
    """Rounds, and lets gradients through: what many defences do, and attacks on them rely on."""

    @staticmethod
    def forward(context, maps):
        return torch.round(maps * 8) / 8

    @staticmethod
    def backward(context, gradient):
        return gradient


class Looks(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.act = how, nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        if how == "its own forward":
            self.act.forward = F.softplus

    def forward(self, images):
        maps = F.relu(self.layer(images))
        if self.how == "values" and maps.sum() > 1e9:
            maps = maps * 2
        if self.how == "sizes":
            maps = maps * len(images)
        if self.how == "straight through":
            maps = Rounded.apply(maps)
        if self.how == "straight through, by hand":
            with torch.no_grad():
                away = torch.round(maps * 8) / 8 - maps
            maps = maps + away
        if self.how == "its own forward":
            maps = self.act(maps - 0.2)
        if self.how == "kept":
            self.kept = maps
        if self.how == "blocked":
            with torch.no_grad():
                share = maps.sigmoid()
            maps = maps * share
        if self.how == "nowhere":
            maps = maps + torch.zeros(4, 1, 1)
        return maps.mean((2, 3))


@pytest.mark.parametrize("how", [
    "values", "sizes", "nowhere", "blocked", "straight through", "straight through, by hand", "its own forward", "kept",
])  # fmt: skip
def test_what_cannot_be_written_down_is_passed_as_it_is(how):
    network, images = Looks(how).eval(), torch.rand(4, 3, 8, 8)
    twin = twin_of(network, images)
    assert twin.program is None
    for found, expected in zip(logits_and_slope(twin, images), logits_and_slope(network, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if how == "kept":
        assert torch.is_tensor(twin.network.kept)


CHANGES = {
    "another layer": lambda network: setattr(network, "pool", nn.MaxPool2d(2)),
    "training": lambda network: network.block.drop.train(),
    "a forward of its own": lambda network: setattr(network.pool, "forward", lambda maps: F.max_pool2d(maps, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_an_attack_changes_in_its_twin_is_passed(change):
    images = torch.rand(6, 3, 8, 8)
    twin = twin_of(made("in place"), images)
    with torch.no_grad():
        before = twin(images)
        CHANGES[change](twin.network)
        torch.manual_seed(0)
        found = twin(images)
        torch.manual_seed(0)
        assert torch.equal(found, twin.network(images.contiguous(memory_format=torch.channels_last)))
    assert not torch.allclose(found, before)


def test_what_is_written_into_its_weights_is_passed_by_a_copy():
    images = torch.rand(6, 3, 8, 8)
    twin = twin_of(made("functions"), images)
    with torch.no_grad():
        twin(images)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        copied = again(twin, "fp32")
        found, copied.program = copied(images), None
        torch.testing.assert_close(found, copied(images), rtol=1e-4, atol=1e-5)


def test_what_drops_nothing_may_be_read_again():
    """In eval mode dropout hands on its input itself: a sum must not be written over it."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, images):
            maps = F.relu(self.first(images))
            dropped = F.dropout(maps, 0.3, self.training)
            return F.relu(self.second(dropped) + maps).mean((2, 3))

    network, images = Twice().eval(), torch.rand(70, 3, 4, 4)
    twin = twin_of(network, images[:4])
    assert twin.program is not None
    with torch.no_grad():
        torch.testing.assert_close(twin(images), network(images), rtol=1e-4, atol=1e-5)


def test_a_network_that_draws_is_not_written_down():
    images = torch.rand(4, 3, 8, 8)
    assert twin_of(made("functions"), images, steady=False).program is None
    assert program_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) is None  # nothing to gain


def test_writing_down_disturbs_no_other_thread():
    """torch's own writer replaces ``nn.Module.__call__`` for the whole process while it works."""
    network, other, images = made("functions"), made("in place"), torch.rand(2, 3, 8, 8)
    freeze_convolutions(network)
    expected, failures, over = other(images), [], threading.Event()

    def passing():
        while not over.is_set():
            try:
                assert torch.equal(other(images), expected)
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=passing)
    thread.start()
    programs = [program_of(network) for _ in range(30)]
    over.set()
    thread.join()
    assert not failures and all(programs)
    assert "forward" not in network.stem.__dict__


def test_its_weights_are_those_of_the_moment():
    images = torch.rand(4, 3, 8, 8)
    twin = twin_of(made("functions"), images)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        found, program = twin(images), twin.program
        twin.program = None
        torch.testing.assert_close(found, twin(images), rtol=1e-4, atol=1e-5)
        assert program is not None


@pytest.mark.parametrize(("window", "side"), [(2, 8), ((2, 4), 8), (8, 8), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_averages_gradient_is_torchs(window, side, dtype):
    maps = torch.randn(3, 5, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn_like(F.avg_pool2d(maps, window))
    found = []
    for pool in (averaged, F.avg_pool2d):
        points = maps.clone().requires_grad_()
        found.append((pool(points, window), torch.autograd.grad((pool(points, window) * weight).sum(), points)[0]))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_which_averages_tile():
    tiling = [nn.AvgPool2d(2), nn.AvgPool2d((2, 3)), nn.AvgPool2d(4, 4)]
    others = [nn.AvgPool2d(3, 2), nn.AvgPool2d(2, padding=1), nn.AvgPool2d(2, ceil_mode=True)]
    assert all(map(is_tiling, tiling)) and not any(map(is_tiling, [*others, nn.AvgPool2d(2, divisor_override=3)]))
