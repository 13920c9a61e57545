"""Broken data sets."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from broken import Case
from scl_defense.errors import UserError
from scl_defense.types import ImageArrays, component

KIND = "dataset"


class Base:
    """Twelve training and six test images of three classes; the broken ones change one thing."""

    flip: ClassVar[bool] = False
    budgets: ClassVar[Mapping[str, str]] = {"linf": "8/255", "l2": "0.5", "l1": "12"}

    def load(self, split: str, root: Path) -> ImageArrays:
        count = 12 if split == "train" else 6
        rng = np.random.default_rng(count)
        images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        return ImageArrays(images, np.arange(count) % 3, ("ring", "square", "cross"), (0.5,), (0.3,))


@component
class Sound(Base):
    """Synthetic images."""


@component
class NotThere(Base):
    """Its file is missing, and it does not say so."""

    def load(self, split: str, root: Path) -> ImageArrays:
        return ImageArrays(np.load(root / "missing.npy"), np.zeros(0), ())


@component
class NotThereButSaysSo(Base):
    """Its file is missing."""

    def load(self, split: str, root: Path) -> ImageArrays:
        raise UserError("the rings are not there; put rings.npz into the data folder")


@component
class ReturnsATuple(Base):
    """(images, labels)."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return (arrays.images, arrays.labels)


@component
class FloatImages(Base):
    """Already divided by 255."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return replace(arrays, images=(arrays.images / 255).astype(np.float32))


@component
class ChannelFirst(Base):
    """(N, C, H, W)."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return replace(arrays, images=arrays.images.transpose(0, 3, 1, 2), mean=None, std=None)


@component
class LabelsFromOne(Base):
    """Classes 1..K."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return replace(arrays, labels=arrays.labels + 1)


@component
class LabelsMissing(Base):
    """One label too few."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return replace(arrays, labels=arrays.labels[:-1])


@component
class ClassWithoutImage(Base):
    """A fourth class that no training image has."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return replace(arrays, classes=(*arrays.classes, "star"))


@component
class ClassesInAnotherOrder(Base):
    """The test split sorts its classes."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return replace(arrays, classes=tuple(sorted(arrays.classes))) if split == "test" else arrays


@component
class TwinClasses(Base):
    """Two classes of one name."""

    def load(self, split: str, root: Path) -> ImageArrays:
        return replace(super().load(split, root), classes=("ring", "ring", "cross"))


@component
class StatisticsOf255(Base):
    """Mean and std in grey levels."""

    def load(self, split: str, root: Path) -> ImageArrays:
        return replace(super().load(split, root), mean=(127.0,), std=(70.0,))


@component
class StatisticsOfEachSplit(Base):
    """Normalises the test split by itself."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return replace(arrays, mean=(float(arrays.images.mean() / 255),))


@component
class LargerTestImages(Base):
    """The test split was not resized."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        return replace(arrays, images=arrays.images.repeat(2, axis=1)) if split == "test" else arrays


@component
class TestsOnTraining(Base):
    """The test split is a part of the training split."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load("train", root)
        return replace(arrays, images=arrays.images[:6].copy(), labels=arrays.labels[:6]) if split == "test" else arrays


@component
class ShufflesEveryTime(Base):
    """A split that moves between runs."""

    def load(self, split: str, root: Path) -> ImageArrays:
        arrays = super().load(split, root)
        order = np.random.default_rng(int.from_bytes(os.urandom(6), "big")).permutation(len(arrays.labels))
        return replace(arrays, images=arrays.images[order], labels=arrays.labels[order])


@component
class BudgetOf8(Base):
    """Eps in grey levels."""

    budgets: ClassVar[Mapping[str, str]] = {"linf": "8", "l2": "0.5", "l1": "12"}


@component
class BudgetMissing(Base):
    """A run with --norm l1 finds no eps."""

    budgets: ClassVar[Mapping[str, str]] = {"linf": "8/255", "l2": "0.5"}


@component
class FlipUnknown(Base):
    """None is not an answer."""

    flip: ClassVar[bool | None] = None


SOUND = [Sound]

CASES = [
    Case(KIND, NotThere, "available", "FileNotFoundError"),
    Case(KIND, NotThereButSaysSo, "available", "put rings.npz into the data folder"),
    Case(KIND, ReturnsATuple, "available", "returned tuple"),
    Case(KIND, FloatImages, "images", "float32, not uint8"),
    Case(KIND, ChannelFirst, "images", "(12, 1, 8, 8)"),
    Case(KIND, LabelsFromOne, "labels", "leave 0..2"),
    Case(KIND, LabelsMissing, "labels", "12 images but 11 labels"),
    Case(KIND, ClassWithoutImage, "labels", "no training image is of class 3 ('star')"),
    Case(KIND, ClassesInAnotherOrder, "classes", "in another order"),
    Case(KIND, TwinClasses, "classes", "same name"),
    Case(KIND, StatisticsOf255, "statistics", "in units of [0, 1]"),
    Case(KIND, StatisticsOfEachSplit, "statistics", "differ"),
    Case(KIND, LargerTestImages, "same-image-size", "(16, 8, 1)"),
    Case(KIND, TestsOnTraining, "splits-apart", "100% of the test images"),
    Case(KIND, ShufflesEveryTime, "repeatable", "twice"),
    Case(KIND, BudgetOf8, "flip-and-budgets", "write 8/255 instead of 8"),
    Case(KIND, BudgetMissing, "flip-and-budgets", "no eps for l1"),
    Case(KIND, FlipUnknown, "flip-and-budgets", "flip is None"),
]
