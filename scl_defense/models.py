"""The network every trainer trains: normalisation -> encoder -> projector (contrastive) and classifier (logits)."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.errors import ComponentError


class Normalize(nn.Module):
    """(images - mean) / std per channel, as the first layer; mean and std travel in the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std) or any(not value > 0 for value in std):
            raise ComponentError(f"normalisation needs as many stds > 0 as means, not mean={mean} std={std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Network(nn.Module):
    """Encoder and heads. ``network(images)`` gives the logits, so a network is also the classifier to be attacked.

    encoder: (N, C, H, W) -> (N, D), with ``feature_dim`` = D. projection: ``(hidden, ..., out)`` widths of the MLP
    that the contrastive loss sees, or ``()`` for none (then ``embed`` gives the features).

    ``dual=True`` gives the encoder's batch-norm layers a second set of weights and statistics for clean images (Xie et
    al. 2020, AdvProp; ACL): the encoder as it stands holds the *adversarial* branch, which is attacked, evaluated and
    exported; ``with network.branch("clean")`` puts the other one in its place.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        projection: Sequence[int] = (),
        dual: bool = False,
    ):
        super().__init__()
        width = getattr(encoder, "feature_dim", None)
        if not isinstance(width, int) or width < 1:
            raise ComponentError(f"encoder {type(encoder).__name__} has no feature_dim (a positive integer)")
        self.normalize = Normalize(mean, std)
        self.encoder = encoder
        layers: list[nn.Module] = []
        before = width
        for size in projection:
            layers += [nn.Linear(before, size), nn.ReLU()]
            before = size
        self.projector = nn.Sequential(*layers[:-1])  # no ReLU after the last; empty: the identity
        self.classifier = nn.Linear(width, num_classes)
        # The clean branch lies outside the encoder, whose own state is thus a plain network's: nothing to convert.
        self.clean_norms = nn.ModuleDict()
        if dual:
            norms = (nn.modules.batchnorm._BatchNorm,)
            self.clean_norms.update({
                name.replace(".", "/"): copy.deepcopy(part)
                for name, part in encoder.named_modules()
                if isinstance(part, norms)
            })  # fmt: skip

    @property
    def branches(self) -> tuple[str, ...]:
        """The batch-norm branches: ``("adv", "clean")``, or ``("adv",)`` when there is one set for all images."""
        return ("adv", "clean") if len(self.clean_norms) else ("adv",)

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Inside, the encoder uses the batch-norm branch ``adv`` or ``clean`` (the same when there is only one)."""
        if name not in ("adv", "clean"):
            raise ComponentError(f"there is no batch-norm branch '{name}'; it is adv or clean")
        kept: list[tuple[nn.Module, str, nn.Module | None]] = []
        for path, clean in self.clean_norms.items() if name == "clean" else ():
            parent, _, last = path.replace("/", ".").rpartition(".")
            owner = self.encoder.get_submodule(parent)
            kept.append((owner, last, owner._modules[last]))
            owner._modules[last] = clean
        try:
            yield
        finally:
            for owner, last, norm in kept:
                owner._modules[last] = norm

    @property
    def num_classes(self) -> int:
        return self.classifier.out_features

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, D)."""
        features: Tensor = self.encoder(self.normalize(images))
        return features

    def embed(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> the space of the contrastive loss, not normalised."""
        embedded: Tensor = self.projector(self.features(images))
        return embedded

    def logits(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, K)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)


def to_channels_last(network: Network, sample: Tensor) -> bool:
    """Lay the convolutions' weights out channels-last, in place, which is what processors and cards compute fastest.

    Only the order in memory changes, not a value. An encoder that cannot work with it (``view`` of a feature map) or
    computes something else then is left as it is. sample: (N, C, H, W) in [0, 1]. Returns whether it was done.
    """
    trial = copy.deepcopy(network).eval()
    with torch.no_grad():
        expected = trial.logits(sample)
        try:
            found = trial.to(memory_format=torch.channels_last).logits(sample)
            trial.train().logits(sample)
        except RuntimeError:
            return False
    scale = expected.abs().amax().clamp(min=1e-6)
    if found.shape != expected.shape or not bool(((found - expected).abs() <= 1e-3 * scale).all()):
        return False
    network.to(memory_format=torch.channels_last)
    return True


class Twin:
    """A weight-averaged copy of a network (mean teacher; Tarvainen & Valpola 2017).

    The momentum is warmed up, ``min(momentum, (1 + t) / (10 + t))``: in a short run a fixed 0.99 would leave the
    twin near its random start. Its batch-norm statistics are its own, measured by its own forward passes
    (``statistics="own"``), or averaged like the weights (``"averaged"``: it costs no pass).
    """

    def __init__(self, network: Network, momentum: float, statistics: str = "own"):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.momentum, self.statistics = momentum, statistics
        self.updates = 0

    @torch.no_grad()
    def update(self, network: Network, images: Tensor) -> None:
        """After an optimizer step: average the weights; own statistics see ``images`` (N, C, H, W) in train mode."""
        momentum = min(self.momentum, (1 + self.updates) / (10 + self.updates))
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 1 - momentum)
        self.updates += 1
        if self.statistics == "averaged":
            for kept, seen in zip(self.network.buffers(), network.buffers(), strict=True):
                if kept.is_floating_point():
                    kept.lerp_(seen, 1 - momentum)
                else:
                    kept.copy_(seen)
            return
        self.network.train()
        for branch in self.network.branches:
            with self.network.branch(branch):
                self.network.embed(images)
        self.network.eval()

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.updates = state["updates"]
