"""Every registered attack, of each library: it works, it keeps the rules, and it takes nothing from the caller."""

import copy
import dataclasses
import importlib

import pytest
import torch
from scl_defense_benchmarks import art_adapter, hooks, native, torchattacks_adapter
from scl_defense_benchmarks.battery import plan_attacks
from torch import nn
from victim_networks import accuracy

from scl_defense.config import make, options_of
from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel
from scl_defense.types import Attack

TARGETS: dict[str, str] = {}
hooks.register_attacks(lambda name, target, *, summary: TARGETS.update({name: target}))
# One name for each class: that the others are the same class is a test of its own.
NAMES = list({target: name for name, target in reversed(TARGETS.items())}.values())[::-1]
NAMES.remove("transfer")  # it needs a second network: it has tests of its own
RADII = {"linf": "0.3", "l2": "1.5", "l1": "8", "l0": "5"}
# Options under which the slow ones are quick; the defaults are used in the tests of the evaluation.
QUICK = {
    "cw": {"steps": "120"},
    "torchattacks:cw": {"steps": "120"},
    "art:cw": {"steps": "10", "binary_search_steps": "4"},
    "apgd-ce": {"steps": "25"},
    "apgd-dlr": {"steps": "25"},
    "apgd-t": {"steps": "25", "targets": "3"},
    "fab-t": {"steps": "25", "targets": "3"},
    "square": {"queries": "300"},
    "autoattack": {"steps": "10", "targets": "2", "queries": "50"},
    "eot": {"steps": "15", "draws": "2"},
    "sparsefool": {"steps": "10"},
    "onepixel": {"steps": "4", "population": "20"},
    "pixle": {"restarts": "20", "steps": "5"},
    "apgd-l1": {"steps": "30"},
    "ead": {"steps": "15", "binary_search_steps": "4"},
    "jsma": {"targets": "1"},
    "simba": {"steps": "300"},
    "hsj": {"steps": "2", "queries": "100", "first_queries": "50"},
    "boundary": {"steps": "15"},
    "spatial": {"grid": "3"},
}
LIBRARY_NAMES = ["fgsm", "pgd", "cw", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "deepfool", "mifgsm"]
LIBRARY_NAMES += ["eot", "sparsefool", "onepixel", "pixle"]
ART_NAMES = ["ead", "jsma", "simba", "hsj", "boundary", "spatial"]
# Quick as they are here, these promise no success on every image.
WEAK = {"noise", "onepixel", "pixle", "jsma"}


def class_of(name):
    module, _, cls = TARGETS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


CASES = [(name, norm) for name in NAMES for norm in sorted(class_of(name).norms)]


def build(host, name):
    return make(host, "attack", name, QUICK.get(name, {}))


def test_the_registered_names_are_the_promised_ones():
    promised = [*LIBRARY_NAMES, *(f"torchattacks:{name}" for name in LIBRARY_NAMES), "autoattack", "noise"]
    promised += ["native:fgsm", "native:pgd", "pgd-min", "apgd-l1", "transfer", *ART_NAMES]
    promised += [f"art:{name}" for name in ("fgsm", "pgd", "cw", *ART_NAMES)]
    assert sorted(TARGETS) == sorted(promised)


@pytest.mark.parametrize("name", [*LIBRARY_NAMES, *ART_NAMES])
def test_a_bare_name_is_the_recommended_attack_of_a_library(host, name):
    library = "art" if name in ART_NAMES else "torchattacks"
    assert host["attack"].get(name) is host["attack"].get(f"{library}:{name}")
    assert f"{library}:{name}" in host["attack"].entry(name).summary


