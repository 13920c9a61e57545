"""The contract of data sets: what splitting, training and reporting rely on."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scl_defense.data import data_folder
from scl_defense.errors import SclDefenseError
from scl_defense.testing._common import (
    BUILT,
    COMPONENT_CHECKS,
    Check,
    CheckResult,
    Fault,
    applies_if,
    examine,
    expect,
    one_line,
)
from scl_defense.threat import NORMS, ThreatModel
from scl_defense.types import ImageArrays

AVAILABLE = "available"
SPLITS = ("train", "test")
COMMON = 0.1  # share of test images that may also be training images


def check_dataset(component: Any, name: str | None = None, *, root: str | Path | None = None) -> list[CheckResult]:
    """Run the contract test on a data set: an instance, or a class (with its default options).

    root: the folder that holds the files; they may be downloaded into it. Without it nothing is downloaded (an option
    ``download`` is switched off) and the files are looked for where a run looks for them: ``SCL_DEFENSE_DATA_ROOT``,
    else ``~/.cache/scl-defense``. Data that cannot be loaded is a failed check ``available`` with the reason.
    """
    results = examine(component, name, DATASET_CHECKS, lambda dataset, label: Trials(dataset, label, root))
    # An option without a default (a path) is the commonest reason why there is nothing to load.
    return [dataclasses.replace(r, check=AVAILABLE) if r.check == BUILT and not r.passed else r for r in results]


class Trials:
    """The splits of one data set, each loaded twice."""

    def __init__(self, dataset: Any, name: str, root: str | Path | None = None):
        self.component, self.name, self.dataset = dataset, name, dataset
        self.root = data_folder(root)
        if root is None and getattr(dataset, "download", False) is True:
            self.dataset = dataclasses.replace(dataset, download=False)

    @cached_property
    def splits(self) -> dict[str, ImageArrays]:
        return {split: self.dataset.load(split, self.root) for split in SPLITS}

    def loaded(self) -> dict[str, ImageArrays]:
        """For every check but ``available``, which says why nothing could be loaded."""
        try:
            splits = self.splits
        except Exception:
            splits = {}
        applies_if(splits and all(isinstance(arrays, ImageArrays) for arrays in splits.values()))
        return splits


def check_available(trials: Trials) -> None:
    """Both splits can be loaded and are :class:`scl_defense.types.ImageArrays`."""
    try:
        splits = trials.splits
    except SclDefenseError:
        raise
    except Exception as error:
        raise Fault(f"load failed: {one_line(error)}; raise UserError saying what is needed") from None
    for split, arrays in splits.items():
        expect(isinstance(arrays, ImageArrays), f"load('{split}') returned {type(arrays).__name__}, not ImageArrays")


def check_images(trials: Trials) -> None:
    """Images are uint8 (N, H, W, C), C = 1 or 3, N >= 1: raw pixels, so that eps means the same for all data."""
    for split, arrays in trials.loaded().items():
        images = arrays.images
        shape: tuple[int, ...] = getattr(images, "shape", ())
        shaped = isinstance(images, np.ndarray) and len(shape) == 4 and shape[3] in (1, 3) and 0 not in shape
        expect(shaped, f"images of '{split}' are {type(images).__name__} {shape}, not an array (N, H, W, 1 or 3)")
        expect(images.dtype == np.uint8, f"images of '{split}' are {images.dtype}, not uint8")


def check_labels(trials: Trials) -> None:
    """One integer label an image, in [0, K); every class has a training image."""
    for split, arrays in trials.loaded().items():
        labels, count = np.asarray(arrays.labels), len(arrays.classes)
        shaped = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
        expect(shaped, f"labels of '{split}' are {labels.dtype} {labels.shape}, not integers (N,)")
        expect(len(labels) == len(arrays.images), f"'{split}' has {len(arrays.images)} images but {len(labels)} labels")
        expect(len(labels) and labels.min() >= 0 and labels.max() < count, f"labels of '{split}' leave 0..{count - 1}")
        missing = sorted(set(range(count)) - set(labels.tolist()))
        if split == "train" and missing:
            raise Fault(f"no training image is of class {missing[0]} ('{arrays.classes[missing[0]]}')")


def check_classes(trials: Trials) -> None:
    """Classes are two or more different names, the same in the same order in both splits."""
    splits = trials.loaded()
    classes = splits["train"].classes
    named = isinstance(classes, tuple) and all(isinstance(name, str) and name.strip() for name in classes)
    expect(named and len(classes) >= 2, f"classes is {classes!r}; it must be a tuple of at least two names")
    expect(len(set(classes)) == len(classes), "two classes have the same name")
    expect(splits["test"].classes == classes, "the test split names other classes, or in another order")


def check_statistics(trials: Trials) -> None:
    """mean and std are per channel, in units of [0, 1], std > 0, equal in both splits; or both ``None``."""
    splits = trials.loaded()
    for split, arrays in splits.items():
        channels = np.asarray(arrays.images).shape[-1]
        for name, values in (("mean", arrays.mean), ("std", arrays.std)):
            if values is None:
                continue
            expect(len(values) == channels, f"{name} of '{split}' has {len(values)} values for {channels} channels")
            legal = all(0 <= value <= 1 for value in values) and (name == "mean" or min(values) > 0)
            expect(legal, f"{name} of '{split}' is {tuple(values)}; it must be in units of [0, 1]")
    train, test = splits["train"], splits["test"]
    expect((train.mean, train.std) == (test.mean, test.std), "mean and std of the two splits differ")


def check_same_image_size(trials: Trials) -> None:
    """Both splits have images of one size and number of channels."""
    sizes = {split: np.asarray(arrays.images).shape[1:] for split, arrays in trials.loaded().items()}
    expect(sizes["train"] == sizes["test"], f"images are {sizes['train']} in 'train' but {sizes['test']} in 'test'")


def check_splits_apart(trials: Trials) -> None:
    """The test split is no copy of training images. (Real data has a few exact duplicates, not one in ten.)"""
    splits = trials.loaded()
    train, test = (np.asarray(splits[split].images) for split in SPLITS)
    expect(not np.shares_memory(train, test), "both splits are the same array")
    seen = {image.tobytes() for image in train}
    share = sum(image.tobytes() in seen for image in test) / max(len(test), 1)
    expect(share <= COMMON, f"{share:.0%} of the test images are also training images")


def check_repeatable(trials: Trials) -> None:
    """Loading twice gives the same images and labels in the same order: a split must not move between runs."""
    for split, first in trials.loaded().items():
        again = trials.dataset.load(split, trials.root)
        equal = np.array_equal(first.images, again.images) and np.array_equal(first.labels, again.labels)
        expect(equal, f"loading '{split}' twice gives different images or labels")


def check_flip_and_budgets(trials: Trials) -> None:
    """``flip`` is True or False, and ``budgets`` has the usual eps > 0 for every norm, written as 8/255 or 0.1."""
    flip: Any = getattr(trials.component, "flip", None)
    budgets: Any = getattr(trials.component, "budgets", None)
    expect(isinstance(flip, bool), f"flip is {flip!r}; it must be True (a mirrored image keeps its label) or False")
    expect(isinstance(budgets, Mapping), f"budgets is {budgets!r}; it must map norms to eps")
    missing = sorted(set(NORMS) - set(budgets))
    expect(not missing, f"budgets has no eps for {', '.join(missing)}")
    for norm, eps in budgets.items():
        expect(isinstance(eps, str), f"the budget of {norm} is {eps!r}; write it as text, like '8/255'")
        expect(ThreatModel(norm, eps).radius > 0, f"the budget of {norm} is 0")


DATASET_CHECKS: tuple[Check, ...] = (
    *COMPONENT_CHECKS,
    check_available,
    check_images,
    check_labels,
    check_classes,
    check_statistics,
    check_same_image_size,
    check_splits_apart,
    check_repeatable,
    check_flip_and_budgets,
)
