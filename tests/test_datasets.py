"""The first-party data sets: what they load, and what they say when they cannot.

Nothing here touches the network (see conftest): where a download would start, it fails as on an offline machine.
"""

import gzip
import hashlib
import os
import pickle
import struct
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scl_defense_plugins.datasets.digits import Digits
from scl_defense_plugins.datasets.image_folder import ImageFolder
from scl_defense_plugins.datasets.npz import Npz
from scl_defense_plugins.datasets.torchvision_sets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

from scl_defense.data import open_data
from scl_defense.errors import UserError
from scl_defense.plugins import PluginHost
from scl_defense.threat import NORMS, ThreatModel

PINNED_DIGITS_TEST = "8a5f3aefa99f030b074fd472a9b5314e4802d4e308f2c78839fe9d9d5e289e2f"
OURS = {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "npz", "image-folder"}
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
        assert set(cls.budgets) == set(NORMS)
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


# -- npz

IMAGES = np.random.RandomState(0).randint(0, 256, (12, 9, 9, 3)).astype(np.uint8)
LABELS = np.arange(12) % 3


def save_folder(folder, **changes):
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        np.savez_compressed(folder / f"{split}.npz", **{"images": IMAGES, "labels": LABELS, **changes})
    return folder


def test_npz_reads_a_folder_and_one_file(tmp_path):
    folder = save_folder(tmp_path / "set")
    np.savez(
        tmp_path / "one.npz", train_images=IMAGES, train_labels=LABELS, test_images=IMAGES[:4], test_labels=LABELS[:4]
    )
    for path, test_count in ((folder, 12), (tmp_path / "one.npz", 4)):
        train, test = (Npz(path=str(path)).load(split, tmp_path) for split in ("train", "test"))
        assert np.array_equal(train.images, IMAGES) and np.array_equal(train.labels, LABELS)
        assert len(test.images) == test_count and train.classes == test.classes == ("0", "1", "2")
    assert Npz(path="set").load("train", tmp_path).images.shape == (12, 9, 9, 3)  # below the root


def test_npz_class_names_come_from_the_file_or_the_training_labels(tmp_path):
    names = np.array(["ant", "bee", "cat"])
    folder = save_folder(tmp_path / "named", classes=names)
    assert Npz(path=str(folder)).load("test", tmp_path).classes == ("ant", "bee", "cat")
    np.savez(folder / "test.npz", images=IMAGES[:2], labels=LABELS[:2])  # names in train.npz alone: they hold for both
    assert Npz(path=str(folder)).load("test", tmp_path).classes == ("ant", "bee", "cat")
    # A test split in which the last class does not occur still knows it.
    folder = save_folder(tmp_path / "bare")
    np.savez(folder / "test.npz", images=IMAGES[:2], labels=LABELS[:2])
    assert Npz(path=str(folder)).load("test", tmp_path).classes == ("0", "1", "2")


def test_npz_test_labels_beyond_the_training_classes_are_refused(tmp_path):
    folder = save_folder(tmp_path / "set")
    np.savez(folder / "test.npz", images=IMAGES, labels=LABELS + 1)
    with one_line_error("from 1 to 3", "3 classes"):
        open_data(str(folder)).split("test")


def broken(kind, folder):
    file = save_folder(folder) / "train.npz"
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "flipped":
        content = bytearray(file.read_bytes())
        content[file.stat().st_size // 3] ^= 0xFF
        file.write_bytes(bytes(content))
    elif kind == "text":
        file.write_text("images, labels")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "array":
        with file.open("wb") as stream:
            np.save(stream, IMAGES)
    elif kind == "keys":
        np.savez(file, x_train=IMAGES, labels=LABELS)
    elif kind == "objects":
        np.savez(file, images=np.array([IMAGES, None], dtype=object), labels=LABELS)
    elif kind == "member":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("images.npy", b"nonsense")
            archive.writestr("labels.npy", b"")
    elif kind == "identifiers":
        np.savez(file, images=IMAGES, labels=LABELS * 10**12)
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["does not exist"]),
        ("cut", ["not a readable", "cut short"]),
        ("flipped", ["not a readable"]),
        ("text", ["not a readable"]),
        ("empty", ["not a readable"]),
        ("array", ["single array", "savez"]),
        ("keys", ["no array 'images'", "x_train, labels"]),
        ("objects", ["object array", "run code"]),
        ("member", ["not a NumPy array"]),
        ("identifiers", ["2000000000000", "classes"]),
    ],
)
def test_a_faulty_npz_is_refused_in_one_line(kind, words, tmp_path):
    with one_line_error(r"train\.npz", *words):
        open_data(str(broken(kind, tmp_path / "set")))


def test_npz_needs_its_path():
    with one_line_error("npz", "'path' is required"):
        open_data("npz")


# -- image folders


def save_image(path, pixels, **options):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def make_folder(root, splits=("train", "test"), per_class=10, side=32):
    random = np.random.RandomState(0)
    made = {}
    for split in splits:
        for name in ("zebra", "ant"):
            for k in range(per_class):
                file = root / split / name / f"{k:02d}.png"
                made[file] = random.randint(0, 256, (side, side, 3)).astype(np.uint8)
                save_image(file, made[file])
    return made