@pytest.mark.parametrize("name", NAMES)
def test_it_is_an_attack_with_documented_options(host, name):
    attack = make(host, "attack", name)
    assert isinstance(attack, Attack)
    assert attack.norms <= set(RADII)
    assert all(option.description for option in options_of(type(attack)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.steps = 3


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize("count", [1, 7])
def test_it_keeps_the_rules_and_does_its_job(host, network, victims, rng, name, norm, count):
    images, labels = victims[0][:count], victims[1][:count]
    before = images.clone(), labels.clone()
    threat, attack = ThreatModel(norm, RADII[norm]), build(host, name)
    made = attack(network, images, labels, threat, rng())
    assert made.shape == images.shape and made.dtype == torch.float32 and not made.requires_grad
    assert made.is_contiguous()
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert bool(made.isfinite().all()) and float(made.min()) >= -1e-6 and float(made.max()) <= 1 + 1e-6
    if not attack.minimal:
        assert bool((threat.distance(images, made) <= threat.tolerance()).all())
    if name not in WEAK and (norm != "l1" or attack.minimal):
        assert accuracy(network, made, labels) <= 2 / 7


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_the_result_depends_on_the_passed_generator_alone(host, network, victims, rng, name, norm):
    images, labels = victims[0][:4], victims[1][:4]
    threat, attack = ThreatModel(norm, RADII[norm]), build(host, name)
    first = attack(network, images, labels, threat, rng(5))
    torch.manual_seed(99)
    assert torch.equal(first, attack(network, images, labels, threat, rng(5)))


@pytest.mark.parametrize("name", ["pgd", "art:pgd", "native:pgd", "noise", "apgd-ce", "apgd-t", "square"])
def test_another_generator_gives_another_random_start(host, network, victims, rng, name):
    images, labels = victims[0][:4], victims[1][:4]
    threat, attack = ThreatModel("linf", "0.1"), build(host, name)
    assert not torch.equal(*(attack(network, images, labels, threat, rng(seed)) for seed in (1, 2)))


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if not class_of(case[0]).minimal])
def test_radius_zero_is_the_identity(host, network, victims, rng, name, norm):
    # Raw: PGDL2 of torchattacks returns NaN here, FastGradientMethod of ART raises.
    images, labels = victims[0][:3], victims[1][:3]
    made = build(host, name)(network, images, labels, ThreatModel(norm, "0"), rng())
    assert torch.equal(made, images)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_no_image_gives_no_image(host, network, victims, rng, name, norm):
    made = build(host, name)(network, victims[0][:0], victims[1][:0], ThreatModel(norm, RADII[norm]), rng())
    assert made.shape == (0, 1, 8, 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_plain_layers_in_training_mode_and_under_no_grad(host, network, victims, rng, name):
    """nn.Sequential (ART calls its layers one by one), channels last, int32 labels, gradients switched off."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        layers[1].weight.copy_(torch.randn(10, 64, generator=torch.Generator().manual_seed(3)))
        layers[1].bias.zero_()
        images = victims[0][:3].clamp(0.05, 0.95).contiguous(memory_format=torch.channels_last)
        labels = layers(images).argmax(1).int()
        layers.train()
        attack = build(host, name)
        norm = min(attack.norms - {"l0"}, default="l0")
        made = attack(layers, images, labels, ThreatModel(norm, {"l0": "5", "l1": "6"}.get(norm, "0.4")), rng())
    assert layers.training and made.shape == images.shape
    if attack.access == "white-box" and name != "jsma":
        assert accuracy(layers, made, labels) == 0


@pytest.mark.parametrize("name", ["fgsm", "art:fgsm", "cw", "art:cw", "deepfool", "autoattack"])
def test_a_network_without_parameters_works(host, rng, name):
    class Parity(nn.Module):
        def forward(self, images):
            return torch.stack([images.flatten(1).sum(1), images.flatten(1)[:, ::2].sum(1) * 2], dim=1)

    images = torch.rand(4, 1, 4, 4, generator=rng(1))
    labels = Parity()(images).argmax(1)
    made = build(host, name)(Parity(), images, labels, ThreatModel("linf", "0.3"), rng())
    assert accuracy(Parity(), made, labels) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if class_of(name).library != "native"])
def test_a_network_that_returns_a_tuple_is_a_clear_error(host, network, victims, rng, name):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, images):
            return self.inner(images), images

    attack = build(host, name)
    norm = min(attack.norms)
    threat = ThreatModel(norm, RADII[norm])
    with pytest.raises(UserError, match=r"returns a tuple; an attack needs one tensor of logits"):
        attack(Pair(), *victims, threat, rng())


@pytest.mark.parametrize("name", ["torchattacks:cw", "art:cw"])
def test_a_failed_search_returns_the_untouched_image(host, victims, rng, name):
    """Not the start 1e-4 beside it: a failure that looks like a small perturbation would be counted as an attempt."""

    class Stubborn(nn.Module):
        def forward(self, images):
            return torch.tensor([[5.0, 0.0]]) + 1e-3 * images.flatten(1).sum(1, keepdim=True)

    images = victims[0][:3]  # many of their pixels are exactly 0 or 1
    made = build(host, name)(Stubborn(), images, torch.zeros(3, dtype=torch.long), ThreatModel("l2", "1"), rng())
    assert torch.equal(made, images)


def test_cw_keeps_the_smallest_success_over_c(network, victims, rng):
    threat, images, labels = ThreatModel("l2", "1"), *victims

    def distances(*c):
        attack = torchattacks_adapter.CW(c=c, steps=100)
        made = attack(network, images, labels, threat, rng())
        with torch.no_grad():
            fooled = network(made).argmax(1) != labels
        return torch.where(fooled, threat.distance(images, made), torch.inf)

    weak, strong, both = distances(0.1), distances(30.0), distances(0.1, 30.0)
    assert not weak.isfinite().all() and strong.isfinite().all()  # neither alone is enough
    assert (weak < strong).any()
    torch.testing.assert_close(both, torch.minimum(weak, strong))


def test_the_worst_noise_is_the_worst_of_its_draws(network, victims, rng):
    threat, (images, labels) = ThreatModel("linf", "0.3"), victims
    with torch.no_grad():
        shared = rng(3)
        points = [(threat.random_corner if draw % 2 else threat.random_start)(images, shared) for draw in range(6)]
        margins = torch.stack([native.margin(network(point), labels) for point in points])
        made = native.Noise(draws=6)(network, images, labels, threat, rng(3))
        assert torch.equal(native.margin(network(made), labels), margins.amax(0))


def test_the_margin_loss_moves_where_cross_entropy_is_flat(network, victims, rng):
    """Logits times 1000: the softmax is exactly one-hot in float32 and the gradient of cross-entropy exactly zero."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(network)

        def forward(self, images):
            return self.inner(images) * 1000

    images, labels = victims
    threat, scaled = ThreatModel("linf", "0.3"), Scaled().eval()
    flat = native.PGD(random_start=False)(scaled, images, labels, threat, rng())
    steep = native.PGD(random_start=False, loss="margin")(scaled, images, labels, threat, rng())
    assert accuracy(scaled, flat, labels) > 0.5 > 0.1 > accuracy(scaled, steep, labels)


def test_a_device_that_art_does_not_know_is_refused(network, rng):
    images = torch.empty(2, 1, 8, 8, device="meta")
    with pytest.raises(UserError, match="ART runs on cpu and cuda, not on meta"):
        art_adapter.FGSM()(network, images, torch.zeros(2, dtype=torch.long), ThreatModel("linf", "0.1"), rng())


def test_options_are_checked_with_the_nearest_name(host):
    threat = ThreatModel("linf", "0.1")
    with pytest.raises(UserError, match="did you mean 'steps'"):
        plan_attacks("pgd:step=3", host=host, threat=threat)
    with pytest.raises(UserError, match="steps"):
        plan_attacks("pgd:steps=0", host=host, threat=threat)
    with pytest.raises(UserError, match="'c'"):
        plan_attacks("cw:c=-1:eps=1", host=host, threat=threat)
