"""The first-party data sets: what they load, and what they say when they cannot.

Nothing here touches the network (see conftest): where a download would start, it fails as on an offline machine.
"""

import gzip
import hashlib
import importlib
import os
import pickle
import struct
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from scl_defense_plugins.datasets.digits import Digits
from scl_defense_plugins.datasets.torchvision_sets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

from scl_defense.data import open_data
from scl_defense.errors import UserError
from scl_defense.plugins import PluginHost
from scl_defense.threat import ALL_NORMS, ThreatModel

PINNED_DIGITS_TEST = "8a5f3aefa99f030b074fd472a9b5314e4802d4e308f2c78839fe9d9d5e289e2f"
OURS = {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "npz", "npy", "image-folder"}
DATA = os.environ.get("SCL_DEFENSE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SCL_DEFENSE_DATA does not name a folder of real data sets")


@pytest.fixture(autouse=True)
def no_root(monkeypatch, tmp_path):
    monkeypatch.setenv("SCL_DEFENSE_DATA_ROOT", str(tmp_path / "root"))


@pytest.fixture
def never_download(monkeypatch):
    """Even the attempt is a failure."""

    def refuse(*args, **kwargs):
        pytest.fail("a download was attempted")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def one_line_error(*words):
    return pytest.raises(UserError, match=r"(?s)\A(?!.*\n)" + "".join(f"(?=.*{word})" for word in words))


def test_all_data_sets_are_registered_and_state_their_budgets():
    entries = {entry.name: entry for entry in PluginHost()["dataset"] if entry.owner.name == "scl-defense"}
    assert set(entries) == OURS
    for entry in entries.values():
        cls = entry.load()
        assert set(cls.budgets) == set(ALL_NORMS)
        for norm, eps in cls.budgets.items():
            assert 0 < ThreatModel(norm, eps).radius < 100
    # Digits have a reading direction: a mirrored 2 is no 2.
    assert not any(cls.flip for cls in (Digits, MNIST, SVHN))
    assert all(cls.flip for cls in (FashionMNIST, CIFAR10, CIFAR100))


# -- digits


def test_digits_are_scikit_learns_images_in_two_disjoint_parts(never_download):
    from sklearn.datasets import load_digits

    source = load_digits()
    train, test = (Digits().load(split, Path("unused")) for split in ("train", "test"))
    assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 8, 8, 1)
    assert np.bincount(test.labels).tolist() == [36] * 10
    expected = sorted(
        (np.rint(i * 255 / 16).astype(np.uint8).tobytes(), n) for i, n in zip(source.images, source.target, strict=True)
    )
    found = [(i.tobytes(), n) for part in (train, test) for i, n in zip(part.images, part.labels, strict=True)]
    assert sorted(found) == expected
    assert train.images.min() == 0 and train.images.max() == 255


def test_digits_keep_their_fixed_split():
    # Whoever changes the split changes every published number: this must be said in the changelog.
    assert open_data("digits").fingerprint("test") == PINNED_DIGITS_TEST


