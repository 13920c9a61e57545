"""The evaluation: minimal attacks, several balls, seeds, counts, precision and inputs that cannot be."""

from itertools import pairwise

import pytest
import torch
from planted_attacks import COUNT, HONEST, L2, LINF, Brightness, Planted, first_pixel, flags_of, run, shift
from scl_defense_benchmarks import native
from scl_defense_benchmarks.battery import Plan, PlannedAttack, plan_attacks
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.planning import Repeated, plan_battery
from scl_defense_benchmarks.results import BROKEN, SPARED, UNTRIED

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel


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


def test_every_chunk_has_its_own_seed_and_every_attack_the_same_ones(images, labels, monkeypatch):
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 10)
    seen = {}

    def remember(name):
        def make(classifier, images, labels, threat, rng):
            seen.setdefault(name, []).append((float(torch.rand((), generator=rng)), float(torch.rand(()))))
            return first_pixel(images, 0.01)

        return Planted(make)

    run(images, labels, remember("a"), remember("b"))
    first = {name: list(draws) for name, draws in seen.items()}
    for source in (0, 1):  # the passed generator, and torch's own
        assert len({draws[source] for draws in first["a"]}) == 4
    assert first["a"] == first["b"]  # the same starts for both: what differs is the attack alone
    seen.clear()
    torch.manual_seed(123)
    run(images, labels, remember("a"), remember("b"))
    assert seen == first
    seen.clear()
    run(images, labels, remember("a"), remember("b"), seed=1)
    assert not set(seen["a"]) & set(first["a"])


def test_a_random_start_does_not_know_the_batch_size(network, digit_images, host):
    """Weak attacks with random starts, ours and the library's: the start decides much of what they find."""
    plan = plan_attacks("native:pgd:steps=2,pgd:steps=2,noise:draws=2", host=host, threat=LINF)
    whole, parts, single = (evaluate(network, *digit_images, plan, seed=0, batch_size=size) for size in (128, 33, 1))
    for other in (parts, single):
        for one, two in zip(whole.attacks, other.attacks, strict=True):
            assert one.outcomes == two.outcomes and one.predictions == two.predictions
            left, right = ([value or 0.0 for value in row.distances] for row in (one, two))
            assert left == pytest.approx(right, abs=1e-6)
    elsewhere = evaluate(network, *digit_images, plan, seed=1)
    assert elsewhere.attacks[2].distances != whole.attacks[2].distances  # the draws do matter


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        "onepixel:norm=l0:eps=3:steps=3:population=12",
        "pixle:norm=l0:eps=20:restarts=5:steps=3",
        "simba:norm=l2:eps=1:steps=30",
        "boundary:norm=l2:eps=1:steps=8",
        "hsj:norm=l2:eps=1:steps=2:queries=60:first_queries=20",
        "spatial:grid=2",
    ],
)
def test_what_goes_image_by_image_does_not_know_the_batch_size(network, digit_images, host, attack):
    """Verdict, label and distance of every image, in parts of a chunk and in the whole; the seed does matter."""
    images, labels = digit_images[0][:10], digit_images[1][:10]
    plan = plan_attacks(attack, host=host, threat=LINF)
    sizes = (128, 7, 1) if attack.startswith("onepixel") else (128, 7)
    whole, *others = (evaluate(network, images, labels, plan, seed=0, batch_size=size).attacks[0] for size in sizes)
    assert whole.status != "failed" and whole.found > 0, whole.note
    for other in others:
        assert (whole.outcomes, whole.predictions) == (other.outcomes, other.predictions)
        left, right = ([value or 0.0 for value in row.distances] for row in (whole, other))
        assert left == pytest.approx(right, abs=1e-5)
    if not attack.startswith("spatial"):
        other = evaluate(network, images, labels, plan, seed=1).attacks[0]
        assert (other.distances, other.forwards) != (whole.distances, whole.forwards)


def test_progress_is_told_before_and_after_every_chunk(images, labels, monkeypatch):
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 16)
    told = []
    run(images, labels, HONEST, progress=lambda *news: told.append(news))
    assert told == [("attack0", 0, 40), ("attack0", 16, 40), ("attack0", 32, 40), ("attack0", 40, 40)]


# -- cascade, restarts, several radii, limits


