"""Every reader against damaged files and nonsense texts: only this project's own errors ever leave.

The default run draws a few inputs a reader, always the same ones; with the mark ``faults`` each reader gets thousands.
"""

import contextlib
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mangling import DAMAGES, damaged, damaged_member, members
from scl_defense_benchmarks.battery import plan_attacks
from scl_defense_benchmarks.containers import read_content
from scl_defense_benchmarks.prepared import read_label_map
from scl_defense_benchmarks.report.read import read_result
from scl_defense_benchmarks.results import check_writable
from scl_defense_benchmarks.state import open_state
from scl_defense_benchmarks.study.cells import grid
from scl_defense_benchmarks.study.spec import read_spec
from scl_defense_benchmarks.study.store import Store
from scl_defense_benchmarks.weights import find_state

import scl_defense
from scl_defense import checkpoint, runstate
from scl_defense.checkpoint import load_classifier
from scl_defense.cli.benchmark import _seconds
from scl_defense.cli.common import key_values
from scl_defense.cli.study import _integers
from scl_defense.cli.subject import _numbers
from scl_defense.compose import make_generator
from scl_defense.config import TrainConfig, options_of, read_toml, to_toml, train_config
from scl_defense.data import open_data
from scl_defense.errors import SclDefenseError, UserError
from scl_defense.plugins import default_host
from scl_defense.replay import StoredExamples
from scl_defense.threat import ThreatModel, parse_eps
from scl_defense.train import train

OURS = {
    "data": "digits", "limit": 64, "batch_size": 32, "val_limit": 32, "val_steps": 1, "epochs": 2, "generator": "none",
    "model_options": {"width": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def seeds(place):
    """name -> payload of a valid file."""
    run = train(**OURS, out=str(place / "runs"))
    found = {"checkpoint": run.last.read_bytes()}
    state = {"conv.weight": torch.arange(8.0).view(2, 2, 2), "fc.weight": torch.ones(10, 4), "fc.bias": torch.zeros(10)}
    buffer = io.BytesIO()
    torch.save({"model": state, "ema": {"decay": 0.9}, "epoch": 3}, buffer)
    found["torch"] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, buffer, _use_new_zipfile_serialization=False)
    found["old torch"] = buffer.getvalue()
    found["pickle"] = pickle.dumps({"a": [1, 2.5, "x"], "b": (None, True)}, protocol=4)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            part = pickle.dumps({"a": 1}, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    found["old torch tar"] = buffer.getvalue()
    found["safetensors"] = safetensors.torch.save(state)
    images = np.arange(12 * 8 * 8, dtype=np.uint8).reshape(12, 8, 8)
    buffer = io.BytesIO()
    np.savez(buffer, train_images=images, train_labels=np.arange(12) % 3,
             test_images=images, test_labels=np.arange(12) % 3,
             classes=np.array(["a", "b", "c"]))  # fmt: skip
    found["npz"] = buffer.getvalue()
    record = {
        "format": "scl-defense-examples/1", "recipe": {"data": "digits"}, "data_sha256": "0" * 64, "threat": "linf:0.1",
    }  # fmt: skip
    tensors = {"adversarial": torch.rand(1, 4, 1, 8, 8), "indices": torch.arange(4)}
    found["examples"] = safetensors.torch.save(tensors, {"scl_defense": json.dumps(record)})
    found["recipe"] = to_toml({**OURS, "eps": "8/255", "generator_options": {"steps": 3}, "logger": ["jsonl"]}).encode()
    found["study"] = (Path(__file__).parents[2] / "benchmarks" / "studies" / "smoke.toml").read_bytes()
    found["idx images"] = bytes.fromhex("00000803 00000004 00000008 00000008".replace(" ", "")) + bytes(range(256))
    found["idx labels"] = bytes.fromhex("00000801 00000004".replace(" ", "")) + bytes([0, 1, 2, 3])
    found["state"] = b'{"format":"scl-defense-battery-state/1","identity":{"seed":0}}\n{"attack":0,"chunk":1,"x":[1]}\n'
    found["result"] = b'{"schema":"scl-defense-result/2","n":3,"attacks":[{"label":"fgsm","outcomes":[0,1]}]}'
    made = place / "whole.json"
    scl_defense.benchmark(run.best, attacks="noise:draws=1", n=4, probes="none", out=str(made))
    found["whole result"] = made.read_bytes()
    found["label map"] = b'{"labels": ["a", "b", "-", "c", 0, null]}'
    found["png"] = _image("PNG")
    found["jpeg"] = _image("JPEG")
    found["gif"] = _image("GIF")
    return found


def _image(kind):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, kind)
    return buffer.getvalue()


# -- readers of files: (which valid files are damaged, what reads them)


def _foreign(path):
    find_state(read_content(path), str(path))


def _recipe(path):
    train_config(read_toml(path))


def _study(path):
    grid(read_spec(path), None)


def _idx(which):
    def read(path):
        folder = path.parent / f"idx{os.getpid()}" / "MNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
                     "t10k-labels-idx1-ubyte"):  # fmt: skip
            content = SEEDS["idx images" if "images" in name else "idx labels"]
            (folder / name).write_bytes(path.read_bytes() if which in name else content)
        open_data("mnist", root=folder.parents[1], options={"download": False})

    return read


