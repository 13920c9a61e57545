"""Any data set as NumPy archives: what most people can write in three lines."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from scl_defense.errors import UserError
from scl_defense.types import Field, ImageArrays, component

INFLATED = 1 << 30  # bytes; what an array may unpack to however small its archive is
MAX_CLASSES = 100_000  # labels above are identifiers of something, not class numbers


@component
class Npz:
    """A folder with ``train.npz`` and ``test.npz`` (keys ``images``, ``labels``), or one archive with
    ``train_images``, ``train_labels``, ``test_images``, ``test_labels``; optional in each: ``classes``, the names.

    images: (N, H, W, C) or (N, H, W), uint8. labels: (N,), integers. Without ``classes`` the classes are the numbers
    up to the largest training label. The test split alone is enough for an audit; without training labels the largest
    test label counts. Pickled (object) arrays are refused: they can run code.
    """

    path: Annotated[str, Field(min_length=1, description="folder with train.npz and test.npz, or one .npz file")]
    flip: Annotated[bool, Field(description="whether a mirrored image keeps its label")] = False
    budgets: ClassVar[Mapping[str, str]] = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "24"}

    def splits(self, root: Path) -> tuple[str, ...]:
        """Which of train and test there are (all of them where that cannot be told)."""
        path = self._place(root)
        if path.is_dir():
            return tuple(split for split in ("train", "test") if (path / f"{split}.npz").is_file())
        try:
            with zipfile.ZipFile(path) as archive:
                return tuple(split for split in ("train", "test") if f"{split}_images.npy" in archive.namelist())
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
            return ("train", "test")

    def _place(self, root: Path) -> Path:
        path = Path(self.path).expanduser()
        return path if path.exists() else root / path

    def load(self, split: str, root: Path) -> ImageArrays:
        path = self._place(root)
        if path.is_dir():
            archive, train, prefix = path / f"{split}.npz", path / "train.npz", ""
        else:
            archive, train, prefix = path, path, f"{split}_"
        found = _read(archive, f"{prefix}images", f"{prefix}labels")
        if "classes" not in found and "train" in self.splits(root):  # not from the test labels: one may not occur there
            found["classes"] = _classes(train, "train_labels" if prefix else "labels")
        elif "classes" not in found:
            found["classes"] = _numbered(archive, found[f"{prefix}labels"])
        names = tuple(str(name) for name in np.ravel(found["classes"]))
        return ImageArrays(found[f"{prefix}images"], found[f"{prefix}labels"], names)


def _classes(train: Path, key: str) -> np.ndarray:
    found = _read(train, key)
    return found["classes"] if "classes" in found else _numbered(train, found[key])


def _numbered(archive: Path, labels: np.ndarray) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer) or labels.size == 0 or labels.max() < 0:
        return np.zeros(0)  # the core says what is wrong with such labels
    if labels.max() >= MAX_CLASSES:
        raise UserError(
            f"labels of '{archive}' run up to {labels.max()}; number the classes 0, 1, 2, ... or store their names as "
            "'classes'"
        )
    return np.arange(int(labels.max()) + 1)


def _read(archive: Path, *keys: str) -> dict[str, np.ndarray]:
    """The arrays of these keys, and ``classes`` if it is there."""
    if not archive.is_file():
        raise UserError(f"'{archive}' does not exist; an npz data set is train.npz and test.npz, or one .npz file")
    try:
        if _is_zip(archive):
            _check_sizes(archive, (*keys, "classes"))
        content = np.load(archive, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise UserError(f"'{archive}' holds a single array, not an archive; write it with numpy.savez")
        with content:
            for key in keys:
                if key not in content:
                    raise UserError(f"'{archive}' has no array '{key}'; it holds {', '.join(content.files) or 'none'}")
            found = {key: content[key] for key in (*keys, "classes") if key in content}
        for key, array in found.items():
            if isinstance(array, bytes):  # what numpy gives for a member that is no .npy file
                raise UserError(f"'{key}' in '{archive}' is not a NumPy array; write the archive with numpy.savez")
        return found
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, struct, numpy: each has its own for a damaged or foreign file
        if "allow_pickle" in str(error) and _is_zip(archive):
            raise UserError(
                f"'{archive}' holds an object array, which could run code; store plain uint8 images and integer labels"
            ) from None
        # numpy's own text recommends loading unsafely; that advice must not reach the user.
        kind = "it is damaged or cut short" if _is_zip(archive) else "it is no zip file as numpy.savez writes them"
        raise UserError(
            f"'{archive}' is not a readable .npz archive: {kind} ({type(error).__name__}); copy or write it again"
        ) from error


def _check_sizes(path: Path, keys: tuple[str, ...]) -> None:
    """Raise :class:`UserError` for arrays larger than the archive can mean, before room is made for them."""
    with zipfile.ZipFile(path) as archive:
        for key in keys:
            if f"{key}.npy" not in archive.namelist():
                continue
            size = archive.getinfo(f"{key}.npy").file_size
            if size > max(INFLATED, 200 * path.stat().st_size):
                raise UserError(f"'{key}' in '{path}' would unpack to {size / 1e9:.3g} GB; write the archive again")
            with archive.open(f"{key}.npy") as stream:
                if stream.read(6) != b"\x93NUMPY":
                    continue  # numpy says what it is
                version = stream.read(2)
                if version not in (b"\x01\x00", b"\x02\x00"):
                    continue
                read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
            if math.prod(shape) * dtype.itemsize > size:
                raise UserError(f"'{key}' in '{path}' is damaged: it claims {shape} {dtype}, more than the file holds")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
