"""What stands in the flags: measured numbers, thresholds, limits and sentences, worked out by hand on planted rows."""

import dataclasses

import pytest
import torch
from planted_attacks import fake
from scl_defense_benchmarks import diagnostics, results
from scl_defense_benchmarks.statistics import wilson


def flags_of(rows, families=None):
    return diagnostics.check_battery(rows, [row.name for row in rows] if families is None else families)


def told(flag):
    return flag.id, flag.severity, flag.measured, flag.threshold, flag.attacks


def changed(row, **more):
    return dataclasses.replace(row, **more)


# -- the network


def asked(logits, images=None, labels=None, network=None):
    images = torch.full((len(logits), 1, 2, 2), 0.5) if images is None else images
    labels = logits.argmax(1) if labels is None else labels

    class Fixed(torch.nn.Module):
        def forward(self, given):  # the evaluation fills its batches up
            return torch.cat([logits, logits[-1:].expand(max(len(given) - len(logits), 0), -1)])[: len(given)]

    return {flag.id: flag for flag in diagnostics.check_network(network or Fixed(), images, labels, logits)}


def test_logits_that_are_not_finite_are_counted():
    logits = torch.eye(2).repeat(5, 1) * 3
    logits[[1, 4], 0] = torch.tensor([torch.nan, torch.inf])
    flag = asked(logits)["not-finite-logits"]
    assert told(flag)[1:4] == ("error", 0.2, 0.0) and "for 2 of 10 clean images" in flag.what


def test_chance_is_one_class_in_k_and_three_sigma():
    logits = torch.eye(4).repeat(25, 1) * 3  # 100 images of 4 classes, the same number of each
    limit = 0.25 + 3 * (0.25 * 0.75 / 100) ** 0.5
    for right, chance in ((37, True), (38, False)):
        labels = (logits.argmax(1) + 1) % 4
        labels[:right] = logits.argmax(1)[:right]
        found = asked(logits, labels=labels)
        assert ("clean-accuracy-at-chance" in found) is chance
    labels[: right - 1] = logits.argmax(1)[: right - 1]
    labels[right - 1] = (labels[right - 1] + 1) % 4
    flag = asked(logits, labels=labels)["clean-accuracy-at-chance"]
    assert flag.measured == pytest.approx(0.37) and flag.threshold == pytest.approx(limit)
    assert "25.0%" in flag.what and f"{limit:.1%}" in flag.what


@pytest.mark.parametrize(("brightest", "dark"), [(0.0499, True), (0.0501, False)])
def test_images_that_never_get_bright(brightest, dark):
    logits = torch.eye(2).repeat(5, 1) * 3
    found = asked(logits, images=torch.full((10, 1, 2, 2), brightest))
    assert ("image-range" in found) is dark
    if dark:
        assert told(found["image-range"])[2:4] == (pytest.approx(0.0499), 0.05)
        assert "0.0499" in found["image-range"].what


def test_probabilities_are_between_0_and_1_and_sum_to_1():
    one = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    assert "probabilities-not-logits" in asked(one)
    assert "probabilities-not-logits" in asked(one + torch.tensor([5e-6, -4e-6]))  # rounding
    assert "probabilities-not-logits" in asked(torch.tensor([[1.000005, -0.000005], [0.2, 0.8]]))
    assert "probabilities-not-logits" not in asked(one + 1e-4)  # the sum
    assert "probabilities-not-logits" not in asked(torch.tensor([[1.5, -0.5], [0.2, 0.8]]))  # the range, below
    assert "probabilities-not-logits" not in asked(torch.tensor([[0.7, 0.3], [-0.5, 1.5]]))
    wide = torch.tensor([[1.2, -0.1, -0.1], [0.2, 0.4, 0.4]])
    assert "probabilities-not-logits" not in asked(wide)


def test_a_random_network_is_asked_four_times_more():
    class Late(torch.nn.Module):
        asked = 0

        def forward(self, images):
            self.asked += 1
            logits = torch.eye(2).repeat(len(images), 1)[: len(images)] * 3
            return -logits if self.asked == self.when else logits

    for when, random in ((1, True), (4, True), (50, False)):
        network = Late()
        network.when = when
        assert ("random-forward" in asked(torch.eye(2).repeat(5, 1) * 3, network=network)) is random


def test_modules_that_stay_in_train_mode_are_counted_and_the_first_is_named():
    class Stubborn(torch.nn.Dropout):
        def train(self, mode=True):
            return super().train(True)

    network = torch.nn.Sequential(torch.nn.Flatten(), Stubborn(0.0), Stubborn(0.0), torch.nn.Linear(4, 2)).eval()
    images = torch.full((10, 1, 2, 2), 0.5)
    flag = asked(network(images).detach(), network=network)["train-mode"]
    assert flag.measured == 2 and flag.what.startswith("2 modules") and "first is '1'" in flag.what


