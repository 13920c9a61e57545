"""Broken models."""

import os
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from broken import Case
from scl_defense.errors import UserError
from scl_defense.types import component

KIND = "model"
Shape = tuple[int, int, int]


class Encoder(nn.Module):
    """The sound encoder; the broken ones change one thing."""

    def __init__(self, channels: int, **norm: bool):
        super().__init__()
        self.feature_dim = 6
        self.conv = nn.Conv2d(channels, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6, **norm)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(images))).mean(dim=(2, 3))


@component
class Sound:
    """One convolution."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        return Encoder(image_shape[0])


@component
class SoundLargeOnly:
    """Says what it needs."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        if min(image_shape[1:]) < 32:
            raise UserError("this model needs images of at least 32x32")
        return Encoder(image_shape[0])


@component
class WrongFeatureDim:
    """feature_dim says 7, there are 6."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        encoder = Encoder(image_shape[0])
        encoder.feature_dim = 7
        return encoder


@component
class NoFeatureDim:
    """Nobody knows how wide the head must be."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        encoder = Encoder(image_shape[0])
        del encoder.feature_dim
        return encoder


@component
class KeepsTheMap:
    """Features (N, D, H, W)."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        encoder = Encoder(image_shape[0])
        encoder.forward = lambda images: encoder.conv(images)
        return encoder


@component
class CrashesOnSmall:
    """Meets its limit in the middle of a forward pass."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        return _CrashesOnSmall(image_shape[0])


class _CrashesOnSmall(Encoder):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.max_pool2d(images, 9, 1))


@component
class RefusesSmall:
    """Meets its limit when built, with an assertion."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        if image_shape[1] < 16:
            raise ValueError("bad shape")
        return Encoder(image_shape[0])


@component
class Squeezes:
    """A single image loses its axis."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        return _Squeezes(image_shape[0])


class _Squeezes(Encoder):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze()


@component
class RoundsImages:
    """Quantises its input: robust against gradients only."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        return _RoundsImages(image_shape[0])


class _RoundsImages(Encoder):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images * 4).round() / 4)


@component
class CutsTheGraph:
    """Runs without a graph in eval mode."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        return _CutsTheGraph(image_shape[0])


class _CutsTheGraph(Encoder):
    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return super().forward(images)


@component
class DropoutForever:
    """Dropout that does not know eval mode."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        return _DropoutForever(image_shape[0])


class _DropoutForever(Encoder):
    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(super().forward(images), 0.5)


@component
class BatchStatisticsForever:
    """Batch norm without running statistics."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        return Encoder(image_shape[0], track_running_stats=False)


@component
class HiddenState:
    """A random scale that is neither a parameter nor a buffer."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        return _HiddenState(image_shape[0])


class _HiddenState(Encoder):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.scale = torch.rand(6) + 0.5

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


@component
class SeedsFromTheSystem:
    """Nobody can repeat its start."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        encoder = Encoder(image_shape[0])
        own = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "big"))
        nn.init.normal_(encoder.conv.weight, generator=own)
        return encoder


@component
class AlwaysTheSame:
    """Its own fixed seed: all seeds of a study start alike."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Encoder(image_shape[0])


@component
class SharesStem:
    """All its encoders hold one layer."""

    stems: ClassVar[dict[int, nn.Module]] = {}

    def __call__(self, image_shape: Shape) -> nn.Module:
        encoder = Encoder(image_shape[0])
        encoder.norm = self.stems.setdefault(0, encoder.norm)
        return encoder


@component
class DeadWeight:
    """A layer that no forward pass uses."""

    def __call__(self, image_shape: Shape) -> nn.Module:
        encoder = Encoder(image_shape[0])
        encoder.head = nn.Linear(6, 10)
        return encoder


SOUND = [Sound, SoundLargeOnly]

CASES = [
    Case(KIND, WrongFeatureDim, "features", "gives (4, 6) for 4 images where feature_dim says (4, 7)"),
    Case(KIND, NoFeatureDim, "features", "feature_dim is None"),
    Case(KIND, KeepsTheMap, "features", "gives (4, 6, 15, 15)", also=frozenset({"single-image", "trainable"})),
    Case(KIND, CrashesOnSmall, "small-images", "on them it raised RuntimeError"),
    Case(KIND, RefusesSmall, "small-images", "ValueError: bad shape"),
    Case(KIND, Squeezes, "single-image", "gives (6,)"),
    Case(KIND, RoundsImages, "gradients-reach-images", "is missing, zero or not finite"),
    Case(KIND, CutsTheGraph, "gradients-reach-images", "no graph"),
    Case(KIND, DropoutForever, "deterministic-in-eval", "two passes"),
    Case(KIND, BatchStatisticsForever, "independent-of-batch", "with the rest of the batch"),
    Case(KIND, HiddenState, "state-dict", "no parameter and no buffer"),
    Case(KIND, SeedsFromTheSystem, "seeded-start", "conv.weight"),
    Case(KIND, AlwaysTheSame, "seeded-start", "the same whatever the seed"),
    Case(KIND, SharesStem, "fresh-encoder", "share parameters"),
    Case(KIND, DeadWeight, "trainable", "no gradient reaches head."),
]
