"""The evaluation against attacks that are honest, cheat, break their contract, raise or do nothing."""

import pytest
import torch
from planted_attacks import COUNT, HONEST, Planted, first_pixel, flags_of, run, shift
from scl_defense_benchmarks import native
from scl_defense_benchmarks.results import BROKEN, MISCLASSIFIED, ROBUST, UNMOVED, UNTRIED
from scl_defense_benchmarks.statistics import wilson
from torch import nn
from victim_networks import Linear

from scl_defense.threat import ThreatModel


def test_an_honest_attack_breaks_exactly_what_can_be_broken(images, labels):
    labels[4] = 1 - labels[4]  # one image is misclassified from the start
    result = run(images, labels, HONEST)
    row = result.attacks[0]
    assert (result.n, result.clean_correct, result.clean_accuracy) == (40, 39, 39 / 40)
    assert result.clean_interval == wilson(39, 40)
    assert (row.status, row.attacked, row.broken, row.unmoved) == ("ok", 39, 19, 0)
    assert row.robust_accuracy == 20 / 40 and row.interval == wilson(20, 40)
    expected = [BROKEN, BROKEN, ROBUST, ROBUST] * 10
    expected[4] = MISCLASSIFIED
    assert list(row.outcomes) == expected
    assert row.distances[4] is None and row.distances[0] == pytest.approx(0.1, abs=1e-6)
    assert result.worst_case.robust_accuracy == 20 / 40
    assert list(result.worst_case.outcomes) == expected
    assert result.flags == ()


def test_outside_the_ball_is_pulled_back_and_judged_again(images, labels):
    result = run(images, labels, Planted(shift(0.4)))
    row = result.attacks[0]
    # At 0.4 all images would be broken; pulled back to 0.1 only the half that an honest attack breaks.
    assert row.broken == 20 and row.robust_accuracy == 0.5
    assert row.violations == {"box": 0, "ball": 40, "nonfinite": 0}
    assert max(row.distances) <= 0.1 + 1e-6
    assert flags_of(result) == {"outside-ball": "warning"}


def test_outside_the_box_is_pulled_back_and_judged_again(images, labels):
    class Overbright(nn.Module):
        """Is fooled by pixels above 1 alone."""

        def forward(self, images):
            score = images[:, 0, 1, 1] - 1.02
            return torch.stack([-score, score], dim=1)

    images[:, 0, 1, 1] = 0.96
    labels = torch.zeros(COUNT, dtype=torch.long)

    def brighten(classifier, images, labels, threat, rng):
        moved = images.clone()
        moved[:, 0, 1, 1] += 0.1  # 1.06: inside the ball, outside the box
        return moved

    result = run(images, labels, Planted(brighten), network=Overbright())
    row = result.attacks[0]
    assert row.broken == 0 and row.robust_accuracy == 1
    assert row.violations == {"box": 40, "ball": 0, "nonfinite": 0}
    assert row.distances[0] == pytest.approx(0.04, abs=1e-6)
    assert flags_of(result) == {"outside-box": "warning"}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("share", [1.0, 0.05])
def test_what_is_not_finite_is_no_example_and_no_robustness(images, labels, bad, share):
    def spoil(classifier, images, labels, threat, rng):
        made = HONEST(classifier, images, labels, threat, rng)
        made[: max(1, int(share * len(made))), 0, 1, 0] = bad
        return made

    result = run(images, labels, Planted(spoil), batch_size=COUNT)
    row = result.attacks[0]
    hit = int(share * COUNT)
    assert row.violations["nonfinite"] == row.unmoved == hit
    assert [row.distances[place] for place in range(hit)] == [None] * hit
    if share == 1:
        assert row.status == "invalid" and row.robust_accuracy is None and row.interval is None
        assert result.worst_case.robust_accuracy is None
        assert flags_of(result) == {"moved-nothing": "error", "not-finite": "warning"}
    else:  # 2 of 40: doubtful, and those two count as robust nowhere
        assert row.status == "doubtful" and row.broken == 18
        assert row.robust_accuracy == 20 / 40 and result.worst_case.robust_accuracy == 20 / 40
        assert result.worst_case.unmoved == 2


