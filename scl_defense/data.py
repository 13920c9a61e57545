"""Data: named data sets as uint8 tensors, and their splits.

Whole splits are kept in memory and augmented batch-wise (:class:`Augment`), without worker processes: at the sizes of
this project that is faster than a loader that decodes image by image. A data set that gives memory-mapped arrays stays
on disk, and the images of a batch are read when it is made (:class:`OnDisk`); nothing else differs.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scl_defense.augment import Augment
from scl_defense.config import make
from scl_defense.errors import ComponentError, SclDefenseError, UserError, has_controls, nearest
from scl_defense.plugins import PluginHost, default_host
from scl_defense.runtime import derive_seed
from scl_defense.types import Dataset, ImageArrays

BLOCK = 1024  # images of a mapped file in memory at a time, where all of them are looked at
MIN_STD = 1e-3  # a constant channel must not make the first layer divide by nothing

__all__ = ["Augment", "Data", "OnDisk", "Split", "open_data", "stratified_subset"]


@dataclass(frozen=True)
class OnDisk:
    """Images (N, C, H, W) uint8 of a memory-mapped file, as far as a tensor is needed: indexed by places, a slice or a
    number, they are read and handed over as one on ``device``.

    source: (M, H, W, C). rows: (N,) int64, which of them these are.
    """

    source: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        _, height, width, channels = self.source.shape
        return len(self.rows), channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def __getitem__(self, idx: Tensor | np.ndarray | slice | int) -> Tensor:
        rows = self.rows[idx.cpu().numpy() if isinstance(idx, Tensor) else idx]
        return torch.from_numpy(np.array(np.moveaxis(self.source[rows], -1, -3), order="C")).to(self.device)

    def part(self, places: np.ndarray) -> "OnDisk":
        """The images at these places (n,), still on disk."""
        return dataclasses.replace(self, rows=self.rows[places])

    def to(self, device: torch.device | str) -> "OnDisk":
        return dataclasses.replace(self, device=device)


@dataclass(frozen=True)
class Split:
    """Images in memory, or on disk if the data set is mapped.

    images: (N, C, H, W) uint8. labels: (N,) int64, on the same device. indices: (N,) int64, the places of these
    images in the source split ("train" for train and val, "test" for test).
    """

    images: Tensor | OnDisk
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def float_images(self, idx: Tensor | slice | None = None) -> Tensor:
        """(n, C, H, W) float32 in [0, 1]: all images, or those at ``idx`` (places in this split)."""
        if isinstance(idx, Tensor):
            idx = idx.to(self.images.device)
        chosen = self.images[slice(None) if idx is None else idx]
        return chosen.to(torch.float32).div_(255)

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device), self.indices.to(device))


@dataclass(frozen=True)
class Data:
    """An opened data set; its training split is in memory (mapped ones stay on disk), its test split is read when first
    asked for.

    name: as the user wrote it. mean, std: per channel, in units of [0, 1]. flip: whether a mirrored image keeps its
    label. budgets: norm -> the usual eps for this data, as written. provenance: component and options, plain data.
    """

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    budgets: dict[str, str]
    provenance: dict[str, Any]
    _load: Callable[[Literal["train", "test"]], "_Arrays"] = field(repr=False, compare=False)
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(
        self,
        which: Literal["train", "val", "test"],
        *,
        val_fraction: float = 0.1,
        limit: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Split:
        """``val`` is a stratified share of the training split, cut off by a fixed seed; ``train`` is the rest.

        So every run on this data validates on the same images, whatever its own seed. limit: a fixed stratified
        subset of at most so many images, taken after the cut. Raises :class:`UserError` for a split, share or limit
        that cannot be.
        """
        if which not in ("train", "val", "test"):
            raise UserError(f"split '{which}' is unknown; it must be train, val or test")
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit} leaves no image; it must be at least 1")
        arrays = self._arrays("test" if which == "test" else "train")
        index = np.arange(len(arrays.labels))
        if which != "test":
            held_out = _validation_part(arrays.labels, val_fraction)
            if which == "val" and len(held_out) == 0:
                raise UserError("there is no val split with val_fraction 0; give a share between 0 and 1")
            index = held_out if which == "val" else np.delete(index, held_out)
        if limit is not None and limit < len(index):
            index = index[stratified_subset(arrays.labels[index], limit, derive_seed(0, f"limit-{which}"))]
        places = torch.from_numpy(index)
        images = arrays.images.part(index) if isinstance(arrays.images, OnDisk) else arrays.images[places]
        return Split(images, arrays.labels[places], places).to(device)

    def fingerprint(self, which: Literal["train", "test"]) -> str:
        """SHA-256 (hex) of a source split: the bytes of its images (N, C, H, W), then of its labels as int64.

        ``train`` covers what is later cut into train and val.
        """
        if which not in ("train", "test"):
            raise UserError(f"split '{which}' has no fingerprint of its own; ask for train (with val) or test")
        key = f"fingerprint-{which}"
        if key not in self._cache:
            arrays = self._arrays(which)
            digest = hashlib.sha256()
            for block in _blocks(arrays.images):
                digest.update(block.numpy().data)
            digest.update(arrays.labels.numpy().astype("<i8").data)
            self._cache[key] = digest.hexdigest()
        return str(self._cache[key])

    def _arrays(self, source: Literal["train", "test"]) -> "_Arrays":
        if source not in self._cache:
            arrays = self._load(source)
            if arrays.shape != self.image_shape or arrays.classes != self.classes:
                raise UserError(
                    f"data set '{self.name}': its test split has images {arrays.shape} of {len(arrays.classes)} "
                    f"classes, its training split {self.image_shape} of {self.num_classes}; shape and class names, "
                    "in order, must be the same"
                )
            self._cache[source] = arrays
        kept: _Arrays = self._cache[source]
        return kept


def data_folder(root: str | Path | None = None) -> Path:
    """Where data sets lie: ``root``, else the environment variable ``SCL_DEFENSE_DATA_ROOT``, else a cache folder."""
    return Path(root or os.environ.get("SCL_DEFENSE_DATA_ROOT") or "~/.cache/scl-defense").expanduser()


def open_data(
    name: str,
    *,
    root: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    host: PluginHost | None = None,
    component: Dataset | None = None,
) -> Data:
    """Open a data set: a registered name, else an existing path, else a path below ``root``.

    A folder with ``train.npz`` or ``test.npz``, or one ``.npz`` file, is read by the component ``npz``; one with
    ``train/images.npy`` or ``test/images.npy`` by ``npy``, which leaves the images on disk; any other folder by
    ``image-folder``. root: where data sets lie and are downloaded to (default: the environment variable
    ``SCL_DEFENSE_DATA_ROOT``, else ``~/.cache/scl-defense``). options: of the component. component: a data set that
    has no registered name; ``name`` is then only what it is called. Where there is a test split alone, shape, classes,
    mean and std are those of the test split, and asking for the others says what is missing. Raises :class:`UserError`.
    """
    host = default_host() if host is None else host
    folder = data_folder(root)
    if component is None:
        component_name, found = _resolve(name, folder, host)
        clash = found.keys() & (options or {}).keys()
        if clash:
            raise UserError(f"data set '{name}' is a path already; leave its option '{min(clash)}' out")
        component = make(host, "dataset", component_name, {**found, **(options or {})})
    else:
        component_name = name

    def load(split: Literal["train", "test"]) -> _Arrays:
        try:
            return _checked(f"data set '{name}', {split} split", component.load(split, folder))
        except SclDefenseError:
            raise
        except Exception as error:
            raise ComponentError(
                f"data set '{name}' failed to load its {split} split: {type(error).__name__}: {_short(error)}"
            ) from error

    present = component.splits(folder) if hasattr(component, "splits") else ("train", "test")
    first: Literal["train", "test"] = "test" if "test" in present and "train" not in present else "train"
    arrays = load(first)
    if first == "train" and len(arrays.labels.unique()) < 2:
        raise UserError(f"data set '{name}': all training images have the same label; at least 2 classes are needed")
    mean, std = _statistics(arrays)
    return Data(
        name=name,
        classes=arrays.classes,
        image_shape=arrays.shape,
        mean=mean,
        std=std,
        flip=bool(component.flip),
        budgets={str(norm): str(eps) for norm, eps in component.budgets.items()},
        provenance={"component": component_name, "options": _plain(component)},
        _load=load,
        _cache={first: arrays},
    )


def stratified_subset(labels: np.ndarray | Tensor, n: int, seed: int) -> np.ndarray:
    """Sorted places of exactly ``n`` of the labels, every class in proportion (largest remainders), by a fixed seed.

    labels: (N,) integers; 0 <= n <= N, else ``ValueError``.
    """
    values = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if values.ndim != 1 or not 0 <= n <= len(values):
        raise ValueError(f"cannot take {n} of labels shaped {values.shape}")
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    share, remainder = np.divmod(n * counts, len(values))  # integers: no rounding decides who comes in
    share[np.argsort(-remainder, kind="stable")[: n - share.sum()]] += 1
    # RandomState, not default_rng: its stream is frozen for ever, and a split must not change with NumPy's version.
    shuffled = np.random.RandomState(seed % 2**32).permutation(len(values))
    by_class = shuffled[np.argsort(group[shuffled], kind="stable")]
    rank = np.arange(len(values)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(by_class[rank < np.repeat(share, counts)])


@dataclass(frozen=True)
class _Arrays:
    images: Tensor | OnDisk  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width


def _resolve(name: str, root: Path, host: PluginHost) -> tuple[str, dict[str, str]]:
    registry = host["dataset"]
    try:
        registry.entry(name)
        return name, {}
    except UserError:
        if name in registry:  # two owners of the name
            raise
    for path in (Path(name).expanduser(), root / name) if name.strip() else ():
        if path.is_dir():
            archives = (path / "train.npz").is_file() or (path / "test.npz").is_file()
            mapped = any((path / split / "images.npy").is_file() for split in ("train", "test"))
            return ("npz" if archives else "npy" if mapped else "image-folder"), {"path": str(path)}
        if path.is_file():
            if path.suffix != ".npz":
                raise UserError(f"'{path}' is no data set: a file must be an .npz archive (or give a folder)")
            return "npz", {"path": str(path)}
    raise UserError(
        f"there is no data set named '{name}'{nearest(name, registry.names())} and no such path, here or in {root}; "
        "a path may be a folder with train.npz and test.npz, one .npz file, a folder with train/images.npy, or one of "
        "images"
    )


def _checked(what: str, arrays: ImageArrays) -> _Arrays:
    """What a component loaded, as tensors. Raises :class:`UserError`, one line, for whatever is not as promised."""
    mapped = isinstance(arrays.images, np.memmap)
    images, labels, classes = np.asarray(arrays.images), np.asarray(arrays.labels), tuple(map(str, arrays.classes))
    if images.dtype != np.uint8:
        raise UserError(f"{what}: images must be uint8 0..255, not {images.dtype}{_hint_on_range(images)}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        turned = images.ndim == 4 and images.shape[1] in (1, 3)
        remedy = "; they look channel-first: use images.transpose(0, 2, 3, 1)" if turned else ""
        raise UserError(f"{what}: images must be shaped (N, H, W, C) with C 1 or 3, not {images.shape}{remedy}")
    if 0 in images.shape:
        raise UserError(f"{what}: there is no image in it (shape {images.shape})")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what}: labels must be integers shaped (N,), not {labels.dtype} shaped {labels.shape}")
    if len(labels) != len(images):
        raise UserError(f"{what}: {len(images)} images but {len(labels)} labels; there must be one label an image")
    if len(classes) < 2:
        raise UserError(f"{what}: {len(classes)} class names; at least 2 classes are needed")
    if odd := next((name for name in classes if has_controls(name)), None):
        raise UserError(f"{what}: class {odd!r} holds control characters; give the classes other names")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{what}: labels run from {labels.min()} to {labels.max()} but there are {len(classes)} classes; "
            f"they must lie in 0..{len(classes) - 1}"
        )
    for key, values in (("mean", arrays.mean), ("std", arrays.std)):
        if values is not None and (len(values) != images.shape[3] or not all(0 <= value <= 1 for value in values)):
            raise UserError(f"{what}: {key} {tuple(values)} must be {images.shape[3]} numbers in [0, 1], one a channel")
    return _Arrays(
        OnDisk(images, np.arange(len(images))) if mapped else torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(labels.astype(np.int64)),
        classes,
        arrays.mean,
        arrays.std,
    )


def _hint_on_range(images: np.ndarray) -> str:
    if not np.issubdtype(images.dtype, np.floating) or images.size == 0:
        return "; convert them with images.astype('uint8') if they are 0..255"
    low, high = float(images.min()), float(images.max())
    if not math.isfinite(low) or not math.isfinite(high):
        return "; they hold values that are not finite"
    if low < 0:
        return f"; they look normalised ({low:.3g} to {high:.3g}): give the raw pixels, the network normalises"
    if high <= 1:
        return "; they look like [0, 1]: use (images * 255).round().astype('uint8')"
    return f" ({low:.3g} to {high:.3g}); use images.round().astype('uint8') if they are 0..255"


def _blocks(images: Tensor | OnDisk) -> Iterator[Tensor]:
    """All images (N, C, H, W); those on disk a part at a time."""
    if isinstance(images, Tensor):
        yield images
        return
    for start in range(0, len(images), BLOCK):
        yield images[start : start + BLOCK]


def _statistics(arrays: _Arrays) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel: the component's own, else measured, exactly, from the histogram of pixel values."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds, counts = [], [], torch.zeros(arrays.shape[0], 256, dtype=torch.int64)
    for block in _blocks(arrays.images):
        for count, channel in zip(counts, block.unbind(1), strict=True):
            count += torch.bincount(channel.flatten(), minlength=256)
    for count in counts:
        share = count.double() / count.sum()
        centre = (share * levels).sum()
        means.append(centre.item())
        stds.append((share * (levels - centre).square()).sum().sqrt().item())
    mean = means if arrays.mean is None else arrays.mean
    std = stds if arrays.std is None else arrays.std
    return tuple(map(float, mean)), tuple(max(float(value), MIN_STD) for value in std)


def _validation_part(labels: Tensor, fraction: float) -> np.ndarray:
    if not 0 <= fraction < 1:
        raise UserError(f"val_fraction {fraction} must lie in [0, 1)")
    count = round(fraction * len(labels))
    if fraction > 0:
        count = min(max(count, 1), len(labels) - 1)
    return stratified_subset(labels, count, derive_seed(0, "validation"))


def _plain(component: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(component) or isinstance(component, type):
        return {}  # a data set of the user's own, handed over as an object
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(component), default=str))
    return plain


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:197] + "..."
