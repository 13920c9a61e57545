"""Data sets as the core sees them: splits, checks of what a component returns, and finding a data set by its name."""

import hashlib
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace
from typing import Annotated, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scl_defense.data import Split, open_data, stratified_subset
from scl_defense.errors import ComponentError, UserError
from scl_defense.plugins import PluginHost
from scl_defense.registry import Owner
from scl_defense.types import Field, ImageArrays, component

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def no_root(monkeypatch, tmp_path):
    monkeypatch.setenv("SCL_DEFENSE_DATA_ROOT", str(tmp_path / "root"))


def arrays(n=60, *, shape=(6, 5, 3), seed=0, classes=CLASSES, **changes):
    random = np.random.RandomState(seed)
    found = {
        "images": random.randint(0, 256, (n, *shape)).astype(np.uint8),
        "labels": np.arange(n) % len(classes),
        "classes": classes,
    }
    return ImageArrays(**{**found, **changes})


def host_of(train, test=None, name="fake", owner="test"):
    """A host with one more data set, which counts how often each split is loaded."""
    host, loads = PluginHost(), Counter()

    @component
    class Fake:
        flip: ClassVar[bool] = True
        budgets: ClassVar[dict] = {"linf": "8/255"}
        shift: Annotated[int, Field(ge=0, description="an option")] = 0

        def load(self, split, root):
            loads[split] += 1
            found = train if split == "train" else test
            if isinstance(found, Exception):
                raise found
            return found

    host["dataset"].add(name, Fake, summary="in memory", owner=Owner(owner, "1", "test"))
    return host, loads


def open_fake(train, test=None, **keywords):
    return open_data("fake", host=host_of(train, test)[0], **keywords)


def one_line_error(*words, kind=UserError):
    return pytest.raises(kind, match=r"(?s)\A(?!.*\n)" + "".join(f"(?=.*{word})" for word in words))


# -- splits


def test_train_and_val_are_a_partition_of_the_training_split_and_point_into_it():
    source = arrays(200)
    data = open_fake(source)
    train, val = data.split("train", val_fraction=0.25), data.split("val", val_fraction=0.25)
    assert len(val) == 50 and len(train) == 150
    assert sorted(torch.cat([train.indices, val.indices]).tolist()) == list(range(200))
    for split in (train, val):
        places = split.indices.numpy()
        assert np.array_equal(split.images.numpy(), source.images[places].transpose(0, 3, 1, 2))
        assert np.array_equal(split.labels.numpy(), source.labels[places])
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64


def test_val_is_stratified_and_the_same_whatever_was_seeded():
    labels = np.repeat([0, 1, 2], [100, 60, 40])
    data = open_fake(arrays(200, labels=labels))
    torch.manual_seed(1)
    np.random.seed(1)
    first = data.split("val", val_fraction=0.1)
    torch.manual_seed(2)
    np.random.seed(2)
    again = open_fake(arrays(200, labels=labels)).split("val", val_fraction=0.1)
    assert torch.equal(first.indices, again.indices)
    assert torch.bincount(first.labels).tolist() == [10, 6, 4]


def test_limits_take_fixed_stratified_subsets_and_never_mix_train_with_val():
    data = open_fake(arrays(300), arrays(90, seed=1))
    train, val = data.split("train", limit=31), data.split("val", limit=13)
    assert len(train) == 31 and len(val) == 13
    assert not set(train.indices.tolist()) & set(data.split("val").indices.tolist())
    assert set(val.indices.tolist()) <= set(data.split("val").indices.tolist())
    assert sorted(torch.bincount(train.labels).tolist()) == [10, 10, 11]
    assert torch.equal(train.indices, data.split("train", limit=31).indices)
    assert len(data.split("test", limit=1000)) == 90
    assert len(data.split("test", limit=7)) == 7


def test_a_val_split_keeps_an_image_on_either_side_and_zero_means_none():
    data = open_fake(arrays(4))
    assert len(data.split("val", val_fraction=0.01)) == 1
    assert len(data.split("train", val_fraction=0.99)) == 1
    assert len(data.split("train", val_fraction=0)) == 4
    with one_line_error("val_fraction 0"):
        data.split("val", val_fraction=0)