def test_success_is_never_taken_from_the_attack(images, labels):
    """It returns clean images and claims success in every way that it can."""

    class Claimed(torch.Tensor):
        pass

    def boast(classifier, images, labels, threat, rng):
        claimed = images.clone().as_subclass(Claimed)
        claimed.success = torch.ones(len(images), dtype=torch.bool)
        labels += 1
        return claimed

    result = run(images, labels, Planted(boast))
    row = result.attacks[0]
    assert row.broken == 0 and row.unmoved == 40 and row.status == "invalid" and row.robust_accuracy is None
    assert flags_of(result) == {"moved-nothing": "error", "input-written": "warning"}


def test_moving_nothing_is_never_robustness(images, labels):
    lazy = Planted(lambda classifier, images, labels, threat, rng: images + 1e-5)
    alone = run(images, labels, lazy)
    row = alone.attacks[0]
    assert (row.status, row.broken, row.unmoved, row.robust_accuracy) == ("invalid", 0, 40, None)
    assert set(row.outcomes) == {UNMOVED}
    assert alone.worst_case.robust_accuracy is None and set(alone.worst_case.outcomes) == {UNMOVED}
    assert "no valid attack" in alone.worst_case.note
    # Beside an honest attack the lazy one changes nothing.
    together = run(images, labels, lazy, HONEST)
    assert together.worst_case.robust_accuracy == 0.5 and together.worst_case.attacks == ("attack1",)


@pytest.mark.parametrize(("moved", "status"), [(40, "ok"), (39, "doubtful"), (36, "doubtful"), (35, "invalid")])
def test_the_limits_of_moving_nothing(images, labels, moved, status):
    def partly(classifier, images, labels, threat, rng):
        made = first_pixel(images, 0.01)
        made[moved:] = images[moved:]
        return made

    result = run(images, labels, Planted(partly), batch_size=COUNT)
    assert result.attacks[0].status == status
    assert result.attacks[0].unmoved == COUNT - moved
    if status != "invalid":
        assert result.worst_case.robust_accuracy == moved / COUNT


def test_radius_zero_is_exempt(images, labels):
    result = run(images, labels, Planted(shift(0.0)), threat=ThreatModel("linf", "0"))
    assert result.attacks[0].status == "ok" and result.worst_case.robust_accuracy == 1


def test_an_attack_that_raises_is_a_row_and_the_battery_goes_on(images, labels):
    def explode(classifier, images, labels, threat, rng):
        raise ValueError("two\nlines of advice")

    result = run(images, labels, Planted(explode), HONEST)
    row = result.attacks[0]
    assert (row.status, row.note) == ("failed", "ValueError: two lines of advice")
    assert row.robust_accuracy is None and row.interval is None and set(row.outcomes) == {UNTRIED}
    assert result.attacks[1].status == "ok"
    assert result.worst_case.robust_accuracy == 0.5 and result.worst_case.attacks == ("attack1",)
    assert flags_of(result) == {"attack-failed": "error"}


def test_what_an_attack_found_before_it_failed_still_counts(images, labels):
    calls = []

    def fail_later(classifier, images, labels, threat, rng):
        calls.append(len(images))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return HONEST(classifier, images, labels, threat, rng)

    weak = Planted(shift(0.01))
    result = run(images, labels, Planted(fail_later), weak, batch_size=8)
    assert calls == [8, 8]
    row = result.attacks[0]
    assert row.status == "failed" and row.broken == 4
    assert list(row.outcomes) == [BROKEN, BROKEN, ROBUST, ROBUST] * 2 + [UNTRIED] * 32
    assert result.worst_case.broken == 4 and result.worst_case.robust_accuracy == 36 / 40


