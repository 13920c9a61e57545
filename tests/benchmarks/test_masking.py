"""What must not pass for robustness: blind gradients, tiny gradients, and a network that was tampered with."""

import pytest
import torch
from planted_attacks import COUNT, LINF, Brightness, Planted, first_pixel, run, shift
from scl_defense_benchmarks import art_adapter, native, torchattacks_adapter
from torch import nn

from scl_defense.threat import ThreatModel


class Scaled(nn.Module):
    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images):
        return self.network(images) * self.factor


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(COUNT, 1, 4, 4) * 0.6 + 0.2


@pytest.fixture
def labels(images):
    return (images[:, 0, 0, 0] > 0.5).long()


def test_a_move_without_a_gradient_is_no_attempt(images, labels):
    """Noise that calls itself a white-box attack, as PGD is where its gradient vanishes."""
    result = run(images, labels, Planted(shift(0.02), looks=False))
    row = result.attacks[0]
    assert row.status == "invalid" and row.robust_accuracy is None and row.unmoved + row.broken == row.attacked
    assert result.worst_case.robust_accuracy is None
    assert [flag.id for flag in result.flags] == ["moved-nothing"]
    assert run(images, labels, Planted(shift(0.02))).attacks[0].status == "ok"


@pytest.mark.parametrize("attack", [torchattacks_adapter.PGD(), art_adapter.PGD(), native.PGD(), native.FGSM()])
def test_saturated_logits_are_not_robustness(images, labels, attack):
    """The same decisions with logits x 1000: the cross-entropy has no gradient in float32, and PGD only its start."""
    honest = run(images, labels, attack)
    masked = run(images, labels, attack, network=Scaled(Brightness(), 1000.0))
    assert honest.attacks[0].status == "ok" and honest.worst_case.robust_accuracy < 0.9
    assert masked.attacks[0].status == "invalid" and masked.attacks[0].robust_accuracy is None
    assert (masked.worst_case.robust_accuracy or 0) <= honest.worst_case.robust_accuracy


@pytest.mark.slow
@pytest.mark.parametrize("attack", [torchattacks_adapter.PGD, art_adapter.PGD])
def test_l2_pgd_depends_neither_on_the_scale_of_logits_nor_on_the_batch(images, labels, attack):
    """Both libraries add a floor to the length of a gradient that is averaged over the batch."""
    threat = ThreatModel("l2", "0.1")
    reference = run(images, labels, native.PGD(steps=20, rel_step=0.25), threat=threat).attacks[0].broken
    assert 0 < reference < COUNT
    for factor in (1.0, 1e-6):
        for batch_size in (1, COUNT):
            network = Scaled(Brightness(), factor)
            row = run(images, labels, attack(), threat=threat, network=network, batch_size=batch_size).attacks[0]
            assert row.broken == reference, (factor, batch_size)


def test_hooks_that_an_attack_leaves_behind_reach_neither_the_judge_nor_the_next_attack(images, labels):
    network = Brightness()

    def tamper(classifier, images, labels, threat, rng):
        classifier.register_forward_hook(lambda module, inputs, output: -output)
        return first_pixel(images, (1 - 2 * labels) * 0.02)

    clean = run(images, labels, Planted(shift(0.02)), network=network).attacks[0]
    result = run(images, labels, Planted(tamper), Planted(shift(0.02)), network=network)
    assert [row.broken for row in result.attacks] == [clean.broken, clean.broken]
    assert not network._forward_hooks


def test_a_parameter_that_an_attack_adds_is_its_own_fault(images, labels):
    def grow(classifier, images, labels, threat, rng):
        classifier.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        return images

    network = Brightness()
    row = run(images, labels, Planted(grow), network=network).attacks[0]
    assert row.status == "failed" and "weights" in row.note and not list(network.parameters())


def test_an_empty_ball_is_called_one(images, labels):
    result = run(images, labels, native.FGSM(), threat=ThreatModel("linf", "0"))
    assert [flag.id for flag in result.flags] == ["empty-ball"]


def test_a_network_that_answers_nan_is_flagged(images, labels):
    result = run(images, labels, native.FGSM(), network=Scaled(Brightness(), float("nan")))
    assert "not-finite-logits" in [flag.id for flag in result.flags] and str(LINF) == "linf:0.1"
