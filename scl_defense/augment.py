"""Batched augmentation: every image its own draw, all randomness from one passed generator."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.errors import ComponentError, UserError

# Below this many pixels a side a crop of 20 % of the area is a few pixels that show no object any more.
SMALL_SIDE = 16
# So many images at a time are recoloured on a processor: what is made on the way stays in its cache.
IN_CACHE = 64


@dataclass(frozen=True)
class Augment:
    """Random augmentation of a batch, with a draw of its own for every image.

    kind: ``none`` (the images themselves), ``weak`` (crop from a reflected border of an eighth of the side, flip) or
    ``simclr`` (Chen et al. 2020, appendix A: random-resized-crop, flip, colour jitter, grayscale; no blur, as there
    for 32 x 32). strength: in [0, 1]; 1 is the full recipe, 0 leaves nothing but the flip (the schedule of DynACL,
    Luo et al. 2023). flip: whether mirroring keeps the label. Raises :class:`UserError` for another kind or strength.

    Details of ``simclr`` at strength s: crop area U[1 - 0.8 s, 1] of the image (U[1 - 0.4 s, 1] where a side is
    under 16 pixels), aspect 3/4 to 4/3 relative to the image's own (its logarithm times s), cut at the image's border,
    bilinear; with probability 0.8 brightness, contrast and saturation by factors U[1 - 0.4 s, 1 + 0.4 s] and hue
    shifted by U[-0.1 s, 0.1 s] turns, in this order; with probability 0.2 s grayscale. Images of one channel get
    brightness and contrast only.
    """

    kind: str
    _: KW_ONLY
    strength: float = 1.0
    flip: bool
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.kind not in ("none", "weak", "simclr"):
            raise UserError(f"augmentation '{self.kind}' is unknown; it must be none, weak or simclr")
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength} of the augmentation must lie in [0, 1]")

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """images: (N, C, H, W) float in [0, 1], on any device -> the same shape, in [0, 1].

        All randomness is drawn from ``rng`` on its own device, so the result does not depend on where images lie.
        """
        if tuple(images.shape[1:]) != tuple(self.image_shape) or not images.is_floating_point():
            raise ComponentError(
                f"augmentation needs float images (N, {', '.join(map(str, self.image_shape))}), "
                f"not {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            )
        if self.kind == "none":
            return images
        draws = torch.rand((len(images), 11), generator=rng, device=rng.device).to(images.device)
        mirrored = draws[:, 0] < (0.5 if self.flip else 0.0)
        if self.kind == "weak" or self.strength == 0:
            return self._shifted(images, draws, mirrored)
        cropped = self._cropped(images, draws.to(images.dtype), mirrored)
        return self._recoloured(cropped, draws.to(images.dtype).view(len(images), -1, 1, 1, 1))

    def _shifted(self, images: Tensor, draws: Tensor, mirrored: Tensor) -> Tensor:
        height, width = images.shape[2:]
        rows = self._reflected(draws[:, 1:2], height)
        columns = self._reflected(draws[:, 2:3], width)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]
        return images.flatten(2).gather(2, places.expand(-1, images.shape[1], -1)).view_as(images)

    def _reflected(self, draw: Tensor, size: int) -> Tensor:
        """Source places (N, size) of a window moved by a whole number of pixels, reflected at the border."""
        pad = round(self.strength * (size // 8))
        offset = (draw * (2 * pad + 1)).long().clamp(max=2 * pad) - pad
        moved = torch.arange(size, device=draw.device) + offset
        return size - 1 - (size - 1 - moved.abs()).abs()

    def _cropped(self, images: Tensor, draws: Tensor, mirrored: Tensor) -> Tensor:
        deepest = 0.8 if min(images.shape[2:]) >= SMALL_SIDE else 0.4
        area = 1 - deepest * self.strength * draws[:, 1]
        ratio = torch.exp(math.log(4 / 3) * self.strength * (2 * draws[:, 2] - 1))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        across, down = (1 - width) * (2 * draws[:, 3] - 1), (1 - height) * (2 * draws[:, 4] - 1)
        return resized_crop(images, torch.stack([across, down, width, height], dim=1), mirrored)

    def _recoloured(self, images: Tensor, u: Tensor) -> Tensor:
        if images.device.type != "cpu":
            return self._jittered(images, u)
        parts = zip(images.split(IN_CACHE), u.split(IN_CACHE), strict=True)
        return torch.cat([self._jittered(*part) for part in parts])

    def _jittered(self, images: Tensor, u: Tensor) -> Tensor:
        # Who is left out gets factors that change nothing: cheaper than choosing between two results.
        reach = torch.where(u[:, 5] < 0.8, 0.4 * self.strength, 0.0).to(images)
        brightness, contrast, saturation = (1 + reach * (2 * u[:, k] - 1) for k in (6, 7, 8))
        grey = images.shape[1] == 1
        new = (images * brightness).clamp_(0, 1)
        mean = (new if grey else luminance(new)).mean(dim=(1, 2, 3), keepdim=True)
        new = _towards(mean, new, contrast).clamp_(0, 1)
        if grey:
            return new
        new = _towards(luminance(new), new, saturation).clamp_(0, 1)
        new = hue_shifted(new, reach / 4 * (2 * u[:, 9] - 1))
        return _towards(luminance(new), new, (u[:, 10] >= 0.2 * self.strength).to(new))


def _towards(origin: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """torch.lerp into ``images``; with a weight an image two products are several times as fast."""
    return images.mul_(weight).add_(origin * (1 - weight))


def resized_crop(images: Tensor, boxes: Tensor, mirrored: Tensor) -> Tensor:
    """Each image's own box, resized bilinearly to the full size, and mirrored where asked.

    boxes: (N, 4) centre x, centre y, width, height; the image reaches from -1 to 1 and has width and height 1.
    mirrored: (N,) bool.
    """
    across, down, width, height = boxes.unbind(1)
    extent = torch.where(mirrored, -width, width)
    with _full_precision(images.device.type):
        if images.shape[1] == 1:
            # Columns, then rows, as two products: for one channel less work than a grid of places.
            columns = bilinear_weights(across, extent, images.shape[3])
            rows = bilinear_weights(down, height, images.shape[2])
            return (rows @ images[:, 0] @ columns.mT)[:, None].clamp_(0, 1)
        none = torch.zeros_like(width)
        theta = torch.stack([extent, none, across, none, height, down], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, "bilinear", padding_mode="border", align_corners=False).clamp_(0, 1)


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Against a caller's autocast: bfloat16 knows no places between pixels."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def bilinear_weights(centre: Tensor, extent: Tensor, size: int) -> Tensor:
    """(N, size, size) shares of the source places (last) in the target places of the box around ``centre`` (N,).

    extent: (N,) width of the box, 1 being the whole image, which reaches from -1 to 1; negative: mirrored. Beyond the
    border the outermost place repeats. The rows sum to 1.
    """
    places = torch.arange(size, dtype=centre.dtype, device=centre.device)
    target = (2 * places + 1) / size - 1
    source = torch.addcmul(centre[:, None], extent[:, None], target)
    source.add_(1).mul_(size / 2).sub_(0.5).clamp_(0, size - 1)
    return (source[:, :, None] - places).abs_().neg_().add_(1).clamp_(min=0)


def luminance(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W), weights of ITU-R BT.601."""
    red, green, blue = images.split(1, dim=1)
    weighted: Tensor = 0.2989 * red
    return weighted.add_(green, alpha=0.587).add_(blue, alpha=0.114)


def hue_shifted(images: Tensor, turns: Tensor) -> Tensor:
    """Hue moved by ``turns`` (N, 1, 1, 1) of the colour circle; value and saturation stay. images: (N, 3, H, W)."""
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    slope = chroma.clamp(min=1e-12).reciprocal_()  # without chroma all differences below are 0
    hue = (red - green).mul_(slope).add_(4)
    hue = torch.where(value == green, (blue - red).mul_(slope).add_(2), hue)
    hue = torch.where(value == red, (green - blue).mul_(slope), hue)
    hue = hue.add_(6 * turns).remainder_(6)
    # HSV to RGB in closed form: low + chroma * share; red is full around 0, green around 2, blue around 4.
    out = torch.empty_like(images)
    for channel, (centre, sign, height) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (hue - centre).abs_().mul_(sign).add_(height).clamp_(0, 1)
        torch.addcmul(low, chroma, share, out=out[:, channel : channel + 1])
    return out.clamp_(0, 1)
