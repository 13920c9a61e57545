"""Part (d): augmentation, images a second: ours by the batch against torchvision in a DataLoader and kornia."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from scl_defense.augment import Augment
from speed import steps
from speed.rivals import imported
from speed.timing import Budget, interleaved, ratio

VIEWS = 2


@dataclass
class Options:
    """images: in an epoch, uint8. batch: as in a training step. sides: (channels, height and width)."""

    root: str | None = None
    seconds: float = 60.0
    repeats: int = 5
    images: int = 2048
    batch: int = 128
    shapes: tuple[tuple[int, int], ...] = ((1, 28), (3, 32))
    loaders: tuple[int, ...] = (0, 2)
    step: bool = True


def measure(options: Options, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    groups = [(kind, shape) for kind in ("weak", "simclr") for shape in options.shapes]
    shares = Budget(options.seconds, len(groups) + 1).shares()
    rows: list[dict[str, Any]] = []
    for kind, (channels, side) in groups:
        say(f"augmentation: {kind}, {channels}x{side}x{side}")
        rows += _group(kind, channels, side, options, next(shares))
    if options.step:
        say("augmentation: beside a training step")
        rows += _beside_step(options, next(shares))
    return rows


def _group(kind: str, channels: int, side: int, options: Options, seconds: float) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (options.images, channels, side, side), generator=rng, dtype=torch.uint8)
    calls: dict[str, Callable[[], Any]] = {"ours": _ours(kind, images, options.batch)}
    closing = []
    for workers in options.loaders:
        epoch, close = _torchvision(kind, images, options.batch, workers)
        calls[f"torchvision v2, DataLoader of {workers} workers"] = epoch
        closing.append(close)
    calls["kornia"] = _kornia(kind, images, options.batch)
    try:
        found = interleaved(calls, repeats=options.repeats, until=perf_counter() + seconds, warm=True)
    finally:
        for close in closing:
            close()
    rows = []
    for name, timing in found.items():
        row: dict[str, Any] = {"kind": "augment", "recipe": kind, "shape": [channels, side, side], "side": name}
        row |= {"images": len(images), "views": VIEWS, **timing.row()}
        if timing.ok:
            row["images_per_s"] = round(VIEWS * len(images) / (timing.median or 1), 1)
            if name != "ours" and (over := ratio(timing, found["ours"])) is not None:
                row["over ours"] = round(over, 4)
        rows.append(row)
    return rows


def _ours(kind: str, images: Tensor, batch: int) -> Callable[[], None]:
    augment = Augment(kind, flip=True, image_shape=tuple(images.shape[1:]))
    rng = torch.Generator().manual_seed(0)

    def epoch() -> None:
        for part in images.split(batch):
            floats = part.float() / 255
            for _ in range(VIEWS):
                augment(floats, rng)

    return epoch


class _Views(torch.utils.data.Dataset):
    """Two views of an image, each with draws of its own, as a training loop reads them."""

    def __init__(self, images: Tensor, transform: Any):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, ...]:
        return tuple(self.transform(self.images[place]) for _ in range(VIEWS))


def _torchvision(kind: str, images: Tensor, batch: int, workers: int) -> tuple[Callable[[], None], Callable[[], None]]:
    v2 = imported("torchvision.transforms.v2", "torchvision")
    channels, side = images.shape[1], images.shape[2]
    if kind == "weak":
        crop = v2.RandomCrop(side, padding=math.ceil(side / 8), padding_mode="reflect")
        parts = [crop, v2.RandomHorizontalFlip()]
    else:
        colour = v2.ColorJitter(0.4, 0.4, 0.4, 0.1) if channels == 3 else v2.ColorJitter(0.4, 0.4)
        parts = [
            v2.RandomResizedCrop(side, scale=(0.2, 1), antialias=False),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([colour], 0.8),
            *([v2.RandomGrayscale(0.2)] if channels == 3 else []),
        ]
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), *parts])
    loader = torch.utils.data.DataLoader(
        _Views(images, transform), batch_size=batch, num_workers=workers, persistent_workers=workers > 0
    )

    def epoch() -> None:
        for _ in loader:
            pass

    def close() -> None:
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None and workers:
            iterator._shutdown_workers()

    return epoch, close


def _kornia(kind: str, images: Tensor, batch: int) -> Callable[[], None]:
    side, channels = images.shape[2], images.shape[1]
    built: list[Any] = []

    def build() -> Any:
        kornia = imported("kornia.augmentation", "kornia")
        if kind == "weak":
            parts = [
                kornia.RandomCrop((side, side), padding=math.ceil(side / 8), padding_mode="reflect", p=1.0),
                kornia.RandomHorizontalFlip(p=0.5),
            ]
        else:
            colour = (0.4, 0.4, 0.4, 0.1) if channels == 3 else (0.4, 0.4, 0.0, 0.0)
            parts = [
                kornia.RandomResizedCrop((side, side), scale=(0.2, 1.0), p=1.0),
                kornia.RandomHorizontalFlip(p=0.5),
                kornia.ColorJiggle(*colour, p=0.8),
                *([kornia.RandomGrayscale(p=0.2)] if channels == 3 else []),
            ]
        return kornia.AugmentationSequential(*parts, data_keys=["input"])

    def epoch() -> None:
        if not built:
            built.append(build())
        for part in images.split(batch):
            floats = part.float() / 255
            for _ in range(VIEWS):
                built[0](floats)

    return epoch


def _beside_step(options: Options, seconds: float) -> list[dict[str, Any]]:
    """One view of a batch beside one cross-entropy step of the small CNN on the same images."""
    import tempfile
    from pathlib import Path

    settings = steps.Options(root=options.root)
    with tempfile.TemporaryDirectory() as folder:
        run = steps._run(steps.METHODS[0], steps.WORLDS[0], "fp32", settings, Path(folder))
    images = run.train_split.float_images(torch.arange(run.batch_size))
    calls: dict[str, Callable[[], Any]] = {"step": lambda: steps._step(run)}
    for kind in ("weak", "simclr"):
        augment = Augment(kind, flip=True, image_shape=tuple(images.shape[1:]))
        rng = torch.Generator().manual_seed(0)
        calls[kind] = lambda augment=augment, rng=rng: augment(images, rng)
    found = interleaved(calls, repeats=4 * options.repeats, until=perf_counter() + seconds, warm=True)
    rows = []
    for kind in ("weak", "simclr"):
        share = ratio(found[kind], found["step"])
        row: dict[str, Any] = {"kind": "augment beside step", "recipe": kind, "batch": len(images), **found[kind].row()}
        row |= {"step": found["step"].median, "share of step": None if share is None else round(share, 4)}
        rows.append(row)
    return rows