def _image_folder(path):
    folder = path.parent / f"images{os.getpid()}"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            (folder / name / f"{number}.png").write_bytes(path.read_bytes() if number else SEEDS["png"])
    open_data(str(folder), options={"size": 8}).split("test")


def _npz(path):
    data = open_data(str(path.rename(path.with_suffix(".npz"))))
    data.split("train"), data.split("test")


def _cell(path):
    store = Store(path.parent / f"study{os.getpid()}")
    store.out.mkdir(exist_ok=True)
    for name in ("results.jsonl", "study.json"):
        (store.out / name).write_bytes(path.read_bytes())
    store.read_results()
    store.read_about()


SEEDS = {}
READERS = {
    "checkpoint": (["checkpoint"], checkpoint.read),
    "checkpoint as a network": (["checkpoint"], load_classifier),
    "checkpoint to resume": (["checkpoint"], runstate.read),
    "foreign weights": (["torch", "old torch", "pickle", "old torch tar", "checkpoint"], _foreign),
    "foreign weights as a network": (["torch", "old torch", "pickle", "old torch tar"], load_classifier),
    "safetensors": (["safetensors", "examples"], lambda path: _foreign(path.rename(path.with_suffix(".safetensors")))),
    "npz": (["npz"], _npz),
    "idx images": (["idx images"], _idx("images")),
    "idx labels": (["idx labels"], _idx("labels")),
    "image folder": (["png", "jpeg", "gif"], _image_folder),
    "stored examples": (["examples"], lambda path: StoredExamples(path=str(path)).opened()),
    "recipe": (["recipe"], _recipe),
    "study": (["study"], _study),
    "state of a benchmark": (["state"], lambda path: open_state(path, {"seed": 0})),
    "result": (["result"], check_writable),
    "result for a report": (["whole result"], read_result),
    "records of a study": (["state", "result"], _cell),
    "label map JSON": (["label map"], lambda path: read_label_map(path.rename(path.with_suffix(".json")), "abc")),
    "label map TOML": (["recipe"], lambda path: read_label_map(path.rename(path.with_suffix(".toml")), "abc")),
}


