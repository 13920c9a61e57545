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


class Wrapped(nn.Module):
    """A network with something around it: the cheats of the zoo, each one class, and its honest twin inside."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


class Quantised(Wrapped):
    """Pixels rounded to 16 levels: the gradient of ``round`` is zero."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * 15).round() / 15)


class StraightThrough(Wrapped):
    """The same, with a made-up gradient of one."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images + ((images * 15).round() / 15 - images).detach())


class JpegLike(Wrapped):
    """4x4 blocks in a cosine basis, their coefficients rounded to 1/8, as in JPEG's quantisation."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        place = torch.arange(4.0)
        basis = torch.cos(torch.pi / 4 * (place[None, :] + 0.5) * place[:, None]) * (0.5**0.5)
        basis[0] = 0.5
        self.register_buffer("basis", basis)

    def forward(self, images: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        blocks = images.reshape(n, channels, height // 4, 4, width // 4, 4).permute(0, 1, 2, 4, 3, 5)
        coefficients = ((self.basis @ blocks @ self.basis.T) * 8).round() / 8
        blocks = (self.basis.T @ coefficients @ self.basis).permute(0, 1, 2, 4, 3, 5)
        return self.network(blocks.reshape(images.shape))


class Softmaxed(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(1)


class Scaled(Wrapped):
    """Logits times a factor: the same decisions."""

    def __init__(self, network: nn.Module, factor: float):
        super().__init__(network)
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) * self.factor


class NoisyInput(Wrapped):
    def __init__(self, network: nn.Module, size: float):
        super().__init__(network)
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images + self.size * torch.randn_like(images))


class Detached(Wrapped):
    """No gradient reaches the images."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.detach()) + 0 * images.flatten(1).sum(1, keepdim=True)


class WrongGradient(Wrapped):
    """The right value, and the gradient of the mirrored image."""

    def forward(self, images: Tensor) -> Tensor:
        mirrored = self.network(images.flip(3))
        return mirrored + (self.network(images) - mirrored).detach()


class Misprepared(Wrapped):
    """Reads pixels in [0, 1] as if they were 0 to 255."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images / 255)


class Permuted(Wrapped):
    """The classes in another order than the data's."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).roll(1, dims=1)


class BatchStatistics(Wrapped):
    """Standardised by the statistics of the batch, in eval mode too."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return F.batch_norm(logits, None, None, training=True)


class AlwaysTraining(Wrapped):
    """``eval()`` does not reach it: dropout stays on."""

    def train(self, mode: bool = True) -> "AlwaysTraining":
        return super().train(True)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class NotANumber(Wrapped):
    """NaN where the first pixel, black in every digit, is not black, in images that are dark on the whole."""

    def forward(self, images: Tensor) -> Tensor:
        dark = images.mean((1, 2, 3))[:, None] < 0.3
        return torch.where(dark & (images[:, :1, 0, 0] > 0.05), torch.nan, self.network(images))


class Counting(Wrapped):
    """Writes into a buffer at every question."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.asked += 1
        return self.network(images)


class Purifying(Wrapped):
    """Improves the image by one gradient step before it answers."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.network(moved).logsumexp(1).sum(), moved)
        return self.network(images + 0.01 * gradient.sign())


class Halves(Wrapped):
    """Honest, with two classes: digits below five, and the others."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return torch.stack([logits[:, :5].logsumexp(1), logits[:, 5:].logsumexp(1)], dim=1)


class Narrow(Wrapped):
    """Honest, for images 8 high and 6 wide: the columns that digits leave empty are put back."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(F.pad(images, (1, 1)))


class Grey(Wrapped):
    """Honest, for three channels: their mean."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.mean(1, keepdim=True))
