"""RobustBench's names, with its package replaced by one of the same interface: no download, no network."""

import hashlib
import sys
import types
from pathlib import Path

import pytest
import torch
from scl_defense_robustbench import hooks
from torch import nn

from scl_defense import UserError
from scl_defense.plugins import PluginHost

ABOUT = {"classes": tuple("0123456789"), "image_shape": (3, 8, 8)}


@pytest.fixture
def asked(monkeypatch):
    """What load_model was asked for; it knows one network."""
    calls = []

    def load_model(model_name, model_dir="./models", dataset="cifar10", threat_model="Linf", **_):
        calls.append((model_name, dataset, threat_model))
        if model_name != "Carmon2019Unlabeled":
            raise KeyError(model_name)
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

    package, utils = types.ModuleType("robustbench"), types.ModuleType("robustbench.utils")
    package.utils, utils.load_model = utils, load_model
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    return calls


@pytest.fixture(scope="module")
def host():
    return PluginHost(files=[hooks.__file__], disabled=["scl-defense-robustbench"])


def opened(host, name, **options):
    return host.call("load_checkpoint", path=Path(name), options={**ABOUT, **options})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("robustbench:Carmon2019Unlabeled", ("Carmon2019Unlabeled", "cifar10", "Linf")),
        ("robustbench:cifar10:L2:Carmon2019Unlabeled", ("Carmon2019Unlabeled", "cifar10", "L2")),
    ],
)
def test_a_name_is_the_network_that_robustbench_gives(host, asked, name, expected):
    loaded = opened(host, name)
    images = torch.rand(4, 3, 8, 8)
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert torch.equal(loaded.network(images), twin(images))
    assert asked == [expected] and loaded.meta["robustbench"]["model"] == expected[0]
    state = twin.state_dict()
    digest = hashlib.sha256(
        b"".join(k.encode() + b"torch.float32" + v.numpy().tobytes() for k, v in state.items())
    ).hexdigest()
    assert loaded.sha256 == digest


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("robustbench:Carmon2020", {}, "has no network 'Carmon2020' for cifar10 and Linf"),
        ("robustbench:mnist:Linf:X", {}, "no data set 'mnist'; it has cifar10"),
        ("robustbench:cifar10:L7:X", {}, "no threat model 'L7'"),
        ("robustbench:cifar10:X", {}, "must be robustbench:NAME or"),
        ("robustbench:Carmon2019Unlabeled", {"classes": None, "image_shape": None}, "--data"),
        ("robustbench:Carmon2019Unlabeled", {"classes": ("a", "b")}, "no data set of 2 classes"),
        ("robustbench:Carmon2019Unlabeled", {"mean": (0.5, 0.5, 0.5)}, "leave mean out"),
    ],
)
def test_mistakes_are_one_line(host, asked, name, options, message):
    with pytest.raises(UserError, match=message) as error:
        opened(host, name, **options)
    assert "\n" not in str(error.value)


def test_a_stale_robustbench_is_named(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))  # no utils in it
    monkeypatch.delitem(sys.modules, "robustbench.utils", raising=False)
    with pytest.raises(UserError, match="torchattacks"):
        opened(host, "robustbench:Carmon2019Unlabeled")


def test_other_files_are_left_to_others(tmp_path):
    assert hooks.load_checkpoint(path=tmp_path / "best.pt", options=ABOUT) is None
