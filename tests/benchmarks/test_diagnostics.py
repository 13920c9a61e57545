"""Every flag: raised by what it is for, and not by sound networks and batteries."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from planted_attacks import COUNT, Brightness, Planted, fake, first_pixel, flags_of, run
from scl_defense_benchmarks import diagnostics, probes, results
from scl_defense_benchmarks.battery import Plan, plan_attacks
from scl_defense_benchmarks.catalogue import CATALOGUE, LETTERS, flagged
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.planted import plant
from scl_defense_benchmarks.statistics import wilson
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


# -- between attacks


def on(places, size=0.1):
    """Flips the images at these places of a batch of all."""

    def make(classifier, images, labels, threat, rng):
        change = torch.full((len(images),), 0.01)
        change[places] = size
        return first_pixel(images, (1 - 2 * labels) * change)

    return make


@pytest.fixture
def near():
    """Every first pixel is 0.45 or 0.55: 0.1 flips each image."""
    made = torch.full((COUNT, 1, 2, 2), 0.5)
    made[:, 0, 0, 0] = torch.tensor([0.45, 0.55]).repeat(COUNT // 2)
    return made


def test_black_box_attacks_that_find_more_are_flagged(near, labels):
    def result(white, black, **options):
        found = run(
            near, labels, Planted(on(slice(0, white))), Planted(on(slice(0, black)), access="score"), batch_size=COUNT
        )
        return flags_of(found)

    # All gradient attacks have one loss here: 0.05 and 0.10 of 40 images, and never fewer than 3.
    assert result(20, 20) == result(20, 10) == result(20, 22) == {}
    assert result(20, 23) == {"black-box-beats-white-box": "warning"}
    assert result(20, 25) == {"black-box-beats-white-box": "error"}


def test_a_second_loss_makes_the_black_box_limit_stricter():
    rows = [fake("pgd", range(20)), fake("apgd-dlr", range(20)), fake("square", range(23), access="score")]
    flags = diagnostics.check_battery(rows, ["pgd", "apgd", "square"])
    assert [(flag.id, flag.severity) for flag in flags] == [("black-box-beats-white-box", "error")]
    assert flags[0].measured == 3 / 40 and flags[0].threshold == 0.05


def test_minimal_norm_against_fixed_eps(near, labels):
    def result(fixed, minimal):
        found = run(
            near, labels, Planted(on(slice(0, fixed))), Planted(on(slice(0, minimal)), minimal=True), batch_size=COUNT
        )
        return flags_of(found)

    assert result(20, 20) == result(20, 22) == {}
    assert result(20, 23) == {"minimal-beats-fixed": "warning"}
    assert result(20, 25) == {"minimal-beats-fixed": "error"}
    assert result(23, 20) == {"minimal-too-far": "info"}


def ids(rows, families):
    return [flag.id for flag in diagnostics.check_battery(rows, families)]


def test_two_libraries_that_disagree_are_flagged():
    one = fake("pgd", range(10))
    for broken, said in ((range(10), []), (range(14), []), (range(20), ["libraries-disagree"])):
        assert ids([one, fake("pgd", broken, library="art")], ["pgd", "pgd"]) == said
    # Ten other images instead of the first ten: as many, so no difference in what they say.
    assert ids([one, fake("pgd", range(10, 20), library="art")], ["pgd", "pgd"]) == []
    # Other settings, another attack, and the same library are other questions.
    other = {"steps": 40, "rel_step": 0.25}
    assert ids([one, fake("pgd", range(20), library="art", options=other)], ["pgd", "pgd"]) == []
    assert ids([one, fake("bim", range(20), library="art")], ["pgd", "bim"]) == []
    assert ids([one, fake("pgd", range(20))], ["pgd", "pgd"]) == []


def test_a_large_gap_between_pgd_and_autoattack_is_flagged():
    whole = fake("autoattack", range(20))
    for broken, said in ((range(17), []), (range(15), ["pgd-far-from-autoattack"])):
        assert ids([fake("pgd", broken), whole], ["pgd", "autoattack"]) == said
    best = [fake("pgd", range(5)), fake("pgd", range(18), library="native", options={"steps": 9})]
    assert ids([*best, whole], ["pgd", "pgd", "autoattack"]) == []


def test_an_empty_day_is_said():
    failed = dataclasses.replace(fake("pgd", ()), status="failed", robust_accuracy=None)
    assert ids([failed], ["pgd"]) == ["no-attack-ran"]


def test_the_recorded_clean_accuracy_is_compared():
    assert diagnostics.check_recorded(9000, 10_000, 0.91, 10_000) == []
    (flag,) = diagnostics.check_recorded(8600, 10_000, 0.91, 10_000)
    assert flag.id == "clean-accuracy-not-as-recorded" and flag.severity == "error"
    # sigma of a difference is sqrt(2) times that of one share: 3 of them, of 1000 images each, are 4.1 points at 10 %
    assert flag.threshold == pytest.approx(0.02 + 3 * (2 * 0.885 * 0.115 / 10_000) ** 0.5, abs=1e-4)
    assert diagnostics.check_recorded(86, 100, 0.91, 10_000) == []
    assert diagnostics.check_recorded(8600, 10_000, 0.91, 100) == []  # few validation images say as little
    assert diagnostics.check_recorded(97, 100, 1.0, 60) == []  # 1.0 of few is not certainty
    assert diagnostics.check_recorded(0, 100, 1.0, 1000) and diagnostics.check_recorded(9800, 10_000, 0.91, 1000)


def test_black_images_are_flagged(network, digit_images):
    images, labels = digit_images
    with torch.no_grad():
        flags = diagnostics.check_network(network, images / 255, labels, network(images / 255))
    assert {"image-range", "clean-accuracy-at-chance"} <= {flag.id for flag in flags}


def test_checks_of_the_network_pass_few_images(network, digit_images):
    """Before its first attack an evaluation should cost little beside the clean pass: on a large network that shows."""
    images, labels = (part.repeat(10, *(1,) * (part.dim() - 1)) for part in digit_images)
    passed = []
    with torch.no_grad():
        logits = network(images)
        hook = network.register_forward_hook(lambda module, given, output: passed.append(len(output)))
        assert diagnostics.check_network(network, images, labels, logits) == []
    hook.remove()
    assert len(images) >= 1000 and 0 < sum(passed) <= 4 * 16 + 64


# -- probes: what the zoo does not show


class Landscape(nn.Module):
    """Two classes; the margin against class 0 is a function of the first pixel, drawn by hand."""

    def __init__(self, height):
        super().__init__()
        self.height = height

    def forward(self, images):
        value = self.height(images[:, 0, 0, 0])
        return torch.stack([-value, value], dim=1)


def probed(network, count=60, eps="0.1", images=None, depth="quick"):
    images = torch.full((count, 1, 2, 2), 0.5) if images is None else images
    labels = torch.zeros(len(images), dtype=torch.long)
    found = diagnostics.probe(
        network, images, labels, ThreatModel("linf", eps), torch.Generator().manual_seed(0), depth
    )
    return {flag.id: flag.severity for flag in found}


def test_too_few_steps_are_seen(network, digit_images, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 3)
    monkeypatch.setattr(probes, "REL_STEP", 0.1)
    rng = torch.Generator().manual_seed(0)
    flags = diagnostics.probe(network, *digit_images, ThreatModel("linf", "0.1"), rng)
    found = {flag.id: flag for flag in flags}
    assert found["steps-not-converged"].severity == "error" == found["one-step-beats-many"].severity
    assert found["steps-not-converged"].measured > found["steps-not-converged"].threshold == 0.02


def test_restarts_that_matter_are_seen():
    """Four hills of the same width in the ball, one of which reaches above zero: a start finds it by luck."""

    def hills(pixel):
        place = (pixel - 0.4) / 0.05
        hill = place.floor()
        return 0.02 - (place - hill - 0.5).abs() * 0.1 - 0.5 * (hill != 2)

    assert probed(Landscape(hills))["restarts-matter"] == "warning"
    assert "restarts-matter" not in probed(Landscape(lambda pixel: 10 * (pixel - 0.55)))


def test_a_larger_ball_that_does_worse_is_seen():
    """A hill so narrow that the steps of the larger ball, a quarter of its radius, jump over it."""
    found = probed(Landscape(lambda pixel: 0.013 - (pixel - 0.55).abs()), eps="0.1")
    assert found["budget-not-monotone"] == "error"


def test_a_network_that_answers_otherwise_later_is_seen():
    class Sleeper(nn.Module):
        asked = 0

        def forward(self, images):
            self.asked += 1
            sign = 1 if self.asked <= 4 else -1
            return torch.stack([images.flatten(1).sum(1), -images.flatten(1).sum(1)], dim=1) * sign

    assert probed(Sleeper())["zero-eps-not-clean"] == "error"


def test_gradients_that_are_cut_or_not_finite_are_seen():
    class Cut(nn.Module):
        @torch.no_grad()
        def forward(self, images):
            return torch.stack([1 - images[:, 0, 0, 0], images[:, 0, 0, 0]], dim=1)

    assert probed(Cut(), images=torch.full((20, 1, 2, 2), 0.4)) == {"cut-gradient": "error"}
    root = Landscape(lambda pixel: (pixel - 0.5).abs().sqrt() + pixel - 0.6)
    assert probed(root)["not-finite-gradient"] == "error"


def test_a_probe_that_fails_is_said_and_stops_nothing(network, digit_images, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no backward pass for this operator")

    monkeypatch.setattr(probes, "ascend", fail)
    rng = torch.Generator().manual_seed(0)
    (flag,) = diagnostics.probe(network, *digit_images, ThreatModel("linf", "0.1"), rng)
    assert flag.id == "probe-failed" and "no backward pass" in flag.what and flag.severity == "warning"


def test_noise_alone_is_seen():
    """Flat but for a narrow well: the cross-entropy leads away from it, a random point falls in."""
    well = Landscape(lambda pixel: torch.where((pixel - 0.43).abs() < 0.015, 1.0, pixel - 2))
    found = probed(well, eps="0.1", images=torch.full((100, 1, 1, 1), 0.5))
    assert {"noise-beats-gradient", "black-box-beats-white-box"} & found.keys()


# -- the verdict


def concluded(rows, flags=(), clean=40):
    """The verdict on a result of these rows: all in one ball, worst case over all that are no control."""
    valid = [row for row in rows if row.access != "control"]
    broken = sum(any(row.outcomes[place] == results.BROKEN for row in valid) for place in range(40))
    left = clean - broken
    case = results.WorstCase(
        norm="linf",
        eps="0.1",
        attacks=tuple(row.label for row in valid),
        broken=broken,
        unmoved=0,
        robust_accuracy=left / 40 if valid else None,
        interval=wilson(left, 40) if valid else None,
        note="",
        outcomes=(),
    )
    result = results.EvaluationResult(
        n=40,
        num_classes=10,
        seed=0,
        batch_size=40,
        norm="linf",
        eps="0.1",
        clean_correct=clean,
        clean_accuracy=clean / 40,
        clean_interval=wilson(clean, 40),
        attacks=tuple(rows),
        worst_cases=(case,),
        flags=tuple(flags),
        probes="quick",
    )
    return diagnostics.verdict(result)


PGD_ROW, SQUARE_ROW = fake("pgd", range(20)), fake("square", range(20), access="score", options={"queries": 300})
FULL = [PGD_ROW, SQUARE_ROW]


def test_the_verdict_of_batteries():
    assert concluded(FULL).text == "trustworthy within the interval"
    assert concluded([fake("autoattack", range(20))]).kind == "trustworthy"
    for rows, reason in (
        ([PGD_ROW], "no attack without gradients"),
        ([fake("fgsm", range(20), options={}), SQUARE_ROW], "10 steps or more"),
        ([fake("pgd", range(20), options={"steps": 9}), SQUARE_ROW], "10 steps or more"),
        ([PGD_ROW, fake("square", range(20), access="score", options={"queries": 199})], "without gradients"),
        ([SQUARE_ROW], "no gradient attack"),
        ([PGD_ROW, fake("noise", range(5), access="control")], "no attack without gradients"),
    ):
        found = concluded(rows)
        assert found.kind == "upper-bound" and found.text.startswith("an upper bound, because ")
        assert reason in found.text
    nothing = concluded([fake("noise", range(5), access="control")])
    assert nothing.kind == "not-trustworthy" and nothing.text.startswith("not trustworthy, because ")


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=list(CATALOGUE))
def test_the_verdict_of_every_flag(entry):
    for severity in entry.severities:
        flag = flagged(entry.id, "Something is so.", severity)
        found = concluded(FULL, [flag])
        if severity == "info" or entry.about == "note":
            assert found.kind == "trustworthy"
        elif severity == "error" and entry.about != "attack":
            assert found.kind == "not-trustworthy"
        else:
            assert found.kind == "upper-bound"
        assert (entry.id in found.text) == (found.kind != "trustworthy")


def test_where_everything_is_broken_masking_is_no_question():
    rows = [fake("pgd", range(40))]
    assert concluded(rows).kind == "trustworthy"
    assert concluded(rows, [flagged("zero-gradient", "So.", "error")]).kind == "trustworthy"
    assert concluded(rows, [flagged("random-forward", "So.")]).kind == "not-trustworthy"


def test_the_gravest_reasons_come_first_and_the_rest_is_counted():
    flags = [flagged("zero-gradient", "So.", "error"), flagged("random-forward", "So."), flagged("cut-gradient", "So.")]
    flags += [flagged("full-range-not-zero", "So."), flagged("stepwise-output", "So.")]
    found = concluded(FULL, flags)
    assert found.reasons[0].startswith("random-forward") and len(found.reasons) == 4
    assert found.text.endswith("; and 1 more") and "stepwise" not in found.text


def test_the_same_fault_is_told_once():
    low, high = flagged("zero-gradient", "a", "warning"), flagged("zero-gradient", "b", "error")
    other = flagged("moved-nothing", "c", "error", attacks=["pgd"])
    assert diagnostics.merged([low, other, high, low]) == [high, other]


# -- planted examples


def posed(network, images, threat="linf", eps="0.1"):
    from scl_defense.guard import frozen

    with frozen(network):
        return plant(network, images, ThreatModel(threat, eps), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("norm", "eps"), [("linf", "0.1"), ("l2", "0.5")])
def test_planted_examples_are_found_through_honest_features(network, robust, digit_images, norm, eps):
    for honest in (network, robust):
        outcome = posed(honest, digit_images[0][:40], norm, eps)
        assert outcome.posed == 40
        assert outcome.found >= 0.9 * outcome.posed and outcome.chance <= 0.3 * outcome.posed


class Mistaken(nn.Module):
    """The right logits; in place of the gradient, that of the mirrored image."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        mirrored = images.flip(3)
        return self.inner(mirrored + (images - mirrored).detach())


