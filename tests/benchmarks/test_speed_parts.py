"""Every part of benchmarks/speed once, tiny: each side has its row, and each attack its verified accuracy."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from speed import attacks, augmentation, bars, losses, networks, rivals, startup, steps
from speed.timing import NotInstalled

from scl_defense.plugins import default_host

SHORT = {
    "pgd-10": attacks.Task("pgd-10", "native:pgd:steps=2", steps=2),
    "restarts-5": attacks.Task("restarts-5", "native:pgd:steps=2:restarts=3", steps=2, restarts=3),
    "curve-8": attacks.Task("curve-8", "native:pgd:steps=2", "pgd-min:steps=2:refine=0", steps=2, curve=3),
    "cw": attacks.Task("cw", "cw:c=1:steps=20", steps=20, minimal=True),
    "apgd-100": attacks.shrunk(attacks.TASKS["apgd-100"], steps=4),
    "autoattack": attacks.shrunk(attacks.TASKS["autoattack"], steps=4, targets=2, queries=10),
    "standard": attacks.Task(
        "standard",
        "noise,fgsm,pgd-l2:eps={l2},cw:eps={l2}:steps=5,apgd-ce:steps=4,square:queries=10",
        steps=4,
        queries=10,
        targets=2,
    ),
}
PEERS = {
    "pgd-10": {"torchattacks", "art", "foolbox", "adv-lib"},
    "restarts-5": {"torchattacks", "art", "foolbox", "adv-lib"},
    "curve-8": {"torchattacks", "art", "foolbox", "adv-lib"},
    "cw": {"torchattacks", "art", "foolbox", "adv-lib"},
    "apgd-100": {"torchattacks", "art", "adv-lib", "pyautoattack"},
    "standard": {"torchattacks", "art"},
    "autoattack": {"torchattacks", "art", "pyautoattack"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The robust small CNN on digits, an epoch or two; and where it is kept."""
    return tmp_path_factory.mktemp("speed")


def options(work, *tasks):
    plan = {bars.CNN: tasks}
    return attacks.Options(work=work, seconds=1.0, repeats=1, most=24, least=16, plan=plan, tiny=True, tasks=SHORT)


def check_attack_rows(rows, task):
    sides = {row["side"]: row for row in rows if row["kind"] == "attack" and row["task"] == task}
    ours = {side for side in sides if side.startswith("ours")}
    searches = {f"ours {precision}, one search" for precision in ("auto", "fp32")} if task == "curve-8" else set()
    assert ours - {"ours auto"} - searches == {"ours fp32"} and searches <= ours
    assert set(sides) - ours == PEERS[task]
    for name, row in sides.items():
        if row["status"].startswith("not installed"):
            assert not name.startswith("ours") and name not in ("torchattacks", "art")
            continue
        assert row["status"] == "ok", (name, row["status"])
        assert 0 <= row["robust"] <= 1 and row["images_per_s"] > 0 and len(row["seconds"]) == 1
        if name != "ours fp32":
            difference, low, high = row["ours fp32 minus this"]
            assert low <= difference <= high
        if name.startswith("ours"):
            assert row["forwards"] >= row["backwards"] > 0
            assert row["share"] > 0 and row["share_side_by_side"] > 0
    return sides


def test_every_side_of_an_attack_has_a_verified_accuracy(trained):
    kept = []
    rows = attacks.measure(
        options(trained, "curve-8", "pgd-10", "restarts-5"),
        keep=lambda rows: kept.append({r.get("task") for r in rows}),
    )
    short_first = [{None, "pgd-10"}, {None, "pgd-10", "restarts-5"}, {None, "pgd-10", "restarts-5", "curve-8"}]
    assert kept == short_first  # what is done is kept, should the run be stopped
    (case,) = [row for row in rows if row["kind"] == "case"]
    assert case["case"] == bars.CNN and case["data"] == "digits" and case["right"] == 24
    assert {row["floor"] for row in rows if row["kind"] == "floor" and row["status"] == "ok"} == {
        f"{kind} {precision}" for kind in ("loop", "side by side") for precision in ("fp32", "bf16")
    }
    for task in ("pgd-10", "restarts-5", "curve-8"):
        check_attack_rows(rows, task)
    curve = check_attack_rows(rows, "curve-8")
    for side in ("ours fp32", "ours fp32, one search", "torchattacks"):
        points = curve[side]["robust_by_ball"]
        assert len(points) == 3 and points[0] >= points[-1]
    passes = [curve[side]["backwards"] for side in ("ours fp32, one search", "ours fp32")]
    assert passes[0] < 1.5 * passes[1], "a search is counted in every ball, and ran once"
    assert "ours fp32, one search minus this" in curve["torchattacks"]
    assert any(one.state != "not measured" for one in bars.verdicts({"attacks": rows}))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cw", "apgd-100", "standard", "autoattack"])
