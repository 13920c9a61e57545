"""Checkpoints: what goes in comes out, nothing half-written, nothing executed, one line for every bad file."""

import errno
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from scl_defense import UserError, checkpoint, load_classifier, train
from scl_defense.compose import make_generator
from scl_defense.plugins import PluginHost, default_host


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(
        limit=96, batch_size=32, val_limit=48, val_steps=1, epochs=1, generator="corner-noise", eps="26/255",
        model_options={"width": 4}, out=str(tmp_path_factory.mktemp("runs")),
    )  # fmt: skip


def test_the_classifier_comes_back_with_everything_that_describes_it(trained):
    loaded = load_classifier(trained.best)
    assert loaded.image_shape == (1, 8, 8) and loaded.classes == tuple("0123456789") and loaded.data == "digits"
    assert str(loaded.threat) == "linf:26/255" and not loaded.network.training
    meta = loaded.meta
    assert meta["config"]["generator"] == "corner-noise" and meta["epoch"] == 1 and meta["random"]["seed"] == 0
    assert {"plugin": "builtin", "distribution": "scl-defense"}.items() <= meta["plugins"][1].items()
    assert meta["versions"]["torch"] == torch.__version__
    assert meta["data_sha256"] and len(loaded.sha256) == 64


def test_logits_are_those_of_the_trained_network_and_normalisation_travels_along(trained):
    images = torch.rand(5, 1, 8, 8)
    state = checkpoint.read(trained.best)[0]
    encoder = default_host()["model"].get("small-cnn")(width=4)((1, 8, 8))
    encoder.load_state_dict(
        {k.removeprefix("encoder."): v for k, v in state["network"].items() if k.startswith("encoder.")}
    )
    features = encoder.eval()((images - state["mean"][0]) / state["std"][0])
    weight, bias = state["network"]["classifier.weight"], state["network"]["classifier.bias"]
    torch.testing.assert_close(load_classifier(trained.best).network(images), features @ weight.T + bias)


def test_plain_torch_reads_it_with_weights_only(trained):
    content = torch.load(trained.best, weights_only=True)
    assert content["format"] == checkpoint.FORMAT


