"""Any data set as a folder of image files."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from scl_defense.errors import UserError
from scl_defense.types import Field, ImageArrays, component

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
TEST_SHARE = 0.2


@component
class ImageFolder:
    """``path/train/<class>/*.png`` and ``path/test/<class>/*.png``, or ``path/<class>/*.png``, whose test split is
    then a fixed 20 % of every class, drawn by a fixed seed from the sorted file names.

    Classes are the folders' names, sorted; folders inside a class are searched too. Images are turned upright, cut to
    a centred square and resized (bicubic); transparency is dropped. An image of the right size keeps its pixels.
    A folder with test/ alone is enough for an audit.
    """

    path: Annotated[str, Field(min_length=1, description="folder with train/ and test/, or with one folder a class")]
    size: Annotated[int, Field(ge=8, le=1024, description="height and width of the images, in pixels")] = 32
    grey: Annotated[bool, Field(description="one channel instead of three")] = False
    flip: Annotated[bool, Field(description="whether a mirrored image keeps its label")] = False
    budgets: ClassVar[Mapping[str, str]] = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "24"}

    def splits(self, root: Path) -> tuple[str, ...]:
        """Which of train and test there are (all of them where one is cut from the other)."""
        path = self._place(root)
        return tuple(name for name in ("train", "test") if (path / name).is_dir()) or ("train", "test")

    def _place(self, root: Path) -> Path:
        path = Path(self.path).expanduser()
        return path if path.exists() else root / path

    def load(self, split: str, root: Path) -> ImageArrays:
        path = self._place(root)
        if not path.is_dir():
            raise UserError(f"image folder '{path}' does not exist; give a folder with one folder of images a class")
        halves = [name for name in ("train", "test") if (path / name).is_dir()]
        if len(halves) == 1 and (halves == ["train"] or split == "train"):
            other = "test" if halves == ["train"] else "train"
            raise UserError(f"image folder '{path}' has {halves[0]}/ but no {other}/; add it, or leave both out")
        if halves:
            classes = _classes(path / halves[0])
            unknown = sorted(set(_classes(path / split)) - set(classes))
            if unknown:
                raise UserError(f"class '{unknown[0]}' of '{path / split}' has no folder in '{path / 'train'}'; add it")
            files = {name: _files(path / split / name) for name in classes if (path / split / name).is_dir()}
        else:
            classes = _classes(path)
            files = {name: _cut(_files(path / name), split) for name in classes}
        images, labels = [], []
        for label, name in enumerate(classes):
            images += files.get(name, [])
            labels += [label] * len(files.get(name, []))
        with ThreadPoolExecutor() as pool:  # decoding leaves the interpreter free
            pixels = list(pool.map(self._read, images))
        return ImageArrays(np.stack(pixels), np.array(labels, dtype=np.int64), tuple(classes))

    def _read(self, file: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise UserError(f"image '{file}' has more than 8 bits a channel; convert it to 8 bits")
                upright = ImageOps.exif_transpose(image).convert("L" if self.grey else "RGB")
                square = ImageOps.fit(upright, (self.size, self.size), Image.Resampling.BICUBIC)
        except UserError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            text = " ".join(str(error).split())
            raise UserError(f"image '{file}' cannot be read ({text[:120]}); repair or remove it") from error
        return np.asarray(square, dtype=np.uint8).reshape(self.size, self.size, -1)


def _classes(folder: Path) -> list[str]:
    names = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"'{folder}' has {len(names)} folders of images; there must be one folder a class, at least 2")
    return names


def _files(folder: Path) -> list[Path]:
    found = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if not found:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise UserError(f"class folder '{folder}' holds no image; add some ({kinds}) or remove the folder")
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _cut(files: list[Path], split: str) -> list[Path]:
    if len(files) < 2:
        raise UserError(f"class folder '{files[0].parent}' holds 1 image; at least 2 are needed to cut a test split")
    count = max(1, round(TEST_SHARE * len(files)))
    in_test = set(np.random.RandomState(0).permutation(len(files))[:count].tolist())  # a stream frozen across versions
    return [file for place, file in enumerate(files) if (place in in_test) == (split == "test")]
