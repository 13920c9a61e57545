"""Attacks of adversarial-library (Rony et al.), with its own parameters unless an option says otherwise."""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scl_defense import ThreatModel
from scl_defense.libraries import attempt, imported
from scl_defense.types import Field, component

Steps = Annotated[int, Field(ge=1, le=100_000, description="gradient steps")]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


def _run(
    name: str, classifier: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator, **settings: Any
) -> Tensor:
    attack = getattr(imported("adv_lib.attacks", "adv-lib"), name)
    return attempt(lambda *given: attack(*given, **settings), classifier, images, labels, rng)


@component
class CW:
    """Carlini & Wagner's L2 attack (2017) with a binary search over c: ``carlini_wagner_l2``."""

    binary_search_steps: Annotated[int, Field(ge=1, le=100, description="values of c tried")] = 9
    steps: Steps = 1000

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "advlib"
    family: ClassVar[str] = "cw"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; ``threat`` bounds nothing."""
        settings = {"binary_search_steps": self.binary_search_steps, "max_iterations": self.steps}
        return _run("carlini_wagner_l2", classifier, images, labels, rng, **settings)


@component
class DDN:
    """Decoupled direction and norm (Rony et al. 2019): ``ddn``, without its quantisation."""

    steps: Steps = 300

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "advlib"
    family: ClassVar[str] = "ddn"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; ``threat`` bounds nothing."""
        return _run("ddn", classifier, images, labels, rng, steps=self.steps, levels=None)


@component
class DeepFool:
    """DeepFool (Moosavi-Dezfooli et al. 2016): ``df``."""

    steps: Steps = 100

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "advlib"
    family: ClassVar[str] = "deepfool"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; ``threat`` bounds nothing."""
        return _run("df", classifier, images, labels, rng, steps=self.steps)


@component
class FMN:
    """Fast minimum norm (Pintor et al. 2021): ``fmn``."""

    steps: Steps = 300

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "advlib"
    family: ClassVar[str] = "fmn"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; of ``threat`` the norm is used."""
        return _run("fmn", classifier, images, labels, rng, norm=ORDER[threat.norm], steps=self.steps)


@component
class FAB:
    """Fast adaptive boundary attack (Croce & Hein 2020): ``fab``, untargeted."""

    steps: Steps = 100

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "advlib"
    family: ClassVar[str] = "fab"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; of ``threat`` the norm is used."""
        return _run("fab", classifier, images, labels, rng, norm=ORDER[threat.norm], n_iter=self.steps)


@component
class APGDL1:
    """Auto-PGD in the L1 ball (Croce & Hein 2021): ``apgd`` with larger radii first."""

    steps: Steps = 100
    loss: Annotated[Literal["ce", "dlr"], Field(description="loss to be maximised")] = "ce"

    norms: ClassVar[frozenset[str]] = frozenset({"l1"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "advlib"
    family: ClassVar[str] = "apgd-l1"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the L1 ball, shaped as ``images``."""
        if threat.radius == 0:
            return images.clone()
        settings = {"n_iter": self.steps, "loss_function": self.loss, "use_large_reps": True}
        made = _run("apgd", classifier, images, labels, rng, eps=threat.radius, norm=1, **settings)
        return threat.project(images, made)  # its sums exceed the radius by a few 1e-7


@component
class SigmaZero:
    """Sigma-zero (Cina et al. 2024): ``sigma_zero``; it counts channels, the evaluation pixels."""

    steps: Steps = 1000

    norms: ClassVar[frozenset[str]] = frozenset({"l0"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "advlib"
    family: ClassVar[str] = "sigma-zero"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success; ``threat`` bounds nothing."""
        return _run("sigma_zero", classifier, images, labels, rng, num_steps=self.steps)
