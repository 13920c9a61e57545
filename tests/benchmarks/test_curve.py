"""The curve from one search: as strong as PGD at every radius, for little more passes than at one of them."""

import math
from itertools import pairwise

import pytest
import torch
from planted_attacks import run
from safetensors.torch import load_file
from scl_defense_benchmarks import pgd_min
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.native import PGD
from scl_defense_benchmarks.pgd_min import PGDMin, evenly
from scl_defense_benchmarks.planning import plan_battery
from scl_defense_benchmarks.results import BROKEN
from scl_defense_benchmarks.twin import Twin, twin_of
from victim_networks import Linear

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel

STEPS, POINTS = 10, 8
TOP = {"linf": "0.3", "l2": "1.6", "l1": "8"}


def curve_of(network, images, labels, host, attack=f"pgd-min:steps={STEPS}", norm="linf", points=POINTS, **options):
    plan = plan_battery(attack, host=host, threats=[ThreatModel(norm, TOP[norm])], classes=10, curve=points)
    return evaluate(network, images, labels, plan, seed=0, **options)


@pytest.fixture(scope="module")
def held_out(digits):
    return digits[0][1400:1550], digits[1][1400:1550]


@pytest.mark.slow
@pytest.mark.parametrize(("which", "norm"), [("network", "linf"), ("robust", "linf"), ("robust", "l2")])
def test_as_strong_as_an_attack_at_every_radius_for_less_than_two_and_a_half(which, norm, held_out, host, request):
    network = request.getfixturevalue(which)
    found = curve_of(network, *held_out, host, norm=norm)
    cases = [case for case in found.worst_cases if case.norm == norm]
    assert len(cases) == POINTS and all(row.status == "ok" for row in found.attacks)
    assert cases[0].robust_accuracy > 0.2 and cases[-1].robust_accuracy < 0.1, "a curve that says something"
    above = []
    for case in cases[::2]:
        fixed = run(*held_out, PGD(steps=STEPS), threat=ThreatModel(norm, case.eps), network=network).attacks[0]
        assert case.robust_accuracy <= fixed.interval.high, case.eps
        above.append(case.robust_accuracy - fixed.robust_accuracy)
    assert sum(above) / len(above) <= 0.01
    (paid,) = {(row.forwards, row.backwards) for row in found.attacks}
    plain = run(*held_out, PGD(steps=STEPS, early_stop=False), threat=ThreatModel(norm, "0.1"), network=network)
    assert plain.attacks[0].backwards == STEPS
    assert STEPS * 0.5 < paid[1] < 2.5 * STEPS
    assert paid[0] < 4 * STEPS, "forward passes alone are cheaper than gradients, and must not make up for it"


def test_the_curve_falls_image_by_image(robust, held_out, host):
    found = curve_of(robust, *held_out, host)
    broken = [torch.tensor(case.outcomes) == BROKEN for case in found.worst_cases]
    assert all(bool((more | ~less).all()) for less, more in pairwise(broken))
    assert len({int(one.sum()) for one in broken}) > 4


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_in_the_largest_ball_it_is_pgd(robust, held_out, host, norm):
    top = ThreatModel(norm, "0.12" if norm == "linf" else "0.5" if norm == "l2" else "2")
    fixed, least = run(*held_out, PGD(steps=STEPS), PGDMin(steps=STEPS), threat=top, network=robust).attacks
    assert 0.02 < fixed.robust_accuracy < 0.98
    assert fixed.outcomes == least.outcomes


