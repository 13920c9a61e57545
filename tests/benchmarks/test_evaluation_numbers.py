"""What an evaluation counts, keeps and passes on, worked out by hand on planted attacks."""

import pytest
import torch
from planted_attacks import HONEST, L2, LINF, Planted, run, shift
from safetensors.torch import load_file
from scl_defense_benchmarks import diagnostics
from scl_defense_benchmarks import evaluate as module
from scl_defense_benchmarks.chunks import Target
from scl_defense_benchmarks.native import PGD

from scl_defense.threat import ThreatModel


def test_clean_accuracy_is_the_share_of_all_images(images, labels):
    labels[:10] = 1 - labels[:10]
    result = run(images, labels, HONEST)
    assert (result.n, result.clean_correct, result.clean_accuracy) == (40, 30, 0.75)
    assert result.worst_case.robust_accuracy == sum(code == 1 for code in result.attacks[0].outcomes) / 40


@pytest.mark.parametrize(("most", "kept"), [(2 * 640, True), (2 * 640 - 1, False), (0, False), (None, True)])
def test_examples_that_may_be_left_out_are_kept_up_to_their_bytes(images, labels, tmp_path, most, kept):
    """Two attacks on 40 images of 4 float32 pixels."""
    file = tmp_path / "examples.safetensors"
    run(images, labels, HONEST, Planted(shift(0.05)), examples_file=file, examples_most=most)
    assert file.exists() is kept


def test_one_search_counted_in_two_balls_leaves_its_examples_in_both(images, labels, tmp_path):
    """One image is wrong from the start: what is tried is not the first places."""
    labels[0] = 1 - labels[0]
    file, search = tmp_path / "examples.safetensors", Planted(shift(0.07), minimal=True)
    result = run(
        images, labels, (search, LINF), (search, ThreatModel("linf", "0.05")), examples_file=file, probes="none"
    )
    first, second = (load_file(file)[row.label] for row in result.attacks)
    assert torch.equal(first, second) and torch.equal(first[0], images[0])
    moved = (first - images)[:, 0, 0, 0].abs()
    assert moved[1:].tolist() == pytest.approx([0.07] * 39)
    assert [row.broken for row in result.attacks] == [19, 0]


@pytest.fixture
def probed(monkeypatch):
    """What the probes were asked for: (ball, which images are left)."""
    asked = []

    def note(network, images, labels, threat, rng, depth, robust):
        asked.append((str(threat), robust.tolist(), depth))
        return []

    monkeypatch.setattr(diagnostics, "probe", note)
    return asked


def test_the_probes_are_told_what_is_left(images, labels, probed):
    labels[0] = 1 - labels[0]
    result = run(images, labels, HONEST, probes="deep")
    left = [code != 2 for code in result.attacks[0].outcomes]
    assert probed == [("linf:0.1", left, "deep")] and sum(left) == 21


def broken_but(count, of=100):
    """Images of which an attack by 0.1 leaves ``count``."""
    images = torch.full((of, 1, 2, 2), 0.5)
    images[:, 0, 0, 0] = torch.tensor([0.45, 0.55]).repeat(of // 2)
    images[:count, 0, 0, 0] = torch.tensor([0.2, 0.8]).repeat(of // 2)[:count]
    return images, torch.tensor([0, 1]).repeat(of // 2)


@pytest.mark.parametrize(("left", "asked"), [(0, 0), (3, 0), (4, 1)])
def test_where_next_to_nothing_is_left_nothing_is_probed(probed, left, asked):
    result = run(*broken_but(left), HONEST, probes="quick")
    assert result.worst_case.robust_accuracy == left / 100 and len(probed) == asked


def test_the_probes_work_in_the_largest_ball_of_the_main_norm(images, labels, probed):
    weak = Planted(shift(0.01))
    run(*broken_but(0), HONEST, (weak, L2), probes="quick")
    assert probed == []  # what is left in another norm is another question
    small, large = ThreatModel("linf", "0.09"), ThreatModel("linf", "0.1")
    run(images, labels, (weak, small), (weak, large), (weak, L2), threat=large, probes="quick")
    assert [ball for ball, _, _ in probed] == ["linf:0.1"]


def test_what_does_not_fit_is_measured_with_the_images_that_attacks_hold(network, digits, monkeypatch):
    images, labels = digits[0][1400:1410], digits[1][1400:1410]
    ran = []
    monkeypatch.setattr(module, "peak_bytes", lambda work, device: ran.append(work()) or 1000)
    monkeypatch.setattr(module, "choose", lambda measure, *rest, **more: (measure(2), measure(8)))
    target = Target(network, images, labels, torch.ones(10, dtype=torch.bool))
    assert module.fitting(target, 1) == (1000 + 32 * 2 * 64 * 4, 1000 + 32 * 8 * 64 * 4) and len(ran) == 2


def test_what_came_too_late_is_counted(images, labels):
    result = run(images, labels, HONEST, PGD(steps=1), time_limit=1e-9)
    (flag,) = [flag for flag in result.flags if flag.id == "time-limit"]
    assert "2 of 2 attacks" in flag.what and flag.attacks == ("attack0", "attack1")
