"""Wide ResNet (Zagoruyko & Komodakis 2016): WRN-28-10, WRN-34-10 and their kin."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from scl_defense.types import Field, component
from scl_defense_plugins.models._common import check_shape, initialise


def _checked_depth(depth: int) -> int:
    if depth < 10 or (depth - 4) % 6:
        nearest = max(10, 6 * round((depth - 4) / 6) + 4)
        raise ValueError(f"depth must be 6 n + 4, from 10 on: 10, 16, 22, 28, 34, ...; the nearest is {nearest}")
    return depth


@component
class WideResNet:
    """WRN-depth-widen with (depth - 4) / 6 blocks in each of three stages. The names in the state dict are those of
    TRADES (Zhang et al. 2019), without ``fc``.
    """

    depth: Annotated[int, AfterValidator(_checked_depth), Field(description="layers: 6 n + 4, such as 28 or 34")] = 28
    widen: Annotated[int, Field(ge=1, le=64, description="factor on the widths 16, 32, 64")] = 10
    dropout: Annotated[float, Field(ge=0, lt=1, description="probability of dropout inside a block")] = 0.0

    def __call__(self, image_shape: tuple[int, int, int]) -> nn.Module:
        channels = check_shape("wide-resnet", image_shape, smallest=8)
        return WideResNetEncoder(channels, (self.depth - 4) // 6, self.widen, self.dropout)


class WideBlock(nn.Module):
    """conv2(drop(relu(bn2(conv1(r))))) + shortcut with r = relu(bn1(x)); a changing shortcut starts from r."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None
        self.dropout = dropout

    def forward(self, images: Tensor) -> Tensor:
        ready = F.relu(self.bn1(images))
        kept = images if self.convShortcut is None else self.convShortcut(ready)
        inner = F.dropout(F.relu(self.bn2(self.conv1(ready))), self.dropout, self.training)
        return self.conv2(inner) + kept


class WideStage(nn.Module):
    """``blocks`` blocks, the first of which changes width and resolution."""

    def __init__(self, blocks: int, channels: int, out: int, stride: int, dropout: float):
        super().__init__()
        first = WideBlock(channels, out, stride, dropout)
        self.layer = nn.Sequential(first, *(WideBlock(out, out, 1, dropout) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


class WideResNetEncoder(nn.Module):
    """(N, C, H, W) -> (N, 64 * widen)."""

    def __init__(self, channels: int, blocks: int, widen: int, dropout: float):
        super().__init__()
        self.feature_dim = 64 * widen
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(blocks, 16, 16 * widen, 1, dropout)
        self.block2 = WideStage(blocks, 16 * widen, 32 * widen, 2, dropout)
        self.block3 = WideStage(blocks, 32 * widen, 64 * widen, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(images))))
        return F.relu(self.bn1(out)).mean(dim=(2, 3))