@pytest.mark.parametrize(
    ("which", "keywords", "words"),
    [
        ("dev", {}, ["'dev'", "train, val or test"]),
        ("train", {"limit": 0}, ["limit 0", "at least 1"]),
        ("train", {"val_fraction": 1.0}, ["val_fraction 1.0"]),
        ("val", {"val_fraction": -0.1}, ["val_fraction -0.1"]),
    ],
)
def test_impossible_splits_are_user_errors(which, keywords, words):
    with one_line_error(*words):
        open_fake(arrays()).split(which, **keywords)


def test_the_test_split_is_read_only_when_asked_for_and_then_once():
    host, loads = host_of(arrays(), arrays(9, seed=3))
    data = open_data("fake", host=host)
    data.split("train"), data.split("val"), data.fingerprint("train")
    assert loads == {"train": 1}
    data.split("test"), data.split("test"), data.fingerprint("test")
    assert loads == {"train": 1, "test": 1}


def test_split_gives_floats_in_the_unit_range_and_moves():
    split = open_fake(arrays(50)).split("train")
    everything = split.float_images()
    assert everything.dtype == torch.float32 and everything.shape == split.images.shape
    assert torch.equal(everything, split.images.float() / 255)
    some = torch.tensor([4, 0, 7])
    assert torch.equal(split.float_images(some), everything[some])
    assert torch.equal(split.float_images(slice(2, 5)), everything[2:5])
    moved = split.to("meta")
    assert isinstance(moved, Split) and {moved.images.device.type, moved.labels.device.type} == {"meta"}
    assert split.images.max() > 1  # float_images left the stored bytes alone


# -- stratified_subset


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.data(), st.integers(0, 2**40))
def test_a_stratified_subset_is_exact_sorted_and_within_one_of_proportional(labels, draw, seed):
    n = draw.draw(st.integers(0, len(labels)))
    labels = np.array(labels)
    places = stratified_subset(labels, n, seed)
    assert len(places) == n == len(set(places.tolist()))
    assert places.tolist() == sorted(places.tolist())
    assert np.array_equal(places, stratified_subset(torch.from_numpy(labels), n, seed))
    for label, count in Counter(labels.tolist()).items():
        assert abs(int((labels[places] == label).sum()) - Fraction(n * count, len(labels))) < 1


def test_a_stratified_subset_depends_on_its_seed_and_not_on_the_version_of_numpy():
    labels = np.arange(40) % 4
    assert stratified_subset(labels, 8, 0).tolist() == [4, 10, 11, 15, 20, 22, 25, 29]  # pinned: splits must not move
    assert stratified_subset(labels, 8, 1).tolist() != stratified_subset(labels, 8, 0).tolist()


def test_every_image_has_the_same_chance_to_be_in_a_subset():
    labels = np.repeat([0, 1], [10, 30])
    hits = sum(np.bincount(stratified_subset(labels, 8, seed), minlength=40) for seed in range(2000))
    assert np.all(np.abs(hits / 2000 - 0.2) < 0.05)  # 5 standard errors


@pytest.mark.parametrize(("labels", "n"), [([0, 1], 3), ([0, 1], -1), ([[0, 1]], 1)])
def test_an_impossible_subset_is_refused(labels, n):
    with pytest.raises(ValueError, match="cannot take"):
        stratified_subset(np.array(labels), n, 0)


# -- what is known about a data set


def test_mean_and_std_are_those_of_the_whole_training_split():
    source = arrays(500)
    data = open_fake(source)
    scaled = source.images.astype(np.float64) / 255
    assert data.mean == pytest.approx(scaled.mean(axis=(0, 1, 2)), abs=1e-12)
    assert data.std == pytest.approx(scaled.std(axis=(0, 1, 2)), abs=1e-12)