@pytest.mark.slow
def test_a_misleading_gradient_misses_what_was_planted(network, digit_images):
    assert torch.equal(Mistaken(network)(digit_images[0]), network(digit_images[0]))
    outcome = posed(Mistaken(network), digit_images[0][:40])
    assert outcome.posed == 40 and outcome.found < probes.PLANTED * 40
    flags = diagnostics.probe(
        Mistaken(network), *digit_images, ThreatModel("linf", "0.1"), torch.Generator().manual_seed(0), "deep"
    )
    assert {flag.id: flag.severity for flag in flags}["planted-not-found"] == "warning"


def test_the_planted_point_is_in_the_ball_and_beyond_the_readout(monkeypatch):
    """On linear features every posed problem can be solved, and the ascent is what solves it."""
    linear = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(16, 3))
    images = torch.full((20, 1, 4, 4), 0.5)
    outcome = posed(linear, images)
    assert (outcome.posed, outcome.found) == (20, 20)
    # With no ascent at all, what is found is found by chance.
    monkeypatch.setattr("scl_defense_benchmarks.planted.ascend", lambda objective, images, *rest, **more: images)
    assert posed(linear, images).found == 0


def test_without_a_linear_head_nothing_is_planted():
    assert posed(Landscape(lambda pixel: pixel - 0.55), torch.full((4, 1, 2, 2), 0.5)) is None


# -- the page

PAGE = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text()


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=list(CATALOGUE))
def test_every_diagnostic_is_documented(entry):
    heading = f"### `{entry.id}` ({'/'.join(LETTERS[severity] for severity in entry.severities)})\n"
    assert PAGE.count(heading) == 1
    section = PAGE.split(heading)[1].split("\n#")[0]
    for text in (entry.threshold, entry.source, entry.why, entry.remedy):
        assert text in section, text


def test_every_published_check_has_its_line():
    for number in range(1, 30):
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| T{number} |")]
        named = {entry.id for entry in CATALOGUE.values() if f"T{number}" in entry.tests}
        assert named == set(re.findall(r"`([a-z-]+)`", line)) & CATALOGUE.keys(), line
        assert len(line.split("|")[2].strip()) > 10 and line.split("|")[3].strip()


def test_the_page_names_nothing_else():
    assert set(re.findall(r"^### `(.*?)`", PAGE, flags=re.MULTILINE)) == set(CATALOGUE)