def test_every_longer_task_too(trained, task):
    check_attack_rows(attacks.measure(options(trained, task)), task)


def test_an_example_outside_the_ball_or_without_effect_is_no_success(trained):
    """What a peer returns is checked by us: its own opinion, and its norm, count for nothing."""
    recipe = next(recipe for recipe in networks.RECIPES if recipe.name == bars.CNN)
    one = networks.case(recipe, work=trained, root=None, host=default_host(), most=24, tiny=True)
    images, labels = one.first(24)
    ball = SHORT["pgd-10"].balls("0.1", "1.0")[0]
    torch.manual_seed(0)
    noise = torch.rand_like(images)  # fools, far outside the ball
    with torch.no_grad():
        assert (one.network(noise).argmax(1) != labels).sum() > 12
    timing = attacks.Timing([1.0], [[noise, images]])
    assert attacks._outcomes("peer", timing, one, images, labels, [ball]) == ["1" * 24]
    inside = images + 0.1 * torch.sign(torch.rand_like(images) - 0.5)
    timing = attacks.Timing([1.0], [[inside.clamp(0, 1), noise]])
    with torch.no_grad():
        fooled = one.network(inside.clamp(0, 1)).argmax(1) != labels
    assert attacks._outcomes("peer", timing, one, images, labels, [ball]) == [
        "".join("0" if wrong else "1" for wrong in fooled.tolist())
    ]


def test_a_peer_that_is_not_installed_is_a_row(trained, monkeypatch):
    def missing(module, distribution):
        raise NotInstalled(f"pip install {distribution}")

    monkeypatch.setattr(rivals, "imported", missing)
    rows = attacks.measure(options(trained, "pgd-10"))
    sides = {row["side"]: row["status"] for row in rows if row["kind"] == "attack"}
    assert sides["ours auto"] == sides["ours fp32"] == "ok"
    assert {sides[name].partition(":")[0] for name in PEERS["pgd-10"]} == {"not installed"}


def test_every_training_step_has_its_passes_and_its_floor():
    world = steps.World("small-cnn", "digits", "small-cnn", 16)
    wanted = ("ce", "ce on pgd-10", "supcon 3 clean views", "supcon + stored", "supcon + contrastive-pgd-online")
    methods = tuple(method for method in steps.METHODS if method.name in wanted)
    given = steps.Options(seconds=1.0, repeats=1, worlds=(world,), methods=methods, precisions=("fp32",), limit=48)
    rows = {row["method"]: row for row in steps.measure(given)}
    assert set(rows) == set(wanted) and all(row["status"] == "ok" for row in rows.values())
    assert [rows[name]["backwards"] for name in wanted] == [1, 11, 3, 3, 13]
    assert all(rows[name]["over floor"] > 0 for name in wanted)
    for name in ("ce on pgd-10", "supcon + contrastive-pgd-online"):
        assert rows[name]["generator over floor"] > 0
    assert rows["supcon + stored"]["over supcon 3 clean views"] > 0


def test_every_loss_has_its_peers_and_the_same_gradient():
    rows = losses.measure(losses.Options(seconds=1.0, repeats=1, rows=(32,), dim=8))
    assert {(row["loss"], row["side"]) for row in rows} == {
        *(("supcon", side) for side in losses.SUPCON),
        *(("ntxent", side) for side in losses.NTXENT),
    }
    for row in rows:
        if row["status"].startswith("not installed"):
            assert row["side"] == "lightly"
        elif row["side"] != "ours":
            assert row["status"] == "ok" and row["gradient_difference"] < 1e-4 and row["over ours"] > 0


def test_a_peak_of_memory_is_seen():
    found = losses.peak(lambda: torch.ones(64 << 18).sum())  # 64 MiB
    if found is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 60 < found < 90


def test_every_augmentation_has_its_peers():
    given = augmentation.Options(seconds=1.0, repeats=1, images=8, batch=8, shapes=((3, 16),), loaders=(0,), step=False)
    rows = augmentation.measure(given)
    sides = {"ours", "torchvision v2, DataLoader of 0 workers", "kornia"}
    assert {(row["recipe"], row["side"]) for row in rows} == {
        (kind, side) for kind in ("weak", "simclr") for side in sides
    }
    for row in rows:
        assert row["status"] == "ok" or (row["side"] == "kornia" and row["status"].startswith("not installed"))


def test_startup_checkpoints_and_report_are_timed():
    given = startup.Options(seconds=1.0, repeats=1, images=64, width=4, commands=("python alone",))
    rows = startup.measure(given)
    assert [row["kind"] for row in rows] == ["start-up", *["checkpoint"] * 4, "report"]
    assert {row["status"] for row in rows} == {"ok"}