# -- MNIST and its kin


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_mnist(root, name="MNIST", counts=(20, 10)):
    random, parts = np.random.RandomState(0), {}
    for part, count in zip(("train", "t10k"), counts, strict=True):
        images, labels = random.randint(0, 256, (count, 28, 28)), np.arange(count) % 10
        write_idx(root / name / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", labels)
        parts[part] = images, labels
    return parts


@pytest.mark.parametrize(("component", "name"), [(MNIST, "MNIST"), (FashionMNIST, "FashionMNIST")])
def test_idx_files_that_are_there_are_read_without_the_network(component, name, tmp_path, never_download):
    parts = write_mnist(tmp_path, name)
    for split, part in (("train", "train"), ("test", "t10k")):
        arrays = component().load(split, tmp_path)
        assert arrays.images.dtype == np.uint8 and np.array_equal(arrays.images[..., 0], parts[part][0])
        assert np.array_equal(arrays.labels, parts[part][1]) and len(arrays.classes) == 10


def test_a_damaged_file_is_named_and_left_where_it_is(tmp_path, never_download):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with one_line_error("MNIST", str(file.parent), "damaged", "delete it"):
        MNIST().load("train", tmp_path)
    assert len(file.read_bytes()) == 16 + 20 * 784 - 100


@pytest.mark.parametrize(
    ("component", "place"),
    [
        (MNIST, "MNIST/raw/train-images-idx3-ubyte"),
        (FashionMNIST, "FashionMNIST/raw/train-images-idx3-ubyte"),
        (CIFAR10, "cifar-10-batches-py"),
        (CIFAR100, "cifar-100-python"),
        (SVHN, "train_32x32.mat"),
    ],
)
def test_offline_the_error_says_where_the_files_belong(component, place, tmp_path, monkeypatch):
    words = [component.__name__, str(tmp_path / "deep" / place), "offline", "SCL_DEFENSE_DATA_ROOT"]
    with one_line_error(*words, "download failed"):
        component().load("train", tmp_path / "deep")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("a download was attempted"))
    with one_line_error(*words, "switched off"):
        component(download=False).load("train", tmp_path / "deep")


def test_a_root_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with one_line_error("MNIST", "file"):
        MNIST().load("train", tmp_path / "file" / "below")


def test_missing_files_are_fetched_checked_and_unpacked(tmp_path, monkeypatch):
    """The download path, with the server's answers made here: the same archives a mirror would send."""
    import torchvision.datasets

    parts = write_mnist(tmp_path / "made")
    answers = {}
    for file in (tmp_path / "made" / "MNIST" / "raw").iterdir():
        answers[f"{file.name}.gz"] = gzip.compress(file.read_bytes())
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in answers.items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)

    class Response:
        def __init__(self, url):
            self.url, self.content = url, answers[url.rsplit("/", 1)[1]]
            self.length = len(self.content)

        def read(self, size=-1):
            taken, self.content = self.content[:size], self.content[size:]
            return taken

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return None

    monkeypatch.setattr(urllib.request, "urlopen", lambda request, **k: Response(request.full_url))
    arrays = MNIST().load("train", tmp_path / "new")
    assert np.array_equal(arrays.images[..., 0], parts["train"][0])
    name, content = next(iter(answers.items()))
    answers[name] = content[:-1] + bytes([content[-1] ^ 1])  # one wrong byte
    with one_line_error("MNIST", "download failed"):
        MNIST().load("train", tmp_path / "other")


def test_a_run_waits_for_the_download_of_another(tmp_path, never_download):
    """Half the files are there, the lock is held, and whoever holds it is still writing."""
    parts = write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    complete = {file: file.read_bytes() for file in raw.iterdir()}
    for file, content in complete.items():
        file.write_bytes(content[: len(content) // 2])
    importlib.import_module("torchvision.datasets")  # slow: not while the other one writes
    locked = threading.Event()

    def other():
        with FileLock(tmp_path / ".MNIST.lock"):
            locked.set()
            time.sleep(0.5)
            for file, content in complete.items():
                file.write_bytes(content)

    thread = threading.Thread(target=other)
    thread.start()
    assert locked.wait(10)
    assert np.array_equal(MNIST().load("train", tmp_path).images[..., 0], parts["train"][0])
    thread.join()


@needs_data
def test_the_real_mnist(never_download):
    data = open_data("mnist", root=DATA)
    train, test = data.split("train", val_fraction=0), data.split("test")
    assert (len(train), len(test)) == (60000, 10000) and data.image_shape == (1, 28, 28) and not data.flip
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9] and test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixels = train.float_images()
    assert data.mean == pytest.approx((pixels.mean().item(),), abs=1e-4)
    assert data.std == pytest.approx((pixels.std().item(),), abs=1e-4)


@needs_data
def test_the_published_cifar_statistics_fit_real_images():
    data = open_data(str(Path(DATA) / "cifar10-jpeg75"))
    assert data.image_shape == (3, 32, 32) and data.classes[:3] == ("airplane", "automobile", "bird")
    # The same photographs, a lossy coding: the means stay, the spread shrinks a little.
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=3e-3)


