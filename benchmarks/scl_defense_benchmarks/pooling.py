"""Averages over windows that do not overlap: torch's own, with a gradient that costs what it should."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def averaged(maps: Tensor, window: int | tuple[int, int]) -> Tensor:
    """``F.avg_pool2d(maps, window)``: (N, C, H, W) -> (N, C, H / h, W / w).

    A gradient that comes back channels-first, as from behind a ``flatten``, costs torch seven times what a
    channels-last one does: 2.0 ms for 128 maps of 128 x 4 x 4, where spreading each number over its window takes 0.5
    (one thread, float32; 2.5 and 0.5 in bfloat16).
    """
    tall, wide = (window, window) if isinstance(window, int) else window
    whole = maps.dim() == 4 and maps.shape[2] % tall == 0 and maps.shape[3] % wide == 0
    plain = type(maps) is Tensor and maps.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
    if whole and plain and torch.is_grad_enabled() and maps.requires_grad:
        made: Tensor = _Averaged.apply(maps, tall, wide)
        return made
    return F.avg_pool2d(maps, (tall, wide))


def is_tiling(layer: nn.AvgPool2d) -> bool:
    """Whether a layer's windows lie side by side, with nothing between, around or left to choose."""
    same = layer.kernel_size == layer.stride and not layer.ceil_mode and layer.divisor_override is None
    return same and layer.padding in (0, (0, 0))


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, maps: Tensor, tall: int, wide: int) -> Tensor:
        context.window = tall, wide
        return F.avg_pool2d(maps, (tall, wide))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        tall, wide = context.window
        count, channels, height, width = gradient.shape
        share = (gradient / (tall * wide)).permute(0, 2, 3, 1).reshape(count, height, 1, width, 1, channels)
        whole = share.expand(count, height, tall, width, wide, channels)
        return whole.reshape(count, height * tall, width * wide, channels).permute(0, 3, 1, 2), None, None
