"""Small synthetic worlds, made from seeds: pictures, networks, and linear networks whose weakness has a closed form."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.guard import global_random_state
from scl_defense.models import Network
from scl_defense.threat import ThreatModel
from scl_defense.types import Batch

Shape = tuple[int, int, int]
CLASSES = 4
GREY, COLOUR = (1, 8, 8), (3, 12, 10)  # not square: a swapped height and width must be seen
SHAPES = (GREY, COLOUR)
LINF = ThreatModel("linf", "0.1")
THREATS = (LINF, ThreatModel("l2", "0.5"), ThreatModel("l1", "2"))
ATTACKED = (*THREATS, ThreatModel("l0", "6"))  # balls that one can attack in, if not train in


def pictures(count: int, shape: Shape, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) of 8 bits and labels (N,): a coarse pattern a class, noise, many pixels exactly 0 or 1."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand((CLASSES, shape[0], 3, 3), generator=torch.Generator().manual_seed(12345))
    patterns = F.interpolate(coarse, shape[1:], mode="bilinear", align_corners=True)
    labels = torch.arange(count) % CLASSES
    images = 0.5 + 2 * (patterns[labels] - 0.5) + 0.1 * torch.randn((count, *shape), generator=rng)
    return (images.clamp(0, 1) * 255).round() / 255, labels


def batch_of(count: int = 7, shape: Shape = GREY, *, views: int = 2, seed: int = 0, copies: bool = False) -> Batch:
    """``copies``: the same image, label and index in every place."""
    images, labels = pictures(1 if copies else count, shape, seed=seed)
    indices = torch.arange(len(images)) + 100
    if copies:
        images, labels, indices = images.repeat(count, 1, 1, 1), labels.repeat(count), indices.repeat(count)
    rng = torch.Generator().manual_seed(seed + 1)
    augmented = []
    for _ in range(views):
        jitter = 0.05 * torch.randn((1 if copies else count, *shape), generator=rng)
        augmented.append((images + jitter).clamp(0, 1))
    return Batch(torch.stack(augmented), labels, images, indices)


def shape_of(images: Tensor) -> Shape:
    channels, height, width = images.shape[1:]
    return channels, height, width


class TinyEncoder(nn.Module):
    """(N, C, H, W) -> (N, 12): convolution, batch norm, ReLU, dropout, mean over places, linear."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.feature_dim = 12
        self.conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(8 * 4, 12)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.dropout(F.relu(self.norm(self.conv(images))))
        features: Tensor = self.linear(F.adaptive_avg_pool2d(maps, 2).flatten(1))
        return features


def tiny_encoder(channels: int, *, dropout: float = 0.0, seed: int = 0) -> TinyEncoder:
    with global_random_state():
        torch.manual_seed(seed)
        return TinyEncoder(channels, dropout)


def lived_in_network(shape: Shape, *, seed: int = 0) -> Network:
    """A network with everything a component could disturb: batch norm with moved statistics, dropout, layers in both
    modes, a frozen parameter, parameters with and without a gradient.
    """
    with global_random_state():
        torch.manual_seed(seed)
        encoder = TinyEncoder(shape[0], dropout=0.3)
        network = Network(encoder, CLASSES, (0.4,) * shape[0], (0.3,) * shape[0], (10,)).train()
        encoder.norm.eval()
        encoder.norm.running_mean = 0.1 * torch.randn(8)
        encoder.norm.running_var = 0.5 + torch.rand(8)
        encoder.conv.weight.grad = torch.randn_like(encoder.conv.weight)
        network.classifier.weight.grad = torch.randn_like(network.classifier.weight)
        for name, parameter in encoder.conv.named_parameters():
            parameter.requires_grad_(name != "bias")
    return network


def saved_encoder(shape: Shape) -> nn.Module:
    """What a checkpoint of anyone's would give: another network's encoder, frozen."""
    return lived_in_network(shape, seed=1234).encoder.eval().requires_grad_(False)