def test_a_components_own_statistics_win_and_a_constant_channel_gets_a_floor():
    images = arrays().images.copy()
    images[..., 1] = 7
    data = open_fake(arrays(images=images))
    assert data.std[1] == 1e-3 and data.mean[1] == pytest.approx(7 / 255)
    given_ = open_fake(arrays(mean=(0.1, 0.2, 0.3), std=(0.5, 0.0, 0.4)))
    assert given_.mean == (0.1, 0.2, 0.3) and given_.std == (0.5, 1e-3, 0.4)


def test_the_opened_data_set_tells_its_shape_classes_budgets_and_origin():
    data = open_fake(arrays(), options={"shift": "3"})
    assert data.name == "fake" and data.classes == CLASSES and data.num_classes == 3
    assert data.image_shape == (3, 6, 5) and data.flip is True and data.budgets == {"linf": "8/255"}
    assert data.provenance == {"component": "fake", "options": {"shift": 3}}


def test_the_fingerprint_is_the_hash_of_images_and_labels():
    source = arrays(30)
    expected = hashlib.sha256(source.images.transpose(0, 3, 1, 2).tobytes() + source.labels.astype("<i8").tobytes())
    assert open_fake(source).fingerprint("train") == expected.hexdigest()
    # The same data in another memory layout and integer type is the same data; one changed bit is not.
    same = arrays(30, images=np.asfortranarray(source.images), labels=source.labels.astype(np.int32))
    assert open_fake(same).fingerprint("train") == expected.hexdigest()
    images, labels = source.images.copy(), source.labels.copy()
    images[3, 2, 1, 0] ^= 1
    labels[5] = (labels[5] + 1) % 3
    assert open_fake(arrays(30, images=images)).fingerprint("train") != expected.hexdigest()
    assert open_fake(arrays(30, labels=labels)).fingerprint("train") != expected.hexdigest()
    with one_line_error("'val'", "no fingerprint"):
        open_fake(source).fingerprint("val")


def test_grey_images_without_a_channel_axis_are_one_channel():
    data = open_fake(arrays(images=arrays().images[..., 0]))
    assert data.image_shape == (1, 6, 5) and data.split("train").images.shape[1:] == (1, 6, 5)


# -- what is refused

UNIT = arrays().images.astype(np.float32) / 255


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": UNIT}, ["uint8 0..255", "float32", r"look like \[0, 1\]"]),
        ({"images": (UNIT - 0.5) / 0.25}, ["uint8 0..255", "look normalised"]),
        ({"images": UNIT * 255}, ["uint8 0..255", r"images.round\(\)"]),
        ({"images": UNIT * np.nan}, ["uint8", "not finite"]),
        ({"images": arrays().images.astype(np.int64)}, ["uint8", "int64", "astype"]),
        ({"images": arrays().images.transpose(0, 3, 1, 2)}, [r"\(N, H, W, C\)", "channel-first"]),
        ({"images": arrays().images[..., :2]}, ["C 1 or 3"]),
        ({"images": arrays().images[0, 0]}, [r"\(N, H, W, C\)"]),
        ({"images": arrays().images[:0], "labels": arrays().labels[:0]}, ["no image"]),
        ({"labels": arrays().labels[:-1]}, ["60 images", "59 labels"]),
        ({"labels": arrays().labels.astype(float)}, ["integers", "float64"]),
        ({"labels": arrays().labels[:, None]}, ["integers shaped", r"\(60, 1\)"]),
        ({"labels": arrays().labels + 1}, ["from 1 to 3", "3 classes", "0..2"]),
        ({"labels": arrays().labels - 1}, ["from -1 to 1"]),
        ({"labels": arrays().labels * 0}, ["same label", "2 classes"]),
        ({"classes": ("only",), "labels": arrays().labels * 0}, ["1 class names", "2 classes"]),
        ({"mean": (0.5,)}, ["mean", "3 numbers"]),
        ({"std": (63.0, 62.1, 66.7)}, ["std", r"\[0, 1\]"]),
        ({"mean": (float("nan"),) * 3}, ["mean", r"\[0, 1\]"]),
    ],
)
def test_arrays_that_are_not_as_promised_are_refused_in_one_line(changes, words):
    with one_line_error("data set 'fake'", *words):
        open_fake(arrays(**changes))


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (arrays(9, shape=(6, 6, 3)), [r"\(3, 6, 6\)", r"\(3, 6, 5\)"]),
        (arrays(9, classes=("bee", "ant", "cat")), ["class names"]),
        (arrays(9, images=UNIT[:9]), ["test split", r"\[0, 1\]"]),
    ],
)
def test_a_test_split_that_does_not_match_is_refused(test, words):
    data = open_fake(arrays(), test)
    with one_line_error("data set 'fake'", *words):
        data.split("test")