# -- CIFAR and SVHN: small files of the official layout, their checksums put in place of the official ones


def write_cifar(root, monkeypatch, component):
    import torchvision.datasets

    cifar10 = component is CIFAR10
    folder = root / ("cifar-10-batches-py" if cifar10 else "cifar-100-python")
    folder.mkdir(parents=True)
    label_key = "labels" if cifar10 else "fine_labels"
    random, written, sums = np.random.RandomState(0), {}, {}
    batches = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"] if cifar10 else ["train", "test"]
    classes = [f"class{k}" for k in range(10 if cifar10 else 100)]
    for name in batches:
        rows, labels = random.randint(0, 256, (12, 3072)).astype(np.uint8), [k % len(classes) for k in range(12)]
        written[name] = rows, labels
        (folder / name).write_bytes(pickle.dumps({"data": rows, label_key: labels}, protocol=2))
    meta = "batches.meta" if cifar10 else "meta"
    key = "label_names" if cifar10 else "fine_label_names"
    (folder / meta).write_bytes(pickle.dumps({key: classes}, protocol=2))
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    official = torchvision.datasets.CIFAR10 if cifar10 else torchvision.datasets.CIFAR100
    monkeypatch.setattr(official, "train_list", [[name, sums[name]] for name in batches[:-1]])
    monkeypatch.setattr(official, "test_list", [[batches[-1], sums[batches[-1]]]])
    monkeypatch.setattr(official, "meta", {"filename": meta, "key": key, "md5": sums[meta]})
    return folder, written, classes


@pytest.mark.parametrize("component", [CIFAR10, CIFAR100])
def test_cifar_batches_are_read_plane_by_plane(component, tmp_path, monkeypatch, never_download):
    _, written, classes = write_cifar(tmp_path, monkeypatch, component)
    *train_names, test_name = written
    for split, names in (("train", train_names), ("test", [test_name])):
        arrays = component().load(split, tmp_path)
        rows = np.concatenate([written[name][0] for name in names])
        assert arrays.images.shape == (len(rows), 32, 32, 3) and list(arrays.classes) == classes
        for n, y, x, c in [(0, 0, 0, 0), (3, 5, 30, 1), (11, 31, 2, 2)]:
            assert arrays.images[n, y, x, c] == rows[n, 1024 * c + 32 * y + x]
        assert arrays.labels.tolist() == [label for name in names for label in written[name][1]]


def test_a_cifar_batch_with_a_wrong_checksum_is_not_unpickled(tmp_path, monkeypatch, never_download):
    folder, _, _ = write_cifar(tmp_path, monkeypatch, CIFAR10)

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (folder / "data_batch_3").write_bytes(pickle.dumps(Trap()))
    with one_line_error("CIFAR10", str(folder), "damaged", "delete it"):
        CIFAR10().load("train", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_svhn_calls_the_digit_zero_zero(tmp_path, monkeypatch, never_download):
    import scipy.io
    import torchvision.datasets

    random = np.random.RandomState(0)
    images, labels = random.randint(0, 256, (32, 32, 3, 11)).astype(np.uint8), np.array([[*range(1, 11), 10]]).T
    table = dict(torchvision.datasets.SVHN.split_list)
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": labels.astype(np.uint8)})
        digest = hashlib.md5((tmp_path / f"{split}_32x32.mat").read_bytes()).hexdigest()
        table[split] = [table[split][0], f"{split}_32x32.mat", digest]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", table)
    for split in ("train", "test"):
        arrays = SVHN().load(split, tmp_path)
        assert arrays.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]
        assert np.array_equal(arrays.images, images.transpose(3, 0, 1, 2))
    (tmp_path / "train_32x32.mat").write_bytes(b"")
    with one_line_error("SVHN", "train_32x32.mat", "damaged"):
        SVHN().load("train", tmp_path)
