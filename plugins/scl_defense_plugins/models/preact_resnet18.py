"""Pre-activation ResNet-18 (He et al. 2016b), the usual network of fast adversarial training (Rice et al. 2020)."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.types import Field, component
from scl_defense_plugins.models._common import check_shape, initialise


@component
class PreActResNet18:
    """Stem of one 3 x 3 convolution; batch norm and ReLU before each convolution and once more at the end."""

    width: Annotated[int, Field(ge=1, le=1024, description="channels of the first stage")] = 64

    def __call__(self, image_shape: tuple[int, int, int]) -> nn.Module:
        return PreActResNet18Encoder(check_shape("preact-resnet18", image_shape, smallest=8), self.width)


class PreActBlock(nn.Module):
    """conv2(relu(bn2(conv1(r)))) + shortcut with r = relu(bn1(x)); a changing shortcut starts from r, else from x."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False)) if stride != 1 or channels != out else None
        )

    def forward(self, images: Tensor) -> Tensor:
        ready = F.relu(self.bn1(images))
        kept = images if self.shortcut is None else self.shortcut(ready)
        return self.conv2(F.relu(self.bn2(self.conv1(ready)))) + kept


class PreActResNet18Encoder(nn.Module):
    """(N, C, H, W) -> (N, 8 * width)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.feature_dim = 8 * width
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return F.relu(self.bn(out)).mean(dim=(2, 3))


def _stage(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(PreActBlock(channels, out, stride), PreActBlock(out, out, 1))
