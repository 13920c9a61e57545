"""The evaluation: minimal attacks, several balls, seeds, counts, precision and inputs that cannot be."""

import pytest
import torch
from planted_attacks import COUNT, HONEST, L2, LINF, Brightness, Planted, first_pixel, flags_of, run, shift
from scl_defense_benchmarks import native
from scl_defense_benchmarks.battery import Plan, PlannedAttack, plan_attacks
from scl_defense_benchmarks.evaluate import evaluate

from scl_defense.errors import UserError


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


def test_every_batch_has_its_own_seed_and_every_attack_the_same_ones(images, labels):
    seen = {}

    def remember(name):
        def make(classifier, images, labels, threat, rng):
            seen.setdefault(name, []).append((float(torch.rand((), generator=rng)), float(torch.rand(()))))
            return first_pixel(images, 0.01)

        return Planted(make)

    run(images, labels, remember("a"), remember("b"), batch_size=10)
    first = {name: list(draws) for name, draws in seen.items()}
    for source in (0, 1):  # the passed generator, and torch's own
        assert len({draws[source] for draws in first["a"]}) == 4
    assert first["a"] == first["b"]  # the same starts for both: what differs is the attack alone
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
