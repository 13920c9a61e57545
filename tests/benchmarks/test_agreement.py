"""The same attack of two libraries and our own must give the same images; and all must reach known optima."""

import io
import json
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from scl_defense_benchmarks import art_adapter, hooks, native, torchattacks_adapter
from scl_defense_benchmarks.agreement import agree, render
from victim_networks import DigitsNet, Linear, accuracy

from scl_defense.errors import UserError
from scl_defense.plugins import PluginHost
from scl_defense.registry import Owner
from scl_defense.threat import ThreatModel
from scl_defense.types import component

MODULES = {"torchattacks": torchattacks_adapter, "art": art_adapter, "native": native}
SAME = 1e-6


def to_the_end(module, name, **options):
    """The libraries go on with an image that is fooled already; ours does when it is told to."""
    own = {"early_stop": False} if (module, name) == (native, "PGD") else {}
    return getattr(module, name)(**options, **own)


def made_by_all(attack_name, network, images, labels, threat, rng, **options):
    return {
        name: to_the_end(module, attack_name, **options)(network, images, labels, threat, rng())
        for name, module in MODULES.items()
    }


@pytest.mark.parametrize("eps", ["0.03", "0.2", "1"])
@pytest.mark.parametrize(
    ("attack", "options"),
    [
        ("FGSM", {}),
        ("PGD", {"random_start": False}),
        ("PGD", {"random_start": False, "steps": 7, "rel_step": 0.6}),
    ],
)
@pytest.mark.parametrize("count", [1, 16, 24])
def test_linf_attacks_agree_image_by_image(network, victims, rng, attack, options, eps, count):
    images, labels = victims[0][:count], victims[1][:count]
    made = made_by_all(attack, network, images, labels, ThreatModel("linf", eps), rng, **options)
    assert (made["native"] - images).abs().max() > 0.9 * float(eps) * images.max()  # something happened
    for name in ("torchattacks", "art"):
        worst = (made[name] - made["native"]).abs().flatten(1).amax(1)
        assert worst.max() <= SAME, f"{name} differs by {worst.tolist()}"


def test_linf_attacks_agree_on_colour_images_and_a_random_network(rng):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = DigitsNet(channels=3).eval()
    images = torch.rand(8, 3, 8, 8, generator=rng(6))
    labels = torch.arange(8) % 10
    for attack, options in (("FGSM", {}), ("PGD", {"random_start": False})):
        made = made_by_all(attack, network, images, labels, ThreatModel("linf", "8/255"), rng, **options)
        for name in ("torchattacks", "art"):
            assert (made[name] - made["native"]).abs().max() <= SAME


def test_the_step_counts_are_the_same(network, victims, rng):
    """N steps are N updates in each of them: after k small steps from the image, nothing is further than k steps."""
    images, labels = victims[0].clamp(0.3, 0.7), victims[1]
    threat = ThreatModel("linf", "0.2")
    for steps in (1, 3):
        made = made_by_all("PGD", network, images, labels, threat, rng, steps=steps, rel_step=0.1, random_start=False)
        for name, image in made.items():
            assert abs(float((image - images).abs().max()) - steps * 0.02) < SAME, name


@pytest.fixture
def linear(rng):
    """Two classes, 60 images well inside the box; the decision border is a plane."""
    weight, images = torch.randn(2, 36, generator=rng(1)), 0.4 + 0.2 * torch.rand(60, 1, 6, 6, generator=rng(2))
    network = Linear(weight, torch.zeros(2))
    with torch.no_grad():
        logits = network(images)
        network.bias[1] += (logits[:, 0] - logits[:, 1]).median() + 1e-3  # both classes occur
        labels = network(images).argmax(1)
    assert 10 < labels.sum() < 50
    normal = (weight[1 - labels] - weight[labels]).view_as(images)
    with torch.no_grad():
        logits = network(images)
    gap = (logits.amax(1) - logits.amin(1)).double()
    return network, images, labels, normal, gap


@pytest.mark.parametrize("library", MODULES)
def test_linf_optimum_of_a_linear_network(linear, rng, library):
    network, images, labels, normal, _ = linear
    best = images + 0.05 * normal.sign()
    module = MODULES[library]
    for attack in (module.FGSM(), to_the_end(module, "PGD"), to_the_end(module, "PGD", random_start=False)):
        made = attack(network, images, labels, ThreatModel("linf", "0.05"), rng())
        torch.testing.assert_close(made, best, atol=1e-6, rtol=0)


