"""Folded batch norm: the same function, wherever the weights have gone, and a network that comes back as it was."""

import copy
from contextlib import nullcontext

import pytest
import torch
from scl_defense_plugins.generators.contrastive_pgd_online import ContrastivePGDOnline
from scl_defense_plugins.generators.pgd import PGD
from scl_defense_plugins.models.preact_resnet18 import PreActResNet18
from scl_defense_plugins.models.resnet18 import ResNet18
from scl_defense_plugins.models.small_cnn import SmallCNN
from scl_defense_plugins.models.wide_resnet import WideResNet
from torch import nn

from scl_defense.folding import Folding, plan
from scl_defense.generation import generate
from scl_defense.models import Network
from scl_defense.passes import counted
from scl_defense.threat import ThreatModel
from scl_defense.types import Batch, Context

MODELS = {
    "small-cnn": SmallCNN(width=2),
    "resnet18": ResNet18(width=2),
    "preact-resnet18": PreActResNet18(width=2),
    "wide-resnet": WideResNet(depth=10, widen=1),
}
# preact-resnet18: the second norm of each block. wide-resnet: likewise; its stem is read by the shortcut, too.
FOLDED = {"small-cnn": 4, "resnet18": 20, "preact-resnet18": 8, "wide-resnet": 3}


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network_of(name, dual=False):
    torch.manual_seed(0)
    encoder = MODELS[name]((3, 16, 16))
    return Network(encoder, 5, [0.4] * 3, [0.3] * 3, (8, 6), dual=dual).double()


def trained(network):
    """After a few steps of SGD in train mode: statistics and weights are no longer those of the start."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for step in range(3):
        loss = nn.functional.cross_entropy(network(rand(16, 3, 16, 16, seed=step)), torch.arange(16) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


class Forked(nn.Module):
    """The convolution's output is read by its norm, and once more beside it."""

    feature_dim = 4

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images):
        maps = self.first(images)
        return self.last(self.second((self.norm(maps) + maps).relu())).mean((2, 3))


class Noisy(nn.Module):
    """Draws in eval mode, too."""

    feature_dim = 4

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, images):
        return torch.dropout(self.norm(self.first(images)), 0.5, True).mean((2, 3))


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_of_the_untrained_network_holds_for_the_trained_one(name):
    network, images = network_of(name), rand(6, 3, 16, 16)
    folding = plan(network, images, Network.features)
    assert len(folding.pairs) == FOLDED[name]
    trained(network).eval().requires_grad_(False)
    calls = []
    for norm, where in ((part, name) for name, part in network.named_modules() if type(part) is nn.BatchNorm2d):
        norm.register_forward_hook(lambda *_, where=where: calls.append(where))

    def outputs():
        points = images.clone().requires_grad_()
        embed, logits = network.embed(points), network.logits(points)
        (gradient,) = torch.autograd.grad(embed.square().sum() + logits.square().sum(), points)
        return embed.detach(), logits.detach(), gradient

    expected, seen = outputs(), set(calls)
    calls.clear()
    with folding.folded(network):
        found = outputs()
    assert set(calls) == seen - {norm for _, norm in folding.pairs}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_network_comes_back(error):
    network = trained(network_of("resnet18", dual=True))
    folding = plan(network, rand(4, 3, 16, 16))
    before, objects = copy.deepcopy(network.state_dict()), dict(network.named_parameters())
    names = [name for name, _ in network.named_modules()]
    network.eval()
    with pytest.raises(error) if error else nullcontext(), folding.folded(network, "bf16"):
        assert network.encoder.conv1.weight.dtype == torch.bfloat16
        if error:
            raise error
    assert names == [name for name, _ in network.named_modules()]
    assert all(parameter is objects[name] for name, parameter in network.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_what_is_read_elsewhere_too_is_not_folded():
    network = Network(Forked(), 5, [0.4] * 3, [0.3] * 3)
    before = copy.deepcopy(network.state_dict())
    assert plan(network, torch.rand(4, 3, 8, 8)).pairs == (("encoder.second", "encoder.last"),)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_network_that_draws_in_eval_mode_or_cannot_be_copied_is_left_alone():
    assert plan(Network(Noisy(), 5, [0.4] * 3, [0.3] * 3), torch.rand(4, 3, 8, 8)) == Folding()
    network = network_of("small-cnn")
    network.handle = (number for number in range(3))  # generators cannot be copied
    assert plan(network, rand(4, 3, 16, 16)) == Folding()


@pytest.mark.parametrize(
    ("generator", "forwards"), [(PGD(steps=4), 4), (ContrastivePGDOnline(steps=4), 5)], ids=["pgd", "online"]
)
def test_an_attack_costs_its_steps_and_its_references_and_is_the_same(generator, forwards):
    """K passes forward and back, one more forward for fixed references; no gradient of a parameter; same examples."""
    network, views, labels = trained(network_of("resnet18")), rand(2, 8, 3, 16, 16), torch.arange(8) % 5
    folding = plan(network, views[0], Network.features)
    batch = Batch(views, labels, views[0], torch.arange(8))
    made = []
    for choice in (None, folding):
        context = Context(ThreatModel("l2", "0.5"), torch.Generator().manual_seed(1), views[0], generator="it")
        before = copy.deepcopy(network.state_dict())
        network.zero_grad()
        with counted(network.encoder) as passes:
            made.append(generate(generator, batch, context, network=network, folding=choice))
        assert (passes.forwards, passes.backwards) == (8 * forwards, 8 * 4)
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    # context.embed and context.logits are float32: what differs is their rounding.
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-4)
    assert (made[0] - views[:1]).abs().max() > 0.01
