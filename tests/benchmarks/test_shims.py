"""The faults of the libraries' Carlini-Wagner, shown on the raw libraries, and gone through the adapters."""

import pytest
import torch
import torchattacks
from scl_defense_benchmarks import art_adapter, torchattacks_adapter
from scl_defense_benchmarks.shims import (
    BOX,
    WALL,
    LibraryNetwork,
    OwnLogits,
    PositiveLogits,
    UnitGradient,
    UnitSpread,
    check_logits,
    finite_or,
    into_box,
    nearest_wrong,
    off_the_walls,
    smallest_success,
)
from torch import nn
from victim_networks import LogSoftmax, Shifted, accuracy

from scl_defense.errors import UserError
from scl_defense.guard import frozen
from scl_defense.threat import ThreatModel

THREAT = ThreatModel("l2", "1")


def raw_torchattacks(network, images, labels):
    with frozen(network):
        return torchattacks.CW(network, c=100, steps=200)(images, labels).detach()


def raw_art(network, images, labels, rng):
    """ART as its users call it: our wrapping of the network, but no margin to the walls."""

    def build(estimator):
        return art_adapter.CarliniL2Method(estimator, batch_size=len(images), verbose=False)

    return art_adapter._call(build, network, images, labels, rng)


@pytest.fixture
def grey(victims):
    """Images without a saturated pixel, so that nothing but the logits is at fault."""
    return off_the_walls(victims[0][:12]), victims[1][:12]


@pytest.mark.parametrize("dress", [lambda net: Shifted(net, -100.0), LogSoftmax], ids=["logits-100", "log_softmax"])
def test_negative_logits_blind_torchattacks_and_not_the_adapter(network, grey, rng, dress):
    images, labels = grey
    same = dress(network).eval()
    assert accuracy(same, images, labels) == 1
    positive = Shifted(network, 50.0).eval()  # the control: the same network again
    assert accuracy(positive, raw_torchattacks(positive, images, labels), labels) == 0
    raw = raw_torchattacks(same, images, labels)
    # The fault: the same network, dressed otherwise, is 100 % "robust" and nothing has moved.
    assert accuracy(same, raw, labels) == 1
    assert (raw - images).abs().max() < 1e-6
    made = torchattacks_adapter.CW(c=(100.0,))(same, images, labels, THREAT, rng())
    assert accuracy(same, made, labels) == 0


@pytest.fixture
def black_and_white(network, victims):
    images = (victims[0] > 0.5).float()
    with torch.no_grad():
        return images, network(images).argmax(1)


def test_saturated_pixels_blind_torchattacks_and_not_the_adapter(network, black_and_white, rng):
    images, labels = black_and_white
    raw = raw_torchattacks(network, images, labels)
    assert accuracy(network, raw, labels) == 1
    assert (raw - images).abs().max() == 0
    made = torchattacks_adapter.CW()(network, images, labels, THREAT, rng())
    assert accuracy(network, made, labels) == 0
    assert float(made.min()) >= 0 and float(made.max()) <= 1
    assert THREAT.distance(images, made).max() < 3  # and by small perturbations: 8x8 images differ by up to 8


@pytest.mark.slow
def test_saturated_pixels_blind_art_and_not_the_adapter(network, black_and_white, rng):
    images, labels = (part[:8] for part in black_and_white)
    raw = raw_art(network, images, labels, rng())
    assert accuracy(network, raw, labels) == 1
    assert (raw - images).abs().max() < 1e-5
    made = art_adapter.CW()(network, images, labels, THREAT, rng())
    assert accuracy(network, made, labels) == 0
    assert THREAT.distance(images, made).max() < 3


def test_positive_logits_change_no_decision_softmax_or_gradient_of_a_margin(network, victims):
    images, labels = victims[0].clone().requires_grad_(), victims[1]
    shifted = Shifted(network, -50.0).eval()
    plain, positive = shifted(images), PositiveLogits(shifted, images.device)(images)
    assert float(positive.detach().min()) == pytest.approx(1)
    torch.testing.assert_close(positive.softmax(1), plain.softmax(1), atol=1e-5, rtol=0)
    assert torch.equal(positive.argmax(1), plain.argmax(1))

    def margin(logits):
        return (logits[:, 3] - logits.gather(1, labels[:, None]).squeeze(1)).sum()

    gradients = [torch.autograd.grad(margin(logits), images, retain_graph=True)[0] for logits in (plain, positive)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_the_library_network_casts_and_is_no_sequential(network, victims):
    wrapped = LibraryNetwork(nn.Sequential(network), victims[0].device)
    assert not isinstance(wrapped, nn.Sequential)
    assert torch.equal(wrapped(victims[0].double()), network(victims[0]))
    assert next(wrapped.parameters()).numel() == 0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ((torch.zeros(2, 3), None), "returns a tuple; an attack needs one tensor"),
        ({"logits": torch.zeros(2, 3)}, "returns a dict"),
        (torch.zeros(2), r"float32 \(2,\) for 2 images"),
        (torch.zeros(2, 1), r"K >= 2"),
        (torch.zeros(3, 4), r"\(3, 4\) for 2 images"),
        (torch.zeros(2, 4, dtype=torch.int64), "int64"),
    ],
)
def test_what_is_no_logits(output, message):
    with pytest.raises(UserError, match=message):
        check_logits(output, 2)


