"""Each attack keeps the contract and is found by name; a missing library is one line."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from scl_defense_foolbox import hooks
from torch import nn

from scl_defense import ThreatModel
from scl_defense.testing import check_attack

FOUND = {}
hooks.register_attacks(lambda name, target, *, summary: FOUND.update({name.partition(":")[2]: target}))
QUICK = {"cw": {"steps": 60, "binary_search_steps": 5}, "ead": {"steps": 60, "binary_search_steps": 5}}
EXCUSED: dict[str, set[str]] = {}


def attack(name, **options):
    module, _, target = FOUND[name].partition(":")
    return getattr(importlib.import_module(module), target)(**{**QUICK.get(name, {}), **options})


@pytest.fixture
def library():
    return pytest.importorskip("foolbox", reason="foolbox is not installed")


@pytest.mark.parametrize("name", list(FOUND))
def test_it_keeps_the_contract(name, library):
    results = check_attack(attack(name), f"foolbox:{name}")
    failed = {result.check: result.message for result in results if not result.passed}
    assert failed.keys() == EXCUSED.get(name, set()), failed


def test_the_network_comes_back_as_it_was(library):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(6, 1, 4, 4)
    labels = network(images).argmax(1)
    threat = ThreatModel("linf", "0.5")
    made = attack("pgd")(network, images, labels, threat, torch.Generator().manual_seed(0))
    assert (network(made).argmax(1) != labels).all()  # a linear network falls in so large a ball
    assert network.training and all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_readme_names_every_attack():
    page = (Path(__file__).parents[1] / "README.md").read_text()
    assert set(re.findall(r"`foolbox:([\w-]+)`", page.partition("| name |")[2])) - {""} == set(FOUND)