class LinearEncoder(nn.Module):
    """(N, C, H, W) -> (N, D), linear in the pixels."""

    def __init__(self, pixels: int, features: int):
        super().__init__()
        self.feature_dim = features
        self.linear = nn.Linear(pixels, features, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.linear(images.flatten(1))
        return features


def linear_network(shape: Shape, classes: int, *, seed: int = 0) -> Network:
    """Logits linear in the pixels; the difference of two classes' weights has an L2 norm of about 20."""
    pixels = shape[0] * shape[1] * shape[2]
    with global_random_state():
        torch.manual_seed(seed)
        encoder = LinearEncoder(pixels, 12)
        network = Network(encoder, classes, (0.5,) * shape[0], (1.0,) * shape[0], (10,))
        nn.init.normal_(encoder.linear.weight, std=pixels**-0.5)
        nn.init.normal_(network.classifier.weight, std=4.0)
    return network.eval()


def slopes(network: Network) -> Tensor:
    """(K, C * H * W): how the logits of a linear network grow with the pixels (std is 1)."""
    encoder: Any = network.encoder
    weight: Tensor = encoder.linear.weight.detach()
    return network.classifier.weight.detach() @ weight


def margins(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} logit_j - logit_y, (N,): positive where the label is wrong."""
    with torch.no_grad():
        logits: Tensor = network(images)
    own: Tensor = logits.gather(1, labels[:, None])
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own.squeeze(1)


def two_class_problem(count: int, depth: float, *, seed: int = 0) -> tuple[Network, Tensor, Tensor]:
    """A linear network of two classes with images, all right, at an L2 distance of exactly ``depth`` from its
    decision plane and at least 0.15 from the walls of the box.
    """
    network = linear_network(GREY, 2, seed=seed)
    weight = slopes(network)[1] - slopes(network)[0]
    labels = torch.arange(count) % 2
    images = 0.5 + 0.2 * (torch.rand((count, *GREY), generator=torch.Generator().manual_seed(seed)) - 0.5)
    with torch.no_grad():
        logits = network(images)
    # Moved along the plane's normal until the signed distance is +depth (class 1) or -depth (class 0).
    signed = (logits[:, 1] - logits[:, 0]) / weight.norm()
    wanted = torch.where(labels == 1, depth, -depth)
    images = images + ((wanted - signed)[:, None] * weight / weight.norm()).view_as(images)
    return network, images, labels


def smallest_radius(norm: str, weight: Tensor, images: Tensor, labels: Tensor, distance: float) -> float:
    """The radius at which every image of :func:`two_class_problem` falls, in closed form.

    L2: the distance to the plane. Linf: by duality distance * ||w||_2 / ||w||_1. L1: the steepest pixels, each moved
    as far as the box lets it (a fractional knapsack). L0: the fewest pixels, each moved to its wall.
    """
    if norm == "l2":
        return distance
    if norm == "linf":
        return float(distance * weight.norm() / weight.abs().sum())
    largest = 0.0
    order = weight.abs().argsort(descending=True)
    for image, label in zip(images.flatten(1), labels, strict=True):
        upward = (weight > 0) == bool(label == 0)  # the direction that leaves the image's class
        room = torch.where(upward, 1 - image, image)
        if norm == "l0":
            gains = (room * weight.abs()).sort(descending=True).values.cumsum(0)
            largest = max(largest, 1.0 + int((gains <= distance * weight.norm()).sum()))
            continue
        room = room[order]
        missing, used = float(distance * weight.norm()), 0.0
        for slope, free in zip(weight.abs()[order].tolist(), room.tolist(), strict=True):
            step = min(free, missing / slope)
            used, missing = used + step, missing - step * slope
            if missing <= 1e-9:
                break
        largest = max(largest, used)
    return largest


class IdleClasses(nn.Module):
    """A network of two classes with more of them, which nothing ever reaches."""

    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        self.network, self.idle = network, classes - 2

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return torch.cat([logits, logits.amin(1, keepdim=True).expand(-1, self.idle) - 1], dim=1)
