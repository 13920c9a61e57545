"""A twin's convolutions, whose weights nobody trains: torch's sums up to their order, and less to pay on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Weights from this number on outgrow a core's cache; torch reads them anew for every map of at most so many pixels.
#: Measured with 512 x 512 x 3 x 3 on maps of 4 x 4 (the last layers of a ResNet-18 on 32 x 32 images, three quarters of
#: its weights), forward and back: side by side they take 0.45 to 0.65 of the time in bfloat16, 0.71 to 0.92 in float32;
#: 256 x 256 gains a tenth in float32 and nothing that can be told from noise in bfloat16.
HEAVY, SMALL = 1_000_000, 16
#: Outputs per input of a convolution from which on its gradient to the inputs is cheaper as a matrix product, if not
#: more than SPREAD times as many numbers come of it as go in. Measured from 1 to 16 and from 3 to 64 channels, 3 x 3.
SPREADING, SPREAD = 16, 2
_Rounded = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class FrozenConv2d(nn.Conv2d):
    """A convolution like any other, of a network that is only attacked. Made by :func:`freeze_convolutions`.

    - Small maps under heavy weights are laid side by side into one wide map, with columns of zeros between them.
    - From few inputs to many outputs (a first layer), the gradient to the inputs is one matrix product, float32 only.
    - Its weights are rounded to bfloat16 once (:meth:`round_once`), where autocast rounds them in every pass.

    All of it with the weights that it was frozen with: of others, put in their place for a pass, nothing is assumed.
    """

    _scl_rounded: _Rounded | None = None

    def round_once(self) -> None:
        """Keep float32 weights in bfloat16 too, for passes under autocast."""
        if self.weight.dtype is torch.float32:
            bias = None if self.bias is None else self.bias.detach().to(torch.bfloat16)
            self._scl_rounded = self.weight, self.bias, self.weight.detach().to(torch.bfloat16), bias

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W'), as :class:`torch.nn.Conv2d`."""
        weight, bias = self._weights(input)
        if input.device.type == "cpu" and input.dim() == 4 and self._keeps_size(weight):
            pixels, places = input.shape[2] * input.shape[3], weight.shape[2] * weight.shape[3]
            if weight.numel() >= HEAVY and places > 1 and pixels <= SMALL and len(input) > 1:
                return self._side_by_side(input, weight, bias)
            if _spreads(weight) and _only_slopes_to(input, weight, bias):
                made: Tensor = _FromFewInputs.apply(input, weight, bias)
                return made
        return self._conv_forward(input, weight, bias)

    def _weights(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of this pass: the rounded ones where autocast would round the ones that they were made of."""
        if self._scl_rounded is not None and _lowered(input):
            weight, bias, rounded, rounded_bias = self._scl_rounded
            if weight is self.weight and bias is self.bias and rounded.device == input.device:
                return rounded, rounded_bias
        return self.weight, self.bias

    def _keeps_size(self, weight: Tensor) -> bool:
        """Whether the map it makes has the size of the one it reads, and zeros around it."""
        sides = tuple(weight.shape[2:])
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        return plain and all(side % 2 for side in sides) and self.padding == tuple(side // 2 for side in sides)

    def _side_by_side(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count, channels, height, width = maps.shape
        apart = width + weight.shape[3] // 2
        rows = F.pad(maps.permute(2, 0, 3, 1), (0, 0, 0, apart - width)).reshape(1, height, count * apart, channels)
        made = self._conv_forward(rows.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
        made = made.reshape(height, count, apart, len(weight))[:, :, :width]
        return made.permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)


def _lowered(input: Tensor) -> bool:
    """Whether autocast takes it down to bfloat16; double and complex numbers it leaves alone."""
    device = input.device.type
    lower = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
    return lower and input.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _spreads(weight: Tensor) -> bool:
    return len(weight) >= SPREADING * weight.shape[1] and weight[0].numel() <= SPREAD * len(weight)


def _only_slopes_to(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient is wanted for ``input`` alone, and in float32."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    whole = input.dtype == torch.float32 == weight.dtype and not torch.is_autocast_enabled("cpu")
    return input.requires_grad and frozen and whole


class _FromFewInputs(torch.autograd.Function):
    """A convolution of stride 1 that keeps the size; its weights want no gradient."""

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

    Left alone are subclasses, and what a hook of its own prepares (a weight that is computed before every pass).
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and not module._forward_pre_hooks:
            module.__class__ = FrozenConv2d
