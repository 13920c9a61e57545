"""ResNet-18 (He et al. 2016), with the stem for small images or the original one."""

from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.types import Field, component
from scl_defense_plugins.models._common import check_shape, initialise


@component
class ResNet18:
    """stem ``cifar``: one 3 x 3 convolution, no pooling, as everywhere in the robustness literature on 32 x 32.
    stem ``imagenet``: 7 x 7 with stride 2 and max pooling; at width 64 this is torchvision's ``resnet18`` without
    ``fc``, with the same names in its state dict.
    """

    width: Annotated[int, Field(ge=1, le=1024, description="channels of the first stage")] = 64
    stem: Annotated[
        Literal["cifar", "imagenet"], Field(description="first layers: for 32x32 or for 224x224 images")
    ] = "cifar"

    def __call__(self, image_shape: tuple[int, int, int]) -> nn.Module:
        channels = check_shape("resnet18", image_shape, smallest=8 if self.stem == "cifar" else 32)
        return ResNet18Encoder(channels, self.width, self.stem)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else nn.Sequential()
        )

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.downsample(images) + self.bn2(self.conv2(out)))


class ResNet18Encoder(nn.Module):
    """(N, C, H, W) -> (N, 8 * width)."""

    def __init__(self, channels: int, width: int, stem: str):
        super().__init__()
        self.feature_dim = 8 * width
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(out)))).mean(dim=(2, 3))


def _stage(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(channels, out, stride), BasicBlock(out, out, 1))
