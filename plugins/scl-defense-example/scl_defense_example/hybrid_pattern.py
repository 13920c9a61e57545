"""Hybrid images: the shape of the picture, the texture of a pattern."""

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.types import Context, Field, GeneratorBatch, component


@component
class HybridPattern:
    """HIT: keep the image's low frequencies and put a pattern's high frequencies in place of its own.

    With a Gaussian low-pass G and tiled concentric rings p::

        hybrid = G * x + weight * (p - G * p)

    brought back into the threat ball around x (Zhang et al. 2022, arXiv 2203.04607). No network, no gradient, no label
    and no chance: what it makes depends on the image alone, so it can be made once and stored.

    The authors' code has 6 x 6 coloured tiles on 299 x 299 photographs and sigma=4; these rings are black and white,
    and the defaults are for small images.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    pattern: Annotated[Literal["circle", "square", "rhombus"], Field(description="shape of the rings")] = "circle"
    tile: Annotated[int, Field(ge=2, description="side of a tile, in pixels")] = 8
    ring: Annotated[float, Field(ge=0.5, allow_inf_nan=False, description="width of a ring, in pixels")] = 1.0
    sigma: Annotated[float, Field(gt=0, le=100, description="width of the low-pass, in pixels")] = 1.0
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False, description="weight of the pattern")] = 1.0

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        images = batch.views[0]
        pattern = self.rings(*images.shape[2:]).to(images).expand(1, images.shape[1], -1, -1)
        hybrid = self.low_pass(images) + self.weight * (pattern - self.low_pass(pattern))
        return context.threat.project(images, hybrid)[None]

    def rings(self, height: int, width: int) -> Tensor:
        """(H, W) of 0 and 1: rings around the middle of every tile, at equal distance in L2, Linf or L1."""
        y, x = ((torch.arange(size) % self.tile) - (self.tile - 1) / 2 for size in (height, width))
        y, x = y[:, None].abs(), x[None, :].abs()
        distance = {"circle": torch.hypot(y, x), "square": torch.maximum(y, x), "rhombus": y + x}[self.pattern]
        return 1 - torch.floor(distance / self.ring) % 2

    def low_pass(self, images: Tensor) -> Tensor:
        """Gaussian blur, cut off at two sigma as in the authors' code; the border is repeated outwards."""
        reach = max(1, math.ceil(2 * self.sigma))
        line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / self.sigma) ** 2).to(images)
        kernel = (line / line.sum()).repeat(images.shape[1], 1, 1, 1)  # (C, 1, 1, 2 * reach + 1)
        padded = F.pad(images, [reach] * 4, mode="replicate")
        across = F.conv2d(padded, kernel, groups=images.shape[1])
        return F.conv2d(across, kernel.transpose(2, 3), groups=images.shape[1])
