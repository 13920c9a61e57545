"""A small convolutional encoder for a laptop's CPU."""

from typing import Annotated

from torch import Tensor, nn

from scl_defense.types import Field, component
from scl_defense_plugins.models._common import check_shape, initialise


@component
class SmallCNN:
    """Four 3 x 3 convolutions with batch norm and ReLU (widths w, 2w, 4w, 8w; the second and third halve the sides),
    then the mean over all places. Images from 8 x 8; 97,392 parameters at width 16 with one channel.
    """

    width: Annotated[int, Field(ge=1, le=1024, description="channels of the first convolution")] = 16

    def __call__(self, image_shape: tuple[int, int, int]) -> nn.Module:
        return SmallCNNEncoder(check_shape("small-cnn", image_shape, smallest=8), self.width)


class SmallCNNEncoder(nn.Module):
    """(N, C, H, W) -> (N, 8 * width)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.feature_dim = 8 * width
        layers: list[nn.Module] = []
        for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.stages = nn.Sequential(*layers)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images).mean(dim=(2, 3))