def test_image_folder_with_train_and_test_keeps_the_pixels(tmp_path):
    made = make_folder(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "ant" / ".hidden.png").write_text("no image")
    for split in ("train", "test"):
        arrays = ImageFolder(path=str(tmp_path)).load(split, Path("unused"))
        assert arrays.classes == ("ant", "zebra") and arrays.labels.tolist() == [0] * 10 + [1] * 10
        expected = [made[tmp_path / split / name / f"{k:02d}.png"] for name in ("ant", "zebra") for k in range(10)]
        assert np.array_equal(arrays.images, np.stack(expected))


def test_image_folder_without_a_test_split_cuts_a_fixed_fifth_of_every_class(tmp_path):
    made = make_folder(tmp_path, splits=("",))
    for k in range(10, 15):  # another class size
        save_image(tmp_path / "ant" / "more" / f"{k}.png", np.full((32, 32, 3), k, np.uint8))
    parts = {split: ImageFolder(path=str(tmp_path)).load(split, Path("unused")) for split in ("train", "test")}
    assert np.bincount(parts["test"].labels).tolist() == [3, 2]
    assert np.bincount(parts["train"].labels).tolist() == [12, 8]
    seen = sorted(image.tobytes() for part in parts.values() for image in part.images)
    expected = [image.tobytes() for image in made.values()] + [bytes([k]) * 3072 for k in range(10, 15)]
    assert seen == sorted(expected)
    again = ImageFolder(path=str(tmp_path)).load("test", Path("unused"))
    assert np.array_equal(again.images, parts["test"].images)


def test_images_are_turned_upright_cut_square_and_resized(tmp_path):
    from PIL import Image

    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the centred square is bright, the rest is cut off
    save_image(tmp_path / "a" / "0.png", wide)
    save_image(tmp_path / "a" / "1.png", np.dstack([wide, np.full((20, 60), 9, np.uint8)]))  # nearly transparent
    save_image(tmp_path / "b" / "0.bmp", wide[..., 0])
    turned = np.zeros((16, 16), np.uint8)
    turned[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: the stored top row is the right column
    save_image(tmp_path / "b" / "1.png", turned, exif=exif)
    component = ImageFolder(path=str(tmp_path), size=16, grey=True)
    images = np.concatenate([component.load(split, Path("unused")).images for split in ("train", "test")])
    assert images.shape == (4, 16, 16, 1)
    upright = np.zeros((16, 16, 1), np.uint8)
    upright[:, -1] = 255
    assert sum(np.array_equal(image, upright) for image in images) == 1
    assert sum(bool((image[:, 3:-3] == 200).all()) for image in images) == 3  # bicubic looks 2.5 pixels past the edge
    assert ImageFolder(path=str(tmp_path), size=16).load("train", Path("unused")).images.shape[1:] == (16, 16, 3)


def spoil(kind, root):
    make_folder(root, per_class=2)
    if kind == "empty":
        (root / "train" / "cat").mkdir()
    elif kind == "unreadable":
        file = root / "train" / "ant" / "00.png"
        file.write_bytes(file.read_bytes()[:200])
    elif kind == "no image":
        (root / "train" / "ant" / "00.jpg").write_text("<html>not found</html>")
    elif kind == "deep":
        save_image(root / "train" / "ant" / "deep.png", np.full((32, 32), 40000, np.uint16))
    elif kind == "no test":
        for file in sorted((root / "test").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (root / "test").rmdir()
    elif kind == "unknown class":
        save_image(root / "test" / "cat" / "0.png", np.zeros((8, 8), np.uint8))
    elif kind == "one class":
        for file in [*(root / "train" / "ant").iterdir(), root / "train" / "ant"]:
            file.rmdir() if file.is_dir() else file.unlink()
    return root


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", ["class folder", "cat", "holds no image"]),
        ("unreadable", ["00.png", "cannot be read", "remove"]),
        ("no image", ["00.jpg", "cannot be read"]),
        ("deep", ["deep.png", "8 bits"]),
        ("no test", ["train/ but no test/"]),
        ("unknown class", ["'cat'", "train"]),
        ("one class", ["1 folders", "at least 2"]),
    ],
)
def test_a_faulty_image_folder_is_refused_in_one_line(kind, words, tmp_path):
    root = spoil(kind, tmp_path / "pictures")
    with one_line_error(*words):
        for split in ("train", "test"):
            ImageFolder(path=str(root)).load(split, tmp_path)


def test_a_folder_of_single_images_cannot_be_cut(tmp_path):
    make_folder(tmp_path, splits=("",), per_class=1)
    with one_line_error("holds 1 image", "at least 2"):
        ImageFolder(path=str(tmp_path)).load("train", tmp_path)
    with one_line_error("does not exist"):
        ImageFolder(path=str(tmp_path / "nothing")).load("train", tmp_path)
