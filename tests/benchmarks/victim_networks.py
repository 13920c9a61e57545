"""Networks to be attacked: one that can be trained, one with a closed-form optimum, and changes of clothes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Two convolutions with batch norm, dropout and a linear layer: the parts whose state a library can disturb."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 12, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 24, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(24)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(24 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(images)))
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        return self.classifier(self.dropout(hidden.flatten(1)))


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).double().mean())


class Linear(nn.Module):
    """Logits W x + b: every attack's optimum has a closed form."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


class Shifted(nn.Module):
    """The same network with every logit shifted: same softmax, same decision."""

    def __init__(self, network: nn.Module, shift: float):
        super().__init__()
        self.network, self.shift = network, shift

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + self.shift


class LogSoftmax(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).log_softmax(1)