def test_a_component_that_breaks_is_named_and_a_user_error_passes():
    with one_line_error("data set 'fake'", "train", "ZeroDivisionError", kind=ComponentError):
        open_fake(ZeroDivisionError("a bug\nin it"))
    with one_line_error("data set 'fake'", "train", "AttributeError", kind=ComponentError):
        open_fake(SimpleNamespace(images=None))
    with one_line_error("no such thing"):
        open_fake(UserError("no such thing"))


# -- names and paths


def write_npz(folder, n=12):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", images=arrays(n).images, labels=arrays(n).labels)
    return folder


def test_a_path_is_opened_by_what_lies_there(tmp_path, monkeypatch):
    folder = write_npz(tmp_path / "mine")
    data = open_data(str(folder))
    assert data.name == str(folder) and data.provenance["component"] == "npz"
    assert data.provenance["options"]["path"] == str(folder)
    assert len(data.split("train", val_fraction=0)) == 12

    source = arrays(12)
    keys = {f"{split}_{key}": getattr(source, key) for split in ("train", "test") for key in ("images", "labels")}
    np.savez(tmp_path / "one.npz", **keys)
    assert open_data(str(tmp_path / "one.npz")).provenance["component"] == "npz"

    monkeypatch.chdir(tmp_path)
    assert open_data("mine").provenance["options"]["path"] == "mine"  # relative to here
    assert open_data("mine", options={"flip": "true"}).flip is True


def test_a_name_below_the_root_is_found_there(tmp_path, monkeypatch):
    write_npz(tmp_path / "elsewhere" / "mine")
    assert open_data("mine", root=tmp_path / "elsewhere").image_shape == (3, 6, 5)
    monkeypatch.setenv("SCL_DEFENSE_DATA_ROOT", str(tmp_path / "elsewhere"))
    assert open_data("mine").image_shape == (3, 6, 5)


def test_any_other_folder_is_a_folder_of_images(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (9, 9), (k, k, k)).save(tmp_path / "pictures" / name / f"{k}.png")
    assert open_data(str(tmp_path / "pictures")).provenance["component"] == "image-folder"


def test_a_registered_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    write_npz(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert open_data("digits").provenance["component"] == "digits"
    assert open_data("./digits").provenance["component"] == "npz"


def test_an_unknown_name_gets_the_nearest_one_and_the_news_that_paths_work(tmp_path):
    with one_line_error("'digit'", "did you mean 'digits'", "npz", "folder", str(tmp_path / "root")):
        open_data("digit")
    for nothing in ("", "  "):  # pathlib takes the empty path for the current folder
        with one_line_error("no data set named"):
            open_data(nothing)
    (tmp_path / "notes.txt").write_text("hello")
    with one_line_error("notes.txt", "npz"):
        open_data(str(tmp_path / "notes.txt"))


def test_options_are_checked_and_cannot_contradict_the_path(tmp_path):
    folder = write_npz(tmp_path / "mine")
    with one_line_error("'shfit'", "did you mean 'shift'"):
        open_fake(arrays(), options={"shfit": 1})
    with one_line_error("option 'path'"):
        open_data(str(folder), options={"path": "other"})


def test_a_name_with_two_owners_is_not_guessed():
    host, _ = host_of(arrays(), name="digits", owner="somebody")
    with one_line_error("'digits'", "somebody"):
        open_data("digits", host=host)
    assert open_data("somebody:digits", host=host).image_shape == (3, 6, 5)
