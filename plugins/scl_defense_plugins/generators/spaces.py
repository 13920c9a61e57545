"""Fixed feature spaces without a trained weight, for model-free contrastive PGD.

Every space is standardised per feature on a fixed calibration sample: without it a random network maps all images to
nearly one point and the contrastive loss is flat. Constant features get the floor of a tenth of the mean spread, so
that a pixel which is always zero does not drown the rest.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.errors import UserError

Space = Callable[[Tensor], Tensor]
POOLED = 8  # feature maps are averaged down to at most 8 x 8 places


def standardised(features: Space, calibration: Tensor) -> Space:
    """(features(x) - mean) / std, both measured once on ``calibration`` (M, C, H, W), M >= 2."""
    with torch.no_grad():
        sample = features(calibration).flatten(1)
        mean, std = sample.mean(0), sample.std(0)
        std = std.clamp(min=float(0.1 * std.square().mean().sqrt()) + 1e-6)
    return lambda images: (features(images).flatten(1) - mean) / std


def pixel(images: Tensor) -> Tensor:
    """The pixels. One-sided InfoNCE here is nearly x + eps * sign(batch mean - x): a blend toward the other images."""
    return images.flatten(1)


def filterbank(channels: int, size: int, device: torch.device, orientations: int = 6) -> Space:
    """Moduli of a fixed Gabor bank (Bovik, Clark & Geisler 1990), two octaves x ``orientations``, and a low-pass.

    Every channel is filtered by itself. Zero-mean kernels, unit L1 norm; sqrt(re^2 + im^2 + 1e-6) keeps the gradient
    finite on flat images; then average pooling.
    """
    kernels = []
    for scale in (1.0, 2.0):
        reach = min(math.ceil(2.5 * scale), max((size - 1) // 2, 1))
        grid = torch.arange(-reach, reach + 1, dtype=torch.float64)
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        envelope = torch.exp(-(x**2 + y**2) / (2 * (0.8 * scale) ** 2))
        for index in range(orientations):
            angle = math.pi * index / orientations
            phase = (0.75 * math.pi / scale) * (x * math.cos(angle) + y * math.sin(angle))
            real, imaginary = envelope * phase.cos(), envelope * phase.sin()
            real = real - envelope * (real.sum() / envelope.sum())  # no response to a flat image
            kernels.append(torch.stack([real, imaginary]) / (real.abs() + imaginary.abs()).sum())
    widest = max(kernel.shape[-1] for kernel in kernels)
    padded = [F.pad(kernel, [(widest - kernel.shape[-1]) // 2] * 4) for kernel in kernels]
    bank = torch.cat(padded).float().to(device)[:, None].repeat(channels, 1, 1, 1)  # (C * 2 * S * O, 1, k, k)
    reach = widest // 2

    def features(images: Tensor) -> Tensor:
        response = F.conv2d(F.pad(images, [reach] * 4, mode="replicate"), bank, groups=channels)
        real, imaginary = response[:, 0::2], response[:, 1::2]
        modulus = (real.square() + imaginary.square() + 1e-6).sqrt()
        return torch.cat([_pooled(modulus).flatten(1), _pooled(images).flatten(1)], dim=1)

    return features


def scattering(size: Sequence[int], device: torch.device, octaves: int = 2, orientations: int = 8) -> Space:
    """Scattering coefficients of orders 0 to 2 (Bruna & Mallat 2013), every channel by itself, through kymatio.

    size: (H, W); fewer than ``octaves`` where a side is too small for them. Raises :class:`UserError` without kymatio.
    """
    octaves = min(octaves, int(math.log2(min(size))))
    if octaves < 1:
        raise UserError(f"space=scattering needs images of at least 2x2, not {'x'.join(map(str, size))}")
    transform = _scattering_transform(tuple(size), device, octaves, orientations)
    return lambda images: transform(images.contiguous()).flatten(1)


@lru_cache(maxsize=4)  # its filters depend on nothing else, and take longer to make than to use
def _scattering_transform(size: tuple[int, ...], device: torch.device, octaves: int, orientations: int) -> Space:
    try:
        # Not kymatio.torch: its 3D part imports a function that SciPy 1.17 no longer has.
        from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D
    except ImportError:
        raise UserError("space=scattering needs kymatio; pip install scl-defense[scattering]") from None
    return ScatteringTorch2D(J=octaves, shape=size, L=orientations).to(device)


def random_conv(
    calibration: Tensor, rng: torch.Generator, width: int = 8, depth: int = 2, places: int = POOLED
) -> Space:
    """Early maps of a random CNN: ``depth`` times (3x3 convolution, batch normalisation, ReLU), then pooling.

    He-normal weights from ``rng``; the normalisation statistics of each layer are measured on ``calibration``, layer
    by layer. Early maps, because deep random networks lose the image (their embeddings lie in a narrow cone). places:
    the maps are averaged down to at most about so many places a side.
    """
    layers: list[tuple[Tensor, Tensor]] = []
    hidden = calibration
    with torch.no_grad():
        for _ in range(depth):
            fan_in = hidden.shape[1] * 9
            weight = torch.randn((width, hidden.shape[1], 3, 3), generator=rng, device=rng.device)
            weight = (weight * math.sqrt(2 / fan_in)).to(calibration)
            response = F.conv2d(hidden, weight, padding=1)
            mean = response.mean((0, 2, 3))
            std = response.std((0, 2, 3)).clamp(min=1e-5)
            layers.append((weight / std.view(-1, 1, 1, 1), -mean / std))  # folded into the convolution
            hidden = F.relu((response - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1))

    def features(images: Tensor) -> Tensor:
        maps = images
        for weight, bias in layers:
            maps = F.relu(F.conv2d(maps, weight, bias, padding=1))
        return _pooled(maps, places).flatten(1)

    return features


def _pooled(maps: Tensor, places: int = POOLED) -> Tensor:
    factor = max(1, math.ceil(max(maps.shape[-2:]) / places))
    return F.avg_pool2d(maps, factor, ceil_mode=True, count_include_pad=False) if factor > 1 else maps
