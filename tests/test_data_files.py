"""Data sets from a user's own files: npz archives and image folders, and what is said about faulty ones."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from scl_defense_plugins.datasets.image_folder import ImageFolder
from scl_defense_plugins.datasets.npz import Npz

from scl_defense.data import open_data
from scl_defense.errors import UserError


@pytest.fixture(autouse=True)
def no_root(monkeypatch, tmp_path):
    monkeypatch.setenv("SCL_DEFENSE_DATA_ROOT", str(tmp_path / "root"))


def one_line_error(*words):
    return pytest.raises(UserError, match=r"(?s)\A(?!.*\n)" + "".join(f"(?=.*{word})" for word in words))


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
        open_data(str(broken(kind, tmp_path / "set"))).split("train")


@pytest.mark.parametrize("named", [True, False])
def test_a_test_split_alone_can_be_opened_but_not_trained_on(tmp_path, named):
    folder = save_folder(tmp_path / "set")
    (folder / "train.npz").unlink()
    extra = {"classes": np.array(["a", "b", "c", "d"])} if named else {}
    np.savez(folder / "test.npz", images=IMAGES, labels=LABELS, **extra)
    np.savez(tmp_path / "one.npz", test_images=IMAGES, test_labels=LABELS, **extra)
    for path in (folder, tmp_path / "one.npz"):
        data = open_data(str(path))
        assert data.classes == (("a", "b", "c", "d") if named else ("0", "1", "2"))  # without names: up to the largest
        assert data.split("test").labels.tolist() == LABELS.tolist()
        assert data.mean == pytest.approx(IMAGES.mean((0, 1, 2)) / 255)
        with one_line_error("train"):
            data.split("train")


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


def test_an_image_folder_with_test_alone_can_be_opened_but_not_trained_on(tmp_path):
    make_folder(tmp_path, splits=("test",))
    data = open_data(str(tmp_path))
    assert data.classes == ("ant", "zebra") and len(data.split("test")) == 20
    with one_line_error("has test/ but no train/"):
        data.split("train")


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
