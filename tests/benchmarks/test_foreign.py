"""Bare weights: the same logits as the network they came from, every tensor placed, nothing executed."""

import os

import pytest
import torch
from safetensors.torch import save_file

from scl_defense import UserError, benchmark, load_classifier
from scl_defense.models import Network
from scl_defense.plugins import default_host

DIGITS = {"classes": tuple("0123456789"), "image_shape": (1, 8, 8)}
OPTIONS = {"model": "small-cnn", "model_options": {"width": 4}, **DIGITS}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    encoder = default_host()["model"].get("small-cnn")(width=4)((1, 8, 8))
    return Network(encoder, 10, [0.3], [0.2]).eval()


def weights(network, head="fc", prefix=""):
    state = network.state_dict()
    bare = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    bare |= {k.replace("classifier.", f"{head}."): v for k, v in state.items() if k.startswith("classifier.")}
    return {prefix + k: v for k, v in bare.items()}


WRAPPED = {
    "bare": lambda n: weights(n),
    "linear": lambda n: weights(n, head="linear"),
    "nested": lambda n: {"epoch": 3, "state_dict": weights(n)},
    "parallel": lambda n: {"model": weights(n, prefix="module.")},
    "compiled": lambda n: weights(n, prefix="_orig_mod.module."),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_logits_are_those_of_the_network_they_came_from(tmp_path, network, kind):
    torch.save(WRAPPED[kind](network), tmp_path / "w.pt")
    loaded = load_classifier(tmp_path / "w.pt", options={**OPTIONS, "mean": [0.3], "std": [0.2]})
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded.network(images), network(images)) and not loaded.network.training


def test_safetensors(tmp_path, network):
    save_file({k: v.contiguous() for k, v in weights(network).items()}, tmp_path / "w.safetensors")
    loaded = load_classifier(tmp_path / "w.safetensors", options={**OPTIONS, "mean": [0.3], "std": [0.2]})
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded.network(images), network(images))
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(UserError, match="no readable safetensors file"):
        load_classifier(tmp_path / "bad.safetensors", options=OPTIONS)


def test_without_normalisation_images_go_in_as_they_are(tmp_path, network):
    torch.save(weights(network), tmp_path / "w.pt")
    loaded = load_classifier(tmp_path / "w.pt", options=OPTIONS)
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(loaded.network(images), network(images * 0.2 + 0.3))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: s, {"model": None}, "need its name; give it with --model"),
        (lambda s: s, {"classes": None}, "name the data set with --data"),
        (lambda s: s, {"model": "smal-cnn"}, "did you mean 'small-cnn'"),
        (lambda s: s, {"model_options": {"width": 8}}, "is .*, this network's is"),
        (lambda s: s, {"classes": ("a", "b")}, "number of classes"),
        (lambda s: s, {"mean": [0.1, 0.2]}, "1 numbers each"),
        (lambda s: s, {"std": [0.0]}, "std above 0"),
        (lambda s: {k: v for k, v in s.items() if "fc." not in k}, {}, "no linear head"),
        (lambda s: {k: v for k, v in s.items() if "running_mean" not in k}, {}, "4 missing"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, {}, r"1 unknown \(encoder.extra.weight\)"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(tmp_path, network, change, options, message):
    torch.save(change(weights(network)), tmp_path / "w.pt")
    with pytest.raises(UserError, match=message) as error:
        load_classifier(tmp_path / "w.pt", options={**OPTIONS, **options})
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": Evil()}}, "evil.pt")
    with pytest.raises(UserError, match="would run code"):
        load_classifier("evil.pt", options=OPTIONS)
    assert not (tmp_path / "ran").exists()


def test_a_dict_of_other_things_is_nobodys(tmp_path):
    torch.save({"results": [1, 2, 3]}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="was not written by scl-defense"):
        load_classifier(tmp_path / "x.pt", options=OPTIONS)


def test_bare_weights_are_benchmarked_with_model_and_data_named(tmp_path, network):
    torch.save(weights(network), tmp_path / "w.pt")
    result = benchmark(
        tmp_path / "w.pt", data="digits", model="small-cnn", model_options={"width": "4"}, mean=[0.3], std=[0.2],
        attacks="native:fgsm", n=20,
    )  # fmt: skip
    assert result.n == 20 and result.num_classes == 10 and (result.norm, result.eps) == ("linf", "0.1")