# -- one attack


def test_what_did_not_move_is_a_share_of_what_was_attacked():
    row = changed(fake("pgd", range(5)), status="invalid", unmoved=10)
    (flag,) = diagnostics.check_row(row)
    assert told(flag) == ("moved-nothing", "error", 0.25, 0.10, ("torchattacks:pgd",))
    assert "10 of 40 images" in flag.what
    (flag,) = diagnostics.check_row(changed(row, status="doubtful", unmoved=2))
    assert told(flag)[1:4] == ("warning", 0.05, 0.01)
    (flag,) = diagnostics.check_row(changed(row, attacked=0, unmoved=0))  # nothing to divide by
    assert flag.measured == 0


@pytest.mark.parametrize(
    ("kind", "id", "text"),
    [
        ("box", "outside-box", "outside [0, 1]"),
        ("ball", "outside-ball", "outside the ball"),
        ("nonfinite", "not-finite", "that are not finite"),
    ],
)
def test_what_lies_outside_is_counted(kind, id, text):
    row = changed(fake("pgd", range(5)), violations={"box": 0, "ball": 0, "nonfinite": 0} | {kind: 10})
    (flag,) = diagnostics.check_row(row)
    assert told(flag)[0] == id and told(flag)[2:4] == (0.25, 0.0) and f"10 of 40 examples {text}." in flag.what
    (flag,) = diagnostics.check_row(changed(row, attacked=0))
    assert flag.measured == 10


def test_an_attack_that_failed_and_a_ball_of_nothing():
    (flag,) = diagnostics.check_row(changed(fake("pgd", ()), status="failed", note="no memory"))
    assert told(flag)[0] == "attack-failed" and "no memory" in flag.what
    assert [flag.id for flag in diagnostics.check_row(changed(fake("pgd", ()), eps="0"))] == ["empty-ball"]
    assert diagnostics.check_row(changed(fake("cw", (), minimal=True), eps="0")) == []
    assert diagnostics.check_row(fake("pgd", ())) == []


def test_the_recorded_accuracy_is_a_distance():
    for correct in (8600, 9600):
        (flag,) = diagnostics.check_recorded(correct, 10_000, 0.91, 10_000)
        assert flag.measured == pytest.approx(0.05) and "91.0%" in flag.what and f"{correct / 100:.1f}%" in flag.what


# -- between attacks


def test_one_step_that_beats_many():
    one, many = fake("fgsm", range(12), options={}), fake("pgd", range(3))
    (flag,) = flags_of([one, many])
    assert told(flag)[0::2] == ("one-step-beats-many", 0.225, ("torchattacks:pgd", "torchattacks:fgsm"))
    assert flag.threshold == 0.005 and "92.5%" in flag.what and "70.0%" in flag.what
    assert flags_of([fake("fgsm", range(4), options={}), fake("pgd", ())]) == []  # p 1/16: by chance
    assert [flag.id for flag in flags_of([fake("fgsm", range(5), options={}), fake("pgd", ())])] == [flag.id]
    # Ten against five other images: more, but not by more than chance.
    assert flags_of([fake("fgsm", range(10), options={}), fake("pgd", range(10, 15))]) == []
    # Only what one of them breaks alone counts for chance, not what both break.
    assert flags_of([fake("fgsm", range(33), options={}), fake("pgd", range(30))]) == []
    assert flags_of([changed(one, library="art", label="art:fgsm"), many]) == []  # another library
    assert flags_of([changed(one, eps="0.2"), many]) == []  # another ball


