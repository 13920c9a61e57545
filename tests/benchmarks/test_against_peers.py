"""Against the official AutoAttack, Foolbox and adversarial-library themselves; each skipped where it is not installed.

``pip install "scl-defense[pyautoattack]" scl-defense-foolbox scl-defense-advlib``; their own parameters throughout.
"""

import sys
from pathlib import Path

import pytest
import torch
from scl_defense_benchmarks import agreement, art_adapter, hooks, torchattacks_adapter
from scl_defense_benchmarks.autoattack import AutoAttack
from scl_defense_benchmarks.verdicts import judge
from torch import nn

from scl_defense.plugins import PluginHost
from scl_defense.threat import ThreatModel

pytestmark = pytest.mark.slow
PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
PEERS = ("foolbox", "advlib")


@pytest.fixture
def peers(monkeypatch):
    for library in PEERS:
        monkeypatch.syspath_prepend(PLUGINS / f"scl-defense-{library}")
    yield [PLUGINS / f"scl-defense-{library}" / f"scl_defense_{library}" / "hooks.py" for library in PEERS]
    packages = {f"scl_defense_{library}" for library in PEERS}
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def right(network, digits, count):
    images, labels = digits[0][1400:], digits[1][1400:]
    with torch.no_grad():
        good = network(images).argmax(1) == labels
    return images[good][:count], labels[good][:count]


def official(network, images, labels, norm, eps, seed):
    """The official standard version's verdicts: bool (N,), True where it finds an example."""
    pyautoattack = pytest.importorskip("pyautoattack")
    attack = pyautoattack.AutoAttack(network, norm=norm, eps=eps, seed=seed, version="standard")
    made, _ = attack.run_standard_evaluation(images.clone(), labels.clone(), batch_size=len(images))
    with torch.no_grad():
        return network(made).argmax(1) != labels


@pytest.mark.parametrize(("norm", "eps"), [("linf", "0.12"), ("l2", "0.6")])
def test_autoattack_is_within_one_image_in_200_of_the_official_code(robust, digits, rng, norm, eps):
    """Robust accuracy of the whole sequence at the official parameters: 200 images, at most one apart."""
    images, labels = right(robust, digits, 200)
    assert len(images) == 200
    threat = ThreatModel(norm, eps)
    made = AutoAttack()(robust, images, labels, threat, rng(0))
    ours = judge(robust, images, labels, made, threat, minimal=False).fooled
    theirs = official(robust, images, labels, {"linf": "Linf", "l2": "L2"}[norm], threat.radius, seed=0)
    assert 20 < int(theirs.sum()) < 180  # neither hopeless nor unbreakable
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 1, (int(ours.sum()), int(theirs.sum()))
    assert int((ours ^ theirs).sum()) <= 2


def median_distance(attack, network: nn.Module, images, labels, norm, generator):
    """Median over all images; one that was not fooled is infinitely far."""
    made = attack(network, images, labels, ThreatModel(norm, "0.3"), generator)
    moved = (made - images).flatten(1)
    with torch.no_grad():
        fooled = network(made).argmax(1) != labels
    distance = {"linf": moved.abs().amax(1), "l2": moved.norm(dim=1), "l1": moved.abs().sum(1)}[norm]
    return float(torch.where(fooled, distance, torch.inf).median())


def of(peers, library, name):
    pytest.importorskip({"foolbox": "foolbox", "advlib": "adv_lib.attacks"}[library])
    return getattr(__import__(f"scl_defense_{library}.attacks", fromlist=[name]), name)()


@pytest.mark.parametrize("defended", [True, False])
@pytest.mark.parametrize(
    ("ours", "norm", "rivals"),
    [
        (torchattacks_adapter.CW, "l2", [("foolbox", "CW"), ("advlib", "CW")]),
        (torchattacks_adapter.DeepFool, "l2", [("foolbox", "DeepFool"), ("advlib", "DeepFool")]),
        (torchattacks_adapter.FAB, "l2", [("advlib", "FAB")]),
        (torchattacks_adapter.FAB, "linf", [("advlib", "FAB")]),
        (art_adapter.EAD, "l1", [("foolbox", "EAD")]),
    ],
)
def test_distances_are_not_worse_than_the_best_of_the_peers(
    robust, network, digits, peers, rng, defended, ours, norm, rivals
):
    """Median of 64 images: at most 5 % above the smallest of those that are installed."""
    target = robust if defended else network
    images, labels = right(target, digits, 64)
    mine = median_distance(ours(), target, images, labels, norm, rng(0))
    found = {}
    for library, name in rivals:
        try:
            found[library] = median_distance(of(peers, library, name), target, images, labels, norm, rng(0))
        except pytest.skip.Exception:
            continue
    if not found:
        pytest.skip("none of " + ", ".join(library for library, _ in rivals) + " is installed")
    assert 0 < mine <= 1.05 * min(found.values()), (mine, found)


def test_the_peers_agree_with_us_in_the_command(robust, digits, peers):
    """Foolbox joins ``agreement`` as a plugin: deterministic PGD equal, image by image."""
    pytest.importorskip("foolbox")
    host = PluginHost(files=[hooks.__file__, str(peers[0])], disabled=["scl-defense"])
    images, labels = right(robust, digits, 48)
    threat = ThreatModel("linf", "0.1")
    found = agreement.agree(robust, images, labels, threat, attacks="pgd:random_start=false", host=host)
    (sides,) = found.sides.values()
    assert {"torchattacks", "art", "native", "foolbox"} <= {side.library for side in sides if not side.reason}
    assert found.agree and all(one.differing == 0 for one in found.comparisons)
