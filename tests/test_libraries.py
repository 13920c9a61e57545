"""What a library's attack is lent, and that nothing of it reaches whoever called."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from scl_defense.errors import UserError
from scl_defense.libraries import attempt, imported


@pytest.fixture
def network():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()


def asked(call, network, count=3, seed=0):
    images = torch.linspace(0, 1, count * 4).view(count, 1, 2, 2)
    labels = torch.zeros(count, dtype=torch.int32)
    made = attempt(call, network, images, labels, torch.Generator().manual_seed(seed))
    return images, labels, made


def test_the_library_gets_copies_that_it_may_ruin(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def ruin(lent, images, labels):
        assert not lent.training and not any(p.requires_grad for p in lent.parameters()) and torch.is_grad_enabled()
        assert labels.dtype == torch.int64 and images.is_contiguous()
        lent.train()(images)
        for parameter in lent.parameters():
            parameter.data.zero_()
        labels.fill_(1)
        return images.fill_(0.5)

    with torch.no_grad():
        images, labels, made = asked(ruin, network)
    assert (made == 0.5).all() and images.unique().numel() == 12 and labels.sum() == 0
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_what_it_draws_comes_from_the_generator_alone(network):
    def draw(lent, images, labels):
        return torch.rand(images.shape) / 3 + float(np.random.rand()) / 3 + random.random() / 3

    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again, other = (asked(draw, network, seed=seed)[2] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    with pytest.raises(ZeroDivisionError):
        asked(lambda *_: torch.rand(3) / 0 + 1 / 0, network)
    assert torch.equal(states[0], torch.random.get_rng_state())


def test_what_is_no_image_comes_back_as_the_image(network):
    def broken(lent, images, labels):
        images[0, 0, 0, 0] = torch.nan
        images[1] = 7
        return images.double().requires_grad_()

    images, _, made = asked(broken, network)
    assert torch.equal(made[0], images[0]) and (made[1] == 1).all() and torch.equal(made[2], images[2])
    assert made.dtype == torch.float32 and not made.requires_grad


def test_without_an_image_there_is_no_call(network):
    assert asked(lambda *_: 1 / 0, network, count=0)[2].shape == (0, 1, 2, 2)


def test_a_missing_library_is_one_line():
    with pytest.raises(UserError, match=r"no-such-thing is not usable here .*pip install no-such-thing") as caught:
        imported("no_such_thing", "no-such-thing")
    assert "\n" not in str(caught.value)
    assert imported("json", "json").dumps(1) == "1"
