"""The evaluation against attacks that cheat, break or do nothing, and against numbers worked out by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scl_defense_benchmarks import native
from scl_defense_benchmarks.battery import Plan, PlannedAttack, plan_attacks
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.results import BROKEN, MISCLASSIFIED, ROBUST, UNMOVED, UNTRIED
from scl_defense_benchmarks.statistics import wilson
from torch import nn
from victim_networks import Linear

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel

LINF, L2 = ThreatModel("linf", "0.1"), ThreatModel("l2", "0.5")
COUNT = 40


class Brightness(nn.Module):
    """Class 1 where the first pixel is above 0.5: what fools it, and at which distance, is plain to see."""

    def forward(self, images):
        score = 10 * (images[:, 0, 0, 0] - 0.5)
        return torch.stack([-score, score], dim=1)


@dataclasses.dataclass(frozen=True)
class Planted:
    """An attack made of one function of (classifier, images, labels, threat, rng)."""

    make: Callable[..., Any]
    minimal: bool = False
    access: str = "white-box"
    norms: frozenset[str] = frozenset({"linf", "l2"})

    def __call__(self, classifier, images, labels, threat, rng):
        return self.make(classifier, images, labels, threat, rng)


def first_pixel(images, change):
    moved = images.clone()
    moved[:, 0, 0, 0] += change
    return moved


def shift(size):
    """Move the first pixel by ``size`` towards the other class."""
    return lambda classifier, images, labels, threat, rng: first_pixel(images, (1 - 2 * labels) * size)


HONEST = Planted(shift(0.1))


@pytest.fixture
def images():
    """First pixel 0.45 or 0.55 on half of the images (0.1 flips them), 0.2 or 0.8 on the others (0.1 does not)."""
    made = torch.full((COUNT, 1, 2, 2), 0.5)
    made[:, 0, 0, 0] = torch.tensor([0.45, 0.55, 0.2, 0.8]).repeat(COUNT // 4)
    return made


@pytest.fixture
def labels():
    return torch.tensor([0, 1]).repeat(COUNT // 2)


def run(images, labels, *attacks, threat=LINF, network=None, **options):
    planned = [
        PlannedAttack(f"attack{place}", "planted", attack, own)
        for place, (attack, own) in enumerate(item if isinstance(item, tuple) else (item, threat) for item in attacks)
    ]
    options = {"seed": 0, "batch_size": 16} | options
    return evaluate(network or Brightness(), images, labels, Plan(threat, tuple(planned)), **options)


def flags_of(result):
    return {flag.id: flag.severity for flag in result.flags}


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
    else:  # 2 of 40: doubtful, and those two are robust in no worst case
        assert row.status == "doubtful" and row.broken == 18
        assert row.robust_accuracy == 22 / 40 and result.worst_case.robust_accuracy == 20 / 40
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


def test_the_network_and_the_global_state_come_back(network, digits):
    network.train()
    network.norm1.eval()
    modes = [module.training for module in network.modules()]
    values = [value.clone() for value in network.state_dict().values()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(digits[0][1400:1420], digits[1][1400:1420], native.FGSM(), native.PGD(steps=2), network=network)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), values, strict=True))
    assert not network._forward_hooks
    network.eval()


# -- minimal attacks and several balls


def test_a_minimal_attack_counts_at_its_budget(images, labels):
    """Distances 0.06 (breaks the near half) and 0.31 (breaks the others): found everywhere, broken within 0.1."""

    def nearest(classifier, images, labels, threat, rng):
        far = (images[:, 0, 0, 0] - 0.5).abs() > 0.1
        return first_pixel(images, (1 - 2 * labels) * torch.where(far, 0.31, 0.06))

    result = run(images, labels, Planted(nearest, minimal=True))
    row = result.attacks[0]
    assert (row.status, row.found, row.broken, row.violations["ball"]) == ("ok", 40, 20, 0)
    assert row.robust_accuracy == 0.5
    assert row.median_distance in (pytest.approx(0.06, abs=1e-5), pytest.approx(0.31, abs=1e-5))
    assert result.worst_case.robust_accuracy == 0.5  # the far half was really attacked: its distance is no failure


def test_a_minimal_attack_that_gives_up_is_not_robustness(images, labels):
    lost = Planted(lambda classifier, images, *rest: images.clone(), minimal=True)
    result = run(images, labels, lost)
    assert result.attacks[0].status == "invalid" and result.worst_case.robust_accuracy is None


def test_a_minimal_attack_leaves_the_box_and_is_pulled_back(images, labels):
    images[:, 0, 0, 0] = torch.tensor([0.45, 0.98]).repeat(COUNT // 2)

    def leave(classifier, images, labels, threat, rng):
        return first_pixel(images, 0.06)

    row = run(images, labels, Planted(leave, minimal=True)).attacks[0]
    assert row.violations == {"box": 20, "ball": 0, "nonfinite": 0}
    assert row.broken == 20 and row.distances[1] == pytest.approx(0.02, abs=1e-6)


def test_an_example_counts_for_every_ball_it_lies_in(images, labels):
    """Linf examples at L2 distance 0.1 also break their images in an L2 ball of 0.5, where the L2 attack was weak."""
    weak = Planted(shift(0.01))
    result = run(images, labels, HONEST, (weak, L2))
    assert result.attacks[1].robust_accuracy == 1
    linf, l2 = result.worst_cases
    assert (linf.norm, linf.robust_accuracy) == ("linf", 0.5)
    assert (l2.norm, l2.eps, l2.broken, l2.robust_accuracy, l2.attacks) == ("l2", "0.5", 20, 0.5, ("attack1",))


def test_an_example_outside_another_ball_does_not_count_there(images, labels):
    strong = (Planted(shift(0.4)), L2)
    result = run(images, labels, Planted(shift(0.01)), strong)
    linf, l2 = result.worst_cases
    assert linf.robust_accuracy == 1 and l2.robust_accuracy == 0


def test_the_worst_case_is_per_image(images, labels):
    """Two attacks that each break another quarter: together half is broken."""

    def only(label):
        def make(classifier, images, labels, threat, rng):
            return first_pixel(images, torch.where(labels == label, (1 - 2 * labels) * 0.1, 0.01 * (2 * labels - 1)))

        return Planted(make)

    result = run(images, labels, only(0), only(1))
    assert [row.robust_accuracy for row in result.attacks] == [0.75, 0.75]
    assert result.worst_case.robust_accuracy == 0.5


def test_a_control_breaks_but_proves_nothing(images, labels):
    control = Planted(shift(0.1), access="control")
    alone = run(images, labels, control)
    assert alone.attacks[0].robust_accuracy == 0.5 and alone.worst_case.robust_accuracy is None
    beside = run(images, labels, control, Planted(shift(0.01)))
    assert beside.worst_case.robust_accuracy == 0.5 and beside.worst_case.attacks == ("attack1",)


# -- flags


@pytest.fixture
def digit_images(digits):
    return digits[0][1400:1500], digits[1][1400:1500]


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


# -- numbers


def test_batch_size_reaches_a_label_through_the_attack_alone(network, digit_images):
    plan = Plan(LINF, (PlannedAttack("a", "a", native.FGSM(), LINF), PlannedAttack("b", "b", HONEST, LINF)))
    results = [evaluate(network, *digit_images, plan, seed=0, batch_size=size) for size in (1, 7, 100, 1000)]
    for result in results[1:]:
        assert [row.outcomes for row in result.attacks] == [row.outcomes for row in results[0].attacks]
        assert result.worst_cases == results[0].worst_cases


def test_passes_through_the_network_are_counted(network, digit_images, host):
    plan = plan_attacks("fgsm,pgd:steps=7,noise:draws=3,art:pgd:steps=2", host=host, threat=LINF)
    rows = {row.name: row for row in evaluate(network, *digit_images, plan, seed=0, batch_size=33).attacks}
    assert (rows["fgsm"].forwards, rows["fgsm"].backwards) == (1, 1)
    assert (rows["pgd"].forwards, rows["pgd"].backwards) == (7, 7)
    assert (rows["noise"].forwards, rows["noise"].backwards) == (3, 0)
    assert rows["art:pgd"].backwards == 2 and rows["art:pgd"].forwards >= 4  # it also predicts before and after
    assert all(row.seconds > 0 for row in rows.values())


def test_every_batch_has_its_own_seed_and_every_label_its_own(images, labels):
    seen = {}

    def remember(name):
        def make(classifier, images, labels, threat, rng):
            seen.setdefault(name, []).append((float(torch.rand((), generator=rng)), float(torch.rand(()))))
            return first_pixel(images, 0.01)

        return Planted(make)

    run(images, labels, remember("a"), remember("b"), batch_size=10)
    first = {name: list(draws) for name, draws in seen.items()}
    for source in (0, 1):  # the passed generator, and torch's own
        assert len({draws[source] for draws in first["a"] + first["b"]}) == 8
    seen.clear()
    torch.manual_seed(123)
    run(images, labels, remember("a"), remember("b"), batch_size=10)
    assert seen == first
    seen.clear()
    run(images, labels, remember("a"), remember("b"), batch_size=10, seed=1)
    assert not set(seen["a"]) & set(first["a"])


def test_progress_is_told_per_batch(images, labels):
    told = []
    run(images, labels, HONEST, batch_size=16, progress=lambda *news: told.append(news))
    assert told == [("attack0", 16, 40), ("attack0", 32, 40), ("attack0", 40, 40)]


def test_without_a_right_image_there_is_nothing_to_attack(images, labels):
    result = run(images, 1 - labels, HONEST)
    row = result.attacks[0]
    assert (row.status, row.attacked, row.robust_accuracy) == ("ok", 0, 0)
    assert result.worst_case.robust_accuracy == 0
    assert flags_of(result) == {"clean-accuracy-at-chance": "error"}


def test_an_interrupt_is_not_an_attack_failure(images, labels):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images, labels, Planted(interrupt))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(40, 4)}, r"images must be float32 \(N, C, H, W\)"),
        ({"images": torch.zeros(40, 1, 2, 2, dtype=torch.uint8)}, "not torch.uint8"),
        ({"images": torch.zeros(0, 1, 2, 2)}, "N >= 1"),
        ({"images": torch.full((40, 1, 2, 2), 255.0)}, r"they lie in \[255, 255\]; divide by 255"),
        ({"images": torch.full((40, 1, 2, 2), -0.1)}, r"must lie in \[0, 1\]"),
        ({"images": torch.full((40, 1, 2, 2), torch.nan)}, r"must lie in \[0, 1\]"),
        ({"labels": torch.zeros(39, dtype=torch.long)}, r"labels must be integers \(40,\)"),
        ({"labels": torch.zeros(40)}, "not torch.float32"),
        ({"labels": torch.full((40,), 2)}, "label 2 has no logit: the network has 2 classes"),
        ({"labels": torch.full((40,), -1)}, "label -1 is negative"),
        ({"batch_size": 0}, "batch size 0 must be at least 1"),
        ({"network": lambda images: images}, "must be a torch.nn.Module"),
    ],
)
def test_inputs_that_cannot_be(images, labels, change, message):
    arguments = {"images": images, "labels": labels, "network": Brightness(), "batch_size": 4} | change
    with pytest.raises(UserError, match=message):
        run(arguments.pop("images"), arguments.pop("labels"), HONEST, **arguments)


def test_nothing_outside_reaches_the_precision(images, labels):
    seen = []

    class Watching(Brightness):
        def forward(self, images):
            seen.append((images.dtype, torch.is_autocast_enabled("cpu"), torch.backends.cudnn.conv.fp32_precision))
            return super().forward(images)

    before = torch.backends.cudnn.conv.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(images, labels, Planted(shift(0.1)), network=Watching())
    assert set(seen) == {(torch.float32, False, "ieee")}
    assert torch.backends.cudnn.conv.fp32_precision == before
