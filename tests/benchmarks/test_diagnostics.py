"""Every flag: raised by what it is for, and not by sound networks and batteries."""

import torch
from planted_attacks import COUNT, Brightness, Planted, first_pixel, flags_of, run
from scl_defense_benchmarks.battery import Plan, plan_attacks
from scl_defense_benchmarks.evaluate import evaluate
from torch import nn

from scl_defense.threat import ThreatModel


def test_a_sound_network_and_battery_raise_no_flag(network, digit_images, host):
    plan = plan_attacks("fgsm,pgd,noise,native:pgd:loss=margin", host=host, threat=ThreatModel("linf", "0.2"))
    result = evaluate(network, *digit_images, plan, seed=0)
    assert result.flags == ()
    assert result.clean_accuracy > 0.9 > 0.3 > result.worst_case.robust_accuracy


def test_more_steps_that_do_worse_than_one_are_flagged(network, digit_images, host):
    threat = ThreatModel("linf", "0.2")
    plan = plan_attacks("fgsm,pgd:steps=1:rel_step=0.01:random_start=false", host=host, threat=threat)
    result = evaluate(network, *digit_images, plan, seed=0)
    assert flags_of(result) == {"one-step-beats-many": "error"}
    # Not between libraries, and not between balls.
    for battery in ("fgsm,native:pgd:steps=1:rel_step=0.01", "fgsm,pgd:steps=1:rel_step=0.01:eps=0.1"):
        assert flags_of(evaluate(network, *digit_images, plan_attacks(battery, host=host, threat=threat), seed=0)) == {}


def test_noise_that_beats_gradients_is_flagged(network, digit_images, host):
    threat = ThreatModel("linf", "0.3")
    plan = plan_attacks("noise,fgsm:eps=0.3,pgd:steps=1:rel_step=0.01:random_start=false", host=host, threat=threat)
    only_weak = Plan(threat, (plan.attacks[0], plan.attacks[2]))
    assert "noise-beats-gradient" not in flags_of(evaluate(network, *digit_images, plan, seed=0))
    assert flags_of(evaluate(network, *digit_images, only_weak, seed=0)) == {"noise-beats-gradient": "error"}
    smaller = plan_attacks("noise,native:pgd:eps=0.01", host=host, threat=threat)  # another ball is another question
    assert flags_of(evaluate(network, *digit_images, smaller, seed=0)) == {}


def test_images_that_only_noise_breaks_are_flagged(images, labels):
    def on(places):
        def make(classifier, images, labels, threat, rng):
            size = torch.full((len(images),), 0.01)
            size[places] = 0.1
            return first_pixel(images, (1 - 2 * labels) * size)

        return make

    white, control = Planted(on(slice(0, 20))), Planted(on(slice(30, 32)), access="control")
    images[30:32, 0, 0, 0] = torch.tensor([0.45, 0.55])
    result = run(images, labels, white, control, batch_size=COUNT)
    assert flags_of(result) == {"noise-beats-gradient": "warning"}


def test_probabilities_are_flagged(network, digit_images, host):
    soft = nn.Sequential(network, nn.Softmax(dim=1))
    plan = plan_attacks("fgsm", host=host, threat=ThreatModel("linf", "0.2"))
    assert flags_of(evaluate(soft, *digit_images, plan, seed=0))["probabilities-not-logits"] == "warning"


def test_clean_accuracy_at_chance_is_flagged(network, digit_images, host):
    plan = plan_attacks("native:fgsm", host=host, threat=ThreatModel("linf", "0.2"))
    result = evaluate(network, digit_images[0], (digit_images[1] + 1) % 10, plan, seed=0)
    assert flags_of(result)["clean-accuracy-at-chance"] == "error"


class Noisy(nn.Module):
    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images):
        return self.network(images + self.size * torch.randn_like(images))


def test_a_random_network_is_flagged_and_its_evaluation_repeats(network, digit_images, host):
    plan = plan_attacks("native:fgsm,native:pgd", host=host, threat=ThreatModel("linf", "0.1"))
    noisy = Noisy(network, 0.3)
    first, again, other = (evaluate(noisy, *digit_images, plan, seed=seed) for seed in (0, 0, 1))
    assert flags_of(first)["random-forward"] == "error"
    assert [row.outcomes for row in first.attacks] == [row.outcomes for row in again.attacks]
    assert [row.outcomes for row in first.attacks] != [row.outcomes for row in other.attacks]


def test_a_network_whose_answer_depends_on_its_batch_is_flagged(network, digit_images, host):
    class Batchwise(nn.Module):
        def forward(self, images):
            return network(images) + images.mean() * torch.arange(10)

    plan = plan_attacks("native:fgsm", host=host, threat=ThreatModel("linf", "0.1"))
    assert flags_of(evaluate(Batchwise(), *digit_images, plan, seed=0))["batch-dependent-forward"] == "error"


def test_a_network_that_answers_nan_is_wrong_there(images, labels):
    class Dividing(nn.Module):
        def forward(self, images):
            logits = Brightness()(images)
            return torch.where(images[:, :1, 1, 1] > 0.55, torch.nan, logits)

    def provoke(classifier, images, labels, threat, rng):
        moved = images.clone()
        moved[:, 0, 1, 1] += 0.08
        return moved

    row = run(images, labels, Planted(provoke), network=Dividing()).attacks[0]
    assert row.broken == 40 and row.robust_accuracy == 0
