"""A small convolutional encoder for a laptop's CPU."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.types import Field, component
from scl_defense_plugins.models._common import check_shape, initialise


@component
class SmallCNN:
    """Four 3 x 3 convolutions with batch norm and ReLU, widths w, 2w, 4w, 8w, then the means over the four quarters of
    the map. Images from 8 x 8; 97,392 parameters at width 16 with one channel, 3.1 million multiplications at 28 x 28.

    All but the first convolution halve the sides (below 16 pixels the last does not: the map would be one pixel).
    Quarters instead of one mean over all places: where a stroke lies tells digits apart, at no cost (one short
    training on MNIST: 97 % instead of 95 %, on small photographs 48 % instead of 44 %).
    """

    width: Annotated[int, Field(ge=1, le=1024, description="channels of the first convolution")] = 16

    def __call__(self, image_shape: tuple[int, int, int]) -> nn.Module:
        channels = check_shape("small-cnn", image_shape, smallest=8)
        return SmallCNNEncoder(channels, self.width, last_stride=2 if min(image_shape[1:]) >= 16 else 1)


class SmallCNNEncoder(nn.Module):
    """(N, C, H, W) -> (N, 32 * width)."""

    def __init__(self, channels: int, width: int, last_stride: int):
        super().__init__()
        self.feature_dim = 32 * width
        layers: list[nn.Module] = []
        for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, last_stride)):
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.stages = nn.Sequential(*layers)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stages(images)
        height, width = maps.shape[2:]
        # adaptive_avg_pool2d(maps, 2), whose backward pass on CUDA is not deterministic; this one is.
        window, stride = (-(-height // 2), -(-width // 2)), (height // 2, width // 2)
        return F.avg_pool2d(maps, window, stride).flatten(1)
