"""Attacks of the Adversarial Robustness Toolbox (Nicolae et al. 2018). The only file that imports ART.

Importing it takes seconds, so only an ``art:`` attack does. ART creates ``~/.art`` while being imported and would
close every logging handler of the process; the latter is prevented here. ART runs on the CPU and on CUDA.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel
from scl_defense.types import Field, component
from scl_defense_benchmarks.fields import RandomStart, RelStep, Steps
from scl_defense_benchmarks.library_guard import library_call, without_logging_setup
from scl_defense_benchmarks.shims import LibraryNetwork, UnitGradient, off_the_walls, smallest_success

with without_logging_setup("art"):
    from art.attacks.evasion import CarliniL2Method, FastGradientMethod, ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

_NORMS = {"linf": np.inf, "l2": 2}


def _call(
    build: Callable[[PyTorchClassifier], Any],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    rng: torch.Generator,
    shim: type[LibraryNetwork] = UnitGradient,
) -> Tensor:
    device = images.device
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"ART runs on cpu and cuda, not on {device.type}; use --device cpu or another attack")
    with library_call(classifier, rng=rng), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        network = shim(classifier, device).eval()
        with torch.no_grad():
            classes = network(images[:1]).shape[1]
        estimator = PyTorchClassifier(
            network,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )
        one_hot = torch.nn.functional.one_hot(labels.long(), classes).float()
        made = build(estimator).generate(images.float().cpu().contiguous().numpy(), one_hot.cpu().numpy())
        return torch.from_numpy(np.asarray(made, dtype=np.float32)).to(device)


@component
class FGSM:
    """Fast gradient sign method: x + eps sign(grad CE) (Goodfellow, Shlens & Szegedy 2015): FastGradientMethod."""

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "fgsm"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the Linf ball, shaped as ``images``."""
        if threat.radius == 0 or len(images) == 0:  # ART refuses a step of length 0
            return images.clone()
        settings = {"norm": np.inf, "eps": threat.radius, "batch_size": len(images)}
        return _call(lambda net: FastGradientMethod(net, **settings), classifier, images, labels, rng)


@component
class PGD:
    """Projected gradient descent on cross-entropy (Madry et al. 2018): ProjectedGradientDescent."""

    steps: Steps = 20
    rel_step: RelStep = 0.25
    random_start: RandomStart = True

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "pgd"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        if threat.radius == 0 or len(images) == 0:
            return images.clone()
        settings = {
            "norm": _NORMS[threat.norm],
            "eps": threat.radius,
            "eps_step": self.rel_step * threat.radius,
            "max_iter": self.steps,
            "num_random_init": int(self.random_start),
            "batch_size": len(images),
            "verbose": False,
        }
        return _call(lambda net: ProjectedGradientDescent(net, **settings), classifier, images, labels, rng)


@component
class CW:
    """Carlini & Wagner's L2 attack (2017) with a binary search over c and a line search per step: CarliniL2Method.

    Five doublings from c = 0.1 end at 1.6, too little where margins are large; from 1 they reach 16.
    """

    binary_search_steps: Annotated[int, Field(ge=1, le=100, description="values of c tried, each from scratch")] = 5
    steps: Steps = 50
    initial_c: Annotated[float, Field(gt=0, allow_inf_nan=False, description="first weight of the margin")] = 1.0
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="first step length, in tanh space")] = 0.01

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "cw"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success, or the image where there is none.

        ``threat`` bounds nothing here: the distance is measured by the evaluation.
        """
        if len(images) == 0:
            return images.clone()
        settings = {
            "binary_search_steps": self.binary_search_steps,
            "max_iter": self.steps,
            "initial_const": self.initial_c,
            "learning_rate": self.lr,
            "batch_size": len(images),
            "verbose": False,
        }
        start = off_the_walls(images)
        found = _call(lambda net: CarliniL2Method(net, **settings), classifier, start, labels, rng, shim=LibraryNetwork)
        return smallest_success(classifier, images, labels, [found])