def test_when_every_attack_fails_the_result_says_so(images, labels):
    def explode(classifier, images, labels, threat, rng):
        raise ValueError("no")

    result = run(images, labels, Planted(explode), Planted(explode, minimal=True))
    assert flags_of(result) == {"attack-failed": "error", "no-attack-ran": "error"}
    assert result.worst_case.robust_accuracy is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda images: images[:-1], r"shape \(15, 1, 2, 2\) for images \(16, 1, 2, 2\)"),
        (lambda images: images.flatten(1), r"shape \(16, 4\)"),
        (lambda images: images.numpy(), "a ndarray, not a tensor"),
        (lambda images: (images, None), "a tuple, not a tensor"),
        (lambda images: None, "a NoneType"),
        (lambda images: (images * 255).to(torch.uint8), "torch.uint8; images are float32"),
    ],
)
def test_a_wrong_shape_or_type_fails_the_attack(images, labels, make, message):
    result = run(images, labels, Planted(lambda classifier, images, *rest: make(images)))
    row = result.attacks[0]
    assert row.status == "failed"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(row.note)


def test_wider_floats_are_judged_in_float32(images, labels):
    def wide(classifier, images, labels, threat, rng):
        return HONEST(classifier, images, labels, threat, rng).double().requires_grad_()

    assert run(images, labels, Planted(wide)).attacks[0].broken == 20


def test_writing_into_the_input_changes_no_verdict(images, labels):
    kept = images.clone(), labels.clone()

    def scribble(classifier, images, labels, threat, rng):
        images += (1 - 2 * labels).view(-1, 1, 1, 1) * 0.4  # then a distance of 0 from what it was given
        labels.fill_(0)
        return images

    result = run(images, labels, Planted(scribble), HONEST)
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])
    row = result.attacks[0]
    assert row.violations["ball"] == 40 and row.broken == 20
    assert flags_of(result) == {"outside-ball": "warning", "input-written": "warning"}
    assert result.attacks[1].broken == 20


def test_a_network_that_the_attack_changes_is_restored_before_judging(images, labels):
    network = Linear(torch.tensor([[0.0] * 4, [10.0, 0, 0, 0]]), torch.tensor([5.0, 0.0]))
    before = [parameter.clone() for parameter in network.parameters()]

    def sabotage(classifier, images, labels, threat, rng):
        with torch.no_grad():
            classifier.weight.zero_()
            classifier.train()
        return first_pixel(images, 0.01)

    result = run(images, labels, Planted(sabotage), HONEST, network=network)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
    assert result.attacks[0].status == "failed" and "changed the network's weights" in result.attacks[0].note
    assert result.attacks[0].broken == 0  # judged on the true network
    assert result.attacks[1].broken == 20


def test_a_network_left_in_training_mode_is_judged_in_eval_mode(network, digit_images):
    """Dropout on and batch statistics in use: other labels, and other statistics for the next batch."""

    def careless(classifier, images, labels, threat, rng):
        made = native.FGSM()(classifier, images, labels, threat, rng)
        classifier.train()
        classifier(torch.rand_like(images) * 0.1)
        return made

    modes = []
    handle = network.dropout.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    kept, left = (run(*digit_images, attack, network=network) for attack in (native.FGSM(), Planted(careless)))
    handle.remove()
    assert any(modes)  # it did train for a moment
    assert kept.attacks[0].outcomes == left.attacks[0].outcomes
    assert kept.worst_cases == left.worst_cases


def test_what_an_attack_draws_from_global_generators_does_not_reach_the_next(images, labels):
    seen = []

    def watch(classifier, images, labels, threat, rng):
        seen.append(float(torch.rand(())))
        return first_pixel(images, 0.01)

    def greedy(classifier, images, labels, threat, rng):
        torch.rand(1000)
        return first_pixel(images, 0.02)

    for first in (HONEST, Planted(greedy)):
        run(images, labels, first, Planted(watch), batch_size=COUNT)
    assert seen[0] == seen[1]