def test_libraries_that_disagree():
    first, other = fake("pgd", range(10)), fake("pgd", range(20), library="art")
    (flag,) = flags_of([first, other])
    assert told(flag) == ("libraries-disagree", flag.severity, 0.25, 0.02, ("torchattacks:pgd", "art:pgd"))
    assert "25.0%" in flag.what and "50.0%" in flag.what
    assert told(flags_of([other, first])[0])[2] == 0.25  # in either order
    assert len(flags_of([first, other, fake("pgd", range(10), library="native")])) == 2  # each pair once
    assert "libraries-disagree" not in [flag.id for flag in flags_of([first, changed(other, minimal=True)])]
    assert flags_of([first, changed(other, eps="0.2")]) == []
    assert flags_of([first, changed(other, spared=3)]) == flags_of([changed(first, spared=3), other]) == []
    assert flags_of([first, other], ["", ""]) == [] and flags_of([first, other], ["cw", "cw"]) == []
    for family in ("fgsm", "pgd", "apgd", "mifgsm", "bim"):
        assert len(flags_of([first, other], [family, family])) == 1
    margin = {"steps": 20, "rel_step": 0.25, "loss": "margin"}
    assert flags_of([first, changed(other, options=margin)]) == []  # another loss
    assert len(flags_of([first, changed(other, options={**margin, "loss": "ce"})])) == 1  # the same, said
    for alone in ("steps", "rel_step", "restarts"):
        assert flags_of([changed(first, options={}), changed(other, options={alone: 1})]) == []
    assert len(flags_of([changed(first, options={}), changed(other, options={"momentum": 1})])) == 1
    # Seven against none are p 2/128; eight are p 2/256.
    assert flags_of([fake("pgd", ()), fake("pgd", range(7), library="art")]) == []
    assert len(flags_of([fake("pgd", ()), fake("pgd", range(8), library="art")])) == 1


def test_the_gap_to_autoattack():
    def rows(pgd, whole, n=40, **more):
        return [fake("pgd", range(pgd), n=n), changed(fake("autoattack", range(whole), n=n), **more)]

    (flag,) = flags_of(rows(10, 20))
    assert told(flag)[0::2] == ("pgd-far-from-autoattack", 0.25, ("torchattacks:pgd", "torchattacks:autoattack"))
    assert flag.threshold == 0.10 and "75.0%" in flag.what and "50.0%" in flag.what
    assert flags_of(rows(16, 20)) == [] and len(flags_of(rows(15, 20))) == 1  # 10 points, and more
    assert flags_of(rows(2, 4, n=10)) == [] and len(flags_of(rows(1, 4, n=10))) == 1  # 2 images are an anecdote
    assert flags_of(rows(10, 20, eps="0.2")) == []


def test_noise_that_beats_gradients():
    def found(noise, *white):
        return flags_of([fake("noise", noise, access="control"), *white])

    (flag,) = found(range(10, 20), fake("pgd", range(5)))
    assert told(flag) == ("noise-beats-gradient", "error", 0.25, 0.01, ("torchattacks:noise", "torchattacks:pgd"))
    assert "breaks 10 images, 10 of them" in flag.what
    (flag,) = found(range(3, 6), fake("pgd", range(5)))
    assert told(flag)[1:3] == ("warning", 0.025)
    assert found(range(5), fake("pgd", range(5))) == [] and found(range(6)) == []
    # More than one attack broke, but not more than another, and nothing alone.
    assert found(range(10), fake("pgd", range(5)), fake("apgd-ce", range(30))) == []
    (flag,) = found(range(10), fake("pgd", range(5)), fake("apgd-ce", range(5, 10)))
    assert flag.severity == "error" and flag.measured == 0  # more than either, though both together have them all
    # What an earlier attack has broken an attack of a cascade was spared: it counts as broken by it.
    cascade = fake("apgd-ce", range(5, 12))
    cascade = changed(cascade, outcomes=(results.SPARED,) * 5 + cascade.outcomes[5:], spared=5)
    assert found(range(10), fake("pgd", range(5)), cascade) == []
    for status in ("failed", "not run"):
        assert found(range(6), changed(fake("pgd", range(5)), status=status)) == []
    assert found(range(6), changed(fake("pgd", range(5)), eps="0.2")) == []


def test_black_boxes_that_find_more():
    def found(black, white=20, **options):
        square = fake("square", black, access="score", options={"queries": 500})
        return flags_of([fake("pgd", range(white), **options), square])

    (flag,) = found(range(20, 23))
    assert told(flag) == (
        "black-box-beats-white-box", "warning", 0.075, 0.05, ("torchattacks:square", "torchattacks:pgd"),
    )  # fmt: skip
    assert "break 3 of 40 images" in flag.what
    (flag,) = found(range(20, 25))
    assert told(flag)[1:4] == ("error", 0.125, 0.10)
    assert found(range(20, 22)) == []
    dlr = fake("apgd-dlr", range(20))
    for black, severity, limit in ((range(20, 23), "error", 0.05), (range(19, 21), None, None)):
        flags = flags_of([dlr, fake("square", black, access="score")])
        assert [(flag.severity, flag.threshold) for flag in flags] == ([(severity, limit)] if severity else [])
    assert flags_of([fake("square", range(9), access="score")]) == []  # no gradient attack to compare with