def test_a_cascade_attacks_what_is_left_and_ends_at_the_same_worst_case(images, labels):
    given = {}

    def only(label):
        def make(classifier, images, labels, threat, rng):
            given.setdefault(label, []).append(len(images))
            classifier(images)
            return first_pixel(images, torch.where(labels == label, (1 - 2 * labels) * 0.1, 0.01 * (2 * labels - 1)))

        return Planted(make)

    attacks = only(0), only(1), HONEST
    alone = run(images, labels, *attacks, batch_size=40)
    given.clear()
    cascade = run(images, labels, *attacks, batch_size=40, mode="cascade")
    assert given == {0: [40], 1: [30]}
    assert cascade.worst_case == alone.worst_case and cascade.mode == "cascade"
    _, second, third = cascade.attacks
    assert [row.robust_accuracy for row in cascade.attacks] == [0.75, 0.5, 0.5]
    assert (second.attacked, second.broken, second.spared) == (30, 10, 10)
    assert (third.attacked, third.broken, third.spared) == (20, 0, 20)
    assert second.outcomes.count(SPARED) == 10
    assert second.forwards == 2 and second.backwards == 1  # an attacked image, not one of all (Planted looks once)
    with pytest.raises(UserError, match="mode 'waterfall' is unknown"):
        run(images, labels, HONEST, mode="waterfall")


def test_in_a_cascade_a_control_spares_no_image(images, labels):
    control = Planted(shift(0.1), access="control")
    result = run(images, labels, control, HONEST, mode="cascade")
    assert result.attacks[1].attacked == 40


def test_restarts_go_on_with_what_is_not_broken(images, labels):
    sizes = []

    def lucky(classifier, images, labels, threat, rng):
        sizes.append(len(images))
        hit = torch.rand(len(images), generator=rng) < 0.5
        return first_pixel(images, torch.where(hit, (1 - 2 * labels) * 0.1, (1 - 2 * labels) * 0.01))

    planned = Repeated("a", "a", Planted(lucky), LINF, restarts=6)
    row = evaluate(Brightness(), images, labels, Plan(LINF, (planned,)), seed=0).attacks[0]
    assert row.restarts == len(sizes) == 6
    assert sizes[0] == 40 and all(a >= b for a, b in pairwise(sizes)) and sizes[-1] < 26
    assert row.broken == 20 or sizes[-1] > 20  # all that can be broken is, or it was still at it
    assert row.forwards == pytest.approx(sum(sizes) / 40, abs=0.01)
    once = Repeated("a", "a", Planted(lucky), LINF, restarts=1)
    first = evaluate(Brightness(), images, labels, Plan(LINF, (once,)), seed=0).attacks[0]
    assert first.broken < row.broken  # and what the first start broke stays broken
    assert all(b == BROKEN for a, b in zip(first.outcomes, row.outcomes, strict=True) if a == BROKEN)


def test_a_battery_with_restarts_is_planned(host):
    plan = plan_battery("quick,pgd:restarts=5:steps=3,apgd-ce:restarts=2", host=host, threats=[LINF])
    rows = {one.label: one for one in plan.attacks}
    assert rows["pgd:restarts=5:steps=3"].restarts == 5 and rows["pgd:restarts=5:steps=3"].attack.steps == 3
    assert rows["apgd-ce:restarts=2"].attack.restarts == 2  # it has such an option itself, and keeps it
    both = plan_battery("pgd,pgd:restarts=5", host=host, threats=[LINF]).attacks
    assert [(one.label, getattr(one, "restarts", 1)) for one in both] == [("pgd", 1), ("pgd:restarts=5", 5)]
    for text, message in (
        ("pgd:restarts=0", "must be a whole number from 1 to 1000"),
        ("pgd:restarts=x", "'x' must be a whole number"),
        ("pgd,pgd", "twice"),
    ):
        with pytest.raises(UserError, match=message):
            plan_battery(text, host=host, threats=[LINF])


@pytest.mark.slow
def test_a_curve_has_a_row_and_a_worst_case_for_each_radius(network, digit_images, host):
    threats = [ThreatModel("linf", eps) for eps in ("0.2", "0.05", "0.1")]
    plan = plan_battery("fgsm,pgd:steps=5,fab-t,cw:c=10:steps=30", host=host, threats=threats, budgets={"l2": "0.5"})
    labels = [one.label for one in plan.attacks]
    assert labels.count("cw:c=10:steps=30") == 1 and "fgsm:eps=0.05" in labels and len(labels) == 10
    result = evaluate(network, *digit_images, plan, seed=0)
    assert (result.eps, result.worst_case.eps) == ("0.2", "0.2")
    curve = {case.eps: case.robust_accuracy for case in result.worst_cases if case.norm == "linf"}
    assert curve["0.05"] >= curve["0.1"] >= curve["0.2"] and curve["0.05"] > curve["0.2"]
    for name in ("fgsm", "pgd:steps=5", "fab-t"):
        small, middle, large = (result.row(f"{name}:eps={eps}") for eps in ("0.05", "0.1", "0.2"))
        for before, after in ((small, middle), (middle, large)):
            pairs = list(zip(before.outcomes, after.outcomes, strict=True))
            assert all(b == BROKEN for a, b in pairs if a == BROKEN)
    small, large = (result.row(f"fgsm:eps={eps}") for eps in ("0.05", "0.1"))
    assert large.carried == small.broken > 0 and large.attacked == small.attacked - small.broken
    # The smallest perturbations are looked for once, and counted at every radius.
    distances = [result.row(f"fab-t:eps={eps}").distances for eps in ("0.05", "0.1", "0.2")]
    assert distances[0] == distances[1] == distances[2] and result.row("fab-t:eps=0.2").seconds == 0
    alone = evaluate(network, *digit_images, plan_attacks("fgsm", host=host, threat=threats[0]), seed=0).attacks[0]
    carried = result.row("fgsm:eps=0.2")
    assert carried.broken >= alone.broken


