"""A network that was lent out must come back as it was, whatever was done to it and however it ended."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from scl_defense.guard import frozen, global_random_state


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm that stays in eval mode, as fine-tuning code does it."""

    def train(self, mode=True):
        return super().train(False)


class Counting(nn.Module):
    """Buffers that are replaced, not written into: running averages are often coded like this."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("later", None)

    def forward(self, images):
        self.seen = self.seen + len(images)
        self.later = torch.ones(2)
        return images


def network():
    """Parts in train and eval mode, frozen parameters, and .grad present on some."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), FrozenNorm(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5)
    )
    made.train()
    made[1].eval()
    made[0].bias.requires_grad_(False)
    made[0].weight.grad = torch.randn_like(made[0].weight)
    made[5].bias.grad = torch.randn_like(made[5].bias)
    return made


def snapshot(module):
    return {
        "modes": {name: part.training for name, part in module.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "grad objects": {name: id(p.grad) if p.grad is not None else None for name, p in module.named_parameters()},
        "grads": {name: copy.deepcopy(p.grad) for name, p in module.named_parameters()},
        "state": copy.deepcopy(module.state_dict()),
    }


def assert_unchanged(module, before):
    after = snapshot(module)
    for part in ("modes", "requires_grad", "grad objects"):
        assert after[part] == before[part], part
    for part in ("grads", "state"):
        assert after[part].keys() == before[part].keys()
        for name, value in before[part].items():
            same = after[part][name] is None if value is None else torch.equal(after[part][name], value)
            assert same, f"{part}: {name}"


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def use(module, images):
    """A forward pass in the mode given, and a backward pass to the images."""
    images = images.clone().requires_grad_()
    module(images).square().sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [False, True])
def test_use_leaves_no_trace(training, images):
    module = network()
    before = snapshot(module)
    with frozen(module, training=training):
        modes = {name: part.training for name, part in module.named_modules() if not isinstance(part, FrozenNorm)}
        assert set(modes.values()) == {training}
        assert not module[2].training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        use(module, images)
        moved = not torch.equal(module[1].running_mean, before["state"]["1.running_mean"])
        assert moved is training  # in train mode the statistics do move while inside
        assert int(module[1].num_batches_tracked) == training
    assert_unchanged(module, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_leaves_no_trace_and_gets_out(error, images):
    module = network()
    before = snapshot(module)
    with pytest.raises(error), frozen(module, training=True):
        use(module, images)
        raise error
    assert_unchanged(module, before)


def test_each_module_keeps_its_own_mode_whatever_its_train_method_does(images):
    """A part that ignores ``train()`` and was switched by hand must be switched back by hand."""
    module = network()
    module[2].training = True
    before = snapshot(module)
    with frozen(module):
        use(module, images)
    assert module[2].training
    assert_unchanged(module, before)


def test_vandalism_inside_is_undone(images):
    """What foreign attack code has been seen to do."""
    module = network()
    before = snapshot(module)
    with frozen(module):
        module.train()
        module.zero_grad(set_to_none=True)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        use(module, images)  # fills .grad with new objects
        module[1].running_var.fill_(7)
        module[1].num_batches_tracked += 5
    assert_unchanged(module, before)


def test_gradients_changed_in_place_are_restored():
    module = network()
    before = snapshot(module)
    with frozen(module):
        module.zero_grad(set_to_none=False)
        module[5].bias.grad.add_(3)
        module[0].weight.grad = torch.ones_like(module[0].weight)
    assert_unchanged(module, before)


def test_buffers_that_are_replaced_are_restored(images):
    module = nn.Sequential(Counting(), Counting())
    original = module[0].seen
    with frozen(module):
        module(images)
        assert module[0].seen == 6
    assert module[0].seen == 0 and module[1].seen == 0
    assert module[0].later is None
    assert module[0].seen is original
    assert set(module.state_dict()) == {"0.seen", "1.seen"}


def test_several_modules_and_shared_parts(images):
    first, second = network(), network()
    second[0] = first[0]
    before = snapshot(first), snapshot(second)
    with frozen(first, second, first[0], training=True):
        use(first, images)
        use(second, images)
    assert_unchanged(first, before[0])
    assert_unchanged(second, before[1])


def test_nesting(images):
    module = network()
    before = snapshot(module)
    with frozen(module, training=True):
        with frozen(module):
            assert not any(part.training for part in module.modules())
            use(module, images)
        assert module[1].training and not module[5].weight.requires_grad
    assert_unchanged(module, before)


def test_training_goes_on_as_if_nothing_had_been(images):
    """A step of SGD after lending equals a step without it."""
    lent, kept = network(), network()
    for module in (lent, kept):
        module[3].p = 0.0
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            if module is lent:
                with frozen(module, training=True):
                    use(module, images)
            optimizer.zero_grad()
            module(images).square().mean().backward()
            optimizer.step()
    for left, right in zip(lent.state_dict().values(), kept.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_nothing_to_freeze():
    with frozen():
        pass
    with frozen(nn.Identity()):
        pass


# -- global randomness


def states():
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_global_generators_come_back(error):
    def draw():
        with global_random_state():
            torch.manual_seed(1)
            torch.rand(3)
            np.random.seed(2)
            np.random.random(3)
            random.seed(3)
            random.gauss(0, 1)  # leaves a second number waiting
            if error:
                raise error

    torch.rand(1), np.random.standard_normal(), random.gauss(0, 1)
    before = states()
    if error:
        with pytest.raises(error):
            draw()
    else:
        draw()
    assert states() == before


def test_draws_inside_do_change_the_state_inside():
    with global_random_state():
        before = states()
        torch.rand(1), np.random.random(), random.random()
        after = states()
    assert all(left != right for left, right in zip(before, after, strict=True))
