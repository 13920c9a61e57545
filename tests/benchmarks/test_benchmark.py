"""``benchmark``: from a checkpoint or a network and the name of a data set to a result on disk."""

import hashlib
import json

import pytest
import torch
from scl_defense_benchmarks import hooks
from scl_defense_benchmarks.benchmark import benchmark
from victim_networks import DigitsNet

import scl_defense
from scl_defense.checkpoint import save
from scl_defense.errors import UserError
from scl_defense.models import Network

# One file: a data set made from scikit-learn's digits, and an encoder. Third parties write exactly this.
PLUGIN = """
from typing import ClassVar
import numpy as np
from sklearn.datasets import load_digits
from torch import nn
from scl_defense import hookimpl
from scl_defense.types import ImageArrays, component

@component
class Scans:
    classes: int = 10
    flip: ClassVar[bool] = False
    budgets: ClassVar[dict[str, str]] = {"linf": "0.2", "l2": "0.5"}

    def load(self, split, root):
        bunch = load_digits()
        images = np.round(bunch.images * 255 / 16).astype(np.uint8)[..., None]
        part = slice(0, 1400) if split == "train" else slice(1400, None)
        names = tuple(str(label) for label in range(10)) + tuple("x" * n for n in range(1, self.classes - 9))
        return ImageArrays(images[part], bunch.target[part], names)

@component
class Wide:
    flip: ClassVar[bool] = False
    budgets: ClassVar[dict[str, str]] = {}

    def load(self, split, root):
        return ImageArrays(np.zeros((20, 16, 16, 1), np.uint8), np.arange(20) % 10, tuple("0123456789"))

class Encoder(nn.Sequential):
    feature_dim = 32

@component
class Flat:
    def __call__(self, image_shape):
        return Encoder(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())

@hookimpl
def register_datasets(register):
    register("scans", Scans, summary="digits")
    register("wide-scans", Wide, summary="blank images of 16 pixels")

@hookimpl
def register_models(register):
    register("flat", Flat, summary="one hidden layer")
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugins") / "scans.py"
    path.write_text(PLUGIN)
    return (hooks.__file__, str(path))


@pytest.fixture(autouse=True)
def only_these_plugins(monkeypatch, no_shell_settings):
    monkeypatch.setenv("SCL_DEFENSE_DISABLE_PLUGINS", "scl-defense")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, digits, plugins):
    from scl_defense.plugins import PluginHost

    host = PluginHost(files=plugins, disabled=["scl-defense"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(host["model"].get("flat")()((1, 8, 8)), 10, (0.3,), (0.4,))
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        images, labels = digits
        for _ in range(5):
            for batch in torch.randperm(len(images)).split(64):
                loss = torch.nn.functional.cross_entropy(network(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save(
        path,
        {
            "network": network.state_dict(),
            "model": "flat",
            "model_options": {},
            "classes": list("0123456789"),
            "image_shape": [1, 8, 8],
            "mean": [0.3],
            "std": [0.4],
            "threat": "linf:0.15",
            "config": json.dumps({"data": "scans", "data_options": {}}),
            "plugins": host.provenance(),
            "epoch": 5,
        },
    )
    return path


def test_a_checkpoint_needs_nothing_else(checkpoint, plugins, tmp_path):
    out = tmp_path / "result.json"
    result = benchmark(
        checkpoint, attacks="fgsm,pgd:steps=5,cw:c=10:steps=30", n=60, seed=4, plugins=plugins, out=out, command="it"
    )
    assert (result.n, result.seed, result.norm, result.eps) == (60, 4, "linf", "0.15")  # the checkpoint's own ball
    assert result.clean_accuracy > 0.9 > result.worst_case.robust_accuracy
    assert [(row.norm, row.eps) for row in result.attacks] == [("linf", "0.15"), ("linf", "0.15"), ("l2", "0.5")]
    data = json.loads(out.read_text())
    assert data == result.to_json()
    assert data["data"]["name"] == "scans" and data["data"]["split"] == "test"
    assert len(data["data"]["fingerprint"]) == len(data["data"]["indices_sha256"]) == 64
    assert data["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert data["checkpoint"]["epoch"] == 5 and data["checkpoint"]["config"]["data"] == "scans"
    assert data["command"] == "it" and data["versions"]["torch"] == torch.__version__
    assert {plugin["plugin"] for plugin in data["plugins"]} == set(plugins)
    assert data["created"].endswith("+00:00")


def test_a_network_needs_data_and_gives_the_same_numbers_every_time(network, plugins):
    with pytest.raises(UserError, match="name it with data"):
        benchmark(network, plugins=plugins)
    first, again, more = (
        benchmark(network, data="scans", attacks=["fgsm", "pgd:steps=5"], n=n, plugins=plugins) for n in (50, 50, None)
    )
    assert (first.norm, first.eps) == ("linf", "0.2")  # the data's usual radius
    assert [row.outcomes for row in first.attacks] == [row.outcomes for row in again.attacks]
    assert first.data == again.data and first.data["indices_sha256"] != more.data["indices_sha256"]
    assert first.data["fingerprint"] == more.data["fingerprint"] and more.n == 397
    assert first.checkpoint == {"path": None, "network": "DigitsNet"}


@pytest.mark.parametrize(
    ("options", "ball"),
    [
        ({"eps": "1/10"}, ("linf", "1/10")),
        ({"eps": 0.1}, ("linf", "0.1")),
        ({"norm": "l2"}, ("l2", "0.5")),
        ({"norm": "L2", "eps": "1"}, ("l2", "1")),
        ({}, ("linf", "0.15")),
    ],
)
def test_the_main_ball(checkpoint, plugins, options, ball):
    result = benchmark(checkpoint, attacks="native:pgd:steps=2", n=20, plugins=plugins, **options)
    assert (result.norm, result.eps) == ball == (result.attacks[0].norm, result.attacks[0].eps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "wide-scans", "eps": "0.1"}, r"reads images \(1, 8, 8\), 'wide-scans' has \(1, 16, 16\)"),
        ({"norm": "l1"}, "no usual l1 radius is known for 'scans'"),
        ({"attacks": "pdg"}, "did you mean 'pgd'"),
        ({"data": "scanz"}, "did you mean 'scans'"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"n": 0}, "at least 1"),
        ({"norm": "l7"}, "norm 'l7' is unknown"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(checkpoint, plugins, options, message):
    told = []
    with pytest.raises(UserError, match=message):
        benchmark(checkpoint, plugins=plugins, progress=lambda *news: told.append(news), **options)
    assert told == []


def test_class_counts_must_match(checkpoint, network, plugins, tmp_path):
    path = tmp_path / "twelve_plugin.py"
    other = PLUGIN.replace('"scans"', '"twelve"').replace('"wide-scans"', '"wide-twelve"').replace('"flat"', '"flat2"')
    path.write_text(other.replace("classes: int = 10", "classes: int = 12"))
    with pytest.raises(UserError, match="the checkpoint has 10 classes, 'twelve' has 12"):
        benchmark(checkpoint, data="twelve", plugins=(*plugins, str(path)))
    with pytest.raises(UserError, match="the network has 10 outputs, 'twelve' has 12 classes"):
        benchmark(network, data="twelve", attacks="fgsm", plugins=(*plugins, str(path)))


def test_a_network_that_cannot_read_the_images_is_told_apart_from_a_failing_attack(plugins):
    with pytest.raises(UserError, match=r"the network cannot read images \(1, 8, 8\) of 'scans'"):
        benchmark(DigitsNet(channels=3), data="scans", attacks="fgsm", plugins=plugins)

    class Pair(torch.nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(UserError, match="the network returns a tuple"):
        benchmark(Pair(), data="scans", attacks="fgsm", plugins=plugins)


def test_a_missing_checkpoint_is_a_user_error(plugins, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        benchmark(tmp_path / "none.pt", plugins=plugins)


def test_it_is_part_of_the_public_interface():
    assert scl_defense.benchmark is benchmark
