"""MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100 and SVHN, read (and fetched where missing) through torchvision.

mean and std are the customary published ones, measured on the training images in units of [0, 1].
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from filelock import FileLock

from scl_defense.errors import UserError
from scl_defense.types import Field, ImageArrays, component

Download = Annotated[bool, Field(description="fetch the files where they are missing; false: never use the network")]
IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
NATURAL = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "24"}


@component
class MNIST:
    """70,000 handwritten digits of 28 x 28 (LeCun et al. 1998)."""

    flip: ClassVar[bool] = False
    budgets: ClassVar[Mapping[str, str]] = {"linf": "0.3", "l2": "2.0", "l1": "10", "l0": "15"}
    download: Download = True

    def load(self, split: str, root: Path) -> ImageArrays:
        opened = _open(
            "MNIST", root, [f"MNIST/raw/{name}" for name in IDX_FILES], self.download, train=split == "train"
        )
        classes = tuple("0123456789")
        return ImageArrays(
            opened.data.numpy()[..., None], opened.targets.numpy(), classes, mean=(0.1307,), std=(0.3081,)
        )


@component
class FashionMNIST:
    """70,000 pictures of clothes, 28 x 28 (Xiao et al. 2017)."""

    flip: ClassVar[bool] = True
    budgets: ClassVar[Mapping[str, str]] = {"linf": "0.1", "l2": "1.5", "l1": "8", "l0": "15"}
    download: Download = True

    def load(self, split: str, root: Path) -> ImageArrays:
        files = [f"FashionMNIST/raw/{name}" for name in IDX_FILES]
        opened = _open("FashionMNIST", root, files, self.download, train=split == "train")
        classes = tuple(opened.classes)
        return ImageArrays(
            opened.data.numpy()[..., None], opened.targets.numpy(), classes, mean=(0.2860,), std=(0.3530,)
        )


@component
class CIFAR10:
    """60,000 photographs of 32 x 32 in 10 classes (Krizhevsky 2009)."""

    flip: ClassVar[bool] = True
    budgets: ClassVar[Mapping[str, str]] = NATURAL
    download: Download = True

    def load(self, split: str, root: Path) -> ImageArrays:
        opened = _open("CIFAR10", root, ["cifar-10-batches-py"], self.download, train=split == "train")
        labels, classes = np.array(opened.targets), tuple(opened.classes)
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        return ImageArrays(opened.data, labels, classes, mean=mean, std=std)


@component
class CIFAR100:
    """60,000 photographs of 32 x 32 in 100 classes (Krizhevsky 2009)."""

    flip: ClassVar[bool] = True
    budgets: ClassVar[Mapping[str, str]] = NATURAL
    download: Download = True

    def load(self, split: str, root: Path) -> ImageArrays:
        opened = _open("CIFAR100", root, ["cifar-100-python"], self.download, train=split == "train")
        labels, classes = np.array(opened.targets), tuple(opened.classes)
        mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        return ImageArrays(opened.data, labels, classes, mean=mean, std=std)


@component
class SVHN:
    """99,289 house numbers of 32 x 32 (Netzer et al. 2011), without the extra part; label 0 is the digit 0."""

    flip: ClassVar[bool] = False
    budgets: ClassVar[Mapping[str, str]] = NATURAL
    download: Download = True

    def load(self, split: str, root: Path) -> ImageArrays:
        opened = _open("SVHN", root, [f"{split}_32x32.mat"], self.download, split=split)
        images, classes = opened.data.transpose(0, 2, 3, 1), tuple("0123456789")
        mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
        return ImageArrays(images, opened.labels, classes, mean=mean, std=std)


def _open(name: str, root: Path, files: Sequence[str], download: bool, **which: Any) -> Any:
    """The torchvision data set. ``files``: what must lie below ``root`` for nothing to be fetched.

    Files that are there but cannot be read are never replaced silently: they may be somebody's.
    """
    import torchvision.datasets

    factory, lock = getattr(torchvision.datasets, name), root / f".{name}.lock"
    if lock.exists():  # another run of a study may be unpacking these very files; a read-only folder cannot be locked
        with suppress(OSError), FileLock(lock):
            pass
    missing = [file for file in files if not (root / file).exists()]
    if not missing:
        return _read(factory, name, root / files[0], root=root, **which)
    place = root / missing[0]
    remedy = "put it there, or set SCL_DEFENSE_DATA_ROOT to the folder that holds it"
    if not download:
        raise UserError(f"{name} is not there: {place} is missing and downloading is switched off (offline); {remedy}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            return factory(root=root, download=True, **which)
    except Exception as error:  # urllib, ssl, tarfile, zlib and torchvision each raise their own
        raise UserError(
            f"{name} is not there: {place} is missing and the download failed ({_one_line(error)}); if this machine "
            f"is offline, {remedy}"
        ) from error


def _read(factory: Any, name: str, place: Path, **arguments: Any) -> Any:
    try:
        return factory(download=False, **arguments)
    except Exception as error:
        damaged = place.parent if place.name in IDX_FILES else place
        raise UserError(
            f"{name} in {damaged} is damaged or incomplete ({_one_line(error)}); delete it and it is downloaded anew, "
            "or put the original files there"
        ) from error


def _one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 160 else text[:157] + "..."