def linear(weight, bias, images):
    network = Linear(torch.stack([torch.zeros_like(weight), weight]), torch.tensor([0.0, bias]))
    return network, network(images).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_radius_of_a_linear_network_is_its_distance(norm):
    """The box is never reached, so that the distance is |w x + b| / the dual norm of w."""
    draw = torch.Generator().manual_seed(3)
    images = 0.4 + 0.2 * torch.rand(60, 1, 4, 4, generator=draw)
    weight = torch.randn(16, generator=draw).sign() * (0.5 + torch.rand(16, generator=draw))
    bias = -float((weight * 0.5).sum())
    network, labels = linear(weight, bias, images)
    gap = (images.flatten(1) @ weight + bias).abs()
    exact = gap / (weight.abs().sum() if norm == "linf" else weight.norm())
    top = 1.05 * float(exact.max())  # exact distances spread over all balls
    with torch.no_grad():
        attack = PGDMin(steps=30, rel_step=0.1, refine=6)
        made = attack(network, images, labels, ThreatModel(norm, f"{top:.6f}"), torch.Generator().manual_seed(0))
    assert bool((network(made).argmax(1) != labels).all())
    distance = ThreatModel(norm, "1").distance(images, made)
    step = top / pgd_min.POINTS
    assert bool((distance >= exact * 0.999).all())
    assert bool((distance <= exact + 1.001 * step).all()), "the ball below was attacked, and held"
    near = exact > step
    assert int(near.sum()) > 40 and float((distance - exact)[near].quantile(0.9)) <= 0.1 * step
    with torch.no_grad():
        coarse = PGDMin(steps=30, rel_step=0.1, refine=0)
        made = coarse(network, images, labels, ThreatModel(norm, f"{top:.6f}"), torch.Generator().manual_seed(0))
    assert float((ThreatModel(norm, "1").distance(images, made) - exact)[near].quantile(0.9)) > 0.3 * step


def test_radii_in_the_result_are_those_of_checked_examples(robust, held_out, host, tmp_path):
    file = tmp_path / "made.safetensors"
    images, labels = held_out[0][:100], held_out[1][:100]
    found = curve_of(robust, images, labels, host, examples_file=file)
    row, made = found.attacks[0], load_file(file)["pgd-min:steps=10"]
    with torch.no_grad():
        predicted = robust(made).argmax(1)
    distance = ThreatModel("linf", "1").distance(images, made)
    for place, (wrong, radius) in enumerate(zip(row.predictions, row.distances, strict=True)):
        if wrong >= 0:
            assert predicted[place] == wrong != labels[place] and distance[place] == pytest.approx(radius, abs=1e-6)
    assert float(made.min()) >= 0 and float(made.max()) <= 1
    for case, one in zip(found.worst_cases, evenly(TOP["linf"], POINTS), strict=True):
        within = ThreatModel("linf", one).tolerance()
        fooled = [wrong >= 0 and distance <= within
                  for wrong, distance in zip(row.predictions, row.distances, strict=True)]  # fmt: skip
        assert [outcome == BROKEN for outcome in case.outcomes] == fooled
    radii = [distance for distance, wrong in zip(row.distances, row.predictions, strict=True) if wrong >= 0]
    spacing = float(TOP["linf"]) / POINTS
    assert any(abs(radius / spacing - round(radius / spacing)) > 0.05 for radius in radii), "finer than the radii"


@pytest.mark.parametrize("restarts", [1, 3])
def test_neither_batches_nor_workers_nor_a_second_run_change_anything(robust, held_out, host, restarts):
    images, labels = held_out[0][:60], held_out[1][:60]
    attack = f"pgd-min:steps=4:restarts={restarts}"
    first = curve_of(robust, images, labels, host, attack)
    for options in ({}, {"batch_size": 7}, {"batch_size": 50, "workers": 2}):
        again = curve_of(robust, images, labels, host, attack, **options)
        for one, other in zip(first.attacks, again.attacks, strict=True):
            assert one.outcomes == other.outcomes
            assert one.distances == pytest.approx(other.distances, abs=1e-5)


def test_in_bfloat16_it_takes_gradients_alone(robust, held_out, host, monkeypatch):
    """Whether a point fools is asked in float32: what it says is broken is, and it finds what float32 finds."""
    monkeypatch.setattr("scl_defense_benchmarks.twin.bf16_pays", lambda device: True)
    passed, forward = [], Twin.forward

    def noted(self, images):
        output = forward(self, images)
        passed.append((self.precision, output.requires_grad))
        return output

    monkeypatch.setattr(Twin, "forward", noted)
    exact = curve_of(robust, *held_out, host)
    assert {precision for precision, _ in passed} == {"fp32"} and exact.attacks[0].precision == "fp32"
    passed.clear()
    rough = curve_of(robust, *held_out, host, precision="auto")
    assert rough.attacks[0].precision == "bf16" and rough.attacks[0].status == "ok"
    rough_twin = twin_of(robust, held_out[0][:8], "bf16")
    passed.clear()
    with torch.no_grad():
        PGDMin(steps=4)(rough_twin, *held_out, ThreatModel("linf", TOP["linf"]), torch.Generator().manual_seed(0))
    assert set(passed) == {("bf16", True), ("fp32", False)} and rough_twin.precision == "bf16"
    with rough_twin.exactly(), torch.no_grad():
        torch.testing.assert_close(rough_twin(held_out[0]), robust(held_out[0]), atol=1e-4, rtol=1e-4)
    assert curve_of(robust, *held_out, host, precision="bf16").attacks[0].precision == "fp32"
    for one, other in zip(exact.worst_cases, rough.worst_cases, strict=True):
        assert other.robust_accuracy == pytest.approx(one.robust_accuracy, abs=0.03)


