"""Convolutions written as other convolutions: the same sums, in shapes that a processor's vectors are full of.

Weights are (K, C, H, W) and maps (N, C, H, W), channels-last throughout: neighbours in a row lie side by side in
memory, each with all its channels, so that a row of pixels is read as a row of half as many pixels with twice the
channels without moving a number.
"""

import torch
from torch import Tensor

#: Outputs of a convolution that are computed together at least: the numbers in a vector of the widest kind.
TOGETHER = 16


def abreast(outputs: int, width: int) -> int:
    """How many neighbours of a row are worth computing as outputs of one place: 4, 2, or 1 for none.

    Measured with 1 to 16 outputs, maps of 16 to 32 pixels a side and 3 x 3 weights on AVX-512: 8 outputs take 0.65 to
    0.9 of the time in float32 and 0.4 to 0.8 in bfloat16; with eight and more neighbours nothing more was gained.
    """
    return next((count for count in (4, 2) if outputs * count <= TOGETHER and width % count == 0 < width - count), 1)


def widened(weight: Tensor, count: int) -> Tensor:
    """(K, C, H, W) -> (count * K, C, H, W + count - 1): ``count`` neighbours at once, with that stride along a row.

    The outputs of a neighbour are the weights again, moved on by one place; what they do not reach is zero.
    """
    outputs, inputs, tall, wide = weight.shape
    made = weight.new_zeros(count, outputs, inputs, tall, wide + count - 1)
    for place in range(count):
        made[place, ..., place : place + wide] = weight
    return made.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def gathered(maps: Tensor, count: int) -> Tensor:
    """(N, C, H, W) -> (N, count * C, H, W / count): neighbours of a row as one place's channels, nothing is moved."""
    total, channels, height, width = maps.shape
    rows = maps.permute(0, 2, 3, 1).reshape(total, height, width // count, count * channels)
    return rows.permute(0, 3, 1, 2)


def spread(maps: Tensor, count: int) -> Tensor:
    """The way back from :func:`gathered`: (N, count * C, H, W) -> (N, C, H, count * W)."""
    total, channels, height, width = maps.shape
    return maps.permute(0, 2, 3, 1).reshape(total, height, count * width, channels // count).permute(0, 3, 1, 2)


def turned(weight: Tensor) -> Tensor:
    """(K, C, H, W) -> (C, K, H, W): with it, a convolution of stride 1 takes a gradient back to its inputs."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def by_parity(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (4 * C, K, 2, 2): the same for stride 2 and padding 1.

    Four convolutions in one, for inputs in even and odd rows and columns: 2a + p gets what output a + d has of weight
    1 + p - 2d, for d in {0, 1}. Its output, with padding 1 and the first row and column cut off, is for
    :func:`interleaved`.
    """
    outputs, inputs = weight.shape[:2]
    made = weight.new_zeros(2, 2, inputs, outputs, 2, 2)
    places = [(p, d, 1 + p - 2 * d) for p in (0, 1) for d in (0, 1) if 1 + p - 2 * d >= 0]
    for row, down, tall in places:
        for column, right, wide in places:
            made[row, column, :, :, down, right] = weight[:, :, tall, wide].T
    return made.reshape(4 * inputs, outputs, 2, 2).contiguous(memory_format=torch.channels_last)


def interleaved(planes: Tensor, height: int, width: int) -> Tensor:
    """(N, 4 * C, H, W) of :func:`by_parity` -> (N, C, height, width), height in {2H - 1, 2H} and width alike."""
    total, channels, rows, columns = planes.shape
    apart = planes.permute(0, 2, 3, 1).reshape(total, rows, columns, 2, 2, channels // 4)
    whole = apart.transpose(2, 3).reshape(total, 2 * rows, 2 * columns, channels // 4)
    return whole[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
