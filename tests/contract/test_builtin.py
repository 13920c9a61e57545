"""Everything that is registered passes the contract test: whoever registers something is tested without a line here."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from scl_defense.config import make
from scl_defense.plugins import default_host
from scl_defense.testing import check_entry

# Variants beside the defaults. Every registered component is run with its defaults too, unless FAST says otherwise.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "generator contrastive-pgd": [
        {"space": "pixel"},
        {"space": "filterbank"},
        {"space": "random-conv", "redraw": "step"},
        {"space": "random-conv", "redraw": "never", "views": 2, "steps": 2},
        {"space": "scattering", "steps": 1},
        {"space": "checkpoint", "path": "anyone.pt", "steps": 3},
        {"space": "pixel", "objective": "ntxent-joint", "views": 3},
        {"objective": "align", "steps": 3},
        {"objective": "supcon", "steps": 3},
        {"negatives": "other-classes", "steps": 3},
    ],
    "generator contrastive-pgd-online": [
        {"ema": 0.9},
        {"views": 3, "start": "gaussian"},
        {"objective": "ntxent-joint"},
        {"objective": "ntxent-joint", "views": 2},
        {"objective": "align"},
        {"objective": "supcon"},
        {"negatives": "other-classes"},
    ],
    "generator uniform-noise": [{"views": 3}],
    "generator corner-noise": [{"views": 3}],
    "generator pgd": [
        {"loss": "kl"},
        {"loss": "margin"},
        {"steps": 1},
        {"steps": 1, "loss": "margin", "start": "zero"},
        {"steps": 3, "start": "zero"},
        {"steps": 3, "views": 3},
        {"steps": 2, "views": 2, "start": "zero"},
    ],
    "generator ridge-pgd": [{"views": 2, "steps": 1, "depth": 1}],
    "trainer adv-supcon": [{"head": "probe"}, {"contrast": 0.0}, {"ce_adv": 0.0}],
    "trainer cross-entropy": [{"ce_clean": 1.0}],
    "trainer multiview": [
        {"positives": "instance", "inferior": 0.7, "beta": 0.5, "tau_plus": 0.1},
        {"select": "leaked", "stop": "clean", "clean_adv": 0.5, "kl": 1.0, "kl_from": "clean"},
        {"bn": "dual", "pool": "adv", "margin": 1.0},
    ],
    "trainer acl": [{"pool": "cross"}, {"head": "joint", "bn": "shared"}],
    "trainer ascl": [{"select": "hard"}],
    "trainer linear": [{"head": "probe"}],
    "model resnet18": [{"width": 4, "stem": "imagenet"}],
    "model wide-resnet": [{"depth": 10, "widen": 1, "dropout": 0.3}],
    "attack native:pgd": [{"loss": "margin"}, {"random_start": False}],
    "attack pgd": [{"random_start": False}],
    "attack art:pgd": [{"random_start": False}],
    "attack apgd-ce": [{"steps": 10, "restarts": 2}],
}
# Options that make a default run short. The promises do not depend on them.
FAST: dict[str, dict[str, Any]] = {
    "model resnet18": {"width": 4},
    "model preact-resnet18": {"width": 4},
    "model wide-resnet": {"depth": 10, "widen": 1},
    "attack cw": {"c": [1.0], "steps": 40, "lr": 0.003},
    "attack torchattacks:cw": {"c": [1.0], "steps": 40, "lr": 0.003},
    **{
        f"attack {prefix}{name}": options
        for prefix in ("", "torchattacks:")
        for name, options in {
            "apgd-ce": {"steps": 15},
            "apgd-dlr": {"steps": 15},
            "apgd-t": {"steps": 15, "targets": 2},
            "fab-t": {"steps": 15, "targets": 2},
            "square": {"queries": 60},
            "eot": {"steps": 15, "draws": 2},
            "sparsefool": {"steps": 5, "spread": 1.0},
            "onepixel": {"steps": 3, "population": 20},
            "pixle": {"restarts": 20, "steps": 5},
        }.items()
    },
    "attack autoattack": {"steps": 10, "targets": 1, "queries": 20},
    "attack art:cw": {"binary_search_steps": 1, "steps": 10, "initial_c": 3.0},
    **{
        f"attack {prefix}{name}": options
        for prefix in ("", "art:")
        for name, options in {
            "ead": {"steps": 30, "binary_search_steps": 4, "initial_c": 1.0},
            "jsma": {"targets": 1},
            "simba": {"steps": 200, "step": 0.05},
            "hsj": {"steps": 3, "queries": 100, "first_queries": 50},
            "boundary": {"steps": 30},
            "spatial": {"grid": 2},
        }.items()
    },
    "attack apgd-l1": {"steps": 25},
}
# Checks that a component cannot pass, each with its reason; one that is passed after all fails the test.
EXCUSED: dict[str, dict[str, str]] = {
    f"attack {name}": {"linear-classifier": "rotations and shifts lie in no small ball"}
    for name in ("spatial", "art:spatial")
}
# Attacks that work on some images only, or need a second network; they have tests of their own.
OTHER_IMAGES = {"pixle", "torchattacks:pixle", "transfer"}
# What takes seconds however short it is made: asked in the long run.
LONG = {
    "attack ead",
    "attack hsj",
    "attack boundary",
    "attack simba",
    "generator contrastive-pgd space=scattering steps=1",
}
# Data sets that need files; those are tested with files of their own below and in the data sets' tests.
NEED_FILES = {"mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "npz", "npy", "image-folder"}


@dataclass(frozen=True)
class Subject:
    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.kind, self.name, *(f"{key}={value}" for key, value in self.options.items())])


def subjects() -> list[Subject]:
    host, found = default_host(), []
    for kind, registry in host.registries.items():
        for entry in registry:
            key = f"{kind} {entry.name}"
            if kind == "dataset" and entry.name in NEED_FILES:
                continue
            if kind == "attack" and entry.name in OTHER_IMAGES:
                continue
            found += [Subject(kind, entry.name, options) for options in [FAST.get(key, {}), *VARIANTS.get(key, [])]]
    return found


def marked() -> list[Any]:
    """In the long run: :data:`LONG`, and the name that says the library where a shorter one is the very same attack."""
    attacks = default_host()["attack"]
    short = {entry.name: entry.target for entry in attacks if ":" not in entry.name}
    found = []
    for subject in subjects():
        _, _, bare = subject.name.partition(":")
        twice = subject.kind == "attack" and bare in short and short[bare] == attacks.entry(subject.name).target
        late = twice or str(subject) in LONG or f"{subject.kind} {subject.name}" in LONG
        found.append(pytest.param(subject, id=str(subject), marks=[pytest.mark.slow] if late else []))
    return found


@pytest.mark.parametrize("subject", marked())
def test_passes_the_contract(subject):
    if subject.name == "tensorboard":
        pytest.importorskip("tensorboard", reason="TensorBoard is an optional extra")
    if subject.options.get("space") == "scattering":
        pytest.importorskip("kymatio", reason="kymatio is an optional extra")
    entry = default_host()[subject.kind].entry(subject.name)
    results = check_entry(entry, subject.options)
    excused = EXCUSED.get(f"{subject.kind} {subject.name}", {})
    failed = {result.check: result.message for result in results if not result.passed}
    assert failed.keys() == excused.keys(), failed
    assert len(results) > 5


@pytest.mark.parametrize("kind", ["generator", "trainer", "attack", "model", "dataset", "logger"])
def test_every_kind_has_something_to_test(kind):
    registered = {entry.name for entry in default_host()[kind]}
    tested = {subject.name for subject in subjects() if subject.kind == kind}
    assert tested and tested == registered - {"dataset": NEED_FILES, "attack": OTHER_IMAGES}.get(kind, set())


def test_no_plugin_was_set_aside():
    assert default_host().quarantined == []


def test_the_tables_name_what_is_registered():
    known = {f"{kind} {entry.name}" for kind, registry in default_host().registries.items() for entry in registry}
    long = {" ".join(name.split()[:2]) for name in LONG}
    assert long | set(VARIANTS) | set(FAST) | {f"dataset {name}" for name in NEED_FILES} <= known


@pytest.mark.parametrize("name", sorted(NEED_FILES - {"npz", "npy", "image-folder"}))
def test_data_that_is_not_there_is_a_failed_check_and_no_download(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SCL_DEFENSE_DATA_ROOT", str(tmp_path))
    assert make(default_host(), "dataset", name).download is True
    failed = [result for result in check_entry(default_host()["dataset"].entry(name)) if not result.passed]
    assert [result.check for result in failed] == ["available"]
    assert "downloading is switched off" in failed[0].message and str(tmp_path) in failed[0].message


@pytest.fixture
def files(tmp_path):
    """The same small data set as an archive and as a folder of images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        labels = np.arange(count) % 3
        (tmp_path / "arrays").mkdir(exist_ok=True)
        np.savez(tmp_path / "arrays" / f"{split}.npz", images=images, labels=labels)
        (tmp_path / "mapped" / split).mkdir(parents=True)
        np.save(tmp_path / "mapped" / split / "images.npy", images)
        np.save(tmp_path / "mapped" / split / "labels.npy", labels)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / "pictures" / split / "abc"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "path", "options"),
    [("npz", "arrays", {}), ("npy", "mapped", {}), ("image-folder", "pictures", {"size": 8})],
)
def test_data_sets_of_ones_own_files(files, name, path, options):
    results = check_entry(default_host()["dataset"].entry(name), {"path": path, **options}, root=files)
    assert [f"{result.check}: {result.message}" for result in results if not result.passed] == []
    assert "splits-apart" in {result.check for result in results}