def test_what_does_not_fit_in_the_time_is_not_run_and_no_robustness(images, labels, monkeypatch, clock):
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 8)

    def slow(classifier, images, labels, threat, rng):
        clock.sleep(0.2)
        return HONEST(classifier, images, labels, threat, rng)

    result = run(images, labels, Planted(slow), HONEST, time_limit=0.5)
    first, second = result.attacks
    assert first.status == "not run" and "of 40 images were attacked" in first.note
    assert first.robust_accuracy is None and first.interval is None and first.attacked == 8  # the rest would take 0.8 s
    assert first.broken == first.attacked // 2 and first.outcomes.count(UNTRIED) == 40 - first.attacked
    assert second.status == "ok" and result.worst_case.attacks == ("attack1",) and not result.complete
    assert flags_of(result)["time-limit"] == "warning"
    nothing = run(images, labels, Planted(slow), time_limit=1e-9)
    assert nothing.worst_case is not None and nothing.worst_case.robust_accuracy is None
    with pytest.raises(UserError, match="must be above 0"):
        run(images, labels, HONEST, time_limit=0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_halves_the_batch_and_changes_no_number(images, labels, error):
    sizes = []

    def hungry(classifier, images, labels, threat, rng):
        sizes.append(len(images))
        if len(images) > 10:
            raise error
        return first_pixel(images, torch.rand(len(images), generator=rng) * 0.1 * (1 - 2 * labels))

    def modest(classifier, images, labels, threat, rng):
        return first_pixel(images, torch.rand(len(images), generator=rng) * 0.1 * (1 - 2 * labels))

    result = run(images, labels, Planted(hungry, looks=False, access="score"), batch_size=40)
    plain = run(images, labels, Planted(modest, looks=False, access="score"), batch_size=40)
    assert sizes == [40, 20, 10, 10, 10, 10]
    assert result.attacks[0].outcomes == plain.attacks[0].outcomes
    assert result.attacks[0].distances == plain.attacks[0].distances
    assert flags_of(result) == {"out-of-memory": "info"} and flags_of(plain) == {}


def test_memory_that_is_not_even_enough_for_one_image_fails_the_attack(images, labels):
    def hungry(classifier, images, labels, threat, rng):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert run(images, labels, Planted(hungry)).attacks[0].status == "failed"


def test_examples_that_do_not_survive_8_bits_are_counted(labels):
    """First pixels 0.5 and 128/255: one is fooled by a shift below half a level, one by a whole level."""
    images = torch.full((40, 1, 2, 2), 128 / 255)
    truth = torch.ones(40, dtype=torch.long)

    class Sharp(Brightness):
        def forward(self, images):
            score = 1e4 * (images[:, 0, 0, 0] - 127.8 / 255)
            return torch.stack([-score, score], dim=1)

    fine = run(images, truth, Planted(shift(0.3 / 255)), network=Sharp()).attacks[0]
    coarse = run(images, truth, Planted(shift(1 / 255)), network=Sharp()).attacks[0]
    assert (fine.broken, fine.rounded, fine.survive_rounding) == (40, 0, 0)
    assert (coarse.broken, coarse.rounded, coarse.survive_rounding) == (40, 40, 1)
    assert set(fine.predictions) == {0}


def test_without_a_right_image_there_is_nothing_to_attack(images, labels):
    result = run(images, 1 - labels, HONEST)
    row = result.attacks[0]
    assert (row.status, row.attacked, row.robust_accuracy) == ("ok", 0, 0)
    assert result.worst_case.robust_accuracy == 0
    assert flags_of(result)["clean-accuracy-at-chance"] == "error"


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
