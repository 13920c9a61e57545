"""A data set that stays on disk: plain NumPy files, memory-mapped, for images that do not fit into memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from scl_defense.errors import UserError
from scl_defense.types import Field, ImageArrays, component

MAX_CLASSES = 100_000  # labels above are identifiers of something, not class numbers


@component
class Npy:
    """A folder with ``train/images.npy``, ``train/labels.npy``, ``test/images.npy`` and ``test/labels.npy``; optional:
    ``classes.txt``, a class name a line.

    images: (N, H, W, C) or (N, H, W), uint8, in C order; they are mapped, and only those that a step or an attack asks
    for are read. labels: (N,), integers, read whole. Without ``classes.txt`` the classes are the numbers up to the
    largest training label. The test split alone is enough for an audit. Pickled (object) arrays are refused.
    """

    path: Annotated[str, Field(min_length=1, description="folder with images.npy and labels.npy in train/ and test/")]
    flip: Annotated[bool, Field(description="whether a mirrored image keeps its label")] = False
    budgets: ClassVar[Mapping[str, str]] = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "24"}

    def splits(self, root: Path) -> tuple[str, ...]:
        """Which of train and test there are."""
        folder = self._place(root)
        return tuple(split for split in ("train", "test") if (folder / split / "images.npy").is_file())

    def _place(self, root: Path) -> Path:
        path = Path(self.path).expanduser()
        return path if path.exists() else root / path

    def load(self, split: str, root: Path) -> ImageArrays:
        folder = self._place(root)
        images, labels = _mapped(folder / split / "images.npy"), _mapped(folder / split / "labels.npy")
        if images.ndim > 1 and not images.flags.c_contiguous:
            raise UserError(
                f"'{folder / split / 'images.npy'}' is in Fortran order: an image lies all over the file; write it "
                "again: numpy.save(file, numpy.ascontiguousarray(images))"
            )
        return ImageArrays(images, np.array(labels), self._classes(folder, split, labels, root))

    def _classes(self, folder: Path, split: str, labels: np.ndarray, root: Path) -> tuple[str, ...]:
        named = folder / "classes.txt"
        if named.is_file():
            try:
                return tuple(line.strip() for line in named.read_text(encoding="utf-8").splitlines() if line.strip())
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"'{named}' cannot be read as UTF-8 text ({type(error).__name__})") from None
        if split != "train" and "train" in self.splits(root):  # not from the test labels: one may not occur there
            labels = _mapped(folder / "train" / "labels.npy")
        if not np.issubdtype(labels.dtype, np.integer) or labels.size == 0 or labels.max() < 0:
            return ()  # the core says what is wrong with such labels
        if labels.max() >= MAX_CLASSES:
            raise UserError(
                f"labels in '{folder}' run up to {labels.max()}; number the classes 0, 1, 2, ... or name them in "
                "classes.txt"
            )
        return tuple(str(number) for number in range(int(labels.max()) + 1))


def _mapped(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(
            f"'{path}' does not exist; an npy data set is train/ and test/ with images.npy and labels.npy in each"
        )
    try:
        with path.open("rb") as stream:
            known = stream.read(6) == b"\x93NUMPY"
        if known:
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy, struct, mmap: each has its own for a damaged or foreign file
        if "Python objects" in str(error):
            raise UserError(
                f"'{path}' holds an object array, which could run code; store plain uint8 images and integer labels"
            ) from None
        raise UserError(f"'{path}' is damaged or cut short ({type(error).__name__}); copy or write it again") from error
    raise UserError(f"'{path}' is no .npy file; write it with numpy.save")
