"""Attacks of Foolbox 3 (Rauber et al. 2020), with its own parameters unless an option says otherwise."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scl_defense import ThreatModel
from scl_defense.libraries import attempt, imported
from scl_defense.types import Field, component

Steps = Annotated[int, Field(ge=1, le=100_000, description="gradient steps")]
Searches = Annotated[int, Field(ge=1, le=100, description="values of c tried, each from scratch")]


def _run(
    attack: Any, classifier: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator, eps: float | None
) -> Tensor:
    """Without eps the nearest example; with it the example at that radius."""
    foolbox = imported("foolbox", "foolbox")

    def call(network: nn.Module, given: Tensor, truth: Tensor) -> Tensor:
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device=given.device)
        criterion = foolbox.criteria.Misclassification(truth)
        return attack.run(model, given, criterion) if eps is None else attack.run(model, given, criterion, epsilon=eps)

    return attempt(call, classifier, images, labels, rng)


@component
class FGSM:
    """Fast gradient sign method (Goodfellow, Shlens & Szegedy 2015): ``LinfFastGradientAttack``."""

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "foolbox"
    family: ClassVar[str] = "fgsm"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the Linf ball, shaped as ``images``."""
        if threat.radius == 0:
            return images.clone()
        attack = imported("foolbox", "foolbox").attacks.LinfFastGradientAttack()
        return _run(attack, classifier, images, labels, rng, threat.radius)


@component
class PGD:
    """Projected gradient descent on cross-entropy (Madry et al. 2018): ``LinfPGD`` and ``L2PGD``."""

    steps: Steps = 20
    rel_step: Annotated[float, Field(gt=0, le=100, description="length of a step in units of eps")] = 0.25
    random_start: Annotated[bool, Field(description="start at a random point of the ball, else at the image")] = True

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "foolbox"
    family: ClassVar[str] = "pgd"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        if threat.radius == 0:
            return images.clone()
        attacks = imported("foolbox", "foolbox").attacks
        kind = attacks.LinfPGD if threat.norm == "linf" else attacks.L2PGD
        attack = kind(rel_stepsize=self.rel_step, steps=self.steps, random_start=self.random_start)
        return _run(attack, classifier, images, labels, rng, threat.radius)


@component
class CW:
    """Carlini & Wagner's L2 attack (2017) with a binary search over c: ``L2CarliniWagnerAttack``."""

    binary_search_steps: Searches = 9
    steps: Steps = 1000

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "foolbox"
    family: ClassVar[str] = "cw"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; ``threat`` bounds nothing."""
        attacks = imported("foolbox", "foolbox").attacks
        attack = attacks.L2CarliniWagnerAttack(binary_search_steps=self.binary_search_steps, steps=self.steps)
        return _run(attack, classifier, images, labels, rng, None)


@component
class DeepFool:
    """DeepFool (Moosavi-Dezfooli et al. 2016): ``L2DeepFoolAttack``."""

    steps: Steps = 50

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "foolbox"
    family: ClassVar[str] = "deepfool"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; ``threat`` bounds nothing."""
        attack = imported("foolbox", "foolbox").attacks.L2DeepFoolAttack(steps=self.steps)
        return _run(attack, classifier, images, labels, rng, None)


@component
class EAD:
    """Elastic-net attack (Chen et al. 2018) with the L1 decision rule: ``EADAttack``."""

    binary_search_steps: Searches = 9
    steps: Steps = 1000

    norms: ClassVar[frozenset[str]] = frozenset({"l1"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "foolbox"
    family: ClassVar[str] = "ead"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; ``threat`` bounds nothing."""
        settings = {"binary_search_steps": self.binary_search_steps, "steps": self.steps, "decision_rule": "L1"}
        attack = imported("foolbox", "foolbox").attacks.EADAttack(**settings)
        return _run(attack, classifier, images, labels, rng, None)
