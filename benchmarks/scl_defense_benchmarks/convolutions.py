"""A twin's convolutions, whose weights nobody trains: torch's sums up to their order, and less to pay on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Weights from this number on outgrow a core's cache; torch reads them anew for every map of at most so many pixels.
#: Measured with 512 x 512 x 3 x 3 on maps of 4 x 4 (the last layers of a ResNet-18 on 32 x 32 images, three quarters of
#: its weights): side by side they take 0.45 of the time in bfloat16, 0.75 to 0.93 in float32; 256 x 256 gains nothing.
HEAVY, SMALL = 1_000_000, 16
#: Outputs per input of a convolution from which on its gradient to the inputs is cheaper as a matrix product.
SPREADING = 16


class FrozenConv2d(nn.Conv2d):
    """A convolution like any other, of a network that is only attacked. Made by :func:`freeze_convolutions`.

    - Small maps under heavy weights are laid side by side into one wide map, with columns of zeros between them.
    - From few inputs to many outputs (a first layer), the gradient to the inputs is one matrix product, float32 only.
    - Its weights are rounded to bfloat16 once (:meth:`round_once`), where autocast rounds them in every pass.
    """

    rounded: tuple[Tensor, Tensor | None] | None = None

    def round_once(self) -> None:
        """Keep the weights in bfloat16 too, for passes under autocast."""
        bias = None if self.bias is None else self.bias.detach().to(torch.bfloat16)
        self.rounded = self.weight.detach().to(torch.bfloat16), bias

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W'), as :class:`torch.nn.Conv2d`."""
        weight, bias = self.weight, self.bias
        lower = torch.is_autocast_enabled(maps.device.type)
        if lower and self.rounded is not None and torch.get_autocast_dtype(maps.device.type) is torch.bfloat16:
            weight, bias = self.rounded  # type: ignore[assignment]
        if maps.device.type == "cpu" and maps.dim() == 4 and self._keeps_size():
            if self.weight.numel() >= HEAVY and maps.shape[2] * maps.shape[3] <= SMALL and len(maps) > 1:
                return self._side_by_side(maps, weight, bias)
            spreading = self.out_channels >= SPREADING * self.in_channels
            if spreading and not lower and maps.requires_grad and maps.dtype == torch.float32 == weight.dtype:
                made: Tensor = _FromFewInputs.apply(maps, weight, bias)
                return made
        return self._conv_forward(maps, weight, bias)

    def _keeps_size(self) -> bool:
        """Whether the map it makes has the size of the one it reads, and zeros around it."""
        around = tuple(side // 2 for side in self.kernel_size)
        odd = all(side % 2 for side in self.kernel_size)
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        return plain and odd and self.padding == around

    def _side_by_side(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count, channels, height, width = maps.shape
        apart = width + self.kernel_size[1] // 2
        rows = F.pad(maps.permute(2, 0, 3, 1), (0, 0, 0, apart - width)).reshape(1, height, count * apart, channels)
        made = self._conv_forward(rows.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
        made = made.reshape(height, count, apart, self.out_channels)[:, :, :width]
        return made.permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)


class _FromFewInputs(torch.autograd.Function):
    """A convolution of stride 1 that keeps the size; its weights get no gradient."""

    @staticmethod
    def forward(context: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return F.conv2d(maps, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """An output's gradient goes, times a weight, to the input that the weight has met: plane by plane, shifted."""
        (weight,) = context.saved_tensors
        (outputs, inputs, tall, wide), (count, _, height, width) = weight.shape, gradient.shape
        by_place = weight.permute(2, 3, 1, 0).reshape(-1, outputs) @ gradient.permute(0, 2, 3, 1).reshape(-1, outputs).T
        planes = by_place.view(tall * wide, inputs, count, height, width)
        found = gradient.new_zeros(inputs, count, height + tall - 1, width + wide - 1)
        for place, plane in enumerate(planes):
            top, left = divmod(place, wide)
            found[:, :, top : top + height, left : left + width] += plane
        top, left = tall // 2, wide // 2
        return found[:, :, top : top + height, left : left + width].transpose(0, 1), None, None


def freeze_convolutions(network: nn.Module) -> None:
    """Make every plain convolution of ``network`` a :class:`FrozenConv2d`, in place; its weights stay the same ones.

    Left alone are subclasses, and what a hook prepares (a weight that is computed anew before every pass).
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and not module._forward_pre_hooks:
            module.__class__ = FrozenConv2d