def test_code_never_goes_in(tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.save(tmp_path / "x.pt", {"network": {}, "config": subprocess.run})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.atomic_write_bytes(path, b"old")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*last.pt' \(3 bytes\): No space left"):
        checkpoint.atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_write_cut_off_by_a_file_size_limit_keeps_the_old_file(tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from scl_defense import UserError\n"
        "from scl_defense.checkpoint import atomic_write_bytes\n"
        "atomic_write_bytes(sys.argv[1], b'old')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: atomic_write_bytes(sys.argv[1], bytes(100_000))\n"
        "except UserError as error: print(error)\n"
    )
    path = tmp_path / "last.pt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert "cannot write" in done.stdout and "File too large" in done.stdout
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.atomic_write_bytes(tmp_path / "x", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def bad_files(folder, good):
    payload = good.read_bytes()
    flipped = bytearray(payload)
    flipped[len(payload) // 2] ^= 1
    torch.save({"format": "x", "weights": Evil(folder / "ran")}, folder / "evil.pt")
    torch.save({"conv.weight": torch.zeros(2)}, folder / "foreign.pt")
    torch.save({"losses": [1, 2]}, folder / "dict.pt")
    torch.save({"format": "scl-defense-checkpoint/99"}, folder / "future.pt")
    torch.save({"format": checkpoint.FORMAT, "network": {}}, folder / "partial.pt")
    with zipfile.ZipFile(folder / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    content, _ = checkpoint.read(good)
    torch.save({**content, "model": "no-such-model"}, folder / "nomodel.pt")
    torch.save({**content, "model_options": {"width": 5}}, folder / "unfit.pt")
    return {
        "empty": (b"", "empty"),
        "truncated": (payload[: len(payload) // 2], "truncated or damaged"),
        "tail": (payload[:-10], "truncated or damaged"),
        "flipped": (bytes(flipped), "damaged"),
        "html": (b"<!DOCTYPE html><html>404</html>", "HTML page"),
        "text": (b"hello", "no zip file"),
        "pickle": (pickle.dumps(Evil(folder / "ran"), protocol=2), "would run code when loaded"),
        "evil": ((folder / "evil.pt").read_bytes(), "would run code when loaded"),
        "foreign": ((folder / "foreign.pt").read_bytes(), "bare weights .* name their network with --model"),
        "other": ((folder / "dict.pt").read_bytes(), "not written by scl-defense"),
        "future": ((folder / "future.pt").read_bytes(), "this version reads"),
        "partial": ((folder / "partial.pt").read_bytes(), "malformed: it lacks model"),
        "zip": ((folder / "other.pt").read_bytes(), "damaged"),
        "nomodel": ((folder / "nomodel.pt").read_bytes(), "no model named"),
        "unfit": ((folder / "unfit.pt").read_bytes(), "do not fit its model"),
    }


NAMES = [
    "empty", "truncated", "tail", "flipped", "html", "text", "pickle", "evil", "foreign", "other", "future", "partial",
    "zip", "nomodel", "unfit",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_is_one_line_and_runs_nothing(tmp_path, trained, name):
    files = bad_files(tmp_path, trained.best)
    assert set(files) == set(NAMES)
    content, message = files[name]
    path = tmp_path / f"{name}-given.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_classifier(path)
    assert "\n" not in str(error.value) and "weights_only=False" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_every_single_flipped_byte_is_noticed_or_harmless(tmp_path, trained):
    """Either refused, or the very same weights: a silently changed weight would be the end of trust."""
    good = checkpoint.read(trained.best)[0]["network"]
    payload = trained.best.read_bytes()
    path = tmp_path / "flipped.pt"
    refused = 0
    for place in range(0, len(payload), len(payload) // 60):
        flipped = bytearray(payload)
        flipped[place] ^= 0x10
        path.write_bytes(bytes(flipped))
        try:
            network = checkpoint.read(path)[0]["network"]
        except UserError:
            refused += 1
            continue
        assert all(torch.equal(network[name], good[name]) for name in good)
    assert refused > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "x"}, "config is not JSON"),
        ({"config": "[]"}, "config is not a JSON object"),
        ({"classes": 10}, "classes is a int, not a list"),
        ({"classes": ["a"]}, "at least two names"),
        ({"image_shape": [1, 8]}, "three sizes"),
        ({"image_shape": [1, 8, 10**9]}, "from 1 to 4096"),
        ({"mean": []}, "1 numbers each"),
        ({"network": {"x": "y"}}, "tensors alone"),
        ({"plugins": ["x"]}, "names and versions"),
        ({"threat": "linf"}, "NORM:EPS"),
    ],
)
def test_a_malformed_checkpoint_is_one_line(tmp_path, trained, change, message):
    torch.save({**checkpoint.read(trained.best)[0], **change}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        load_classifier(tmp_path / "x.pt")


def test_directories_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        load_classifier(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_classifier(tmp_path / "none.pt")


def test_a_model_from_a_missing_plugin_says_where_it_came_from(tmp_path):
    plugin = tmp_path / "mymodels.py"
    plugin.write_text(
        "from torch import nn\n"
        "from scl_defense import hookimpl\n"
        "from scl_defense.types import component\n"
        "@component\n"
        "class Flat:\n"
        "    def __call__(self, image_shape):\n"
        "        encoder = nn.Flatten()\n"
        "        encoder.feature_dim = image_shape[0] * image_shape[1] * image_shape[2]\n"
        "        return encoder\n"
        "@hookimpl\n"
        "def register_models(register):\n"
        "    register('flat', Flat, summary='pixels as features')\n"
    )
    result = train(limit=64, batch_size=32, val_limit=32, val_steps=1, epochs=1, generator="none", model="flat",
                   out=str(tmp_path / "runs"), host=PluginHost(files=[plugin]))  # fmt: skip
    assert load_classifier(result.best, host=PluginHost(files=[plugin])).network(torch.rand(2, 1, 8, 8)).shape == (
        2,
        10,
    )
    with pytest.raises(UserError, match=r"no model named 'flat'.*it came from mymodels"):
        load_classifier(result.best)


def test_a_foreign_file_is_offered_to_the_load_checkpoint_hook(tmp_path):
    torch.save({"w": torch.ones(10, 64)}, tmp_path / "linear.pt")
    plugin = tmp_path / "reader.py"
    plugin.write_text(
        "from torch import nn\n"
        "from scl_defense import hookimpl\n"
        "from scl_defense.checkpoint import LoadedClassifier, read_tensors\n"
        "@hookimpl\n"
        "def load_checkpoint(path, options):\n"
        "    content, sha256 = read_tensors(path)\n"
        "    if set(content) != {'w'}:\n"
        "        return None\n"
        "    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))\n"
        "    network[1].weight.data.copy_(content['w'])\n"
        "    digits = tuple('0123456789')\n"
        "    return LoadedClassifier(network, digits, (1, 8, 8), (0.0,), (1.0,), None, None, {}, path, sha256)\n"
    )
    loaded = load_classifier(tmp_path / "linear.pt", host=PluginHost(files=[plugin]))
    assert torch.equal(loaded.network(torch.ones(1, 1, 8, 8)), torch.full((1, 10), 64.0))
    with pytest.raises(UserError, match="bare weights"):  # without that plugin: the benchmark layer's own reader
        load_classifier(tmp_path / "linear.pt")


@pytest.mark.parametrize("path", ["\x00", "runs/\x00/best.pt"])
def test_a_path_that_no_system_knows_is_one_line(path):
    """From a recipe: TOML can write it, a command line cannot."""
    for read in (checkpoint.read, lambda path: make_generator(default_host(), f"file:{path}", {})):
        with pytest.raises(UserError, match=r"cannot be read: .*null"):
            read(path)
