"""Networks and data sets of somebody else's, as they are named on the command line: ``foreign_modules:LeNet``."""

import numpy as np
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models.resnet import BasicBlock


class LeNet(nn.Module):
    def __init__(self, num_classes=10, hidden=16):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * 36, hidden)
        self.out = nn.Linear(hidden, num_classes)

    def forward(self, images):
        maps = self.norm(self.conv(images)).relu().flatten(1)
        return self.out(self.hidden(maps).relu())


class Encoder(nn.Module):
    feature_dim = 64

    def forward(self, images):
        return images.flatten(1)


def broken():
    raise RuntimeError("no such thing")


def number():
    return 3


def advertorch_lenet5():
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 49, 200), nn.ReLU(), nn.Linear(200, 10)),
    )


class Lenet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.linear1, self.linear2 = nn.Linear(64 * 49, 200), nn.Linear(200, 10)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images):
        maps = self.pool(self.conv2(self.pool(self.conv1(images).relu())).relu())
        return self.linear2(self.linear1(maps.flatten(1)).relu())


def conv_small(image_shape, padding=1):
    channels, side, _ = image_shape
    for _ in range(2):
        side = (side + 2 * padding - 4) // 2 + 1
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 4, 2, padding), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, padding), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * side * side, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


class OptionA(nn.Module):
    """The shortcut of He et al. 2016 for CIFAR: every other pixel, new channels zero."""

    def forward(self, images):
        extra = images.shape[1] // 2
        return nn.functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))


class ResNet32(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stage(16, 16, 1), _stage(16, 32, 2), _stage(32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images):
        maps = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(images)).relu())))
        return self.linear(maps.mean((2, 3)))


def _stage(channels, out, stride):
    first = BasicBlock(channels, out, stride, OptionA() if stride > 1 else None)
    return nn.Sequential(first, *(BasicBlock(out, out) for _ in range(4)))


def digits(start=1400):
    """(images, labels, classes), floats (N, 1, 8, 8) in [0, 1] as torch users have them."""
    bunch = load_digits()
    images = np.round(bunch.images * 255 / 16)[start:, None] / 255
    return images.astype(np.float32), bunch.target[start:], [str(k) for k in range(10)]


def both_splits(split):
    images, labels, classes = digits(0)
    part = slice(0, 1400) if split == "train" else slice(1400, None)
    return images[part], labels[part], classes


class Scans:
    flip = False
    budgets = {"linf": "0.2"}  # noqa: RUF012

    def load(self, split, root):
        from scl_defense.types import ImageArrays

        images, labels, classes = both_splits(split)
        return ImageArrays((images * 255).round().astype(np.uint8).transpose(0, 2, 3, 1), labels, tuple(classes))