@pytest.mark.parametrize("family", ["autoattack", "cw", "deepfool", "fab"])
def test_what_climbs_another_loss(family):
    plain = fake("mine", range(5))
    assert diagnostics._another_loss(plain, family) and not diagnostics._another_loss(plain, "pgd")
    assert diagnostics._another_loss(changed(plain, options={"loss": "margin"}))
    assert not diagnostics._another_loss(changed(plain, options={"loss": "cross-entropy"}))
    assert diagnostics._another_loss(changed(plain, name="torchattacks:apgd-dlr"))


def test_minimal_attacks_against_those_of_one_radius():
    def found(minimal, fixed, **more):
        return flags_of([fake("deepfool", minimal, minimal=True), changed(fake("pgd", fixed), **more)])

    (flag,) = found(range(23), range(20))
    assert told(flag)[:4] == ("minimal-beats-fixed", "warning", 0.075, 0.05)
    assert flag.attacks == ("torchattacks:deepfool", "torchattacks:pgd") and "find 3 of 40 examples" in flag.what
    (flag,) = [flag for flag in found(range(25), range(20)) if flag.id == "minimal-beats-fixed"]
    assert told(flag)[1:4] == ("error", 0.125, 0.10)
    (flag,) = found(range(17), range(20))
    assert told(flag) == ("minimal-too-far", "info", 0.075, 0.05, ("torchattacks:deepfool",))
    assert "3 of 40 images" in flag.what
    (flag,) = found((), range(40))  # all of them: one grade alone, whatever the share
    assert told(flag)[1:4] == ("info", 1.0, 0.05)
    assert found(range(18), range(20)) == []
    scored = found(range(20, 30), range(20), access="score")  # nothing of one radius to compare with
    assert "minimal-beats-fixed" not in [flag.id for flag in scored]


def test_where_no_attack_ran_that_is_all():
    rows = [changed(fake("pgd", ()), status=status, robust_accuracy=None) for status in ("failed", "not run")]
    assert [flag.id for flag in flags_of(rows)] == ["no-attack-ran"]
    assert flags_of([rows[0], fake("pgd", range(4))]) == []


# -- the verdict


def test_the_verdict_is_about_the_main_norm():
    """In l2 everything is broken, so that masked gradients hide nothing there; what linf left is another question."""

    def case(norm, eps, broken):
        return results.WorstCase(
            norm=norm, eps=eps, attacks=("torchattacks:pgd",), broken=broken, unmoved=0,
            robust_accuracy=(40 - broken) / 40, interval=wilson(40 - broken, 40), note="", outcomes=(),
        )  # fmt: skip

    flag = diagnostics.flagged("zero-gradient", "So.", "error")
    for norm, kind in (("l2", "trustworthy"), ("linf", "not-trustworthy")):
        result = results.EvaluationResult(
            n=40, num_classes=10, seed=0, batch_size=40, norm=norm, eps="0.5", clean_correct=40, clean_accuracy=1.0,
            clean_interval=wilson(40, 40), attacks=(fake("pgd", range(40)),),
            worst_cases=(case("linf", "0.1", 20), case("l2", "0.5", 40)), flags=(flag,), probes="quick",
        )  # fmt: skip
        assert diagnostics.verdict(result).kind == kind


# -- the report's notes


def test_a_small_sample_is_said_with_its_interval():
    def noted(n, right):
        result = results.EvaluationResult(
            n=n, num_classes=10, seed=0, batch_size=n, norm="linf", eps="0.1", clean_correct=right,
            clean_accuracy=right / n, clean_interval=wilson(right, n), attacks=(), worst_cases=(), flags=(),
        )  # fmt: skip
        return diagnostics.notes(result)

    low, high = wilson(174, 200)
    small, fixed = noted(200, 174)
    assert told(small)[:4] == ("small-sample", "info", 200, 1000) and fixed.id == "not-adaptive"
    assert f"known to {100 * low:.1f} to {100 * high:.1f} %" in small.what
    assert [flag.id for flag in noted(1000, 900)] == ["not-adaptive"]
    assert [flag.id for flag in noted(999, 900)] == ["small-sample", "not-adaptive"]


def test_the_limit_of_the_recorded_accuracy_is_that_of_few_images():
    """None of 20 right, all of 20 recorded: the pooled share, one image of each kind added, is 21 of 42."""
    (flag,) = diagnostics.check_recorded(0, 20, 1.0, 20)
    assert flag.threshold == pytest.approx(0.02 + 3 * (0.25 * 2 / 20) ** 0.5)


def test_a_reason_names_the_one_attack_that_it_is_about():
    one, two = ("art:pgd",), ("art:pgd", "art:cw")
    named = [diagnostics._reason(diagnostics.flagged("outside-box", "It left.", attacks=who)) for who in (one, two, ())]
    assert named == ["outside-box (art:pgd: It left)", "outside-box (It left)", "outside-box (it left)"]
