"""The handwritten digits that come with scikit-learn: real data for any machine, without a download."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from scl_defense.types import ImageArrays, component

TEST_PER_CLASS = 36  # 360 of the 1,797 images, as the customary 20 %


@component
class Digits:
    """1,797 scans of 8 x 8, ten classes (Alpaydin & Kaynak, UCI 1998). The source has no split; this one is fixed:
    36 images of each class, drawn once by a fixed seed, are the test split.
    """

    flip: ClassVar[bool] = False
    budgets: ClassVar[Mapping[str, str]] = {"linf": "0.1", "l2": "0.5", "l1": "2", "l0": "5"}

    def load(self, split: str, root: Path) -> ImageArrays:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # the scans hold 0..16
        labels = bunch.target.astype(np.int64)
        shuffled = np.random.RandomState(0).permutation(len(labels))  # its stream is frozen across NumPy's versions
        in_test = np.zeros(len(labels), dtype=bool)
        for label in range(10):
            in_test[shuffled[labels[shuffled] == label][:TEST_PER_CLASS]] = True
        chosen = in_test if split == "test" else ~in_test
        return ImageArrays(images[chosen][..., None], labels[chosen], tuple("0123456789"))
