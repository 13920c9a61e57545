"""Passes over what has changed, and the search by squares that is our own rewriting of a library's."""

import pytest
import torch
import torch.nn.functional as F
from scl_defense_benchmarks import patches as module
from scl_defense_benchmarks.autoattack import AutoAttack
from scl_defense_benchmarks.patches import Patches
from scl_defense_benchmarks.torchattacks_adapter import Square, _Square
from scl_defense_benchmarks.twin import twin_of
from torch import nn

from scl_defense.models import Network
from scl_defense.plugins import default_host
from scl_defense.threat import ThreatModel


class Odd(nn.Module):
    """What the project's own networks do not have: other strides, kernels and paddings, a sum across, a large image."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.first = nn.Conv2d(channels, 5, 5, stride=1, padding=1)
        self.second, self.third = nn.Conv2d(5, 6, (3, 1), stride=(2, 1)), nn.Conv2d(6, 6, 3, padding=1)
        self.short, self.act = nn.Conv2d(5, 6, (3, 1), stride=(2, 1)), nn.LeakyReLU(0.1)
        self.pool, self.head = nn.MaxPool2d(2), nn.LazyLinear(4)

    def forward(self, images):
        maps = self.act(self.first(images * self.scale - 0.3))
        maps = F.relu(self.third(self.second(maps)) + self.short(maps))
        return self.head(self.pool(maps).flatten(1))


class Gated(nn.Module):
    """What weighs its channels by a mean over the whole map, and its images by their own: no constants."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.gate = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, images):
        maps = F.relu(self.first(images - images.mean((1, 2, 3), keepdim=True)))
        maps = maps * torch.sigmoid(3 * self.gate(F.adaptive_avg_pool2d(maps, 1)))
        return self.head(F.relu(self.second(maps)).amax((2, 3)))


def network_of(name, shape):
    torch.manual_seed(0)
    if name == "gated":
        return Gated(shape[0]).eval().requires_grad_(False)
    if name == "odd":
        network = Odd(shape[0])
        network(torch.rand(2, *shape))
    else:
        network = Network(default_host()["model"].get(name)(width=4)(shape), 5, [0.4] * shape[0], [0.3] * shape[0])
        for _ in range(10):
            network(torch.rand(8, *shape))
    return network.eval().requires_grad_(False)


FLAT = [("small-cnn", (1, 8, 40)), ("small-cnn", (3, 20, 100))]  # a first square larger than a side
CASES = [("gated", (3, 16, 16)), ("small-cnn", (1, 28, 28)), ("resnet18", (3, 32, 32)), ("odd", (2, 24, 19))]


def patches_of(name, shape):
    twin = twin_of(network_of(name, shape), torch.rand(4, *shape))
    assert twin.program is not None
    return twin.program, Patches(twin.program)