def test_more_starts_find_no_less(robust, held_out, host):
    once = curve_of(robust, *held_out, host, "pgd-min:steps=3:rel_step=0.5")
    often = curve_of(robust, *held_out, host, "pgd-min:steps=3:rel_step=0.5:restarts=4")
    for one, other in zip(once.worst_cases, often.worst_cases, strict=True):
        assert {*torch.tensor(other.outcomes).eq(BROKEN).nonzero().flatten().tolist()} >= {
            *torch.tensor(one.outcomes).eq(BROKEN).nonzero().flatten().tolist()}  # fmt: skip
    assert sum(case.broken for case in often.worst_cases) > sum(case.broken for case in once.worst_cases)


class Blind(torch.nn.Module):
    """No gradient reaches the images, but for those that are dark."""

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        seen = torch.where(mean.detach() < 0.5, mean, mean.detach())
        return torch.stack([seen - 0.5, 0.5 - seen], 1) + 0 * mean[:, None]


def test_what_has_no_gradient_is_no_attempt_and_draws_for_itself_alone():
    images = torch.full((16, 1, 4, 4), 0.9)
    images[::2] = 0.4
    labels = Blind()(images).argmax(1)
    found = [run(images, labels, PGDMin(steps=3), network=Blind(), batch_size=size).attacks[0] for size in (16, 3)]
    assert found[0].distances == found[1].distances
    assert found[0].unmoved == 8


def test_the_plan_of_a_curve(host):
    main = ThreatModel("linf", "8/255")
    plan = plan_battery("fgsm,pgd-min:steps=5", host=host, threats=[main], classes=10, curve=4)
    assert [(one.label, one.threat.eps) for one in plan.attacks] == [
        ("fgsm", "8/255"),
        ("pgd-min:steps=5", "8/255"),
        ("pgd-min:steps=5:eps=2/255", "2/255"),
        ("pgd-min:steps=5:eps=4/255", "4/255"),
        ("pgd-min:steps=5:eps=6/255", "6/255"),
    ]
    assert {one.attack.radii for one in plan.attacks[1:]} == {("2/255", "4/255", "6/255", "8/255")}
    added = plan_battery("fgsm", host=host, threats=[main], classes=10, curve=2)
    assert [one.label for one in added.attacks] == ["fgsm", "pgd-min", "pgd-min:eps=4/255"]
    several = plan_battery("pgd-min", host=host, threats=[main, ThreatModel("linf", "0.01")], classes=10)
    assert {one.attack.radii for one in several.attacks} == {("0.01", "8/255")}
    assert evenly("0.3", 4) == ("0.075", "0.15", "0.225", "0.3") and evenly("1/255", 2) == ("1/510", "1/255")
    assert evenly("1/3", 3) == ("1/9", "2/9", "1/3")


@pytest.mark.parametrize(
    ("eps", "points", "said"),
    [
        (("0.1", "0.2"), 4, "several radii"),
        (("0.1",), 1, "from 2 to"),
        (("0",), 4, "above 0"),
        (("0.1",), 5000, "2 to"),
    ],
)
def test_a_curve_that_cannot_be_is_one_line(host, eps, points, said):
    with pytest.raises(UserError, match=said) as error:
        plan_battery("fgsm", host=host, threats=[ThreatModel("linf", one) for one in eps], classes=10, curve=points)
    assert "\n" not in str(error.value)


def test_the_search_is_told_once_in_the_table(robust, held_out, host):
    found = curve_of(robust, held_out[0][:60], held_out[1][:60], host, "fgsm")
    text = found.table()
    assert text.count("finds a wrong label") == 1 and text.count("worst case  ") == POINTS
    assert math.isclose(found.worst_case.robust_accuracy, found.row("pgd-min").robust_accuracy)
