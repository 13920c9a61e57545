"""Each attack keeps the contract and is found by name; a missing library is one line."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from scl_defense_advlib import hooks
from torch import nn

from scl_defense import ThreatModel
from scl_defense.testing import check_attack

FOUND = {}
hooks.register_attacks(lambda name, target, *, summary: FOUND.update({name.partition(":")[2]: target}))
QUICK = {"cw": {"steps": 60, "binary_search_steps": 5}, "ddn": {"steps": 60}, "fmn": {"steps": 60},
         "fab": {"steps": 20}, "apgd-l1": {"steps": 40}, "sigma-zero": {"steps": 100}}  # fmt: skip
# Under L2 it stops on the plane itself, where rounding decides whether the image counts; more steps change nothing.
EXCUSED: dict[str, set[str]] = {"fmn": {"linear-classifier"}}


def attack(name, **options):
    module, _, target = FOUND[name].partition(":")
    return getattr(importlib.import_module(module), target)(**{**QUICK.get(name, {}), **options})


@pytest.fixture
def library():
    return pytest.importorskip("adv_lib.attacks", reason="adv-lib is not installed")


@pytest.mark.parametrize("name", [name for name in FOUND if name != "sigma-zero"])
def test_it_keeps_the_contract(name, library):
    results = check_attack(attack(name), f"advlib:{name}")
    failed = {result.check: result.message for result in results if not result.passed}
    assert failed.keys() == EXCUSED.get(name, set()), failed


def test_the_network_comes_back_as_it_was(library):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(6, 1, 4, 4)
    labels = network(images).argmax(1)
    threat = ThreatModel("l2", "3")
    made = attack("ddn")(network, images, labels, threat, torch.Generator().manual_seed(0))
    assert (network(made).argmax(1) != labels).all()  # a linear network falls in so large a ball
    assert network.training and all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_readme_names_every_attack():
    page = (Path(__file__).parents[1] / "README.md").read_text()
    assert set(re.findall(r"`advlib:([\w-]+)`", page.partition("| name |")[2])) - {""} == set(FOUND)