def windows(shape, count, rng):
    """Of every size, and each of them at the edges too."""
    for number in range(count):
        height, width = (int(torch.randint(1, 7, (), generator=rng)) for _ in range(2))
        last = shape[1] - height, shape[2] - width
        top, left = (int(torch.randint(0, most + 1, (), generator=rng)) for most in last)
        yield (0 if number % 4 == 0 else top), (last[1] if number % 4 == 1 else left), height, width


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("said", [False, True])
@torch.no_grad()
def test_what_a_window_reaches_is_all_that_changes(name, shape, said):
    program, patches = patches_of(name, shape)
    rng = torch.Generator().manual_seed(1)
    known = torch.rand(9, *shape, generator=rng)
    torch.testing.assert_close(patches(known), program(known))
    patches.settle(torch.ones(9, dtype=torch.bool), torch.ones(9, dtype=torch.bool))
    partly = 0
    for top, left, height, width in windows(shape, 60, rng):
        images = known.clone()
        images[:, :, top : top + height, left : left + width] = torch.rand(
            len(known), shape[0], height, width, generator=rng
        )
        patches.expected = (top, left, height, width) if said else None
        torch.testing.assert_close(patches(images), program(images), rtol=1e-5, atol=1e-5)
        partly += len(patches._asked) > 1 or name == "gated"
        taken = torch.rand(len(known), generator=rng) < 0.3
        staying = torch.rand(len(known), generator=rng) < (0.5 if len(known) > 4 and top % 5 == 0 else 2)
        patches.settle(taken, staying)
        known = torch.where(taken.view(-1, 1, 1, 1), images, known)[staying]
        assert torch.equal(patches.known[program.images], known)
    assert partly > 40 and 2 <= len(known) < 9
    for node, value in patches.known.items():  # what is remembered is what the images give
        fresh = Patches(program)
        fresh(known)
        torch.testing.assert_close(value, fresh.known[node], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_images_and_other_numbers_of_them_are_passed_whole():
    program, patches = patches_of(*CASES[1])
    for count in (6, 6, 3, 7):
        images = torch.rand(count, 1, 28, 28)
        torch.testing.assert_close(patches(images), program(images))
        torch.testing.assert_close(patches(images), program(images))  # nothing has changed
    patches(images[:0])


@torch.no_grad()
def test_what_would_take_too_much_memory_is_not_remembered(monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 1000)
    program, patches = patches_of(*CASES[1])
    images = torch.rand(6, 1, 28, 28)
    for _ in range(2):
        assert torch.equal(patches(images), program(images)) and not patches.known
    patches.settle(torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool))


def fallible(network, shape, count=24):
    images = torch.rand(count, *shape)
    with torch.no_grad():
        return images, network(images).argmax(1)


@pytest.mark.parametrize(("name", "shape"), [*CASES, *FLAT])
@pytest.mark.parametrize("queries", [60, 5000])
def test_a_search_by_squares_is_torchattacks_own(name, shape, queries):
    network = network_of(name, shape)
    images, labels = fallible(network, shape)
    steps = min(queries, 60)
    found = {}
    for kind in ("theirs", "ours", "remembering"):
        twin = twin_of(network, images[:4])
        twin.program = twin.program if kind == "remembering" else None
        attack = _Square(twin, norm="Linf", eps=0.05, n_queries=steps, resc_schedule=queries < 5000)
        torch.manual_seed(3)
        with twin.remembering() as attack.patches:
            attack.init_hyperparam(images)
            theirs = lambda attack=attack: attack.attack_single_run(images, labels)[1]  # noqa: E731
            found[kind] = theirs() if kind == "theirs" else attack.perturb(images, labels)
    assert torch.equal(found["ours"], found["theirs"])
    torch.testing.assert_close(found["remembering"], found["theirs"])
    with torch.no_grad():
        wrong = (network(found["theirs"]).argmax(1) != labels).sum()
    moved = (found["theirs"] != images).flatten(1).any(1)
    assert moved.all() and (name in ("odd", "gated") or wrong > 0)


def test_a_search_remembers_in_a_twins_hands_alone(monkeypatch):
    network = network_of(*CASES[1])
    images, labels = fallible(network, (1, 28, 28))
    ball, made = ThreatModel("linf", "0.05"), []
    passed, whole = [], Patches.__call__
    monkeypatch.setattr(Patches, "__call__", lambda self, images: passed.append(len(images)) or whole(self, images))
    for remembers in (True, False):
        twin = twin_of(network, images[:4])
        twin.program = twin.program if remembers else None
        made.append(Square(queries=50)(twin, images, labels, ball, torch.Generator().manual_seed(0)))
        assert bool(passed) is remembers and twin.patches is None
        passed.clear()
    torch.testing.assert_close(made[0], made[1])
    twin = twin_of(network, images[:4])
    Square(queries=5)(twin, images, labels, ThreatModel("l2", "0.5"), torch.Generator().manual_seed(0))
    assert not passed  # under L2 every square rescales the whole image
    tiny = ThreatModel("linf", "0.0001")  # so that some stand until the squares
    AutoAttack(steps=2, targets=1, queries=5)(twin, images, labels, tiny, torch.Generator().manual_seed(0))
    assert passed and twin.patches is None