@pytest.mark.parametrize("library", MODULES)
def test_l2_optimum_of_a_linear_network(linear, rng, library):
    network, images, labels, normal, _ = linear
    best = images + 0.3 * normal / normal.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for random_start in (False, True):
        attack = to_the_end(MODULES[library], "PGD", steps=40, random_start=random_start)
        made = attack(network, images, labels, ThreatModel("l2", "0.3"), rng())
        torch.testing.assert_close(made, best, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "attack",
    [torchattacks_adapter.CW(steps=200), art_adapter.CW(steps=20, binary_search_steps=6)],
    ids=["torchattacks", "art"],
)
def test_cw_finds_the_nearest_point_of_a_linear_network(linear, rng, attack):
    network, images, labels, normal, gap = linear
    nearest = gap / normal.flatten(1).norm(dim=1).double()  # the distance to the plane
    threat = ThreatModel("l2", "1")
    made = attack(network, images, labels, threat, rng())
    assert accuracy(network, made, labels) == 0
    distance = threat.distance(images, made)
    assert (distance >= nearest - 1e-4).all()  # nothing is nearer than the plane
    assert (distance / nearest).median() <= 1.25
    assert (distance <= 1.6 * nearest + 0.05).all()  # very near the plane the length of a step decides


# -- the comparison itself


@pytest.fixture
def compare(host, network, digits):
    images, labels = digits[0][1400:1460], digits[1][1400:1460]

    def run(attacks, threat="linf:0.1", **settings):
        return agree(network, images, labels, ThreatModel.parse(threat), attacks=attacks, host=host, **settings)

    return run


def test_the_libraries_agree_on_fgsm_and_pgd(compare):
    result = compare(["fgsm", "pgd:random_start=false", "pgd:steps=10"])
    assert result.agree and 50 < result.attacked <= 60
    verdicts = {(one.attack, one.second): one.verdict for one in result.comparisons}
    for other in ("art", "torchattacks"):
        assert verdicts["fgsm", f"{other}:fgsm"] == verdicts["pgd:random_start=false", f"{other}:pgd"] == "equal"
        assert verdicts["pgd:steps=10", f"{other}:pgd"] == "agree"
    broken = [side.broken for side in result.sides["fgsm"]]
    assert min(broken) > 5 and len(set(broken)) == 1
    assert json.loads(json.dumps(result.to_json()))["agree"] is True
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(result))
    assert "native:pgd / art:pgd" in console.export_text()


def test_another_step_is_found_and_named(rng):
    """A library whose FGSM takes half the step, and one that raises."""

    @component
    class Half:
        norms: ClassVar[frozenset[str]] = frozenset({"linf"})
        minimal: ClassVar[bool] = False
        access: ClassVar[str] = "white-box"
        library: ClassVar[str] = "half"
        family: ClassVar[str] = "fgsm"

        def __call__(self, classifier, images, labels, threat, rng):
            made = native.FGSM()(classifier, images, labels, threat, rng)
            return images + 0.5 * (made - images)

    @component
    class Broken(Half):
        def __call__(self, *given):
            raise RuntimeError("no such device")

    host = PluginHost(files=[hooks.__file__], disabled=["scl-defense"])
    for name, what in (("half:fgsm", Half), ("broken:fgsm", Broken)):
        host["attack"].add(name, what, summary="wrong on purpose", owner=Owner("a test", "1", "here"))
    network, images = (
        Linear(torch.randn(2, 16, generator=rng(1)), torch.zeros(2)),
        torch.rand(20, 1, 4, 4, generator=rng(2)),
    )
    with torch.no_grad():
        labels = network(images).argmax(1)
    result = agree(network, images, labels, ThreatModel("linf", "0.05"), attacks="fgsm", host=host)
    assert not result.agree
    verdicts = {one.second: one.verdict for one in result.comparisons}
    assert verdicts == {"art:fgsm": "equal", "torchattacks:fgsm": "equal", "half:fgsm": "disagree"}
    (failed,) = [side for side in result.sides["fgsm"] if side.reason]
    assert failed.name == "broken:fgsm" and "no such device" in failed.reason and failed.broken is None


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ("art:fgsm", "names its library; give the attack alone, like fgsm"),
        ("square", "comes from 1 libraries; compare one of cw, fgsm, pgd"),
        ("cw", "works in l2, which needs a radius"),
        ("pgd:steps=none", "steps"),
    ],
)
def test_what_cannot_be_compared(compare, attacks, message):
    with pytest.raises(UserError, match=message):
        compare(attacks)