def test_into_the_box_leaves_what_is_inside_bit_for_bit(rng):
    images = torch.rand(5, 1, 6, 6, generator=rng(1))
    examples = torch.randn(5, 1, 6, 6, generator=rng(2))
    boxed = into_box(images, examples)
    torch.testing.assert_close(boxed, examples.clamp(0, 1), atol=1e-6, rtol=0)
    inside = (examples >= 0) & (examples <= 1)
    assert inside.any() and torch.equal(boxed[inside], examples[inside])
    assert BOX.contains(images, boxed).all()


class Threshold(nn.Module):
    """Class 1 where the mean of the image is above 0.5."""

    def forward(self, images):
        score = images.flatten(1).mean(1) - 0.5
        return torch.stack([-score, score], dim=1)


def test_the_smallest_success_is_kept_and_carried_over_to_the_image():
    images, labels = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)
    start = off_the_walls(images)
    assert start.min() == pytest.approx(WALL)
    big, small = start + 0.9, start + 0.6
    far = start.clone()
    far[:, :, 0], far[:, :, 1, 0] = 1.5, 0.5  # out of the box: judged at 1; the last pixel is left alone
    failed = start + 0.1
    broken = torch.full_like(start, torch.nan)
    candidates = [
        torch.stack([big[0], small[1], failed[2], broken[3]]),
        torch.stack([small[0], big[1], broken[2], far[3]]),
    ]
    best = smallest_success(Threshold(), images, labels, candidates)
    torch.testing.assert_close(best[0], torch.full((1, 2, 2), 0.6))  # without the 0.01 that the start was off
    torch.testing.assert_close(best[1], torch.full((1, 2, 2), 0.6))
    assert torch.equal(best[2], images[2])  # no success: the image itself
    assert bool((best[3] >= 0).all() and (best[3] <= 1).all())
    assert best[3, 0, 1, 1] == 0  # the pixel that did not move is back on its wall
    assert (Threshold()(best).argmax(1) != labels).tolist() == [True, True, False, True]


def test_an_example_that_only_fools_off_the_walls_is_still_kept():
    """Carried over to the image it loses 0.01 a pixel and with it the wrong label; as it was it fools."""
    images, labels = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    candidate = torch.full_like(images, 0.505)
    best = smallest_success(Threshold(), images, labels, [candidate])
    assert torch.equal(best, candidate)


def test_unit_spread_moves_no_linearised_boundary(network, victims):
    images, labels = victims[0].clone().requires_grad_(), victims[1]
    with frozen(network):
        plain, spread = network(images), UnitSpread(network, images.device)(images)
        assert torch.equal(plain.argmax(1), spread.argmax(1))
        torch.testing.assert_close((spread.amax(1) - spread.amin(1)).detach(), torch.ones(len(images)))
        # The step to the boundary of class 3: gap over slope, the same in either scale.
        steps = []
        for logits in (plain, spread):
            gap = logits[:, 3] - logits.gather(1, labels[:, None]).squeeze(1)
            slope = torch.autograd.grad(gap.sum(), images)[0]
            steps.append(gap.detach()[labels != 3] / slope.flatten(1).norm(dim=1)[labels != 3])
    torch.testing.assert_close(*steps, atol=1e-4, rtol=1e-4)


def test_unit_gradient_remembers_which_images_had_a_usable_gradient():
    class Slopes(nn.Module):
        def forward(self, images):
            slopes = torch.tensor([1.0, 0.0, 1e-30, torch.inf])
            return images.flatten(1)[:, :2] * slopes[:, None]

    watched = UnitGradient(Slopes(), torch.device("cpu"))
    watched.watch(4)
    images = torch.ones(4, 1, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(watched(images)[:, 0].sum(), images)
    assert watched.seen.tolist() == [True, False, True, False]
    assert gradient[:3].flatten(1).amax(1).tolist() == [1, 0, 1]
    watched.watch(4)
    assert not watched.seen.any()


def test_square_is_handed_a_copy_of_the_logits():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = torch.zeros(2, 3)

        def forward(self, images):
            return self.kept

    network = Own()
    OwnLogits(network, torch.device("cpu"))(torch.zeros(2, 1, 2, 2)).fill_(1)
    assert (network.kept == 0).all()


def test_the_nearest_wrong_example_is_found_by_the_norm_that_was_asked_for():
    images, labels = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    flat = torch.full_like(images, 0.7)  # Linf 0.7, L2 1.4
    peaked = torch.tensor([[[[1.0, 1.0], [0.01, 0.01]]]])  # Linf 1, L2 1.414, L1 2.02 against 2.8
    one_pixel = torch.tensor([[[[5.0, 0.0], [0.0, 0.0]]]])  # in the box it is right
    for norm, wanted in (("linf", flat), ("l2", flat), ("l1", peaked)):
        best, found = nearest_wrong(Threshold(), images, labels, [one_pixel, peaked, flat], norm)
        assert found.all() and torch.equal(best, wanted), norm
    best, found = nearest_wrong(Threshold(), images, labels, [one_pixel, flat * torch.nan], "l2")
    assert not found.any() and torch.equal(best, images)


def test_what_is_not_finite_becomes_the_image():
    images, examples = torch.zeros(3, 1, 1, 2), torch.ones(3, 1, 1, 2)
    examples[1, 0, 0, 1], examples[2, 0, 0, 0] = torch.nan, torch.inf
    assert finite_or(images, examples).flatten(1).tolist() == [[1, 1], [0, 0], [0, 0]]