def hold(action, what):
    """Run ``action``: fine, or one of our errors with a text of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except SclDefenseError as error:
        assert str(error), what
        assert "weights_only=False" not in str(error)


def quick(count, name):
    return settings(max_examples=count, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


def long(count, name):
    return settings(max_examples=count, derandomize=False, suppress_health_check=list(HealthCheck), print_blob=True)


def fuzz_file(name, place, seeds, budget):
    sources, read = READERS[name]
    SEEDS.update(seeds)
    zips = {source: members(seeds[source]) for source in sources if seeds[source][:2] == b"PK"}
    path = place / f"{name.replace(' ', '-')}-{os.getpid()}"
    count = [0]

    @budget
    @given(st.sampled_from(sources), st.booleans(), st.integers(0, 100), DAMAGES)
    def trial(source, behind, which, damages):
        count[0] += 1
        if source in zips and behind:
            payload = damaged_member(zips[source], which, damages)
        else:
            payload = damaged(seeds[source], damages)
        for suffix in ("", ".npz", ".json", ".toml", ".safetensors"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        path.write_bytes(payload)
        hold(lambda: read(path), name)

    trial()
    return count[0]


@pytest.mark.parametrize("name", READERS)
def test_readers_of_files_quickly(name, place, seeds):
    hold_valid(name, place, seeds)
    assert fuzz_file(name, place, seeds, quick(12, name)) >= 12


def hold_valid(name, place, seeds):
    """The undamaged file is read: else nothing behind the first check is ever reached."""
    sources, read = READERS[name]
    SEEDS.update(seeds)
    if name in ("checkpoint", "stored examples", "npz", "recipe", "study", "idx images", "image folder", "result",
                "result for a report", "state of a benchmark"):  # fmt: skip
        path = place / f"valid-{name.replace(' ', '-')}"
        path.write_bytes(seeds[sources[0]])
        read(path)


# -- readers of texts: what people type, and what stands in recipes and results

TEXTS = {
    "eps": (["8/255", "0.3", "1e-3", "3", " 4/255 ", "0", "1/0", "٣/255"], parse_eps),
    "threat": (["linf:8/255", "l2:0.5", "l1:12", "l0:3", "linf: 8/255"], ThreatModel.parse),
    "attack list": (
        ["fgsm,pgd,cw", "pgd:steps=40:rel_step=0.1", "art:cw:c=1+10:eps=0.5", "standard", "native:pgd:norm=l2:eps=0.5"],
        lambda text: plan_attacks(text, threat=ThreatModel("linf", "0.1"), host=default_host()),
    ),
    "generator": (["contrastive-pgd", "mix:corner-noise=0.5,uniform-noise=0.5", "file:x.safetensors", "none"],
                  lambda text: make_generator(default_host(), text, {})),
    "options": (["steps=20", "rel_step=0.1", "--awp=0.005", "space=gabor"], lambda text: key_values([text], "-g")),
    "recipe values": (
        ["0.1", "adamw", "1", "true", "8/255", "jsonl", "simclr", "bf16"],
        lambda text: [every for name in FIELDS for every in [_tried(name, text)]],
    ),
    "time": (["600", "90s", "10m", "1.5h"], _seconds),
    "seeds": (["0,1,2", "7"], _integers),
    "normalisation": (["0.5", "0.49+0.48+0.45"], lambda text: _numbers("--mean", text)),
}  # fmt: skip
FIELDS = [option.name for option in options_of(TrainConfig)]
NONSENSE = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="0123456789./:,+-=eE_ linfpgdstepsNa∞½٣\x00\x1b", max_size=40),
    st.builds(lambda part, n: part * n, st.sampled_from(["9", "1/", ":", ",", "=", "-", "mix:", "(", "e9"]),
              st.integers(0, 3000)),
)  # fmt: skip


def _tried(name, text):
    """Each field is asked by itself, for one that is refused would hide the others."""
    with contextlib.suppress(UserError):
        train_config({name: text})


def fuzz_text(name, budget):
    good, read = TEXTS[name]
    count = [0]

    def mangled(text, damages):
        return damaged(text.encode(), damages).decode(errors="surrogateescape")

    @budget
    @given(st.one_of(NONSENSE, st.builds(mangled, st.sampled_from(good), DAMAGES), st.sampled_from(good)))
    def trial(text):
        count[0] += 1
        hold(lambda: read(text), f"{name}: {text!r}"[:200])

    trial()
    return count[0]


@pytest.mark.parametrize("name", TEXTS)
def test_readers_of_texts_quickly(name):
    _, read = TEXTS[name]
    if name not in ("eps", "generator", "seeds"):  # which hold one that is refused
        read(TEXTS[name][0][0])
    assert fuzz_text(name, quick(60, name)) >= 60


# -- the full run: at least 100 000 inputs, other ones each time

SHARE = {
    **dict.fromkeys(["eps", "threat", "options", "time", "seeds", "normalisation"], 9_000),
    **dict.fromkeys(["attack list", "generator"], 5_000),
    **dict.fromkeys(["study", "checkpoint as a network", "checkpoint to resume", "foreign weights as a network",
                     "idx images", "idx labels", "recipe values"], 1_000),
    "image folder": 400,
}  # fmt: skip
USUAL = 2_500


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
def test_readers_of_files(name, place, seeds, book):
    hold_valid(name, place, seeds)
    book("inputs fuzzed", fuzz_file(name, place, seeds, long(SHARE.get(name, USUAL), name)))


@pytest.mark.faults
@pytest.mark.parametrize("name", TEXTS)
def test_readers_of_texts(name, book):
    book("inputs fuzzed", fuzz_text(name, long(SHARE.get(name, USUAL), name)))


def test_the_full_run_is_of_a_hundred_thousand_inputs():
    assert sum(SHARE.get(name, USUAL) for name in [*READERS, *TEXTS]) >= 100_000
